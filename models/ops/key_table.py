"""What an attention operator has to know about one map size: which keys each window sees.

Legend: H W rows and columns of the padded map, T = H*W fine tokens, S = T + pooled tokens, s window side,
P = (H/s)*(W/s) windows in row-major order, Q = s*s queries of a window, K keys of a window, K' of them after
folding, G as they are gathered.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

T = TypeVar("T")

NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0])
"""Of PyTorch operators: that of this package, since a copy of it elsewhere registers its own ones."""


@dataclass(frozen=True)
class Fold:
    """Key columns that are the same token for every window, to be merged into one.

    Two copies of a key with biases a and b weigh exp(z + a) + exp(z + b) in the softmax, as one copy with
    bias logaddexp(a, b) does: the rewriting is exact.
    """

    single: Tensor  # [K - 2M] columns that stand once
    first: Tensor  # [M] first copy of each pair
    second: Tensor  # [M] second copy, in the same order


@dataclass(frozen=True)
class KeyTable:
    """Index tables of one map size on one device.

    `index` points into the S tokens [fine tokens of the padded map, pooled level 0, level 1, ...]; where a
    key is absent it points at any token and `visible` is False. `dense` exists where no window sees a token
    twice: it turns a bias over the folded keys into one over all S tokens, so that small maps need no gather
    (see `spread_bias`).
    """

    height: int
    width: int
    window: int
    index: Tensor  # [P, K] int64
    visible: Tensor | None  # [P, 1 or Q, K] bool; None: everything is visible
    fold: Fold | None
    folded_index: Tensor  # [P, K'] int64
    folded_visible: Tensor | None  # [P, 1 or Q, K'] bool
    gathered_index: Tensor  # [P, G] int64: the folded ones, on the CPU filled up to whole vectors
    gathered_visible: Tensor | None  # [P, 1 or Q, G] bool
    readers: Tensor  # [R] int64: slots (window * G + key) that see a token, sorted by token
    first_reader: Tensor  # [S] int64: where a token's slots begin in `readers`
    dense: Tensor | None  # [P, S] int64: which of a window's K' keys a token is, K' where it is none


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Columns of [N, X], the same in every row: index [...] -> [N, ...].

    On the CPU by a gather, which reads and writes in order; elsewhere its gradient would be summed in any
    order, which an embedding's is not. (The gradient of plain indexing is a slow scatter on the CPU.)
    """
    if x.device.type == "cpu":
        return x.gather(1, index.flatten().expand(len(x), -1)).unflatten(1, index.shape)
    return F.embedding(index, x.t()).movedim(-1, 0)


def lookup(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a [R, N] table as a bias, heads first: index [...] -> [N, ...]."""
    return pick(table.t(), index)


def lookup_columns(table: Tensor, index: Tensor) -> Tensor:
    """Columns of a [N, Q, U] table for every window, as `pick` does: index [P, K] -> [N, P, Q, K]."""
    if table.device.type == "cpu":
        columns = table.gather(2, index.flatten().expand(*table.shape[:2], -1))
        return columns.unflatten(2, index.shape).transpose(1, 2)
    return pick(table.flatten(0, 1), index).unflatten(0, table.shape[:2]).transpose(1, 2)


def fold_bias(bias: Tensor, fold: Fold | None, filling: int = 0) -> Tensor:
    """Merge duplicate key columns and append `filling` columns of zeros: [..., K] -> [..., K' + filling]."""
    parts = [bias]
    if fold is not None:
        pair = torch.logaddexp(bias.index_select(-1, fold.first), bias.index_select(-1, fold.second))
        parts = [bias.index_select(-1, fold.single), pair]
    if filling:
        parts.append(bias.new_zeros(*bias.shape[:-1], filling))
    return torch.cat(parts, dim=-1) if len(parts) > 1 else bias


def spread_bias(bias: Tensor, table: KeyTable) -> Tensor:
    """A bias for every score that is computed, -inf where a key is not seen.

    Args:
        bias: [N, P or 1, Q, K].

    Returns:
        [N, 1, T, S] in the dense form, else [N, P, Q, G].
    """
    bias = fold_bias(bias, table.fold, table.gathered_index.shape[1] - table.folded_index.shape[1])
    if table.dense is None:
        return mask_absent(bias, table.gathered_visible).expand(-1, len(table.index), -1, -1)
    padded = F.pad(bias, (0, 1), value=float("-inf"))
    of_query = torch.arange(padded[0].numel(), device=bias.device).view(padded.shape[1:])[..., :1]
    cells = rows_of_map(of_query + table.dense[:, None], table)  # [T, S] of N rows [P or 1, Q, K' + 1]
    return pick(padded.flatten(1), cells)[:, None]


def rows_of_map(x: Tensor, table: KeyTable) -> Tensor:
    """Rows of windows in map order: [P, Q, X] -> [T, X]."""
    s = table.window
    x = x.unflatten(1, (s, s)).unflatten(0, (table.height // s, table.width // s)).transpose(1, 2)
    return x.flatten(0, 3)


def mask_absent(bias: Tensor, visible: Tensor | None) -> Tensor:
    """Set the bias [N, P or 1, Q, K] of absent keys (`visible` [P, 1 or Q, K]) to -inf: [N, P, Q, K].

    By adding, since a sum has its gradient at hand: what comes back for an absent key is zero, as its weight
    is.
    """
    if visible is None:
        return bias
    return bias + torch.zeros_like(visible, dtype=bias.dtype).masked_fill(~visible, float("-inf"))


def split_qkv(qkv: Tensor, table: KeyTable) -> tuple[Tensor, Tensor, Tensor]:
    """Views of a packed map [B, S, 3, N, D]: queries of the fine tokens [B, T, N, D], keys and values [B, S,
    N, D]."""
    q, k, v = qkv.unbind(2)
    return q[:, : table.height * table.width], k, v


def split_windows(x: Tensor, table: KeyTable) -> Tensor:
    """Tokens in map order to windows: [B, T, N, D] -> [B, N, P, Q, D]."""
    s = table.window
    b, _, n, d = x.shape
    x = x.reshape(b, table.height // s, s, table.width // s, s, n, d)
    return x.permute(0, 5, 1, 3, 2, 4, 6).reshape(b, n, -1, s * s, d)


def merge_windows(x: Tensor, table: KeyTable) -> Tensor:
    """Windows back to tokens in map order, heads side by side: [B, N, P, Q, D] -> [B, T, N*D]."""
    s = table.window
    b, n, _, _, d = x.shape
    x = x.reshape(b, n, table.height // s, table.width // s, s, s, d)
    return x.permute(0, 2, 4, 3, 5, 1, 6).reshape(b, table.height * table.width, n * d)


class _ByAddress:
    """A tensor that equals another where both are the same array. It holds the array: while it does, no other
    one can have that address."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByAddress) and self._key == other._key


def kept_with_tables(most: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Keep what a function derives from index tables, which must not be written to, and from numbers.

    Args:
        most: results kept, with the tables they came from.
    """

    def decorate(build: Callable[..., T]) -> Callable[..., T]:
        @lru_cache(maxsize=most)
        def made(*arguments: Any) -> T:
            return build(*(x.tensor if isinstance(x, _ByAddress) else x for x in arguments))

        @wraps(build)
        def get(*arguments: Any) -> T:
            return made(*(_ByAddress(x) if isinstance(x, Tensor) else x for x in arguments))

        get.cache_info = made.cache_info  # type: ignore[attr-defined]
        return get

    return decorate
