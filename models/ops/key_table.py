"""What an attention operator has to know about one map size: which keys each window sees.

Legend: H W rows and columns of the padded map, T = H*W fine tokens, S = T + pooled tokens, s window side,
P = (H/s)*(W/s) windows in row-major order, Q = s*s queries of a window, K keys of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


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
    key is absent it points at token 0 and `visible` is False. `dense` exists where no window sees a token
    twice: it turns a bias over the folded keys into one over all S tokens, so that small maps need no gather
    (see `dense_bias`).
    """

    height: int
    width: int
    window: int
    index: Tensor  # [P, K] int64
    visible: Tensor | None  # [P, 1 or Q, K] bool; None: everything is visible
    fold: Fold | None
    folded_index: Tensor  # [P, K'] int64
    folded_visible: Tensor | None  # [P, 1 or Q, K'] bool
    readers: Tensor  # [R] int64: slots (window * K' + key) that see a token, sorted by token
    first_reader: Tensor  # [S] int64: where a token's slots begin in `readers`
    dense: Tensor | None  # [T, S] int64: position in the flattened [Q, K' + 1] bias of the token's window
    dense_window: Tensor | None  # [T, 1] int64: the window of each token


def lookup(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a [R, N] table as a bias, heads first: index [...] -> [N, ...].

    As an embedding, because the gradient of plain indexing is a slow scatter on the CPU.
    """
    return F.embedding(index, table).movedim(-1, 0)


def fold_bias(bias: Tensor, fold: Fold | None) -> Tensor:
    """Merge duplicate key columns: [..., K] -> [..., K']."""
    if fold is None:
        return bias
    pair = torch.logaddexp(bias.index_select(-1, fold.first), bias.index_select(-1, fold.second))
    return torch.cat([bias.index_select(-1, fold.single), pair], dim=-1)


def dense_bias(bias: Tensor, table: KeyTable) -> Tensor:
    """Spread a folded bias [N, P or 1, Q, K'] over all tokens: [N, T, S], -inf where a token is not seen."""
    assert table.dense is not None and table.dense_window is not None, "no dense form of this table"
    heads, windows, queries, keys = bias.shape
    position = table.dense
    if windows > 1:
        position = position + table.dense_window * (queries * (keys + 1))
    padded = F.pad(bias, (0, 1), value=float("-inf")).reshape(heads, -1)
    return lookup(padded.t(), position)


def mask_absent(bias: Tensor, visible: Tensor | None) -> Tensor:
    """Set the bias [N, P or 1, Q, K] of absent keys (`visible` [P, 1 or Q, K]) to -inf: [N, P, Q, K]."""
    return bias if visible is None else bias.masked_fill(~visible, float("-inf"))


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
