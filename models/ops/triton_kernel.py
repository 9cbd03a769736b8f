"""Focal attention in fused CUDA kernels (Triton), forward and backward: the backend for training on a GPU.

A program takes the queries of one window and head, reads that window's keys and values by index straight from
the projection's output, and writes the result in token order. Gathered keys, scores and probabilities never
reach memory; scores, softmax and sums are in float32. The backward pass recomputes the scores from the saved
log-sum-exp, in two kernels: one over windows, for queries and bias, and one over blocks of tokens, for keys
and values (see `triton_launch`). Every sum has a fixed order and nothing is added atomically, so the same
input gives the same bits, whatever `torch.use_deterministic_algorithms` says.

To PyTorch `focal::attention` is one operator with a gradient, which compile, autocast, checkpointing and
export see as a whole. It saves its input, its output and one number per query and head. On CPU tensors the
kernels run only in Triton's interpreter (TRITON_INTERPRET=1), for tests.

Legend: as `key_table`; B batch, N heads, D head width, C = N*D; a *group* is the windows that share a bias
(all of them, or one), an *item* one window of one image. Names ending in `_ptr` are arrays, capitals are
known at compile time, `q_batch, q_token, q_head` are the steps between images, tokens and heads of `q`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .key_table import KeyTable, fold_bias, mask_absent
from .triton_launch import KernelTables, config, divide, kernel_tables, padded_keys, padded_queries

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "the attention backend 'triton' needs the package triton (pip install triton; PyTorch for CUDA on "
        "Linux brings it): install it or choose the backend 'sdpa'"
    ) from error

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)  # a finite "no score yet", so that nothing but absent keys gives no NaN

HEAD_DIMS = (16, 32, 48, 64)
MAX_WINDOW = 12
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _window_tokens(window, query, map_width, SIDE: tl.constexpr, QUERIES: tl.constexpr):
    """Token of every query of a window; that of the last one beyond the end."""
    query = tl.minimum(query, QUERIES - 1)
    windows_across = map_width // SIDE
    first = (window // windows_across) * (SIDE * map_width) + (window % windows_across) * SIDE
    return first + (query // SIDE) * map_width + query % SIDE


@triton.jit
def _row_offsets(token, stride, BLOCK_D: tl.constexpr):
    """Offsets of one head's channels of some tokens, [rows, BLOCK_D]; of token 0 where there is none (-1)."""
    return tl.maximum(token, 0)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load_rows(base, token, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head's channels of some tokens: [rows, BLOCK_D], 0 beyond HEAD_DIM."""
    offset = _row_offsets(token, stride, BLOCK_D)
    if HEAD_DIM == BLOCK_D:
        return tl.load(base + offset)
    else:
        return tl.load(base + offset, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store_rows(base, value, token, stride, real, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write what `_load_rows` reads, for the rows that are real."""
    mask = real[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(base + _row_offsets(token, stride, BLOCK_D), value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _forward_tile(
    top, total, out, q, bias_ptr, k_base, v_base, k_token, v_token, key_ptr, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: maximum and sum [queries] and output [queries, BLOCK_D] so far."""
    key = tl.load(key_ptr)
    k = _load_rows(k_base, key, k_token, HEAD_DIM, BLOCK_D)
    v = _load_rows(v_base, key, v_token, HEAD_DIM, BLOCK_D)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + tl.load(bias_ptr).to(tl.float32)
    score = tl.where((key >= 0)[None, :], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score * LOG2E - (new_top * LOG2E)[:, None])
    shrink = tl.exp2((top - new_top) * LOG2E)
    out = out * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
    return new_top, total * shrink + tl.sum(weight, 1), out


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, index_ptr, out_ptr, lse_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    slices, slice_items, items, group_windows, windows, row_keys, map_width, heads, scale,
    SIDE: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, Q_BLOCKS: tl.constexpr, TILES: tl.constexpr,
    UNROLL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp (base 2) of a slice of the items of one group, head and block of queries.

    UNROLL the tiles of keys, so that loads run ahead across items. Grid: heads, groups * slices, Q_BLOCKS.
    """
    head = tl.program_id(0)
    group = tl.program_id(1) // slices
    first = tl.program_id(1) % slices * slice_items
    query = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = query < QUERIES
    column = tl.arange(0, BLOCK_K)
    bias_size = Q_BLOCKS * BLOCK_Q * row_keys
    bias = bias_ptr + (head * (windows // group_windows) + group).to(tl.int64) * bias_size
    bias += query[:, None] * row_keys + column[None, :]
    for item in range(first, tl.minimum(first + slice_items, items)):
        image = (item // group_windows).to(tl.int64)
        window = group + item % group_windows
        token = _window_tokens(window, query, map_width, SIDE, QUERIES)
        k_base = k_ptr + image * k_batch + head * k_head
        v_base = v_ptr + image * v_batch + head * v_head
        q = _load_rows(q_ptr + image * q_batch + head * q_head, token, q_token, HEAD_DIM, BLOCK_D)
        key = index_ptr + window * row_keys + column
        top = tl.full([BLOCK_Q], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        if UNROLL:
            for tile in tl.static_range(TILES):
                top, total, out = _forward_tile(
                    top, total, out, q, bias + tile * BLOCK_K, k_base, v_base, k_token, v_token,
                    key + tile * BLOCK_K, scale, HEAD_DIM, BLOCK_D, PRECISION,
                )  # fmt: skip
        else:
            for tile in range(TILES):
                top, total, out = _forward_tile(
                    top, total, out, q, bias + tile * BLOCK_K, k_base, v_base, k_token, v_token,
                    key + tile * BLOCK_K, scale, HEAD_DIM, BLOCK_D, PRECISION,
                )  # fmt: skip
        total = tl.where(total > 0.0, total, 1.0)
        out_base = out_ptr + (image * (windows * QUERIES) * heads + head) * HEAD_DIM
        _store_rows(out_base, out / total[:, None], token, heads * HEAD_DIM, real, HEAD_DIM, BLOCK_D)
        lse_base = lse_ptr + ((image * heads + head) * windows + window) * QUERIES
        tl.store(lse_base + query, top * LOG2E + tl.log2(total), mask=real)


@triton.jit
def _query_step(
    dq, q, d_out, lse, delta, bias_ptr, k_base, v_base, k_token, v_token, key_ptr, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries with one more tile of keys, and the gradient of its scores, [keys, queries].

    Keys come first so that the tile is tall: eight warps share 128 rows, where 64 queries would feed four.
    """
    key = tl.load(key_ptr)
    k = _load_rows(k_base, key, k_token, HEAD_DIM, BLOCK_D)
    v = _load_rows(v_base, key, v_token, HEAD_DIM, BLOCK_D)
    score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale + tl.load(bias_ptr).to(tl.float32)
    weight = tl.where((key >= 0)[:, None], tl.exp2(score * LOG2E - lse[None, :]), 0.0)
    d_weight = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
    d_score = weight * (d_weight - delta[None, :])
    return dq + tl.dot(tl.trans(d_score.to(k.dtype)), k, input_precision=PRECISION), d_score


@triton.jit
def _query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, index_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, d_bias_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    d_out_batch, d_out_token, dq_batch, dq_token, dq_head,
    slices, slice_items, items, group_windows, windows, row_keys, map_width, heads, scale,
    SIDE: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, Q_BLOCKS: tl.constexpr, TILES: tl.constexpr,
    WITH_BIAS: tl.constexpr, WITH_QUERY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and bias over a slice of the items of one group, head and block of queries.

    bias is [N, groups, keys, queries] and d_bias [slices, N, groups, keys, queries], padded. WITH_BIAS: at
    most two tiles of keys, whose bias gradient stays in registers. Where there are more keys, the last axis
    of the grid also counts chunks of `TILES` tiles, and a launch without WITH_BIAS finds the gradient of the
    queries. WITH_QUERY also writes `delta`, the sum over channels of output times its gradient.

    Grid: heads, groups * slices, chunks of keys * Q_BLOCKS.
    """
    head = tl.program_id(0)
    group = tl.program_id(1) // slices
    part = tl.program_id(1) % slices
    first = part * slice_items
    query = tl.program_id(2) % Q_BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column = tl.program_id(2) // Q_BLOCKS * (TILES * BLOCK_K) + tl.arange(0, BLOCK_K)
    real = query < QUERIES
    groups = windows // group_windows
    bias_size = Q_BLOCKS * BLOCK_Q * row_keys
    bias_offset = column[:, None] * (Q_BLOCKS * BLOCK_Q) + query[None, :]
    bias = bias_ptr + (head * groups + group).to(tl.int64) * bias_size + bias_offset
    step_bias: tl.constexpr = BLOCK_K * Q_BLOCKS * BLOCK_Q
    d_bias_0 = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    d_bias_1 = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    for item in range(first, tl.minimum(first + slice_items, items)):
        image = (item // group_windows).to(tl.int64)
        window = group + item % group_windows
        token = _window_tokens(window, query, map_width, SIDE, QUERIES)
        k_base = k_ptr + image * k_batch + head * k_head
        v_base = v_ptr + image * v_batch + head * v_head
        q = _load_rows(q_ptr + image * q_batch + head * q_head, token, q_token, HEAD_DIM, BLOCK_D)
        out_base = out_ptr + (image * (windows * QUERIES) * heads + head) * HEAD_DIM
        out = _load_rows(out_base, token, heads * HEAD_DIM, HEAD_DIM, BLOCK_D)
        d_out_base = d_out_ptr + image * d_out_batch + head * HEAD_DIM
        d_out = _load_rows(d_out_base, token, d_out_token, HEAD_DIM, BLOCK_D)
        delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
        row = ((image * heads + head) * windows + window) * QUERIES
        lse = tl.load(lse_ptr + row + query, mask=real, other=float("inf"))
        key = index_ptr + window * row_keys + column
        dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        if WITH_BIAS:
            dq, d_score = _query_step(
                dq, q, d_out, lse, delta, bias, k_base, v_base, k_token, v_token, key, scale,
                HEAD_DIM, BLOCK_D, PRECISION,
            )  # fmt: skip
            d_bias_0 += d_score
            if TILES > 1:
                dq, d_score = _query_step(
                    dq, q, d_out, lse, delta, bias + step_bias, k_base, v_base, k_token, v_token,
                    key + BLOCK_K, scale, HEAD_DIM, BLOCK_D, PRECISION,
                )  # fmt: skip
                d_bias_1 += d_score
        else:
            for tile in range(TILES):
                dq, d_score = _query_step(
                    dq, q, d_out, lse, delta, bias + tile * step_bias, k_base, v_base, k_token, v_token,
                    key + tile * BLOCK_K, scale, HEAD_DIM, BLOCK_D, PRECISION,
                )  # fmt: skip
        if WITH_QUERY:
            dq_base = dq_ptr + image * dq_batch + head * dq_head
            _store_rows(dq_base, dq * scale, token, dq_token, real, HEAD_DIM, BLOCK_D)
            tl.store(delta_ptr + row + query, delta, mask=real)
    if WITH_BIAS:
        d_bias = d_bias_ptr + ((part * heads + head) * groups + group).to(tl.int64) * bias_size + bias_offset
        tl.store(d_bias, d_bias_0)
        if TILES > 1:
            tl.store(d_bias + step_bias, d_bias_1)


@triton.jit
def _key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    block_token_ptr, entry_start_ptr, entry_window_ptr, entry_column_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    d_out_batch, d_out_token, dk_batch, dk_token, dk_head,
    heavy, blocks, images, group_windows, windows, row_keys, map_width, heads, scale,
    SIDE: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, Q_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of one block of tokens, image and head.

    bias is [N, groups, keys, queries], padded: the keys of a block are whole rows of it. Grid: blocks *
    images * heads; the heavy blocks of all images first, as they take longest; then image by image, so that
    windows are read while they are in the cache.
    """
    head = tl.program_id(0) % heads
    place = tl.program_id(0) // heads
    late = place - heavy * images
    light = tl.maximum(blocks - heavy, 1)
    block = tl.where(late < 0, place // images, heavy + late % light)
    image = tl.where(late < 0, place % images, late // light).to(tl.int64)
    q_base = q_ptr + image * q_batch + head * q_head
    d_out_base = d_out_ptr + image * d_out_batch + head * HEAD_DIM
    row_base = (image * heads + head) * windows * QUERIES
    groups = windows // group_windows
    bias_size = (row_keys * Q_BLOCKS * BLOCK_Q).to(tl.int64)
    bias_base = bias_ptr + (head * groups) * bias_size
    slot = tl.arange(0, BLOCK_K)
    token = tl.load(block_token_ptr + block * BLOCK_K + slot)
    k = _load_rows(k_ptr + image * k_batch + head * k_head, token, k_token, HEAD_DIM, BLOCK_D)
    v = _load_rows(v_ptr + image * v_batch + head * v_head, token, v_token, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    start = tl.load(entry_start_ptr + block) * Q_BLOCKS
    stop = tl.load(entry_start_ptr + block + 1) * Q_BLOCKS
    for step in range(start, stop):
        entry = step // Q_BLOCKS
        window = tl.load(entry_window_ptr + entry)
        column = tl.load(entry_column_ptr + entry * BLOCK_K + slot)
        query = step % Q_BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
        real = query < QUERIES
        q_rows = _window_tokens(window, query, map_width, SIDE, QUERIES)
        q = _load_rows(q_base, q_rows, q_token, HEAD_DIM, BLOCK_D)
        d_out = _load_rows(d_out_base, q_rows, d_out_token, HEAD_DIM, BLOCK_D)
        row = row_base + window * QUERIES
        lse = tl.load(lse_ptr + row + query, mask=real, other=float("inf"))
        delta = tl.load(delta_ptr + row + query, mask=real, other=0.0)
        bias_rows = bias_base + window // group_windows * bias_size
        bias_offset = tl.maximum(column, 0)[:, None] * (Q_BLOCKS * BLOCK_Q) + query[None, :]
        bias = tl.load(bias_rows + bias_offset).to(tl.float32)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale + bias
        weight = tl.where((column >= 0)[:, None], tl.exp2(score * LOG2E - lse[None, :]), 0.0)
        dv += tl.dot(weight.to(d_out.dtype), d_out, input_precision=PRECISION)
        d_weight = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        d_score = weight * (d_weight - delta[None, :])
        dk += tl.dot(d_score.to(q.dtype), q, input_precision=PRECISION)
    offset = image * dk_batch + head * dk_head
    _store_rows(dk_ptr + offset, dk * scale, token, dk_token, token >= 0, HEAD_DIM, BLOCK_D)
    _store_rows(dv_ptr + offset, dv, token, dk_token, token >= 0, HEAD_DIM, BLOCK_D)


INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)
"""TRITON_INTERPRET was set when this module was imported: the kernels run on CPU tensors, slowly."""


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, window: int) -> str | None:
    """Why a layer cannot run here and what to choose instead; None where it can."""
    if device.type != "cuda" and not INTERPRETED:
        return f"the triton backend needs a CUDA device, got {device}: use the backend sdpa"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the triton backend needs a GPU of compute capability 8.0 or later: use the backend sdpa"
    if dtype not in DTYPES:
        return f"the triton backend needs float16, bfloat16 or float32, got {dtype}: use the backend sdpa"
    if head_dim not in HEAD_DIMS:
        return f"the triton backend needs a head width of 16, 32, 48 or 64, got {head_dim}: use sdpa"
    if window > MAX_WINDOW:
        return f"the triton backend needs a window side up to {MAX_WINDOW}, got {window}: use sdpa"
    return None


def prepare_bias(bias: Tensor, table: KeyTable, dtype: torch.dtype) -> Tensor:
    """Bias of the folded keys, padded to whole tiles: [N, P or 1, Q padded, K' padded].

    Keys that a whole window lacks stay out of it (the index table marks them); only where single queries of a
    window lack some (`USE_SHIFT`) it is spread over all windows and -inf there. Kernels read it in `dtype`,
    as the sdpa backend does; for training it is converted inside the operator, so its gradient is float32.
    """
    bias = fold_bias(bias, table.fold)
    visible = table.folded_visible
    if visible is not None and visible.shape[1] > 1:
        bias = mask_absent(bias, visible)
    queries, keys = bias.shape[-2:]
    bias = F.pad(bias, (0, padded_keys(keys) - keys, 0, padded_queries(queries) - queries))
    training = torch.is_grad_enabled() and bias.requires_grad
    return bias.to(torch.float32 if training else dtype)


def attend(qkv: Tensor, table: KeyTable, bias: Tensor, scale: float) -> Tensor:
    """See `models.ops.focal_attention`; `bias` comes from `prepare_bias`."""
    reason = unsupported(qkv.device, qkv.dtype, qkv.shape[-1], table.window)
    if reason is not None:
        raise ValueError(reason)
    size = (table.height, table.width, table.window)
    return attention(qkv, bias, table.folded_index, table.folded_visible, *size, scale)[0]


_SIZES = "Tensor bias, Tensor index, Tensor? visible, int height, int width, int window, float scale"


@torch.library.custom_op(
    "focal::attention", mutates_args=(), schema=f"(Tensor qkv, {_SIZES}) -> (Tensor, Tensor)"
)
def attention(qkv, bias, index, visible, height, width, window, scale):
    """Output [B, T, N*D] and log-sum-exp, base 2, [B, N, P, Q], of [B, S, 3, N, D]."""
    tables = kernel_tables(index, visible, height, width, window, qkv.shape[1])
    return _forward(*_unpack(qkv, height * width), bias.to(qkv.dtype), tables, width, window, scale)


@torch.library.custom_op(
    "focal::attention_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor qkv, Tensor out, Tensor lse, {_SIZES}, bool with_bias)"
    " -> (Tensor, Tensor)",
)
def attention_backward(d_out, qkv, out, lse, bias, index, visible, height, width, window, scale, with_bias):
    """Gradients of `qkv`, one tensor that the kernels write in place, and of the bias, float32 (or empty)."""
    tables = kernel_tables(index, visible, height, width, window, qkv.shape[1])
    bias = bias.to(qkv.dtype).transpose(-1, -2).contiguous()
    qkv_parts = _unpack(qkv, height * width)
    return _backward(d_out, *qkv_parts, out, lse, bias, tables, width, window, scale, with_bias)


def _unpack(qkv: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the fine tokens, keys and values: views."""
    return qkv[:, :tokens, 0], qkv[:, :, 1], qkv[:, :, 2]


@attention.register_fake
def _attention_fake(qkv, bias, index, visible, height, width, window, scale):
    b, _, _, n, d = qkv.shape
    lse = qkv.new_empty((b, n, index.shape[0], window * window), dtype=torch.float32)
    return qkv.new_empty((b, height * width, n * d)), lse


@attention_backward.register_fake
def _attention_backward_fake(
    d_out, qkv, out, lse, bias, index, visible, height, width, window, scale, with_bias
):
    *front, queries, keys = bias.shape
    d_bias = bias.new_empty((*front, keys, queries) if with_bias else (0,), dtype=torch.float32)
    return qkv.new_empty(qkv.shape), d_bias.transpose(-1, -2) if with_bias else d_bias


def _keep(ctx, inputs, output) -> None:
    qkv, bias, index, visible, *ctx.sizes = inputs
    ctx.save_for_backward(qkv, bias, index, visible, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_out, d_lse):
    if d_out is None:
        return (None,) * 8
    qkv, bias, index, visible, out, lse = ctx.saved_tensors
    with_bias = ctx.needs_input_grad[1]
    d_qkv, d_bias = attention_backward(d_out, qkv, out, lse, bias, index, visible, *ctx.sizes, with_bias)
    return d_qkv, d_bias.to(bias.dtype) if with_bias else None, *(None,) * 6


attention.register_autograd(_gradients, setup_context=_keep)


def _rows(x: Tensor) -> Tensor:
    """`x` with contiguous channels: itself, unless someone made an unusual view."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Steps between images, tokens and heads of tensors [B, S, N, D]."""
    return tuple(step for x in tensors for step in x.stride()[:3])


def _on_device(x: Tensor) -> AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _compile_time(kernel: str, q: Tensor, queries: int, keys: int, window: int) -> dict[str, Any]:
    """Compile-time arguments that all kernels share, and how to compile."""
    chosen = config(kernel, q.shape[-1], q.element_size())
    block_q, block_k = min(chosen.block_queries, queries), min(chosen.block_keys, keys)
    exact = q.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return {
        "SIDE": window,
        "QUERIES": window * window,
        "HEAD_DIM": q.shape[-1],
        "BLOCK_D": triton.next_power_of_2(q.shape[-1]),
        "BLOCK_Q": block_q,
        "Q_BLOCKS": queries // block_q,
        "BLOCK_K": block_k,
        "PRECISION": "tf32x3" if exact else "tf32",
        "num_warps": chosen.num_warps if block_k == chosen.block_keys else 4,
        "num_stages": chosen.num_stages,
    }


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, tables: KernelTables, width: int, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v, bias = _rows(q), _rows(k), _rows(v), bias.contiguous()
    b, t, n, d = q.shape
    windows, row_keys = tables.index.shape
    groups, queries = bias.shape[1:3]
    out = q.new_empty((b, t, n * d))
    lse = q.new_empty((b, n, windows, window * window), dtype=torch.float32)
    fixed = _compile_time("forward", q, queries, row_keys, window)
    tiles = ceil(tables.keys / fixed["BLOCK_K"])
    unroll = tiles <= config("forward", d, q.element_size()).static_tiles
    items = b * windows // groups
    slices, slice_items = divide(items, n * groups * fixed["Q_BLOCKS"])
    with _on_device(q):
        _forward_kernel[(n, groups * slices, fixed["Q_BLOCKS"])](
            q, k, v, bias, tables.index, out, lse, *_strides(q, k, v),
            slices, slice_items, items, windows // groups, windows, row_keys, width, n, scale,
            TILES=tiles, UNROLL=unroll, **fixed,
        )  # fmt: skip
    return out, lse


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor,
    tables: KernelTables, width: int, window: int, scale: float, with_bias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `attention_backward`; `bias` is [N, groups, keys, queries]."""
    q, k, v, d_out = _rows(q), _rows(k), _rows(v), _rows(d_out)
    d_qkv = k.new_empty((k.shape[0], k.shape[1], 3, *k.shape[2:]))
    d_qkv[:, q.shape[1] :, 0].zero_()
    dq, dk, dv = _unpack(d_qkv, q.shape[1])
    delta = torch.empty_like(lse)
    with _on_device(q):
        d_bias = _query_gradient(
            q, k, v, bias, tables, out, d_out, lse, delta, dq, width, window, scale, with_bias
        )
        b, _, n, _ = k.shape
        windows, row_keys = tables.index.shape
        blocks = tables.block_token.shape[0]
        fixed = _compile_time("key_gradient", q, bias.shape[3], row_keys, window)
        _key_gradient_kernel[(b * n * blocks,)](
            q, k, v, bias, d_out, lse, delta, dk, dv,
            tables.block_token, tables.entry_start, tables.entry_window, tables.entry_column,
            *_strides(q, k, v), *d_out.stride()[:2], *_strides(dk),
            tables.heavy_blocks, blocks, b, windows // bias.shape[1], windows, row_keys, width, n, scale,
            **fixed,
        )  # fmt: skip
    return d_qkv, d_bias


def _query_gradient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, tables: KernelTables, out: Tensor, d_out: Tensor,
    lse: Tensor, delta: Tensor, dq: Tensor, width: int, window: int, scale: float, with_bias: bool,
) -> Tensor:  # fmt: skip
    """Write `dq` and `delta`; return the bias's gradient [N, groups, queries, keys] (empty if not wanted).

    One launch, or where the keys fill more tiles than fit into registers, one for each of the two gradients.
    """
    b, _, n, d = q.shape
    windows, row_keys = tables.index.shape
    groups, queries = bias.shape[1], bias.shape[3]
    fixed = _compile_time("query_gradient", q, queries, row_keys, window)
    tiles = row_keys // fixed["BLOCK_K"]
    static_tiles = config("query_gradient", d, q.element_size()).static_tiles
    items = b * windows // groups

    def launch(tiles: int, chunks: int, with_bias: bool, with_query: bool) -> Tensor:
        slices, slice_items = divide(items, n * groups * fixed["Q_BLOCKS"] * chunks)
        d_bias = bias.new_empty((slices, *bias.shape) if with_bias else (0,), dtype=torch.float32)
        _query_gradient_kernel[(n, groups * slices, fixed["Q_BLOCKS"] * chunks)](
            q, k, v, bias, tables.index, out, d_out, lse, delta, dq, d_bias,
            *_strides(q, k, v), *d_out.stride()[:2], *_strides(dq),
            slices, slice_items, items, windows // groups, windows, row_keys, width, n, scale,
            TILES=tiles, WITH_BIAS=with_bias, WITH_QUERY=with_query, **fixed,
        )  # fmt: skip
        return d_bias.sum(0).transpose(-1, -2) if with_bias else d_bias

    if not with_bias or tiles <= static_tiles:
        return launch(tiles, 1, with_bias, True)
    launch(tiles, 1, False, True)
    return launch(1, tiles, True, False)
