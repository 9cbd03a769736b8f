"""Pictures of what focal attention looks at, drawn over the image; the numbers come from attention.py.

Tokens are drawn at their own size: a fine one of the first stage is 4 x 4 pixels, one that was pooled from a
window 28 x 28. What a query does not see is dark.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .attention import AROUND, OWN_WINDOW, BlockAttention, Grain, TokenMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {OWN_WINDOW: "#d55e00", AROUND: "#f0e442"}  # Okabe and Ito's, told apart by the colour-blind
POOLED_COLOURS = ("#0072b2", "#009e73")
MARK = "#ffffff"
TINT = 0.45  # opacity of a colour over the image
DARK = 0.3  # brightness of what is not seen
PANEL = 2.3  # inches
DPI = 110
HEADS_ACROSS = 6


def new_figure(
    down: int, across: int, title: str, panel: float = PANEL, legend: float = 0.0
) -> tuple["Figure", np.ndarray]:
    """A figure of panels without axes, [down, across]; sides of a panel and height of a legend in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the pictures need matplotlib: pip install matplotlib") from error
    height = (panel + 0.25) * down + 0.35 + legend  # with titles
    figure = Figure(figsize=(max(panel * across, 2 * PANEL), height), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    panels = figure.subplots(down, across, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    return figure, panels


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG file of 256 colours, a third as large as one of all colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    picture = Image.open(drawn).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)


def at_pixels(cells: Tensor, stride: int, size: tuple[int, int], fill: float = -1) -> np.ndarray:
    """Values of a stage's map [H, W] at the pixels of an image of `size`; `fill` beyond the map."""
    large = cells.repeat_interleave(stride, 0).repeat_interleave(stride, 1)[: size[0], : size[1]]
    pixels = np.full(size, fill, dtype=large.numpy().dtype)
    pixels[: large.shape[0], : large.shape[1]] = large.numpy()
    return pixels


def draw_borders(axes: "Axes", cells: np.ndarray, colour: str, width: float) -> None:
    """Lines between pixels of different cells, none where neither is one (-1)."""
    from matplotlib.collections import LineCollection

    framed = np.pad(cells, 1, constant_values=-1)
    y, x = np.nonzero(framed[:, 1:] != framed[:, :-1])
    upright = [((b - 0.5, a - 1.5), (b - 0.5, a - 0.5)) for a, b in zip(y, x, strict=True)]
    y, x = np.nonzero(framed[1:] != framed[:-1])
    level = [((b - 1.5, a - 0.5), (b - 0.5, a - 0.5)) for a, b in zip(y, x, strict=True)]
    axes.add_collection(LineCollection(upright + level, colors=colour, linewidths=width))


def mark_query(axes: "Axes", stride: int, row: int, column: int) -> None:
    """A cross on the query's token."""
    y, x = (row + 0.5) * stride - 0.5, (column + 0.5) * stride - 0.5
    axes.plot([x], [y], marker="x", markersize=6, markeredgewidth=3, color="black")
    axes.plot([x], [y], marker="x", markersize=5, markeredgewidth=1.5, color=MARK)


def colours_of(grains: Sequence[Grain]) -> dict[str, str]:
    """A colour per granularity."""
    pooled = iter(POOLED_COLOURS)
    return {grain.name: COLOURS.get(grain.name) or next(pooled) for grain in grains}


# --- Which tokens a query sees ------------------------------------------------------------------------------


def draw_keys(axes: "Axes", picture: np.ndarray, tokens: TokenMap, at: tuple[int, int], stride: int) -> int:
    """The tokens that the query at a pixel sees, in a colour per granularity, coarse ones below.

    Args:
        axes: to draw on.
        picture: [H, W, 3] in [0, 1].
        tokens: a layer's map.
        at: x and y of the query, in pixels.
        stride: side of a token of the map, in pixels.

    Returns:
        How many tokens are seen.
    """
    row, column = token_at(tokens, at, stride)
    grains = tokens.seen_from(row, column)
    colours = colours_of(grains)
    size = picture.shape[:2]
    pixels = {grain.name: at_pixels(grain.cells, stride, size) for grain in grains}
    seen = np.zeros(size, dtype=bool)
    shown = picture.mean(axis=2, keepdims=True).repeat(3, axis=2)
    for grain in reversed(grains):
        here = pixels[grain.name] >= 0
        seen |= here
        shown = np.where(here[..., None], (1 - TINT) * picture + TINT * rgb(colours[grain.name]), shown)
    axes.imshow(np.where(seen[..., None], shown, DARK * shown), interpolation="nearest")
    for grain in reversed(grains):
        draw_borders(axes, pixels[grain.name], colours[grain.name], 0.4 if grain.area == 1 else 0.9)
    mark_query(axes, stride, row, column)
    return sum(int((grain.cells.unique() >= 0).sum()) for grain in grains)


def rgb(colour: str) -> np.ndarray:
    """ "#ff8000" as three numbers from 0 to 1."""
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def token_at(tokens: TokenMap, at: tuple[int, int], stride: int) -> tuple[int, int]:
    """Row and column of the token at a pixel (x, y); rows left over by the patches count to the last one."""
    x, y = at
    return min(y // stride, tokens.height - 1), min(x // stride, tokens.width - 1)


def keys_figure(
    rows: Sequence[tuple[str, Sequence[TokenMap]]],
    picture: np.ndarray,
    at: tuple[int, int],
    strides: Sequence[int],
    title: str,
) -> "Figure":
    """One row of panels per model, one panel per stage, and a legend.

    Args:
        rows: names of models and the maps of their stages.
        picture: [H, W, 3] in [0, 1].
        at: x and y of the query, in pixels.
        strides: side of a token of each stage, in pixels.
        title: of the figure.
    """
    from matplotlib.patches import Patch

    figure, panels = new_figure(len(rows), max(len(maps) for _, maps in rows), title, legend=0.4)
    used: dict[str, str] = {}
    for (name, maps), line in zip(rows, panels, strict=True):
        for number, (tokens, axes) in enumerate(zip(maps, line, strict=False)):
            stride = strides[number]
            count = draw_keys(axes, picture, tokens, at, stride)
            used |= colours_of(tokens.seen_from(*token_at(tokens, at, stride)))
            prefix = f"{name}, " if name else ""
            axes.set_title(f"{prefix}stage {number + 1}: {count} keys", fontsize="small")
    names = sorted(used, key=lambda name: [*COLOURS, *used].index(name))
    handles = [Patch(color=used[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize="small")
    return figure


# --- Weights ------------------------------------------------------------------------------------------------


def draw_heat(axes: "Axes", picture: np.ndarray, heat: np.ndarray, smooth: bool = False) -> None:
    """Values at pixels, nan where there are none, as colours over the darkened image."""
    from matplotlib.colors import PowerNorm

    grey = picture.mean(axis=2, keepdims=True).repeat(3, axis=2)
    axes.imshow(grey if smooth else DARK * grey, interpolation="nearest")
    top = float(np.nanmax(heat)) or 1.0
    opacity = np.where(np.isnan(heat), 0.0, 0.55 if smooth else 0.75)
    norm = PowerNorm(1.0 if smooth else 0.5, vmin=0, vmax=top)  # a few tokens get most of the weight
    axes.imshow(np.nan_to_num(heat), cmap="inferno", norm=norm, alpha=opacity, interpolation="nearest")


def attention_figure(
    records: Sequence[BlockAttention],
    picture: np.ndarray,
    at: tuple[int, int],
    strides: Sequence[int],
    title: str,
) -> "Figure":
    """Mean over heads: per stage what a pixel gets in all, and the share of each granularity."""
    places = [token_at(record.tokens, at, stride) for record, stride in zip(records, strides, strict=True)]
    seen = [record.tokens.seen_from(*place) for record, place in zip(records, places, strict=True)]
    figure, panels = new_figure(len(records), 1 + max(map(len, seen)), title)
    for number, (record, place, grains) in enumerate(zip(records, places, seen, strict=True)):
        stride, size = strides[number], picture.shape[:2]
        values = record.of_query(*place).mean(dim=0)
        draw_heat(panels[number, 0], picture, all_grains(record.tokens, values, stride, size))
        panels[number, 0].set_title(f"stage {number + 1}: all", fontsize="small")
        mark_query(panels[number, 0], stride, *place)
        for axes, grain in zip(panels[number, 1:], grains, strict=False):
            numbers = grain.cells.unique()
            share = 100 * float(values[numbers[numbers >= 0]].sum())
            draw_heat(axes, picture, at_pixels(grain.spread(values), stride, size, np.nan))
            draw_borders(axes, at_pixels(grain.cells, stride, size), "#808080", 0.3)
            mark_query(axes, stride, *place)
            axes.set_title(f"{grain.name}: {share:.0f} %", fontsize="small")
    return figure


def all_grains(tokens: TokenMap, values: Tensor, stride: int, size: tuple[int, int]) -> np.ndarray:
    """What each pixel gets, coarse tokens divided over theirs."""
    heat = tokens.evenly(values)
    return at_pixels(torch.where(heat > 0, heat, float("nan")), stride, size, np.nan)


def heads_figure(
    record: BlockAttention, picture: np.ndarray, at: tuple[int, int], stride: int, title: str
) -> "Figure":
    """What each pixel gets, by head."""
    place = token_at(record.tokens, at, stride)
    heads = record.of_query(*place)
    across = min(HEADS_ACROSS, len(heads))
    figure, panels = new_figure(-(-len(heads) // across), across, title)
    for number, (axes, values) in enumerate(zip(panels.flat, heads, strict=False)):
        draw_heat(axes, picture, all_grains(record.tokens, values, stride, picture.shape[:2]))
        mark_query(axes, stride, *place)
        axes.set_title(f"head {number + 1}", fontsize="small")
    return figure


def overlay_figure(picture: np.ndarray, heat: Tensor, title: str) -> "Figure":
    """The image, and a stage's map [H, W] over it, interpolated to pixels."""
    figure, panels = new_figure(1, 2, title, panel=3)
    panels[0, 0].imshow(picture, interpolation="nearest")
    size = picture.shape[:2]
    large = torch.nn.functional.interpolate(heat[None, None], size, mode="bicubic")[0, 0].clamp(min=0)
    draw_heat(panels[0, 1], picture, large.numpy(), smooth=True)
    return figure
