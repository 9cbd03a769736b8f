"""LayerNorm in a block, with what precedes or follows it: one kernel each where attention has fused kernels.

In eager mode nobody else joins these steps, and each of them reads or writes the whole map. The kernels
take part wherever attention's own do (`ops.triton_kernel`); compiled, traced, exported or transformed by
`torch.func`, with a module that is not PyTorch's or ours as it was built, or with hooks, modules run as ever.
Under autocast the MLP then gets its input in the dtype of autocast, where LayerNorm gives it float32. A sum
with stochastic depth is one operation without them as well, on any device in eager training (`add`).

Legend: B batch, H W rows and columns, C channels.
"""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from .focal_attention import FocalAttention
from .layers import LinearPool
from .linear import is_hooked
from .ops import sdpa


def takes_kernels(x: Tensor, attention: FocalAttention) -> bool:
    """Whether a block that holds such an attention layer may run in fused kernels.

    Args:
        x: the block's input, [B, H, W, C].
        attention: its attention layer, or what a user put in its place.
    """
    if torch.compiler.is_compiling() or type(attention) is not FocalAttention:
        return False
    if x.device.type not in (("cuda", "cpu") if attention.backend == "triton" else ("cuda",)):
        return False  # the kernels run on a CPU in their interpreter alone, which nobody gets unasked
    is_eager = sdpa.may_wrap(trains=torch.is_grad_enabled())
    return is_eager and attention.resolved_backend(_working_dtype(x)) == "triton"


def normed_attention(
    x: Tensor, norm: nn.Module, attention: FocalAttention, pools: nn.ModuleList, fused: bool
) -> tuple[Tensor, Tensor]:
    """The map, to go on with instead of `x`, and `attention(norm(x), pools)`, both [B, H, W, C].

    Args:
        x: the map.
        norm: LayerNorm, or what stands in its place.
        attention: the attention layer.
        pools: its pooling modules.
        fused: what `takes_kernels` answers.
    """
    if not (fused and _is_plain(norm, x) and makes_tokens(attention, pools)):
        return x, attention(norm(x), pools)
    from .ops import triton_norm  # needs an optional package

    pool = (pools[0].weight, pools[0].bias) if len(pools) else (None, None)
    settings = (attention.selection.window_size, norm.eps, _working_dtype(x))
    x, tokens = triton_norm.NormTokens.apply(x, norm.weight, norm.bias, *pool, *settings)
    return x, attention.attend(tokens, (x.shape[1], x.shape[2]))


def add_and_norm(
    x: Tensor, branch: Tensor, drop_path: nn.Module, norm: nn.Module, fused: bool
) -> tuple[Tensor, Tensor]:
    """The sum `x + drop_path(branch)` and `norm` of it, both [B, H, W, C].

    Args:
        x: the map.
        branch: what is added to it.
        drop_path: stochastic depth.
        norm: LayerNorm, or what stands in its place.
        fused: what `takes_kernels` answers.
    """
    is_plain = fused and _is_plain(norm, x) and type(drop_path) in (DropPath, nn.Identity)
    if not is_plain or is_hooked(drop_path) or not _is_alike(x, branch):
        x = add(x, branch, drop_path)
        return x, norm(x)
    from .ops import triton_norm  # needs an optional package

    factor = _factor(drop_path, branch).flatten() if _is_drawn(drop_path) else None
    settings = (norm.eps, _working_dtype(x))
    return triton_norm.add_norm(x, branch, factor, norm.weight, norm.bias, *settings)[:2]


def add(x: Tensor, branch: Tensor, drop_path: nn.Module) -> Tensor:
    """The sum `x + drop_path(branch)`, [B, H, W, C].

    In eager training without an array between, and rounded once, where both have one dtype: not under
    autocast, which leaves the map in float32.
    """
    if not _is_drawn(drop_path) or is_hooked(drop_path) or torch.compiler.is_compiling():
        return x + drop_path(branch)  # the compiler joins the operations itself
    if (
        not sdpa.may_wrap(trains=torch.is_grad_enabled())
        or x.dtype != branch.dtype
        or x.shape != branch.shape
    ):
        return x + drop_path(branch)
    return torch.addcmul(x, branch, _factor(drop_path, branch))


def _is_alike(x: Tensor, branch: Tensor) -> bool:
    """Whether the sum of both has the shape and the dtype of `x`."""
    return x.shape == branch.shape and torch.promote_types(x.dtype, branch.dtype) == x.dtype


def _is_drawn(drop_path: nn.Module) -> bool:
    """Whether this is timm's stochastic depth, in training."""
    return type(drop_path) is DropPath and drop_path.training


def _factor(drop_path: nn.Module, branch: Tensor) -> Tensor:
    """What stochastic depth multiplies each image of a [B, ...] branch by, [B, 1, ...]; draws what it would
    draw."""
    return drop_path(branch.new_ones(len(branch), *[1] * (branch.ndim - 1)))


def _working_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer computes in where it is given `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _is_plain(norm: nn.Module, x: Tensor) -> bool:
    """Whether a module is PyTorch's LayerNorm over the channels of `x`, affine and without hooks."""
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None or is_hooked(norm):
        return False
    from .ops import triton_norm  # needs an optional package

    return norm.normalized_shape == (x.shape[-1],) and triton_norm.supports(x, norm.weight, norm.bias)


def makes_tokens(attention: FocalAttention, pools: nn.ModuleList) -> bool:
    """Whether the tokens of a layer are those of its map and at most one linearly pooled one per window."""
    if attention.shift_size or is_hooked(attention) or len(pools) > 1:
        return False
    side = attention.selection.window_size
    return all(
        type(pool) is LinearPool and pool.side == side and pool.bias is not None and not is_hooked(pool)
        for pool in pools
    )
