"""Where windows, rings, pooled regions and nearest tokens lie, in plain integers (numpy).

Legend: H W rows and columns of a map, T = H*W, S = T + pooled tokens, P windows in row-major order, Q = s*s
queries of a window with side s, K keys of a window. Coordinates are (row, column).
"""

from __future__ import annotations

import numpy as np

DENSE_RATIO = 2.0
"""Skip the gather where all tokens of the map are at most this many times the keys of a window.

Time of attention without the gather over that with it, inference and training, on one and on two cores of a
2.8 GHz Xeon (2026-11-23, AVX-512, torch 2.15.0, float32, batch 8, 12 heads of width 32): 14 x 14 map (1.0 and
1.1 times the keys) 0.7-0.9 and 0.7-0.9, 21 x 21 (2.5 times) 1.3-1.5 and 1.6-2.0, 28 x 28 (4.5 times) 2.1-2.3
and 2.5-3.0.
"""


def padded_size(height: int, width: int, window: int) -> tuple[int, int]:
    """The next multiples of the window side."""
    return -(-height // window) * window, -(-width // window) * window


def grid(height: int, width: int) -> np.ndarray:
    """Row and column of every cell of a grid, row-major: [height*width, 2]."""
    return np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1).reshape(-1, 2)


def relative_index(window: int, region: int) -> np.ndarray:
    """Row of the bias table for each query of a window and key of a region: [Q, region**2].

    Both are numbered within their own square; the difference query - key runs from 1 - region to window - 1.
    """
    offset = grid(window, window)[:, None] - grid(region, region)[None] + region - 1
    return offset[..., 0] * (window + region - 1) + offset[..., 1]


def ring_offsets(window: int, expand: int) -> np.ndarray:
    """Row and column of every ring slot relative to the window's first token: [slots, 2].

    Four copies of the window, moved by `expand` towards each corner, less what falls into the window itself.
    """
    inside = grid(window, window)
    groups = []
    for dy in (expand, -expand):
        for dx in (expand, -expand):
            leaves_rows = inside[:, 0] >= window - expand if dy > 0 else inside[:, 0] < expand
            leaves_columns = inside[:, 1] >= window - expand if dx > 0 else inside[:, 1] < expand
            groups.append(inside[leaves_rows | leaves_columns] + (dy, dx))
    return np.concatenate(groups) if expand > 0 else np.empty((0, 2), dtype=np.int64)


def folding(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns of offsets [K, 2] that stand once; the first and the second copy of those that stand twice."""
    _, group, count = np.unique(offsets, axis=0, return_inverse=True, return_counts=True)
    assert count.max() <= 2, "no token lies in more than two of the four corners"
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")  # copies of one token side by side, in column order
    twice = order[count[group[order]] == 2]
    return np.flatnonzero(count[group] == 1), twice[0::2], twice[1::2]


def seam_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Which queries of a window may see which of its tokens on a rolled map: bool [P, Q, Q]."""
    region = [
        np.searchsorted((side - window, side - shift), np.arange(side), side="right")
        for side in (height, width)
    ]
    label = region[0][:, None] * 3 + region[1][None]
    label = label.reshape(height // window, window, width // window, window).swapaxes(1, 2)
    label = label.reshape(-1, window * window)
    return label[:, :, None] == label[:, None, :]


def fill_up(
    index: np.ndarray, visible: np.ndarray | None, multiple: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Append absent keys to tables [P, K] and [P, 1 or Q, K] until K is a multiple of `multiple`.

    They stand at the last key of their window, and not at all where they would be more than an eighth of K.
    """
    filling = -index.shape[1] % multiple
    if filling == 0 or 8 * filling > index.shape[1]:
        return index, visible
    visible = np.ones((len(index), 1, index.shape[1]), dtype=bool) if visible is None else visible
    return np.pad(index, ((0, 0), (0, filling)), "edge"), np.pad(visible, ((0, 0), (0, 0), (0, filling)))


def slots_of_tokens(
    index: np.ndarray, visible: np.ndarray | None, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Turn an index table [P, K] round: which of its P*K slots see each token.

    Returns:
        slots [R], sorted by token, and where each token's begin [S]. Slots that no query sees are left out.
    """
    seen = np.ones(index.size, dtype=bool) if visible is None else visible.any(axis=1).reshape(-1)
    slots = np.flatnonzero(seen)
    token = index.reshape(-1)[slots]
    order = np.argsort(token, kind="stable")
    return slots[order], np.searchsorted(token[order], np.arange(tokens))


def dense_columns(index: np.ndarray, visible: np.ndarray | None, tokens: int) -> np.ndarray | None:
    """Turn an index table [P, K] round: which of a window's keys each token is, K where it is none.

    Returns:
        int64 [P, S], or None where the dense form does not apply: a map too large for it, a window that sees
        a token twice, or keys that only some queries of a window see.
    """
    windows, keys = index.shape
    if tokens > DENSE_RATIO * keys or (visible is not None and visible.shape[1] > 1):
        return None
    seen = np.ones_like(index, dtype=bool) if visible is None else visible[:, 0]
    column = np.full((windows, tokens), keys)
    row = np.broadcast_to(np.arange(windows)[:, None], index.shape)
    column[row[seen], index[seen]] = np.broadcast_to(np.arange(keys), index.shape)[seen]
    return column if (column < keys).sum() == seen.sum() else None


def nearest_cells(centres: np.ndarray, height: int, width: int, count: int) -> np.ndarray:
    """The `count` cells of a grid nearest to each centre, nearest first, ties in row-major order.

    Args:
        centres: [P, 2], may lie outside the grid.
        count: at most height*width.

    Returns:
        int64 [P, count], cells numbered row-major.
    """
    farthest = int(np.abs(centres).max()) + height + width
    reach = 2 * int(np.ceil(np.sqrt(count)))
    while True:
        reach = min(reach, farthest)
        offsets = grid(2 * reach + 1, 2 * reach + 1) - reach
        distance = (offsets**2).sum(axis=-1)
        offsets = offsets[np.argsort(distance, kind="stable")]
        offsets = offsets[(offsets**2).sum(axis=-1) <= reach**2]  # beyond the disc the square is incomplete
        cell = centres[:, None] + offsets[None]
        inside = ((cell >= 0) & (cell < (height, width))).all(axis=-1)
        if inside.sum(axis=1).min() >= count or reach == farthest:
            break
        reach *= 2
    first = np.argsort(~inside, axis=1, kind="stable")[:, :count]
    chosen = np.take_along_axis(cell, first[..., None], axis=1)
    return chosen[..., 0] * width + chosen[..., 1]


def offset_index(to_centre: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number the distinct offsets of one level.

    Args:
        to_centre: window centre - key, [P, K, 2].
        place: query - window centre, [Q, 2].

    Returns:
        All offsets of the box that holds query - key, float32 [R, 2]; for each query and each distinct place
        of a key, the row of their offset, int64 [Q, U]; and the place of each key, int64 [P, K].
    """
    low = to_centre.min(axis=(0, 1)) + place.min(axis=0)
    size = to_centre.max(axis=(0, 1)) + place.max(axis=0) - low + 1
    box = grid(*size) + low
    stride = np.array([size[1], 1])
    of_query = ((place - place.min(axis=0)) * stride).sum(axis=-1)
    of_key = ((to_centre - to_centre.min(axis=(0, 1))) * stride).sum(axis=-1)
    distinct, which = np.unique(of_key, return_inverse=True)
    return box.astype(np.float32), of_query[:, None] + distinct, which.reshape(of_key.shape)
