"""Pictures of what focal attention looks at, drawn over the image; the numbers come from attention.py.

Tokens are drawn at their own size: a fine one of the first stage is 4 x 4 pixels, one that was pooled from a
window 28 x 28. What a query does not see is dark. In all functions `picture` is [H, W, 3] in [0, 1], and `at`
are x and y of the query in pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from utils import UserError

from .attention import AROUND, OWN_WINDOW, TokenMap, weights_of_query

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {OWN_WINDOW: "#d55e00", AROUND: "#f0e442"}  # Okabe and Ito's, told apart by the colour-blind
POOLED_COLOURS = ("#0072b2", "#009e73")
TINT = 0.45  # opacity of a colour over the image
DARK = 0.3  # brightness of what is not seen
PANEL = 1.5  # inches; small, so that letters are large beside it


def blank_figure(**options: Any) -> "Figure":
    """An empty figure.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the pictures need matplotlib: pip install matplotlib") from error
    return Figure(layout="constrained", **options)


def new_figure(down: int, across: int, title: str) -> tuple["Figure", np.ndarray]:
    """A figure of panels without axes, [down, across]."""
    figure = blank_figure(figsize=(PANEL * max(across, 3), (PANEL + 0.25) * down + 0.7))
    figure.suptitle(title, fontsize="medium")
    panels = figure.subplots(down, across, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    return figure, panels


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=170)
    print(f"wrote {path}")


def at_pixels(cells: Tensor, stride: int, size: tuple[int, ...], fill: float = -1) -> np.ndarray:
    """Values of a stage's map [H, W] at the pixels of an image of `size`; `fill` beyond the map."""
    large = cells.repeat_interleave(stride, 0).repeat_interleave(stride, 1)[: size[0], : size[1]].numpy()
    pixels = np.full(size, fill, dtype=large.dtype)
    pixels[: large.shape[0], : large.shape[1]] = large
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


def mark_query(axes: "Axes", tokens: TokenMap, at: tuple[int, int]) -> None:
    """A cross on the query's token."""
    y, x = ((number + 0.5) * tokens.stride - 0.5 for number in tokens.at_pixel(*at))
    axes.plot([x], [y], marker="x", markersize=5, markeredgewidth=2.5, color="black")
    axes.plot([x], [y], marker="x", markersize=4, markeredgewidth=1.2, color="white")


def grey(picture: np.ndarray) -> np.ndarray:
    """Without colours, in the same shape."""
    return picture.mean(axis=2, keepdims=True).repeat(3, axis=2)


# --- Which tokens a query sees ------------------------------------------------------------------------------


def draw_keys(axes: "Axes", picture: np.ndarray, tokens: TokenMap, at: tuple[int, int]) -> dict[str, str]:
    """The tokens that a query sees, in a colour per granularity, coarse ones below; returns the colours."""
    from matplotlib.colors import to_rgb

    grains, pooled = tokens.seen_from(*tokens.at_pixel(*at)), iter(POOLED_COLOURS)
    colours = {grain.name: COLOURS.get(grain.name) or next(pooled) for grain in grains}
    shown, seen = grey(picture), np.zeros(picture.shape[:2], dtype=bool)
    for grain in reversed(grains):
        pixels = at_pixels(grain.cells, tokens.stride, seen.shape)
        here, colour = pixels >= 0, colours[grain.name]
        seen |= here
        shown = np.where(here[..., None], (1 - TINT) * picture + TINT * np.array(to_rgb(colour)), shown)
        draw_borders(axes, pixels, colour, 0.25 if grain.area == 1 else 0.6)
    axes.imshow(np.where(seen[..., None], shown, DARK * shown), interpolation="nearest")
    mark_query(axes, tokens, at)
    axes.set_title(f"{sum(len(grain.tokens) for grain in grains)} keys", fontsize="small")
    return colours


def keys_figure(
    rows: Sequence[tuple[str, Sequence[TokenMap]]],
    picture: np.ndarray,
    at: tuple[int, int],
    title: str,
) -> "Figure":
    """A row of panels per model, a panel per stage, and a legend.

    Args:
        rows: names of models and the maps of their stages.
        picture, at: see above.
        title: of the figure.
    """
    from matplotlib.patches import Patch

    figure, panels = new_figure(len(rows), len(rows[0][1]), title)
    used: dict[str, str] = {}
    for (name, maps), line in zip(rows, panels, strict=True):
        for number, (tokens, axes) in enumerate(zip(maps, line, strict=True), start=1):
            used |= draw_keys(axes, picture, tokens, at)
            axes.set_title(f"stage {number}: {axes.get_title()}", fontsize="small")
        line[0].text(-0.06, 0.5, name, transform=line[0].transAxes, rotation=90, ha="right", va="center")
    names = sorted(used, key=[*COLOURS, *used].index)
    handles = [Patch(color=used[name], label=name) for name in names]
    handles.append(Patch(color="0.2", label="not seen"))
    where = {"loc": "outside lower center", "ncols": len(handles), "columnspacing": 1}
    figure.legend(handles=handles, fontsize="small", **where)
    return figure


# --- Weights ------------------------------------------------------------------------------------------------


def draw_heat(axes: "Axes", picture: np.ndarray, heat: np.ndarray) -> None:
    """Values at pixels, nan where there are none, as colours over the darkened image."""
    from matplotlib.colors import PowerNorm

    axes.imshow(DARK * grey(picture), interpolation="nearest")
    norm = PowerNorm(0.5, vmin=0, vmax=float(np.nanmax(heat)) or 1.0)  # a few tokens get most of the weight
    opacity = np.where(np.isnan(heat), 0.0, 0.75)
    axes.imshow(np.nan_to_num(heat), cmap="inferno", norm=norm, alpha=opacity, interpolation="nearest")


def attention_figure(
    maps: Sequence[TokenMap], recorded: Sequence[Tensor], picture: np.ndarray, at: tuple[int, int], title: str
) -> "Figure":
    """Mean over heads: per stage what a pixel gets in all, coarse tokens divided over their pixels, and the
    share of each granularity. `recorded` are queries, keys and values of the maps' layers."""
    places = [tokens.at_pixel(*at) for tokens in maps]
    seen = [tokens.seen_from(*place) for tokens, place in zip(maps, places, strict=True)]
    figure, panels = new_figure(len(maps), 1 + max(map(len, seen)), title)
    rows = zip(maps, recorded, places, seen, strict=True)
    for number, (tokens, qkv, place, grains) in enumerate(rows):
        size, values = picture.shape[:2], weights_of_query(tokens, qkv, *place).mean(dim=0)
        total = tokens.evenly(values)
        total = torch.where(total > 0, total, float("nan"))
        draw_heat(panels[number, 0], picture, at_pixels(total, tokens.stride, size, np.nan))
        mark_query(panels[number, 0], tokens, at)
        panels[number, 0].set_title(f"stage {number + 1}: all", fontsize="small")
        for axes, grain in zip(panels[number, 1:], grains, strict=False):
            draw_heat(axes, picture, at_pixels(grain.spread(values), tokens.stride, size, np.nan))
            draw_borders(axes, at_pixels(grain.cells, tokens.stride, size), "#808080", 0.3)
            mark_query(axes, tokens, at)
            axes.set_title(f"{grain.name}: {100 * float(values[grain.tokens].sum()):.0f} %", fontsize="small")
    return figure
