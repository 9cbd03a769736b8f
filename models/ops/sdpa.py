"""Focal attention through `torch.nn.functional.scaled_dot_product_attention`: the portable fast path.

On the CPU `cpu_kernel` does the work, but for what its operator has no rules for (`may_wrap`).

Three exact rewritings of the definition: keys that stand twice are folded into one; windows become heads, so
that the call stays four-dimensional (five-dimensional inputs fall to the slow math kernel); and on small
maps, where a window sees nearly everything, no key is gathered at all (`KeyTable.dense`).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from . import cpu_kernel
from .key_table import KeyTable, merge_windows, split_qkv, split_windows, spread_bias

TELLS_EXPORTS = torch.__version__ >= "2.9"
"""Whether a strict export can be told from torch.compile; else compiled inference goes without operators."""


def prepare_bias(bias: Tensor, table: KeyTable, dtype: torch.dtype) -> Tensor:
    """Mask for SDPA in `dtype`: [1, N, T, S] for the dense form, else [1, N*P, Q, G]."""
    return spread_bias(bias, table).flatten(0, 1).to(dtype)[None]


def attend(qkv: Tensor, table: KeyTable, bias: Tensor, scale: float) -> Tensor:
    """See `models.ops.focal_attention`; `bias` comes from `prepare_bias`."""
    trains = torch.is_grad_enabled() and (qkv.requires_grad or bias.requires_grad)
    on_cpu = qkv.device.type == "cpu"
    if not (trains or on_cpu) or not may_wrap(trains):
        return _attend(qkv, table, bias, scale)
    if on_cpu:
        return cpu_kernel.attend(qkv, table, bias, scale)
    # Elsewhere the kernels have all gradients; gathered keys are gathered again rather than kept.
    return checkpoint(_attend, qkv, table, bias, scale, use_reentrant=False, preserve_rng_state=False)


def may_wrap(trains: bool) -> bool:
    """Whether this runs here, with nothing asked of it but its gradient.

    Not in graphs that are made to run without this package, within `torch.func` or in forward-mode AD.
    """
    if torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        is_export = torch.compiler._is_exporting_flag if TELLS_EXPORTS else not trains
        return torch.compiler.is_dynamo_compiling() and not is_export
    return not torch.jit.is_tracing() and forward_ad._current_level < 0


def _attend(qkv: Tensor, table: KeyTable, bias: Tensor, scale: float) -> Tensor:
    q, k, v = split_qkv(qkv, table)
    if table.dense is not None:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, N, T or S, D]
        return _attention(q, k, v, bias, scale).transpose(1, 2).flatten(2)
    index, heads = table.gathered_index, q.shape[2]
    windows = split_windows(q, table)  # [B, N, P, Q, D]
    keys, values = (
        x.transpose(1, 2).index_select(2, index.flatten()).reshape(len(x), -1, index.shape[1], x.shape[-1])
        for x in (k, v)
    )  # [B, N*P, G, D]
    out = _attention(windows.flatten(1, 2), keys, values, bias, scale)
    return merge_windows(out.unflatten(1, (heads, -1)), table)


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Four-dimensional attention with an additive mask.

    On CUDA the cuDNN kernel is kept out: with a mask it has returned wrong values and NaN gradients.
    Forward-mode AD has only the plain products.
    """
    is_dual = forward_ad._current_level >= 0
    kernels = [SDPBackend.MATH] if is_dual else [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels) if q.is_cuda or is_dual else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
