"""What stands around attention in a block, in fused CUDA kernels (Triton): LayerNorm and what goes with it.

`norm_tokens` makes the tokens that attention projects, of the map: normalised, zero-padded to whole windows,
and a pooled one for each window. `add_norm` adds a branch to the map, with stochastic depth, and normalises
the sum. Both read and write the map once, in the precision that is wanted next; so do their backward
passes. Means, variances and sums are in float32. Each program adds up the gradients of parameters for its own
part of the map, and then they are summed in a fixed order: the same input gives the same bits.

To PyTorch both are operators with a gradient, but no second one. On CPU tensors the kernels run only in
Triton's interpreter (TRITON_INTERPRET=1), for tests.

Legend: as `key_table`; B batch, H W rows and columns of the map, s window side, P windows of the padded map,
T = P*s*s, S = T + P (or T without pooled tokens), C channels.
"""

from __future__ import annotations

from math import ceil, prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .key_table import NAMESPACE
from .triton_kernel import DTYPES, on_device
from .triton_launch import check_offsets
from .triton_norm_passes import (
    add_norm_gradient_kernel,
    add_norm_kernel,
    norm_tokens_gradient_kernel,
    norm_tokens_kernel,
)

MAX_CHANNELS = 2048

TARGET_WARPS = 4224
"""Warps to divide a pass into, where it has as many items: 32 for each of the 132 SMs of a Hopper."""

ROWS = {
    "norm_tokens": (4, 2),
    "norm_tokens_gradient": (4, 4),
    "add_norm": (4, 4),
    "add_norm_gradient": (4, 4),
}
"""Tokens of a tile, where one warp takes all channels and where several do; two where they are most. Chosen
so that nothing spills on Hopper and several programs run on an SM (tests/test_triton_norm.py compiles them);
not yet timed."""


def supports(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the kernels can normalise the last dimension of `x` with such parameters."""
    tensors = (x, weight, bias)
    is_here = all(tensor.dtype in DTYPES and tensor.device == x.device for tensor in tensors)
    return is_here and weight.numel() <= MAX_CHANNELS


@torch.library.custom_op(
    f"{NAMESPACE}::norm_tokens",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor? pool_weight, Tensor? pool_bias, int window,"
    " float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
)
def norm_tokens(x, weight, bias, pool_weight, pool_bias, window, eps, dtype):
    """Tokens of a map, for attention to project.

    Args:
        x: [B, H, W, C].
        weight, bias: LayerNorm's, [C].
        pool_weight: weights of a window's places in its pooled token, row-major, [1, s*s]; None for no pooled
            tokens.
        pool_bias: added to pooled tokens, [1]; None as well.
        window: side s.
        eps: LayerNorm's.
        dtype: of the tokens.

    Returns:
        Tokens [B, S, C]: those of the normalised map, zero-padded at the bottom and right, then the pooled
        ones, row-major. Mean and reciprocal standard deviation of every token of `x`, float32, [B, H, W].
    """
    b, height, width, channels = x.shape
    with_pool = pool_weight is not None
    across, windows, tokens = _sizes(height, width, window, with_pool)
    check_offsets(tokens * channels)
    out = x.new_empty((b, tokens, channels), dtype=dtype)
    mean, rstd = (x.new_empty(x.shape[:3], dtype=torch.float32) for _ in range(2))
    x = x.contiguous()
    pool = (pool_weight.contiguous(), pool_bias) if with_pool else (weight, bias)  # any pointers
    with on_device(x):
        norm_tokens_kernel[(b * windows,)](
            x, weight.contiguous(), bias.contiguous(), *pool, out, mean, rstd,
            height, width, tokens, windows, across,
            EPS=eps, SIDE=window, WITH_POOL=with_pool, **_compile_time("norm_tokens", channels),
        )  # fmt: skip
    return out, mean, rstd


@torch.library.custom_op(
    f"{NAMESPACE}::norm_tokens_backward",
    mutates_args=(),
    schema="(Tensor d_tokens, Tensor? d_map, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias,"
    " Tensor? pool_weight, int window, bool with_parameters) -> (Tensor, Tensor, Tensor)",
)
def norm_tokens_backward(d_tokens, d_map, x, mean, rstd, weight, bias, pool_weight, window, with_parameters):
    """Gradients of a map, of LayerNorm's parameters and of the pooling weights.

    Args:
        d_tokens: [B, S, C].
        d_map: what else is to be added to the gradient of `x`, [B, H, W, C], or None.
        x, mean, rstd, weight, bias, pool_weight, window: as for `norm_tokens`.
        with_parameters: whether those of parameters are wanted; else they are empty.

    Returns:
        Gradient of `x`, and float32 ones of weight and bias, [2, C], and of `pool_weight`, [s*s].
    """
    b, height, width, channels = x.shape
    with_pool = pool_weight is not None
    across, windows, tokens = _sizes(height, width, window, with_pool)
    dx = x.new_empty(x.shape)
    x, d_tokens = x.contiguous(), d_tokens.contiguous()
    fixed = _compile_time("norm_tokens_gradient", channels)
    slices, slice_items = _divide(b * windows, fixed["num_warps"])
    d_norm = mean.new_empty((slices, 2, channels) if with_parameters else (1, 0))
    d_pool = mean.new_empty((slices, window * window) if with_parameters and with_pool else (1, 0))
    with on_device(x):
        norm_tokens_gradient_kernel[(slices,)](
            d_tokens, dx if d_map is None else d_map.contiguous(),
            x, mean, rstd, weight.contiguous(), bias.contiguous(),
            pool_weight.contiguous() if with_pool else weight, dx, d_norm, d_pool,
            height, width, tokens, windows, across, b * windows, slice_items,
            WITH_MAP=d_map is not None, WITH_PARAMETERS=with_parameters, WITH_POOL=with_pool, SIDE=window,
            **fixed,
        )  # fmt: skip
    return dx, d_norm.sum(0), d_pool.sum(0)


@norm_tokens.register_fake
def _norm_tokens_fake(x, weight, bias, pool_weight, pool_bias, window, eps, dtype):
    b, height, width, channels = x.shape
    tokens = _sizes(height, width, window, pool_weight is not None)[2]
    statistics = (x.new_empty(x.shape[:3], dtype=torch.float32) for _ in range(2))
    return x.new_empty((b, tokens, channels), dtype=dtype), *statistics


@norm_tokens_backward.register_fake
def _norm_tokens_backward_fake(
    d_tokens, d_map, x, mean, rstd, weight, bias, pool_weight, window, with_parameters
):
    d_norm = mean.new_empty((2, x.shape[3]) if with_parameters else (0,))
    d_pool = mean.new_empty((window * window if with_parameters and pool_weight is not None else 0,))
    return x.new_empty(x.shape), d_norm, d_pool


def _keep_for_tokens(ctx, inputs, output) -> None:
    x, weight, bias, pool_weight, pool_bias, ctx.window, _, _ = inputs
    ctx.save_for_backward(x, *output[1:], weight, bias, pool_weight, pool_bias)
    ctx.set_materialize_grads(False)


def _gradients_of_tokens(ctx, d_tokens, d_mean, d_rstd, d_map=None):
    if d_tokens is None:
        return d_map, *(None,) * 7
    *saved, pool_bias = ctx.saved_tensors
    x, _, _, weight, bias, pool_weight = saved
    wanted = ctx.needs_input_grad
    dx, d_norm, d_pool = norm_tokens_backward(d_tokens, d_map, *saved, ctx.window, any(wanted[1:4]))
    d_pool_bias = None
    if wanted[4]:
        fine = _sizes(x.shape[1], x.shape[2], ctx.window, False)[2]
        d_pool_bias = d_tokens[:, fine:].sum(dtype=torch.float32).to(pool_bias.dtype).view_as(pool_bias)
    return (
        dx if wanted[0] else None,
        d_norm[0].to(weight.dtype) if wanted[1] else None,
        d_norm[1].to(bias.dtype) if wanted[2] else None,
        d_pool.to(pool_weight.dtype).view_as(pool_weight) if wanted[3] else None,
        d_pool_bias,
        *(None,) * 3,
    )


norm_tokens.register_autograd(_gradients_of_tokens, setup_context=_keep_for_tokens)


class NormTokens(torch.autograd.Function):
    """`norm_tokens` that hands its map on: arguments -> (map, tokens).

    What follows should use that map: then the gradient that comes back through it is added to the tokens' in
    their kernel, and not by a pass of autograd over three maps.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        made = norm_tokens(x, *settings)
        _keep_for_tokens(ctx, (x, *settings), made)
        return x, made[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_map: Tensor | None, d_tokens: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients_of_tokens(ctx, d_tokens, None, None, d_map)


@torch.library.custom_op(
    f"{NAMESPACE}::add_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor branch, Tensor? factor, Tensor weight, Tensor bias, float eps,"
    " ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
)
def add_norm(x, branch, factor, weight, bias, eps, dtype):
    """The map with a branch added, and LayerNorm of that sum.

    Args:
        x: [B, ..., C].
        branch: the same shape, and a dtype that `x` can hold.
        factor: what each image's branch is multiplied with, [B]; None for 1.
        weight, bias: LayerNorm's, [C].
        eps: LayerNorm's.
        dtype: of the normalised sum.

    Returns:
        Sum, in the dtype of `x`; normalised sum; mean and reciprocal standard deviation of every token of the
        sum, float32, [B, ...].

    Raises:
        ValueError: a branch of another shape.
    """
    if x.shape != branch.shape:
        raise ValueError(f"expected a branch of shape {list(x.shape)}, got {list(branch.shape)}: expand it")
    x, branch = x.contiguous(), branch.contiguous()
    total = x.new_empty(x.shape)
    out = x.new_empty(x.shape, dtype=dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    fixed = _compile_time("add_norm", x.shape[-1])
    slices, sizes = _row_sizes(x, fixed)
    with on_device(x):
        add_norm_kernel[(slices,)](
            x, branch, weight if factor is None else factor.contiguous(),
            weight.contiguous(), bias.contiguous(), total, out, mean, rstd, *sizes,
            WITH_FACTOR=factor is not None, EPS=eps, **fixed,
        )  # fmt: skip
    return total, out, mean, rstd


@torch.library.custom_op(
    f"{NAMESPACE}::add_norm_backward",
    mutates_args=(),
    schema="(Tensor d_sum, Tensor d_out, Tensor total, Tensor mean, Tensor rstd, Tensor? factor,"
    " Tensor weight, ScalarType branch_dtype, bool with_branch, bool with_parameters)"
    " -> (Tensor, Tensor, Tensor)",
)
def add_norm_backward(
    d_sum, d_out, total, mean, rstd, factor, weight, branch_dtype, with_branch, with_parameters
):
    """Gradients of the map, of the branch, and of LayerNorm's weight and bias, float32 [2, C]; those of
    branch and parameters are empty where they are not wanted."""
    d_sum, d_out, total = d_sum.contiguous(), d_out.contiguous(), total.contiguous()
    dx = total.new_empty(total.shape)
    d_branch = total.new_empty(total.shape if with_branch else (0,), dtype=branch_dtype)
    fixed = _compile_time("add_norm_gradient", total.shape[-1])
    slices, sizes = _row_sizes(total, fixed)
    d_norm = mean.new_empty((slices, 2, total.shape[-1]) if with_parameters else (1, 0))
    with on_device(total):
        add_norm_gradient_kernel[(slices,)](
            d_sum, d_out, total, mean, rstd, weight if factor is None else factor.contiguous(),
            weight.contiguous(), dx, d_branch, d_norm, *sizes,
            WITH_FACTOR=factor is not None, WITH_BRANCH=with_branch, WITH_PARAMETERS=with_parameters, **fixed,
        )  # fmt: skip
    return dx, d_branch, d_norm.sum(0)


@add_norm.register_fake
def _add_norm_fake(x, branch, factor, weight, bias, eps, dtype):
    statistics = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), *statistics


@add_norm_backward.register_fake
def _add_norm_backward_fake(
    d_sum, d_out, total, mean, rstd, factor, weight, branch_dtype, with_branch, with_parameters
):
    d_branch = total.new_empty(total.shape if with_branch else (0,), dtype=branch_dtype)
    d_norm = mean.new_empty((2, total.shape[-1]) if with_parameters else (0,))
    return total.new_empty(total.shape), d_branch, d_norm


def _keep_for_sum(ctx, inputs, output) -> None:
    _, branch, factor, weight, bias, _, ctx.dtype = inputs
    total, _, mean, rstd = output
    ctx.branch_dtype, ctx.bias_dtype = branch.dtype, bias.dtype
    ctx.save_for_backward(total, mean, rstd, factor, weight)
    ctx.set_materialize_grads(False)


def _gradients_of_sum(ctx, d_sum, d_out, *_):
    if d_sum is None and d_out is None:
        return (None,) * 7
    total, mean, rstd, factor, weight = ctx.saved_tensors
    d_sum = torch.zeros_like(total) if d_sum is None else d_sum
    d_out = torch.zeros_like(total, dtype=ctx.dtype) if d_out is None else d_out
    wanted = ctx.needs_input_grad
    is_same = factor is None and ctx.branch_dtype == total.dtype  # then the branch's gradient is the map's
    dx, d_branch, d_norm = add_norm_backward(
        *(d_sum, d_out, total, mean, rstd, factor, weight, ctx.branch_dtype),
        wanted[1] and not is_same,
        wanted[3] or wanted[4],
    )
    return (
        dx if wanted[0] else None,
        (dx if is_same else d_branch) if wanted[1] else None,
        None,
        d_norm[0].to(weight.dtype) if wanted[3] else None,
        d_norm[1].to(ctx.bias_dtype) if wanted[4] else None,
        *(None,) * 2,
    )


add_norm.register_autograd(_gradients_of_sum, setup_context=_keep_for_sum)


def _sizes(height: int, width: int, window: int, with_pool: bool) -> tuple[int, int, int]:
    """Windows in a row of the padded map, P and S."""
    across = ceil(width / window)
    windows = ceil(height / window) * across
    return across, windows, windows * (window * window + with_pool)


def _row_sizes(x: Tensor, fixed: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
    """Slices of the tokens of `x`, and the sizes that the kernels of `add_norm` take."""
    rows = prod(x.shape[:-1])
    check_offsets(rows)
    tiles = ceil(rows / fixed["ROWS"])
    slices, slice_tiles = _divide(tiles, fixed["num_warps"])
    return slices, (rows, prod(x.shape[1:-1]), tiles, slice_tiles)


def _divide(items: int, num_warps: int) -> tuple[int, int]:
    """Programs of so many warps to divide items among: their number, and items of each."""
    size = max(1, ceil(items * num_warps / TARGET_WARPS))
    return ceil(items / size), size


def _compile_time(kernel: str, channels: int) -> dict[str, Any]:
    """Compile-time arguments that all kernels share, and how to compile."""
    block = 1 << (channels - 1).bit_length()
    return {
        "CHANNELS": channels,
        "BLOCK_C": block,
        "ROWS": min(ROWS[kernel][block > 128], 2 * MAX_CHANNELS // block),
        "num_warps": max(1, block // 128),
        "num_stages": 1,
        "enable_fp_fusion": True,  # as in `triton_kernel`
    }
