"""Targets of RepPoints v2's verification tasks, and the replacement of regressed by verified corners.

Functions of plain tensors, used by `detection.reppoints_v2`. The tasks are those of Chen et al., "RepPoints
v2: Verification Meets Regression for Object Detection" (NeurIPS 2020), section 3: corner points as in
CornerNet (Law and Deng, ECCV 2018), and the inside of boxes, per class. As in the authors' release, all boxes
are targets on all levels, and heatmap peaks are sized in pixels. Departures from it: if two boxes have a
corner in the same cell, the cell's offset points to the nearer corner (in the release, to the later box's);
of two equally near cells, the upper or left one is used.

Letters: B images; G boxes of an image; C classes; N boxes of an image to be refined; H, W cells of a level.
The cell in row i and column j of a level with stride s stands for the image point (j * s, i * s). Corner
kinds: 0 top-left, 1 bottom-right.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

NOWHERE = -1e7  # coordinate of a dummy box, so that images without boxes are no special case


class LevelTargets(NamedTuple):
    """Targets of one level, of one image or (with a leading B) of several.

    heatmap (2, H, W): 1 at cells nearest to a corner, falling off around them, per corner kind.
    is_corner (2, H, W): bool, where the heatmap is 1 because a corner lies there.
    offsets (4, H, W): from such a cell to its corner in cells, x and y of kind 0, x and y of kind 1; else 0.
    foreground (C, H, W): 1 / pixels of the smallest box of a class that covers the cell, 0 outside of boxes.
    valid (1, H, W): bool, whether the cell is part of the image rather than of the batch's padding.
    """

    heatmap: Tensor
    is_corner: Tensor
    offsets: Tensor
    foreground: Tensor
    valid: Tensor


def corner_radii(boxes: Tensor, min_overlap: float = 0.7) -> Tensor:
    """Largest error of both corners at which a box overlaps the true one by `min_overlap`: (G,), pixels.

    Of CornerNet's three cases (both corners moved inwards, both outwards, one each) the first is always the
    tightest: (w - 2r)(h - 2r) = min_overlap * w * h.

    Args:
        boxes: (G, 4) left, top, right, bottom.
        min_overlap: intersection over union, in (0, 1).
    """
    width, height = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).unbind(dim=1)
    discriminant = (width - height).square() + 4 * min_overlap * width * height
    return (width + height - discriminant.sqrt()) / 4


def corner_targets(boxes: Tensor, size: tuple[int, int], stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heatmap (2, H, W), is_corner (2, H, W) and offsets (4, H, W) of `LevelTargets`.

    The heatmap falls off as a Gaussian of a sixth of 2r + 1 pixels, and ends at r of `corner_radii`.

    Args:
        boxes: (G, 4) in pixels; they may reach beyond the level's last cell.
        size: (H, W).
        stride: pixels per cell.
    """
    height, width = size
    boxes = pad(boxes, (0, 0, 1, 0), value=NOWHERE)
    corners = boxes.view(-1, 2, 2)  # G + 1, kind, (x, y)
    columns = torch.arange(width, device=boxes.device)
    rows = torch.arange(height, device=boxes.device)
    from_column = corners[..., 0, None] - columns * stride  # G + 1, 2, W
    from_row = corners[..., 1, None] - rows * stride  # G + 1, 2, H
    squared = from_row.square()[..., None] + from_column.square()[..., None, :]  # G + 1, 2, H, W

    radii = corner_radii(boxes)[:, None, None, None]
    sigma = (2 * radii + 1) / 6
    heatmap = (torch.exp(-squared / (2 * sigma.square())) * (squared < radii.square())).amax(dim=0)

    column, row = _nearest_cells(corners[1:] / stride, size).unbind(dim=-1)  # G, 2 each
    is_corner = torch.zeros((2, height, width), dtype=torch.bool, device=boxes.device)
    is_corner[torch.arange(2, device=boxes.device).expand_as(row), row, column] = True
    heatmap = heatmap.masked_fill(is_corner, 1.0)

    nearest = squared.argmin(dim=0, keepdim=True)  # 1, 2, H, W
    across = from_column[..., None, :].expand_as(squared).gather(0, nearest)
    down = from_row[..., None].expand_as(squared).gather(0, nearest)
    offsets = torch.cat([across, down]).transpose(0, 1) / stride  # kind, (x, y), H, W
    offsets = offsets * is_corner[:, None]
    return heatmap, is_corner, offsets.reshape(4, height, width)


def _nearest_cells(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Column and row (..., 2) of the cell nearest to points (..., 2) in cells; the lower one of two."""
    last = points.new_tensor([size[1] - 1, size[0] - 1])
    return (points - 0.5).ceil().clamp(min=points.new_zeros(2), max=last).long()


def foreground_targets(
    boxes: Tensor, labels: Tensor, num_classes: int, size: tuple[int, int], stride: int, finest_stride: int
) -> Tensor:
    """Foreground (C, H, W) of `LevelTargets`: weights of positive cells, with which all boxes count equally.

    On the finest level, a box covers all cells that it touches; on a coarser level, the cells whose image
    point is also the point of a covered cell of the finest level.

    Args:
        boxes: (G, 4) in pixels.
        labels: (G,) class numbers below num_classes.
        num_classes: C.
        size: (H, W).
        stride: pixels per cell.
        finest_stride: pixels per cell of the finest level.
    """
    height, width = size
    x = torch.arange(width, device=boxes.device) * stride
    y = torch.arange(height, device=boxes.device) * stride
    start = (boxes[:, :2] / finest_stride).floor() * finest_stride
    end = boxes[:, 2:]
    inside_x = (x >= start[:, :1]) & (x <= end[:, :1])  # G, W
    inside_y = (y >= start[:, 1:]) & (y <= end[:, 1:])  # G, H
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).clamp(min=1)
    weights = (inside_y[:, :, None] & inside_x[:, None, :]) / area[:, None, None]
    flat = boxes.new_zeros((num_classes, height * width))
    classes = labels[:, None].expand(-1, height * width)
    return flat.scatter_reduce(0, classes, weights.flatten(1), "amax").view(num_classes, height, width)


def level_targets(
    boxes: Tensor,
    labels: Tensor,
    num_classes: int,
    size: tuple[int, int],
    image_size: tuple[int, int],
    strides: tuple[int, int],
) -> LevelTargets:
    """Targets of one image on one level; cells beyond the image have no targets and are not valid.

    Args:
        boxes: (G, 4) in pixels.
        labels: (G,) class numbers.
        num_classes: C.
        size: (H, W) of the level, of the whole batch.
        image_size: height and width of this image with its own padding, pixels.
        strides: of this level and of the finest level.
    """
    stride, finest = strides
    height, width = (min(math.ceil(image_size[axis] / stride), size[axis]) for axis in range(2))
    own = (height, width)
    heatmap, is_corner, offsets = corner_targets(boxes, own, stride)
    foreground = foreground_targets(boxes, labels, num_classes, own, stride, finest)
    valid = torch.ones((1, *own), dtype=torch.bool, device=boxes.device)
    margin = (0, size[1] - width, 0, size[0] - height)
    return LevelTargets(*(pad(part, margin) for part in (heatmap, is_corner, offsets, foreground, valid)))


def snap_to_corners(points: Tensor, scores: Tensor, offsets: Tensor, stride: int) -> Tensor:
    """Move each point to the best verified corner among the four cells around it: (B, N, 2), pixels.

    The paper's joint inference: the cell of highest score within one cell of the regressed corner, moved by
    that cell's offset.

    Args:
        points: (B, N, 2) x and y in pixels; points outside the level use its nearest cells.
        scores: (B, H, W) verification scores of one corner kind, on any monotonically increasing scale.
        offsets: (B, 2, H, W) x and y from cells to corners, in cells.
        stride: pixels per cell.
    """
    height, width = scores.shape[-2:]
    around = points.new_tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    last = points.new_tensor([width - 1, height - 1])
    cells = (points / stride).floor()[:, :, None] + around  # B, N, 4, 2
    cells = cells.clamp(min=torch.zeros_like(last), max=last)
    flat = (cells[..., 1] * width + cells[..., 0]).long()  # B, N, 4
    best = scores.flatten(1).gather(1, flat.flatten(1)).view_as(flat).argmax(dim=2, keepdim=True)
    chosen = flat.gather(2, best)[..., 0]  # B, N
    shift = offsets.flatten(2).gather(2, chosen[:, None].expand(-1, 2, -1)).transpose(1, 2)  # B, N, 2
    column, row = chosen % width, chosen.div(width, rounding_mode="floor")
    return (torch.stack([column, row], dim=-1) + shift) * stride
