"""Parameters of one setting made to fit another: window, focal windows, ring or input size.

Each is a picture per head or channel over relative or absolute positions, and is resized bicubically in
float32, as the model itself resizes its position embedding to other inputs. The antialiased kernel (a = -0.5)
keeps linear functions, the plain one (a = -0.75) does not. What agrees in shape stays the same tensor.

* Own windows: an image over the offset query - key, sides 2s - 1.
* Rings: one number for each query and slot, of which the mean over equal offsets makes an image, sides
  2(s + e) - 1. A stage that was a single window has no ring; its own-window image goes on beyond its border.
* Pooled levels: an image over query - coarse key, sides s + m - 1.
* Weights of a pooled cell: an image over the cell, whose sum is kept.
* Absolute position embedding: an image over the map.

Focal-fast computes its bias from offsets: only its pooling is resized.

Legend: N heads, s window side, e expand size, Q = s*s, m side of a pooled region, p side of a pooled cell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from math import isqrt, prod

import torch
from torch import Tensor
from torch.nn import functional as F

from .focal_transformer import grid, ring_offsets

OWN, RING = "relative_position_bias_table", "relative_position_bias_table_to_neighbors"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has its values at hand, in a format that converts to others."""
    is_known = tensor.dtype in FLOATS or not (tensor.is_floating_point() or tensor.is_complex())
    return is_known and tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized)


def is_ring(name: str) -> bool:
    """Whether a parameter is the table of a ring, which a stage that is a single window lacks."""
    return name.endswith(f".{RING}")


def resize_state(
    given: dict[str, Tensor], wanted: Mapping[str, Tensor], map_size: tuple[int, int] | None
) -> tuple[list[str], list[str], list[str]]:
    """Make a state dict fit a model of another setting, as far as that is all that differs.

    What cannot be resized (other channels, no square table, no floats) stays as it is, for the check that
    follows to refuse.

    Args:
        given: changed in place.
        wanted: the model's own state dict.
        map_size: rows and columns of the model's first map; None for a model without position embedding.

    Returns:
        Names of parameters: resized; rings that `given` lacked, made of its own windows; rings that the model
        lacks, dropped.
    """
    resized, continued, dropped = [], [], []
    for name in sorted(given.keys() & wanted.keys()):
        value, shape = given[name], wanted[name].shape
        resizer = next((f for pattern, f in RESIZERS.items() if pattern.search(name)), None)
        if resizer is None or value.shape == shape or not _is_image(value) or value.ndim != len(shape):
            continue
        fitted = resizer(value.float(), shape, map_size)
        if fitted is not None:
            given[name] = fitted.reshape(shape)
            resized.append(name)
    for name in sorted(given.keys() - wanted.keys()):
        if is_ring(name) and _own_table_of(name) in wanted:
            del given[name]
            dropped.append(name)
    for name in sorted(wanted.keys() - given.keys()):
        own = _own_table_of(name)
        if is_ring(name) and own in given and given[own].shape == wanted[own].shape and _is_image(given[own]):
            given[name] = _continued(given[own].float(), wanted[name].shape)
            continued.append(name)
    return resized, continued, dropped


# --- Pictures -----------------------------------------------------------------------------------------------


def _is_image(value: Tensor) -> bool:
    return is_plain(value) and value.is_floating_point() and value.numel() > 0


def _stretched(images: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Images [N, rows * columns] at another size: [N, rows' * columns']."""
    images = images.reshape(1, len(images), *old)
    return F.interpolate(images, new, mode="bicubic", align_corners=False, antialias=True)[0].flatten(1)


def _squares(images: Tensor, cells: int) -> Tensor | None:
    """Square images [N, a * a] at the size of `cells` cells: [N, cells]; None if they are not square."""
    side, new = isqrt(images.shape[1]), isqrt(cells)
    return _stretched(images, (side, side), (new, new)) if side**2 == images.shape[1] else None


def _own_windows(table: Tensor, shape: Sequence[int], _: object) -> Tensor | None:
    """[(2s-1)^2, N]."""
    resized = _squares(table.t(), shape[0]) if table.shape[1] == shape[1] else None
    return None if resized is None else resized.t()


def _pooled_windows(table: Tensor, shape: Sequence[int], _: object) -> Tensor | None:
    """[N, (s+m-1)^2]."""
    return _squares(table, shape[1]) if table.shape[0] == shape[0] else None


def _cell_weights(weight: Tensor, shape: Sequence[int], _: object) -> Tensor | None:
    """[1, p*p] or [C, 1, p, p]; the sum is kept, so that even maps pool to what they did."""
    old, new = weight.flatten(1), prod(shape[1:])
    resized = _squares(old, new) if weight.shape[0] == shape[0] else None
    return None if resized is None else resized * (old.shape[1] / new)


def _positions(embedding: Tensor, shape: Sequence[int], map_size: tuple[int, int] | None) -> Tensor | None:
    """[1, T, C]. The file does not say its map's sides: as long to each other as the model's, else equal."""
    if map_size is None or (embedding.shape[0], embedding.shape[2]) != (shape[0], shape[2]):
        return None
    tokens = embedding.shape[1]
    for rows, columns in (map_size, (1, 1)):
        height = isqrt(tokens * rows // columns)
        width = tokens // max(height, 1)
        if height * width == tokens and height * columns == width * rows:
            return _stretched(embedding[0].t(), (height, width), map_size).t()
    return None


# --- Rings --------------------------------------------------------------------------------------------------


def _own_table_of(ring: str) -> str:
    return ring.removesuffix(RING) + OWN


def _sides(shape: Sequence[int]) -> tuple[int, int] | None:
    """Window side and expand size of a ring [1, N, Q, slots], (s, e); None if there are none such."""
    queries, slots = shape[2:]
    window = isqrt(queries)
    expand = window - isqrt(max(queries - slots // 4, 0))
    fits = expand > 0 and window**2 == queries and 4 * (queries - (window - expand) ** 2) == slots
    return (window, expand) if fits else None


def _cells(window: int, expand: int) -> Tensor:
    """Which cell of the image each entry of a ring belongs to, by its offset query - key: [Q, slots]."""
    reach = window + expand - 1
    offset = grid(window, window)[:, None] - ring_offsets(window, expand)[None] + reach
    return torch.from_numpy(offset[..., 0] * (2 * reach + 1) + offset[..., 1])


def _ring(table: Tensor, shape: Sequence[int], _: object) -> Tensor | None:
    """[1, N, Q, slots]."""
    old, new = _sides(table.shape), _sides(shape)
    if old is None or new is None or table.shape[:2] != shape[:2]:
        return None
    side, new_side = (2 * sum(sides) - 1 for sides in (old, new))
    image = _mean_by_cell(table[0].flatten(1), _cells(*old).flatten(), side)
    return _stretched(image, (side, side), (new_side, new_side))[:, _cells(*new)][None]


def _mean_by_cell(values: Tensor, cell: Tensor, side: int) -> Tensor:
    """Means [N, side * side] of the values [N, V] that share a cell; empty cells take their neighbours'.

    Empty is offset zero, or where the ring is as wide as the window all of its row and column.
    """
    shape = (1, side, side)
    total = values.new_zeros(len(values), side**2).index_add_(1, cell, values).view(-1, *shape)
    count = torch.bincount(cell, minlength=side**2).to(values.dtype).view(1, *shape)
    image, known = total / count.clamp(min=1), (count > 0).to(values.dtype)
    near = F.avg_pool2d(image, 3, 1, 1) / F.avg_pool2d(known, 3, 1, 1)
    return torch.where(count > 0, image, near).flatten(1)


def _continued(own: Tensor, shape: Sequence[int]) -> Tensor:
    """A ring [1, N, Q, slots] from own windows' table [(2s-1)^2, N]: beyond its border, the border."""
    window, expand = _sides(shape) or (0, 0)
    side = 2 * window - 1
    image = F.pad(own.t().reshape(1, -1, side, side), (expand,) * 4, mode="replicate")
    return image.flatten(2)[:, :, _cells(window, expand)]


Resizer = Callable[[Tensor, Sequence[int], "tuple[int, int] | None"], "Tensor | None"]
RESIZERS: dict[re.Pattern[str], Resizer] = {
    re.compile(rf"\.attn\.{OWN}$"): _own_windows,
    re.compile(rf"\.attn\.{RING}$"): _ring,
    re.compile(rf"\.attn\.{OWN}_to_windows\.\d+$"): _pooled_windows,
    re.compile(r"\.pool_layers\.\d+\.weight$"): _cell_weights,
    re.compile(r"^absolute_pos_embed$"): _positions,
}
"""By name: a parameter in float32, its new shape and the model's map -> the parameter resized, or None."""
