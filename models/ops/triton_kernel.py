"""Focal attention in fused CUDA kernels (Triton), forward and backward: the backend for training on a GPU.

A program takes the queries of one window and head, reads that window's keys and values by index straight from
the projection's output, and writes the result in token order. Gathered keys, scores and probabilities never
reach memory; scores, softmax and sums are in float32. The backward pass recomputes the scores from the saved
log-sum-exp, in two kernels: one over windows, for queries and bias, and one over blocks of tokens, for keys
and values (see `triton_launch`). Every sum has a fixed order and nothing is added atomically, so the same
input gives the same bits, whatever `torch.use_deterministic_algorithms` says.

To PyTorch `attention` is one operator with a gradient, which compile, autocast, checkpointing and
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

from .key_table import NAMESPACE, KeyTable, fold_bias, mask_absent
from .triton_launch import (
    KernelTables,
    check_offsets,
    config,
    divide,
    kernel_tables,
    padded_keys,
    padded_queries,
)
from .triton_passes import INTERPRETED, forward_kernel, key_gradient_kernel, query_gradient_kernel

HEAD_DIMS = (16, 32, 48, 64)
MAX_WINDOW = 12
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
    f"{NAMESPACE}::attention", mutates_args=(), schema=f"(Tensor qkv, {_SIZES}) -> (Tensor, Tensor)"
)
def attention(qkv, bias, index, visible, height, width, window, scale):
    """Output [B, T, N*D] and log-sum-exp, base 2, [B, N, P, Q], of [B, S, 3, N, D]."""
    tables = kernel_tables(index, visible, height, width, window, qkv.shape[1])
    return _forward(*_unpack(qkv, height * width), bias.to(qkv.dtype), tables, width, window, scale)


@torch.library.custom_op(
    f"{NAMESPACE}::attention_backward",
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
    check_offsets(max(x.shape[1] * x.stride(1) for x in tensors))
    return tuple(step for x in tensors for step in x.stride()[:3])


def _on_device(x: Tensor) -> AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _tf32_allowed() -> bool:
    """Whether PyTorch's own products of float32 may be rounded to TF32; asked as the release at hand wants,
    since an answer by its older name is refused where the newer one was set."""
    matmul = torch.backends.cuda.matmul
    newer = getattr(matmul, "fp32_precision", None)  # PyTorch 2.9
    return matmul.allow_tf32 if newer is None else newer == "tf32"


def _compile_time(kernel: str, q: Tensor, queries: int, keys: int, window: int) -> dict[str, Any]:
    """Compile-time arguments that all kernels share, and how to compile."""
    chosen = config(kernel, q.shape[-1], q.element_size())
    block_q, block_k = min(chosen.block_queries, queries), min(chosen.block_keys, keys)
    exact = q.dtype == torch.float32 and not _tf32_allowed()
    return {
        "SIDE": window,
        "QUERIES": window * window,
        "HEAD_DIM": q.shape[-1],
        "BLOCK_D": 1 << (q.shape[-1] - 1).bit_length(),
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
    items = b * windows // groups
    slices, slice_items = divide(items, n * groups * fixed["Q_BLOCKS"])
    with _on_device(q):
        forward_kernel[(n * groups * slices * fixed["Q_BLOCKS"],)](
            q, k, v, bias, tables.index, out, lse, *_strides(q, k, v),
            slices, slice_items, items, windows // groups, windows, row_keys, width, n, scale,
            TILES=tiles, **fixed,
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
        key_gradient_kernel[(b * n * blocks,)](
            q, k, v, bias, d_out, lse, delta, dk, dv,
            tables.block_token, tables.entry_start, tables.entry_window, tables.entry_column,
            *_strides(q, k, v), *_strides(d_out)[:2], *_strides(dk),
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
        query_gradient_kernel[(n * groups * slices * fixed["Q_BLOCKS"] * chunks,)](
            q, k, v, bias, tables.index, out, d_out, lse, delta, dq, d_bias,
            *_strides(q, k, v), *_strides(d_out)[:2], *_strides(dq),
            slices, slice_items, items, windows // groups, windows, row_keys, width, n, scale,
            TILES=tiles, WITH_BIAS=with_bias, WITH_QUERY=with_query, **fixed,
        )  # fmt: skip
        return d_bias.sum(0).transpose(-1, -2) if with_bias else d_bias

    if not with_bias or tiles <= static_tiles:
        return launch(tiles, 1, with_bias, True)
    launch(tiles, 1, False, True)
    return launch(1, tiles, True, False)
