"""Focal attention through `torch.nn.functional.scaled_dot_product_attention`: the portable fast path.

Three exact rewritings of the definition: keys that stand twice are folded into one; windows become heads, so
that the call stays four-dimensional (five-dimensional inputs fall to the slow math kernel); and on small
maps, where a window sees nearly everything, no key is gathered at all (`KeyTable.dense`).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from .key_table import KeyTable, merge_windows, split_qkv, split_windows, spread_bias
from .recompute import RecomputedAttention, gather_heads

KEYS_AT_ONCE = 2**21
"""Values of gathered keys, and as many of values, that are worked on at once on the CPU."""


def prepare_bias(bias: Tensor, table: KeyTable, dtype: torch.dtype) -> Tensor:
    """Mask for SDPA in `dtype`: [1, N, T, S] for the dense form, else [1, N*P, Q, G]."""
    return spread_bias(bias, table).flatten(0, 1).to(dtype)[None]


def attend(qkv: Tensor, table: KeyTable, bias: Tensor, scale: float) -> Tensor:
    """See `models.ops.focal_attention`; `bias` comes from `prepare_bias`."""
    trains = torch.is_grad_enabled() and (qkv.requires_grad or bias.requires_grad)
    if not trains or torch.compiler.is_compiling():
        return _attend(qkv, table, bias, scale)
    if qkv.device.type == "cpu":
        return RecomputedAttention.apply(qkv, bias, table, scale, _attend)
    # Elsewhere the kernels have all gradients; gathered keys are gathered again rather than kept.
    return checkpoint(_attend, qkv, table, bias, scale, use_reentrant=False, preserve_rng_state=False)


def _attend(qkv: Tensor, table: KeyTable, bias: Tensor, scale: float) -> Tensor:
    q, k, v = split_qkv(qkv, table)
    if table.dense is not None:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, N, T or S, D]
        return _attention(q, k, v, bias, scale).transpose(1, 2).flatten(2)
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if qkv.device.type == "cpu" and not torch.is_grad_enabled() and not is_traced:
        return _attend_in_pieces(q, k, v, table, bias, scale)
    index, heads = table.gathered_index, q.shape[2]
    windows = split_windows(q, table)  # [B, N, P, Q, D]
    keys, values = (
        x.transpose(1, 2).index_select(2, index.flatten()).reshape(len(x), -1, index.shape[1], x.shape[-1])
        for x in (k, v)
    )  # [B, N*P, G, D]
    out = _attention(windows.flatten(1, 2), keys, values, bias, scale)
    return merge_windows(out.unflatten(1, (heads, -1)), table)


def _attend_in_pieces(q: Tensor, k: Tensor, v: Tensor, table: KeyTable, bias: Tensor, scale: float) -> Tensor:
    """A few images at a time, whose gathered keys use the same memory again and again: fresh memory of their
    size would cost more than filling it.

    Args:
        q: [B, T, N, D].
        k, v: [B, S, N, D].

    Returns:
        [B, T, N*D].
    """
    (images, tokens, heads, dim), index = q.shape, table.gathered_index
    at_once = min(images, max(1, KEYS_AT_ONCE // (heads * index.numel() * dim)))
    gathered = q.new_empty(2, at_once, heads, index.numel(), dim)
    out = q.new_empty(images, tokens, heads * dim)
    for qs, ks, vs, target in zip(*(x.split(at_once) for x in (q, k, v, out)), strict=True):
        for source, buffer in zip((ks, vs), gathered, strict=True):
            for image, rows in zip(source.transpose(1, 2), buffer, strict=False):
                gather_heads(image, index, rows)
        keys, values = gathered[:, : len(qs)].unflatten(3, index.shape).flatten(2, 3)
        attended = _attention(split_windows(qs, table).flatten(1, 2), keys, values, bias, scale)
        target.copy_(merge_windows(attended.unflatten(1, (heads, -1)), table))
    return out


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Four-dimensional attention with an additive mask.

    On CUDA the cuDNN kernel is kept out: with a mask it has returned wrong values and NaN gradients.
    """
    kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
