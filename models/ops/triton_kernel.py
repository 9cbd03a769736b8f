"""Focal attention in fused CUDA kernels (Triton), forward and backward: the backend for training on a GPU.

A program takes the queries of one window and head, reads that window's keys and values by index straight from
the projection's output, and writes the result in token order. Gathered keys, scores and probabilities never
reach memory; scores, softmax and sums are in float32. The backward pass recomputes the scores from the saved
log-sum-exp, in two kernels: one over windows, for queries and bias, and one over blocks of tokens, for keys
and values (see `triton_launch`). Every sum has a fixed order and nothing is added atomically, so the same
input gives the same bits, whatever `torch.use_deterministic_algorithms` says.

To PyTorch `attention` is one operator with a gradient, which compile, autocast, checkpointing and
export see as a whole. It saves its input, its output and one number per query and head, those that fill a
window up included. On CPU tensors the kernels run only in Triton's interpreter (TRITON_INTERPRET=1), for
tests.

Legend: as `key_table`; B batch, N heads, D head width, C = N*D; a *group* is the windows that share a bias
(all of them, or one), an *item* one window of one image. Names ending in `_ptr` are arrays, capitals are
known at compile time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from math import e, log2
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .key_table import NAMESPACE, KeyTable, fold_bias, mask_absent
from .triton_launch import (
    PIPELINE_BYTES,
    KernelTables,
    check_offsets,
    computed_keys,
    config,
    divide,
    kernel_tables,
    padded_keys,
    padded_queries,
)
from .triton_passes import INTERPRETED, forward_kernel, key_gradient_kernel, query_gradient_kernel

MAX_HEAD_DIM = 64
MAX_WINDOW = 12
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2E = log2(e)
LEAST_SCALE = 2**-6
LARGEST_BIAS = 2.0**16
"""A stand-in for infinity, which products with an identity would turn into NaN. Where all scores of a tile
are its negative, what is left before the exponential is its rounding error, which must stay small."""


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, window: int) -> str | None:
    """Why a layer cannot run here and what to choose instead; None where it can."""
    if device.type != "cuda" and not INTERPRETED:
        return f"the triton backend needs a CUDA device, got {device}: use the backend sdpa"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the triton backend needs a GPU of compute capability 8.0 or later: use the backend sdpa"
    if dtype not in DTYPES:
        return f"the triton backend needs float16, bfloat16 or float32, got {dtype}: use the backend sdpa"
    if head_dim % 8 or not 0 < head_dim <= MAX_HEAD_DIM:
        return (
            f"the triton backend needs a head width that is a multiple of 8 up to {MAX_HEAD_DIM}, "
            f"got {head_dim}: use the backend sdpa"
        )
    if window > MAX_WINDOW:
        return (
            f"the triton backend needs a window side up to {MAX_WINDOW}, got {window}: use the backend sdpa"
        )
    return None


def prepare_bias(bias: Tensor, table: KeyTable, dtype: torch.dtype) -> Tensor:
    """Bias of the folded keys, -inf where there is none, in float32: [N, P or 1, Q padded, K' padded].

    Keys that a whole window lacks stay out of it (the index table marks them); only where single queries of a
    window lack some (`USE_SHIFT`) it is spread over all windows and -inf there. Kernels read it in `dtype`,
    as the sdpa backend does; it is converted inside the operator, so its gradient is float32.
    """
    bias = fold_bias(bias, table.fold)
    visible = table.folded_visible
    if visible is not None and visible.shape[1] > 1:
        bias = mask_absent(bias, visible)
    queries, keys = bias.shape[-2:]
    missing = (0, padded_keys(keys) - keys, 0, padded_queries(queries) - queries)
    return F.pad(bias.float(), missing, value=float("-inf"))


def attend(qkv: Tensor, table: KeyTable, bias: Tensor, scale: float) -> Tensor:
    """See `models.ops.focal_attention`; `bias` comes from `prepare_bias`."""
    reason = unsupported(qkv.device, qkv.dtype, qkv.shape[-1], table.window)
    if reason is not None:
        raise ValueError(reason)
    size = (table.height, table.width, table.window)
    if not LEAST_SCALE <= scale <= 1 / LEAST_SCALE:  # the bias is divided by it
        qkv, scale = torch.cat((scale * qkv[:, :, :1], qkv[:, :, 1:]), dim=2), 1.0
    return attention(qkv, bias, table.folded_index, table.folded_visible, *size, scale)[0]


_SIZES = "Tensor bias, Tensor index, Tensor? visible, int height, int width, int window, float scale"


@torch.library.custom_op(
    f"{NAMESPACE}::attention", mutates_args=(), schema=f"(Tensor qkv, {_SIZES}) -> (Tensor, Tensor)"
)
def attention(qkv, bias, index, visible, height, width, window, scale):
    """Output [B, T, N*D] of [B, S, 3, N, D], and log-sum-exp, in the unit that the kernels give scores,
    [B, N, P, Q padded]."""
    tables = kernel_tables(index, visible, height, width, window, qkv.shape[1])
    return _forward(qkv.contiguous(), _kernel_bias(bias, scale, qkv.dtype), tables, width, window, scale)


@torch.library.custom_op(
    f"{NAMESPACE}::attention_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor qkv, Tensor out, Tensor lse, {_SIZES}, bool with_bias)"
    " -> (Tensor, Tensor)",
)
def attention_backward(d_out, qkv, out, lse, bias, index, visible, height, width, window, scale, with_bias):
    """Gradients of `qkv`, one tensor that the kernels write in place, and of the bias, float32 (or empty)."""
    tables = kernel_tables(index, visible, height, width, window, qkv.shape[1])
    qkv, d_out, bias = qkv.contiguous(), d_out.contiguous(), _kernel_bias(bias, scale, qkv.dtype)
    d_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    d_qkv[:, height * width :, 0].zero_()
    arrays = (qkv, bias, tables, out, d_out, lse, delta, d_qkv)
    d_bias = _query_gradient(*arrays, width, window, scale, with_bias)
    _key_gradient(*arrays, width, window, scale)
    return d_qkv, d_bias


def _kernel_bias(bias: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The bias as the kernels read it, finite: where they add it to products before these are scaled (all
    but float32), divided by the scale."""
    limit = min(torch.finfo(dtype).max, LARGEST_BIAS)
    factor = 1 if dtype == torch.float32 else 1 / scale
    scaled = bias.new_empty(bias.shape, dtype=dtype)  # contiguous
    return torch.mul(bias, factor, out=scaled).clamp_(-limit, limit)


@attention.register_fake
def _attention_fake(qkv, bias, index, visible, height, width, window, scale):
    b, _, _, n, d = qkv.shape
    lse = qkv.new_empty((b, n, index.shape[0], padded_queries(window * window)), dtype=torch.float32)
    return qkv.new_empty((b, height * width, n * d)), lse


@attention_backward.register_fake
def _attention_backward_fake(
    d_out, qkv, out, lse, bias, index, visible, height, width, window, scale, with_bias
):
    d_bias = bias.new_empty(bias.shape if with_bias else (0,), dtype=torch.float32)
    return qkv.new_empty(qkv.shape), d_bias


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


def on_device(x: Tensor) -> AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _tf32_allowed() -> bool:
    """Whether PyTorch's own products of float32 may be rounded to TF32; asked as the release at hand wants,
    since an answer by its older name is refused where the newer one was set."""
    matmul = torch.backends.cuda.matmul
    newer = getattr(matmul, "fp32_precision", None)  # PyTorch 2.9
    return matmul.allow_tf32 if newer is None else newer == "tf32"


@lru_cache
def _may_pipeline(device: torch.device) -> bool:
    """Whether a block has the shared memory to fetch one item while another is computed."""
    if device.type != "cuda":
        return True
    import triton

    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return properties["max_shared_mem"] >= PIPELINE_BYTES


def _compile_time(kernel: str, qkv: Tensor, bias: Tensor, window: int) -> dict[str, Any]:
    """Compile-time arguments that all kernels share, and how to compile."""
    heads, dim = qkv.shape[3:]
    groups, queries, row = bias.shape[1:]
    chosen = config(kernel, dim, qkv.element_size())
    exact = qkv.dtype == torch.float32 and not _tf32_allowed()
    block_queries = min(chosen.block_queries, queries)
    return {
        "HEADS": heads,
        "HEAD_DIM": dim,
        "SIDE": window,
        "SHARED": groups == 1,
        "ROW": row,
        "BLOCK_Q": block_queries,
        "Q_BLOCKS": queries // block_queries,
        "BLOCK_K": chosen.block_keys,
        "BLOCK_D": max(16, 1 << (dim - 1).bit_length()),  # the least that Triton's products take
        "PRECISION": "tf32x3" if exact else "tf32",
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages if _may_pipeline(qkv.device) else 1,
        "enable_fp_fusion": True,  # later releases of Triton leave it off unless asked
    }


def _sizes(qkv: Tensor, tables: KernelTables, width: int) -> tuple[int, int, int]:
    """Tokens of an image, its windows, and columns of the map.

    Raises:
        ValueError: the kernels cannot address an image.
    """
    check_offsets(qkv[0].numel() if len(qkv) else 0)
    return qkv.shape[1], len(tables.index), width


def forward_tiles(keys: int, always_seen: int, block_keys: int) -> dict[str, int]:
    """How the forward pass cuts keys into tiles.

    Args:
        keys: of a window.
        always_seen: the first so many are there for every window.
        block_keys: of a tile.
    """
    tiles, tail = divmod(computed_keys(keys), block_keys)
    return {"TILES": tiles, "TAIL": tail, "PLAIN": always_seen // block_keys}


def gradient_tiles(
    keys: int, always_seen: int, block_keys: int, most: int, with_bias: bool
) -> list[tuple[int, dict[str, Any]]]:
    """Launches of the gradients of queries and bias: first tile, and compile-time arguments.

    One launch, or where the keys fill more tiles than fit into registers, one for the queries and several
    for the bias.

    Args:
        keys: of a window.
        always_seen: the first so many are there for every window.
        block_keys: of a tile.
        most: tiles whose gradients of the bias fit into registers.
        with_bias: whether the bias wants a gradient.
    """
    tiles = computed_keys(keys) // block_keys

    def part(first: int, count: int, bias: bool, query: bool) -> tuple[int, dict[str, Any]]:
        plain = min(count, max(0, always_seen // block_keys - first)) if bias else 0
        arguments = {"TILES": count, "PLAIN": plain, "WITH_BIAS": bias, "WITH_QUERY": query}
        return first, arguments

    if not with_bias or tiles <= most:
        return [part(0, tiles, with_bias, True)]
    rest = [part(first, min(most, tiles - first), True, False) for first in range(0, tiles, most)]
    return [part(0, tiles, False, True), *rest]


def _forward(
    qkv: Tensor, bias: Tensor, tables: KernelTables, width: int, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    tokens, windows, width = _sizes(qkv, tables, width)
    b, _, _, n, d = qkv.shape
    groups, queries = bias.shape[1:3]
    out = qkv.new_empty((b, windows * window * window, n * d))
    lse = qkv.new_empty((b, n, windows, queries), dtype=torch.float32)
    fixed = _compile_time("forward", qkv, bias, window)
    tiles = forward_tiles(tables.keys, tables.always_seen, fixed["BLOCK_K"])
    items = b * windows // groups
    slices, slice_items = divide("forward", items, n * groups * fixed["Q_BLOCKS"])
    with on_device(qkv):
        forward_kernel[(n * groups * slices * fixed["Q_BLOCKS"],)](
            qkv, bias, tables.index, tables.first, out, lse,
            tokens, slices, slice_items, items, windows, width, scale * LOG2E, **tiles, **fixed,
        )  # fmt: skip
    return out, lse


def _query_gradient(
    qkv: Tensor, bias: Tensor, tables: KernelTables, out: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor,
    d_qkv: Tensor, width: int, window: int, scale: float, with_bias: bool,
) -> Tensor:  # fmt: skip
    """Write the queries' part of `d_qkv`, and `delta`; return the gradient of the bias (empty if not
    wanted)."""
    tokens, windows, width = _sizes(qkv, tables, width)
    b, _, _, n, d = qkv.shape
    groups = bias.shape[1]
    fixed = _compile_time("query_gradient", qkv, bias, window)
    most = config("query_gradient", d, qkv.element_size()).static_tiles
    items = b * windows // groups
    slices, slice_items = divide("query_gradient", items, n * groups * fixed["Q_BLOCKS"])
    d_bias = bias.new_empty((slices, *bias.shape) if with_bias else (0,), dtype=torch.float32)
    launches = gradient_tiles(tables.keys, tables.always_seen, fixed["BLOCK_K"], most, with_bias)
    with on_device(qkv):
        for first_tile, tiles in launches:
            query_gradient_kernel[(n * groups * slices * fixed["Q_BLOCKS"],)](
                qkv, bias, tables.index, tables.first, out, d_out, lse, delta, d_qkv, d_bias,
                tokens, slices, slice_items, items, first_tile, windows, width, scale * LOG2E,
                **tiles, **fixed,
            )  # fmt: skip
    if with_bias:
        d_bias = d_bias[0] if slices == 1 else d_bias.sum(0)
        d_bias[..., computed_keys(tables.keys) :] = 0
    return d_bias


def _key_gradient(
    qkv: Tensor, bias: Tensor, tables: KernelTables, out: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor,
    d_qkv: Tensor, width: int, window: int, scale: float,
) -> None:  # fmt: skip
    """Write the keys' and values' part of `d_qkv`, after `delta` was written."""
    tokens, windows, width = _sizes(qkv, tables, width)
    b, _, _, n, _ = qkv.shape
    fixed = _compile_time("key_gradient", qkv, bias, window)
    blocks = len(tables.block_token)
    with on_device(qkv):
        key_gradient_kernel[(b * n * blocks,)](
            qkv, bias.transpose(-1, -2).contiguous(), d_out, lse, delta, d_qkv,
            tables.block_token, tables.entry_start, tables.entry_window, tables.entry_first,
            tables.entry_column, tokens, tables.heavy_blocks, blocks, b, windows, width, scale * LOG2E,
            **fixed,
        )  # fmt: skip
