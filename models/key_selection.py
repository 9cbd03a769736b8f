"""Which keys a window sees, and the bias that belongs to them: all in which Focal and Focal-fast differ.

* `RingPooledKeys` (Focal, paper section 3.2): the window itself, a ring of fine tokens around it that wraps
  round the image, and at every pooled level the m x m coarse tokens around it.
* `NearestKeys` (Focal-fast, of the release, not in the paper): the nearest fine tokens and the nearest window
  summaries, with a bias computed from the offset by a small network.

A selection is a plain object. It registers its bias parameters on the attention layer, under the names that
the original release uses, builds the index tables of a map size (cached, bounded) and turns parameters into a
bias.

Departures from the original: a size that needs padding works in both families (Focal-fast chooses among real
tokens only), the tables follow the input's size, and only Focal-fast's stored choice is part of the state.

Legend: H W rows and columns of the map, Hp Wp of the padded map, T = Hp*Wp fine tokens, s window side, P
windows, Q = s*s queries, K keys, N heads, D head width, e expand size, f focal window, p side of a pooled
cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .geometry import (
    dense_columns,
    fill_up,
    folding,
    grid,
    nearest_cells,
    offset_index,
    padded_size,
    relative_index,
    ring_offsets,
    seam_mask,
    slots_of_tokens,
)
from .layers import fingerprint
from .ops import Fold, KeyTable, lookup, lookup_columns

CACHED_TABLES = 64
"""Tables that a process keeps. A model uses one for each stage and input size, two where blocks alternate."""

KEYS_MULTIPLE = 16
"""Keys that the CPU gathers for a window are filled up to a multiple of this: rows of scores then begin where
vectors do. The products of attention take 0.75 to 1 of the time with 224 keys that they take with 218
(2026-11-23, two cores of a 2.8 GHz Xeon, AVX-512, torch 2.15.0, float32, 192 windows of 49 queries, head
width 32, medians and minima of repeated calls)."""


@dataclass(frozen=True)
class SelectedKeys:
    """The table for the operator and, beside it, what the selection needs to build the bias."""

    table: KeyTable
    bias_index: tuple[tuple[Tensor, ...], ...]  # one entry per group of keys


@dataclass(frozen=True)
class RingPooledKeys:
    """Keys of Focal attention: own window, ring, pooled levels.

    Args:
        window_size: s.
        expand_size: e, how far the ring reaches beyond the window; 0 for no ring.
        focal_window: f, windows covered at the coarsest view; odd.
        pooled_levels: number of pooled levels.
        shift_size: the map was rolled by this much; windows must then not look across the seam.
    """

    window_size: int
    expand_size: int
    focal_window: int
    pooled_levels: int
    shift_size: int = 0

    def region(self, level: int) -> int:
        """Side m of the square of level-`level` tokens that a window sees."""
        return self.focal_window + 2**level - 1

    def register(self, layer: Any, num_heads: int, head_dim: int) -> None:
        """Put the three kinds of bias tables on `layer`."""
        s = self.window_size
        layer.relative_position_bias_table = nn.Parameter(torch.zeros((2 * s - 1) ** 2, num_heads))
        if self.expand_size > 0:
            slots = len(ring_offsets(s, self.expand_size))
            layer.relative_position_bias_table_to_neighbors = nn.Parameter(
                torch.zeros(1, num_heads, s * s, slots)
            )
            trunc_normal_(layer.relative_position_bias_table_to_neighbors, std=0.02)
        if self.pooled_levels > 0:
            sides = [s + self.region(level) - 1 for level in range(self.pooled_levels)]
            layer.relative_position_bias_table_to_windows = nn.ParameterList(
                nn.Parameter(trunc_normal_(torch.zeros(num_heads, side**2), std=0.02)) for side in sides
            )

    def refresh(self, layer: Any, strict: bool = False) -> None:
        """Nothing of this selection is stored."""

    def made_for(self, layer: Any, map_size: tuple[int, int]) -> RingPooledKeys:
        """The selection for another map size: the same."""
        return self

    def keys(self, layer: Any, height: int, width: int, device: torch.device) -> SelectedKeys:
        """Tables for an (unpadded) map of `height` x `width` tokens."""
        numbers = (self.window_size, self.expand_size, self.focal_window, self.pooled_levels, self.shift_size)
        return _constant_ring_pooled_keys(device, height, width, *numbers)

    def bias(self, layer: Any, keys: SelectedKeys) -> Tensor:
        """Bias shared by all windows: [N, 1, Q, K]."""
        (own_index,), *level_indices = keys.bias_index
        parts = [lookup(layer.relative_position_bias_table, own_index)]
        if self.expand_size > 0:
            parts.append(layer.relative_position_bias_table_to_neighbors[0])
        for level, (index,) in enumerate(level_indices):
            parts.append(lookup(layer.relative_position_bias_table_to_windows[level].t(), index))
        return torch.cat(parts, dim=-1)[:, None]


@dataclass(frozen=True)
class NearestKeys:
    """Keys of Focal-fast attention: the nearest fine tokens, then the nearest window summaries.

    Which token is nearest is a matter of taste where distances tie, and the original left it to the sort at
    hand. Released weights are trained with one such choice, so it is part of the state dict
    (`topk_cloest_indice_k`, the original's spelling) and used whenever the map has the size it was made for.
    At any other size the choice is made anew; ties go to the token that comes first in row-major order.

    Args:
        window_size: s.
        topk: keys taken per level, or all there are if fewer.
        pooled_levels: 0 or 1.
        built_for: H, W of the map at construction.
    """

    window_size: int
    topk: int
    pooled_levels: int
    built_for: tuple[int, int]

    def register(self, layer: Any, num_heads: int, head_dim: int) -> None:
        """Put the offset networks and the stored choice on `layer`."""
        layer.coord2rpb_all = nn.ModuleList(
            nn.Sequential(nn.Linear(2, head_dim), nn.ReLU(), nn.Linear(head_dim, num_heads))
            for _ in range(1 + self.pooled_levels)
        )
        self.store_choice(layer)

    def store_choice(self, layer: Any) -> None:
        """Put a fresh choice for the map size `built_for` on `layer`."""
        device = layer.coord2rpb_all[0][0].weight.device
        for level, choice in enumerate(_nearest(self, *self.built_for)):
            layer.register_buffer(_choice_name(level), torch.tensor(choice, device=device))
        layer.stored_from = None

    def made_for(self, layer: Any, map_size: tuple[int, int]) -> NearestKeys:
        """The selection for another map size, whose choice takes the place of this one's on `layer`."""
        other = replace(self, built_for=map_size)
        other.store_choice(layer)
        other.refresh(layer)
        return other

    def stored(self, layer: Any) -> list[Tensor]:
        """The choice of each level, as `layer` holds it."""
        return [getattr(layer, _choice_name(level)) for level in range(1 + self.pooled_levels)]

    def check_choice(self, choice: Sequence[Tensor]) -> None:
        """Refuse a choice that names tokens which do not exist.

        Raises:
            ValueError: saying so.
        """
        limits = (self.built_for[0] * self.built_for[1], len(choice[0]))
        for name, numbers, limit in zip(("fine tokens", "windows"), choice, limits, strict=False):
            low, high = int(numbers.min()), int(numbers.max())
            if low < 0 or high >= limit:
                raise ValueError(
                    f"stored nearest {name} run from {low} to {high}, expected 0 to {limit - 1}: "
                    "the checkpoint was made for another map size, or is damaged"
                )

    def refresh(self, layer: Any, strict: bool = False) -> None:
        """Derive the tables of the stored choice again, if it was loaded, moved or written to.

        Args:
            layer: holds the choice and gets the tables.
            strict: raise ValueError for a choice that cannot be; else (a model that waits for its weights)
                make do with a fresh one until the next call.
        """
        stored = self.stored(layer)
        if fingerprint(stored) == layer.stored_from:
            return
        choice = _nearest(self, *self.built_for)
        if not stored[0].is_meta:
            try:
                self.check_choice(stored)
                choice = tuple(level.cpu().numpy() for level in stored)
            except ValueError:
                if strict:
                    raise
        layer.stored_keys = _nearest_keys_of(self, *self.built_for, choice, stored[0].device)
        layer.stored_from = fingerprint(stored)

    def keys(self, layer: Any, height: int, width: int, device: torch.device) -> SelectedKeys:
        """Tables for an (unpadded) map of `height` x `width` tokens."""
        if (height, width) == self.built_for:
            if not torch.compiler.is_compiling():
                self.refresh(layer, strict=True)
            return layer.stored_keys
        return _constant_nearest_keys(device, height, width, self.window_size, self.topk, self.pooled_levels)

    def bias(self, layer: Any, keys: SelectedKeys) -> Tensor:
        """Bias of every window: [N, P, Q, K].

        The offsets between queries and keys are small integers with few distinct values, so the network runs
        on each distinct one and the bias is read from its answers.
        """
        parts = []
        groups = zip(layer.coord2rpb_all, keys.bias_index, strict=True)
        with full_precision(keys.table.index.device):
            for network, (offsets, rows, place) in groups:
                answers = network(offsets.to(network[0].weight.dtype))
                parts.append(
                    lookup_columns(lookup(answers, rows), place)
                )  # by place of a key [N, Q, U] first
        return torch.cat(parts, dim=-1)


@torch.compiler.assume_constant_result
def _constant_ring_pooled_keys(device: torch.device, height: int, width: int, *numbers: int) -> SelectedKeys:
    """`_ring_pooled_keys` of plain numbers: all that torch.compile can see through to a constant."""
    return _ring_pooled_keys(RingPooledKeys(*numbers), height, width, device)


@torch.compiler.assume_constant_result
def _constant_nearest_keys(
    device: torch.device, height: int, width: int, window_size: int, topk: int, pooled_levels: int
) -> SelectedKeys:
    """`_nearest_keys` of plain numbers, likewise."""
    selection = NearestKeys(window_size, topk, pooled_levels, built_for=(height, width))
    return _nearest_keys(selection, height, width, device)


def full_precision(device: torch.device) -> AbstractContextManager:
    """Without autocast (the meta device has none)."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _choice_name(level: int) -> str:
    return f"topk_cloest_indice_{level}"


def _table(
    size: tuple[int, int],
    window: int,
    index: np.ndarray,
    visible: np.ndarray | None,
    columns: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
    tokens: int,
    device: torch.device,
) -> KeyTable:
    """Put the arrays of a padded map `size` on `device` and derive the folded and the dense form."""

    def place(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    def place_any(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else place(array)

    folded_index, folded_visible, fold = index, visible, None
    if columns is not None and len(columns[1]):
        kept = np.concatenate(columns[:2])
        folded_index = index[:, kept]
        folded_visible = None if visible is None else visible[..., kept]
        fold = Fold(*(place(part) for part in columns))
    dense = dense_columns(folded_index, folded_visible, tokens)
    gathered_index, gathered_visible = folded_index, folded_visible
    if device.type == "cpu" and dense is None:
        gathered_index, gathered_visible = fill_up(folded_index, folded_visible, KEYS_MULTIPLE)
    readers, first_reader = slots_of_tokens(gathered_index, gathered_visible, tokens)
    folded = (place(folded_index), place_any(folded_visible))
    is_filled = gathered_index is not folded_index
    gathered = (place(gathered_index), place_any(gathered_visible)) if is_filled else folded
    return KeyTable(
        *size,
        window,
        index=place(index),
        visible=place_any(visible),
        fold=fold,
        folded_index=folded[0],
        folded_visible=folded[1],
        gathered_index=gathered[0],
        gathered_visible=gathered[1],
        readers=place(readers),
        first_reader=place(first_reader),
        dense=place_any(dense),
    )


@lru_cache(maxsize=CACHED_TABLES)
@torch.inference_mode(False)
def _ring_pooled_keys(
    selection: RingPooledKeys, height: int, width: int, device: torch.device
) -> SelectedKeys:
    s = selection.window_size
    height, width = padded_size(height, width, s)
    windows = grid(height // s, width // s)
    offsets = np.concatenate([grid(s, s), ring_offsets(s, selection.expand_size)])
    fine = (windows[:, None] * s + offsets[None]) % (height, width)  # the ring wraps round the image
    index = [fine[..., 0] * width + fine[..., 1]]
    visible = [np.ones_like(index[0], dtype=bool)]
    columns = [offsets]
    bias_index = [(relative_index(s, s),)]
    tokens = height * width
    for level in range(selection.pooled_levels):
        scale, region = 2**level, selection.region(level)
        counts = (height // s * scale, width // s * scale)
        reach = (2 * (selection.focal_window // 2) + 2 * scale - 1) // 2 - (scale - 1)
        cell = windows[:, None] * scale - reach + grid(region, region)[None]
        inside = ((cell >= 0) & (cell < counts)).all(axis=-1)
        index.append(np.where(inside, tokens + cell[..., 0] * counts[1] + cell[..., 1], 0))
        visible.append(inside)
        columns.append(grid(region, region) + (level + 1) * 10**6)  # a pooled token is nobody's duplicate
        bias_index.append((relative_index(s, region),))
        tokens += counts[0] * counts[1]
    seen = np.concatenate(visible, axis=1)[:, None]
    if selection.shift_size > 0:
        seen = np.repeat(seen, s * s, axis=1)
        seen[:, :, : s * s] = seam_mask(height, width, s, selection.shift_size)
    table = _table(
        (height, width),
        s,
        np.concatenate(index, axis=1),
        None if seen.all() else seen,
        folding(np.concatenate(columns)),
        tokens,
        device,
    )
    return SelectedKeys(table, _place_groups(bias_index, device))


@lru_cache(maxsize=CACHED_TABLES)
def _nearest(selection: NearestKeys, height: int, width: int) -> tuple[np.ndarray, ...]:
    """Nearest fine tokens [P, K_0] of the real map and, with a pooled level, nearest windows [P, K_1]."""
    s = selection.window_size
    rows, columns = (side // s for side in padded_size(height, width, s))
    windows = grid(rows, columns)
    choice = [nearest_cells(windows * s + s // 2, height, width, min(selection.topk, height * width))]
    if selection.pooled_levels > 0:
        choice.append(nearest_cells(windows, rows, columns, min(selection.topk, len(windows))))
    return tuple(choice)


@lru_cache(maxsize=CACHED_TABLES)
def _nearest_keys(selection: NearestKeys, height: int, width: int, device: torch.device) -> SelectedKeys:
    return _nearest_keys_of(selection, height, width, _nearest(selection, height, width), device)


@torch.inference_mode(False)
def _nearest_keys_of(
    selection: NearestKeys, height: int, width: int, choice: tuple[np.ndarray, ...], device: torch.device
) -> SelectedKeys:
    """Tables for a given choice of fine tokens (numbered on the real map) and windows."""
    s = selection.window_size
    padded = padded_size(height, width, s)
    windows = grid(padded[0] // s, padded[1] // s)
    place = grid(s, s) - s // 2
    fine = np.stack([choice[0] // width, choice[0] % width], axis=-1)
    index = [fine[..., 0] * padded[1] + fine[..., 1]]
    bias_index = [offset_index((windows * s + s // 2)[:, None] - fine, place)]
    tokens = padded[0] * padded[1]
    for nearest in choice[1:]:
        index.append(tokens + nearest)
        bias_index.append(offset_index((windows[:, None] - windows[nearest]) * s, place))
        tokens += len(windows)
    table = _table(padded, s, np.concatenate(index, axis=1), None, None, tokens, device)
    return SelectedKeys(table, _place_groups(bias_index, device))


def _place_groups(
    groups: Sequence[tuple[np.ndarray, ...]], device: torch.device
) -> tuple[tuple[Tensor, ...], ...]:
    return tuple(tuple(torch.from_numpy(array).to(device) for array in group) for group in groups)
