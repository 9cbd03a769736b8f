"""Attention for training on the CPU: keeps q, k, v and the bias for the backward pass, nothing else.

PyTorch's fused CPU kernel has no gradient for a bias, so with a learned one autograd falls back to plain
products and keeps gathered keys, scores and probabilities. Here the forward pass stays fused, and the
backward pass computes the probabilities again, a few windows of one image at a time, so that they never leave
the cache:

    P = softmax(scale q k' + bias),  dv = P' do,  dP = do v',  ds = P * (dP - rowsum(dP * P)),
    dq = scale ds k,  dk = scale ds' q,  dbias = sum of ds over the batch.

The gradient of a key is the sum over the slots that read it, taken in a fixed order: two runs give the same
bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .key_table import KeyTable

SCORES_AT_ONCE = 2**17
"""Scores per thread that are worked on at once, so that a few copies of them stay in a core's cache."""

Attend = Callable[[Tensor, KeyTable, Tensor, float], Tensor]


class RecomputedAttention(torch.autograd.Function):
    """`attend` of the sdpa backend, given as the last argument, with the backward pass described above.

    It has no second derivative; the reference backend has.
    """

    @staticmethod
    def forward(qkv: Tensor, bias: Tensor, table: KeyTable, scale: float, attend: Attend) -> Tensor:
        return attend(qkv, table, bias.detach(), scale)  # a bias that wants a gradient loses the fused kernel

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        qkv, bias, ctx.table, ctx.scale, _ = inputs
        ctx.save_for_backward(qkv, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias = ctx.saved_tensors
        table, scale = ctx.table, ctx.scale
        heads, fine = qkv.shape[3], grad.shape[1]
        wide = torch.promote_types(bias.dtype, torch.float32)
        gradient = torch.empty_like(qkv)
        gradient[:, fine:, 0] = 0  # nobody asks with a pooled token
        scores_bias, dbias = bias[0].to(wide), torch.zeros(bias.shape[1:], dtype=wide)  # [N*P, Q, K']
        for image in range(len(qkv)):
            q, k, v = (x.transpose(0, 1).to(wide) for x in qkv[image].unbind(1))  # [N, S, D]
            do = grad[image].unflatten(-1, (heads, -1)).transpose(0, 1).to(wide)
            q, do = (_queries(x, table) for x in (q[:, :fine], do))  # [N*P, Q, D]
            k, v = (_keys(x, table) for x in (k, v))  # [N*P, K', D]
            dq, dk, dv = _products(q, k, v, do, scores_bias, dbias, scale)
            _put_queries(gradient[image, :fine, 0].transpose(0, 1), dq, table)
            _put_keys(gradient[image, :, 1].transpose(0, 1), dk, table)
            _put_keys(gradient[image, :, 2].transpose(0, 1), dv, table)
        return gradient, dbias[None].to(bias.dtype), None, None, None


def _products(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, bias: Tensor, dbias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one image's windows, R = N*P of them, in pieces whose scores fit the cache.

    Args:
        q, grad: queries, and the output's gradient, [R, Q, D].
        k, v: [R, K', D].
        bias: [R, Q, K'].
        dbias: added to, as `bias`.

    Returns:
        dq [R, Q, D], dk and dv [R, K', D].
    """
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    scores_at_once = SCORES_AT_ONCE * max(2, torch.get_num_threads())
    step = min(len(q), max(1, scores_at_once // bias[0].numel()))
    buffers = bias.new_empty(2, step, *bias.shape[1:])  # used again and again: fresh memory costs page faults
    arrays = (q, k, v, grad, bias, dbias, dq, dk, dv)
    for qs, ks, vs, gs, bs, dbs, dqs, dks, dvs in zip(*(x.split(step) for x in arrays), strict=True):
        scores, probabilities = buffers[:, : len(qs)]
        torch.baddbmm(bs, qs, ks.mT, alpha=scale, out=scores)
        torch.softmax(scores, dim=-1, out=probabilities)
        torch.bmm(probabilities.mT, gs, out=dvs)
        torch.bmm(gs, vs.mT, out=scores)
        torch.ops.aten._softmax_backward_data.out(scores, probabilities, -1, scores.dtype, grad_input=scores)
        dbs += scores
        dqs.baddbmm_(scores, ks, beta=0, alpha=scale)
        dks.baddbmm_(scores.mT, qs, beta=0, alpha=scale)
    return dq, dk, dv


def _queries(x: Tensor, table: KeyTable) -> Tensor:
    """[N, T, D] -> [N*P, Q, D]."""
    return _by_windows(x, table).contiguous().flatten(0, 2).flatten(1, 2)


def _put_queries(target: Tensor, x: Tensor, table: KeyTable) -> None:
    """Turn `_queries` back: write [N*P, Q, D] to `target` [N, T, D]."""
    windows = _by_windows(target, table)
    windows.copy_(x.view(windows.shape))


def _by_windows(x: Tensor, table: KeyTable) -> Tensor:
    """A view: [N, T, D] -> [N, H/s, W/s, s, s, D]; the dense form is one window, [N, 1, 1, H, W, D]."""
    height, width = (table.window,) * 2 if table.dense is None else (table.height, table.width)
    x = x.unflatten(1, (table.height // height, height, table.width // width, width))
    return x.transpose(2, 3)


def _keys(x: Tensor, table: KeyTable) -> Tensor:
    """Keys of every window: [N, S, D] -> [N*P, K', D]."""
    if table.dense is not None:
        return x.contiguous()
    gathered = x.new_empty(len(x), table.folded_index.numel(), x.shape[-1])
    gather_heads(x, table.folded_index, gathered)
    return gathered.view(-1, table.folded_index.shape[1], x.shape[-1])


def gather_heads(x: Tensor, index: Tensor, target: Tensor) -> None:
    """Keys of every window of one image, without autograd: [N, S, D], [P, K'] -> `target` [N, P*K', D].

    Head by head, because the CPU copies whole rows fastest.
    """
    for head, rows in zip(x, target, strict=True):
        torch.index_select(head, 0, index.flatten(), out=rows)


def _put_keys(target: Tensor, x: Tensor, table: KeyTable) -> None:
    """Turn `_keys` back: add up in `target` [N, S, D] what all windows ask of a token, [N*P, K', D]."""
    if table.dense is not None:
        target.copy_(x)
        return
    for head, slots in zip(target, x.view(len(target), -1, x.shape[-1]), strict=True):
        head.copy_(F.embedding_bag(table.readers, slots, table.first_reader, mode="sum"))
