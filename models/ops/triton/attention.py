"""The operator as PyTorch sees it.

`attention` is one operator with a gradient, which compile, autocast, checkpointing and export see as a whole.
It saves its inputs, its output and one number per query and head, those that fill a window up included. Its
second derivative is that of the plain operator.

Every sum has a fixed order and nothing is added atomically, so the same input gives the same bits, whatever
`torch.use_deterministic_algorithms` says.

Legend: as in `tables`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...focal_transformer import AttentionIndex, plain_attention
from ..tables import NAMESPACE, merge_bias
from . import launch
from .kernels import INTERPRETED
from .tables import TritonTables, padded_keys

MAX_HEAD_DIM = 64
MAX_WINDOW = 12
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST_SCALE = 2**-6
LARGEST_BIAS = 2.0**16
"""A stand-in for infinity, which products with an identity would turn into NaN. Where all scores of a tile
are its negative, what is left before the exponential is its rounding error, which must stay small."""


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, window: int) -> str | None:
    """See `Backend`."""
    if device.type != "cuda" and not INTERPRETED:
        return f"needs a CUDA device, got {device}"
    if reason := launch.why_not(device):
        return reason
    if dtype not in DTYPES:
        return f"needs float16, bfloat16 or float32, got {dtype}"
    if head_dim % 8 or not 0 < head_dim <= MAX_HEAD_DIM:
        return f"needs heads whose width is a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}"
    return None if window <= MAX_WINDOW else f"needs windows of up to {MAX_WINDOW} a side, got {window}"


def attend(qkv: Tensor, index: AttentionIndex, bias: Tensor, scale: float) -> Tensor:
    """See `Backend`.

    Keys that a whole window lacks are marked in the table of keys. Only where single queries of a window lack
    some, the bias is spread over all windows and -inf there.
    """
    made: TritonTables = index.tables
    bias = merge_bias(made.merged, bias)
    visible = made.merged.visible
    if visible is not None and visible.shape[1] > 1:
        bias = torch.where(visible, bias, float("-inf"))
    if not LEAST_SCALE <= scale <= 1 / LEAST_SCALE:  # the bias is divided by it
        qkv, scale = torch.cat((scale * qkv[:, :, :1], qkv[:, :, 1:]), dim=2), 1.0
    size = (index.height, index.width, index.window)
    return attention(qkv, bias, made.keys, made.first, made.always_seen, *size, scale)[0]


_INPUTS = (
    "Tensor bias, Tensor keys, Tensor first, int always_seen, int height, int width, int window, float scale"
)


@torch.library.custom_op(
    f"{NAMESPACE}::triton_attention",
    mutates_args=(),
    schema=f"(Tensor qkv, {_INPUTS}) -> (Tensor, Tensor)",
)
def attention(qkv, bias, keys, first, always_seen, height, width, window, scale):
    """Attention with the keys of `TritonTables`.

    Args:
        qkv: [B, S, 3, N, D].
        bias: [N, P or 1, Q, K']; -inf where a query lacks a key that others of its window see.
        keys, first, always_seen: of `TritonTables`.
        height, width, window: of the padded map.
        scale: factor of the scores.

    Returns:
        Output [B, T, N*D]; log-sum-exp, in the unit that the kernels give scores, [B, N, P, padded Q].
    """
    tables = launch.Tables(keys, first, bias.shape[-1], always_seen, width, window, scale)
    return launch.forward(qkv.contiguous(), kernel_bias(bias, scale, qkv.dtype), tables)


@torch.library.custom_op(
    f"{NAMESPACE}::triton_attention_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor qkv, Tensor out, Tensor lse, {_INPUTS}, bool with_bias)"
    " -> (Tensor, Tensor)",
)
def attention_backward(
    d_out, qkv, out, lse, bias, keys, first, always_seen, height, width, window, scale, with_bias
):
    """Gradients of `qkv`, and of the bias in float32 (empty unless `with_bias`)."""
    tables = launch.Tables(keys, first, bias.shape[-1], always_seen, width, window, scale)
    qkv, d_out, padded = qkv.contiguous(), d_out.contiguous(), kernel_bias(bias, scale, qkv.dtype)
    d_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    d_bias = launch.query_gradient(qkv, padded, out, d_out, lse, delta, d_qkv, tables, with_bias)
    launch.key_gradient(qkv, padded.mT.contiguous(), d_out, lse, delta, d_qkv, tables, height)
    return d_qkv, d_bias.sum(0)[..., : bias.shape[-2], : bias.shape[-1]] if with_bias else d_bias


def kernel_bias(bias: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The bias as the kernels read it: in their type, padded to [N, P or 1, padded Q, padded K'], and finite.

    Where it is added to products before these are scaled (in all types but float32), it is divided by the
    scale.
    """
    limit = min(torch.finfo(dtype).max, LARGEST_BIAS)
    factor = 1 if dtype == torch.float32 else 1 / scale
    padded = _padded(bias, dtype).fill_(-limit)
    part = padded[..., : bias.shape[-2], : bias.shape[-1]]
    torch.mul(bias, factor, out=part).clamp_(-limit, limit)
    return padded


def _padded(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """An array for a padded bias."""
    *groups, queries, keys = bias.shape
    return bias.new_empty(*groups, launch.padded_queries(queries), padded_keys(keys), dtype=dtype)


@attention.register_fake
def _attention_fake(qkv, bias, keys, first, always_seen, height, width, window, scale):
    b, _, _, n, d = qkv.shape
    lse = qkv.new_empty(b, n, keys.shape[0], launch.padded_queries(window * window), dtype=torch.float32)
    return qkv.new_empty(b, height * width, n * d), lse


@attention_backward.register_fake
def _attention_backward_fake(
    d_out, qkv, out, lse, bias, keys, first, always_seen, height, width, window, scale, with_bias
):
    d_bias = bias.new_empty(0, dtype=torch.float32)
    if with_bias:
        d_bias = _padded(bias, torch.float32)[..., : bias.shape[-2], : bias.shape[-1]]
    return qkv.new_empty(qkv.shape), d_bias


def _save(ctx, inputs, output) -> None:
    qkv, bias, keys, first, *ctx.numbers = inputs
    ctx.save_for_backward(qkv, bias, keys, first, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_out, d_lse):
    if d_out is None:
        return (None,) * 9
    qkv, bias, keys, first, out, lse = ctx.saved_tensors
    if torch.is_grad_enabled():  # somebody wants to differentiate the gradients
        _, height, width, window, scale = ctx.numbers
        keys = keys[:, : bias.shape[-1]].long()
        visible = (keys >= 0)[:, None]
        index = AttentionIndex(height, width, window, len(keys), keys.clamp(min=0), visible, ())
        out = plain_attention(qkv, index, bias, scale, fused=False)
        wanted = [x for x in (qkv, bias) if x.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, d_out, create_graph=True))
        return *(next(found) if x.requires_grad else None for x in (qkv, bias)), *(None,) * 7
    with_bias = ctx.needs_input_grad[1]
    arrays = (d_out, qkv, out, lse, bias, keys, first)
    d_qkv, d_bias = attention_backward(*arrays, *ctx.numbers, with_bias)
    return d_qkv, d_bias.to(bias.dtype) if with_bias else None, *(None,) * 7


attention.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(getattr(torch.ops, NAMESPACE).triton_attention)
def _attention_flops(qkv_shape, bias_shape, keys_shape, *_, **__) -> int:
    """Two products of B*N*P matrices [Q, K'] with vectors of width D."""
    batch, _, _, heads, dim = qkv_shape
    return 2 * 2 * batch * heads * keys_shape[0] * bias_shape[2] * bias_shape[3] * dim


@register_flop_formula(getattr(torch.ops, NAMESPACE).triton_attention_backward)
def _attention_backward_flops(d_out_shape, qkv_shape, _, __, bias_shape, keys_shape, *___, **____) -> int:
    """Five products, as PyTorch counts for its own kernels: those of gradients, and the scores once more."""
    return _attention_flops(qkv_shape, bias_shape, keys_shape) // 2 * 5
