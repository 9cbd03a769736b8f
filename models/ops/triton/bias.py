"""The bias: prepared for the attention kernels, and its gradient for the network; one launch each.

Legend: as in `launch`; G groups of the network's bias. A *plane* is the bias of one head and group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch
from .kernels import LOWEST, tl, triton  # says what to do where triton is missing
from .tables import padded_keys

LARGEST_BIAS = 2.0**16
"""A stand-in for infinity, which products with an identity would turn into NaN. Where all scores of a tile
are its negative, what is left before the exponential is its rounding error, which must stay small."""

SUMMANDS, BLOCK = 8, 128
"""Planes that a program of the gradient adds up side by side, and numbers of each."""

SIZES = (
    *("head_stride", "group_stride", "query_stride", "key_stride"),
    *("heads", "groups", "queries", "queries_padded", "keys", "row", "all_keys", "summands", "windows"),
)
"""Arguments that do not compile one kernel per value, such as 1 or a multiple of 16."""


@triton.jit
def _load_columns(base, column, key_stride, mask):
    """The network's bias of some columns in float32, finite where it is low or masked."""
    bias = tl.load(base + column.to(tl.int64) * key_stride, mask=mask, other=LOWEST).to(tl.float32)
    return tl.where(bias < LOWEST, LOWEST, bias)


@triton.jit(do_not_specialize=SIZES)
def prepare_kernel(
    bias_ptr, columns_ptr, visible_ptr, out_ptr, transposed_ptr,
    head_stride, group_stride, query_stride, key_stride,
    heads, groups, queries, queries_padded, keys, row, all_keys, factor, limit,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of what `prepare` returns. Grid: groups * tiles of queries * tiles of keys * heads."""
    head, place = (tl.program_id(0) % heads).to(tl.int64), tl.program_id(0) // heads
    key_tiles, query_tiles = row // BLOCK_K, tl.cdiv(queries_padded, BLOCK_Q)
    key = place % key_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    query = (place // key_tiles % query_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q))[:, None]
    group = (place // key_tiles // query_tiles).to(tl.int64)
    first = tl.load(columns_ptr + key, mask=key < keys, other=-1)[None, :]
    second = tl.load(columns_ptr + keys + key, mask=key < keys, other=-1)[None, :]
    real = (query < queries) & (first >= 0)
    if visible_ptr is not None:
        at = visible_ptr + (group * queries + query) * all_keys + first
        real = real & (tl.load(at, mask=real, other=0) != 0)
    base = bias_ptr + head * head_stride + group * group_stride + query * query_stride
    bias = _load_columns(base, first, key_stride, real)
    other = _load_columns(base, second, key_stride, real & (second >= 0))
    high, low = tl.where(other > bias, other, bias), tl.where(other > bias, bias, other)
    bias = (high + tl.log(1.0 + tl.exp(low - high))) * factor
    bias = tl.where(bias > limit, limit, tl.where(bias < -limit, -limit, bias))  # NaN stays
    bias = bias.to(out_ptr.dtype.element_ty)
    plane = (head * groups + group) * (queries_padded * row)
    tl.store(out_ptr + plane + (query * row + key[None, :]), bias, mask=query < queries_padded)
    if transposed_ptr is not None:
        at = transposed_ptr + plane + (key[None, :] * queries_padded + query)
        tl.store(at, bias, mask=query < queries_padded)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    d_prepared_ptr, bias_ptr, columns_ptr, d_bias_ptr,
    head_stride, group_stride, query_stride, key_stride,
    heads, groups, queries, queries_padded, keys, row, summands, windows,
    SUMMANDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of one plane of what `gradient` returns. Grid: groups * blocks of a plane * heads.

    Each is a sum of `summands` numbers: of all slices, and of the `windows` groups of d_prepared that share a
    group of the bias. SUMMANDS of them are added up side by side.
    """
    head, place = tl.program_id(0) % heads, tl.program_id(0) // heads
    blocks = tl.cdiv(queries * row, BLOCK)
    group, number = place // blocks, place % blocks * BLOCK + tl.arange(0, BLOCK)
    query, key = number // row, number % row
    real = (query < queries) & (key < keys)
    total = tl.zeros([SUMMANDS, BLOCK], tl.float32)
    for start in range(0, summands, SUMMANDS):
        summand = start + tl.arange(0, SUMMANDS)[:, None]
        at = (summand // windows * heads + head) * (groups * windows) + group * windows + summand % windows
        at = at.to(tl.int64) * (queries_padded * row) + number[None, :]
        total += tl.load(d_prepared_ptr + at, mask=(summand < summands) & real[None, :], other=0.0)
    d_bias = tl.sum(total, 0)
    first = tl.load(columns_ptr + key, mask=real, other=0)
    second = tl.load(columns_ptr + keys + key, mask=real, other=-1)
    pair = real & (second >= 0)
    base = bias_ptr + head.to(tl.int64) * head_stride + group.to(tl.int64) * group_stride
    base += query * query_stride
    lead = _load_columns(base, first, key_stride, pair) - _load_columns(base, second, key_stride, pair)
    base = d_bias_ptr + (group * queries + query) * heads + head
    column_size = groups.to(tl.int64) * queries * heads
    of_first = tl.where(pair, d_bias / (1.0 + tl.exp(-lead)), d_bias)
    tl.store(base + first * column_size, of_first.to(base.dtype.element_ty), mask=real)
    of_second = d_bias / (1.0 + tl.exp(lead))
    tl.store(base + second * column_size, of_second.to(base.dtype.element_ty), mask=pair)


def prepare(
    bias: Tensor,
    columns: Tensor,
    visible: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    with_transposed: bool,
) -> list[Tensor]:
    """The bias as the kernels read it: in `dtype`, finite, and the lowest value where there is no such key.

    It is added to products before these are scaled, and thus divided by the scale.

    Args:
        bias: [N, G, Q, K].
        columns: of `TritonTables`.
        visible: bool [P, 1 or Q, K]. Keys that no query of a window sees are left to the table of keys.
        scale: factor of the scores.
        dtype: of `qkv`.
        with_transposed: whether to return what the gradient of keys reads, too.

    Returns:
        [N, groups, padded Q, padded K'], and `with_transposed` [N, groups, padded K', padded Q].
    """
    heads, groups, queries, all_keys = bias.shape
    seen = None if visible is None or visible.shape[1] == 1 else visible.contiguous()
    groups = groups if seen is None else len(seen)
    queries_padded, row = launch.padded_queries(queries), padded_keys(columns.shape[1])
    out = [bias.new_empty(heads, groups, queries_padded, row, dtype=dtype)]
    if with_transposed:
        out.append(bias.new_empty(heads, groups, row, queries_padded, dtype=dtype))
    block = 32
    with launch._on_device(bias.device):
        prepare_kernel[(heads * groups * triton.cdiv(queries_padded, block) * (row // block),)](
            bias, columns, seen, out[0], out[-1] if with_transposed else None,
            *bias.expand(-1, groups, -1, -1).stride(),
            heads, groups, queries, queries_padded, columns.shape[1], row, all_keys,
            1 / scale, min(torch.finfo(dtype).max, LARGEST_BIAS),
            BLOCK_Q=block, BLOCK_K=block,
        )  # fmt: skip
    return out


def gradient(d_prepared: Tensor, bias: Tensor, columns: Tensor) -> Tensor:
    """Gradient of the network's bias, [N, G, Q, K] in its type, as `new_gradient` lays it out.

    Two keys that were merged share the gradient of their logaddexp as the softmax of their biases.
    `d_prepared` is [slices, N, groups, padded Q, padded K'], and its padding may hold anything.
    """
    slices, heads, all_groups, queries_padded, row = d_prepared.shape
    groups, queries = bias.shape[1:3]
    windows = all_groups // groups
    summands, d_bias = slices * windows, new_gradient(bias)
    with launch._on_device(bias.device):
        gradient_kernel[(heads * groups * triton.cdiv(queries * row, BLOCK),)](
            d_prepared, bias, columns, d_bias, *bias.stride(),
            heads, groups, queries, queries_padded, columns.shape[1], row, summands, windows,
            SUMMANDS=SUMMANDS, BLOCK=BLOCK,
        )  # fmt: skip
    return d_bias


def new_gradient(bias: Tensor) -> Tensor:
    """An array for the gradient of the network's bias, [N, G, Q, K]. In memory keys come first, heads last:
    so a range of keys is contiguous, as the gradient of an embedding has to be."""
    heads, groups, queries, keys = bias.shape
    return bias.new_empty(keys, groups, queries, heads).permute(3, 1, 2, 0)
