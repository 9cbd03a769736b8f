"""Attention for training on the CPU: keeps q, k, v and the bias for the backward pass, nothing else.

PyTorch's fused CPU kernel has no gradient for a bias, so with a learned one autograd falls back to plain
products and keeps gathered keys, scores and probabilities. Here the forward pass stays fused, and the
backward pass computes the probabilities again, a few windows of one image at a time, so that they never leave
the cache:

    P = softmax(scale q k' + bias),  dv = P' do,  dP = do v',  ds = P * (dP - rowsum(dP * P)),
    dq = scale ds k,  dk = scale ds' q,  dbias = sum of ds over the batch.

The gradient of a key is the sum over the slots that read it, taken in a fixed order: two runs give the same
bits.

Legend: as `key_table`. R score matrices of an image, Q x G each: N*P windows, or in the dense form N whole
maps with Q = T and G = S.
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
        table, (heads, dim) = ctx.table, qkv.shape[3:]
        fine = grad.shape[1]
        wide = torch.promote_types(bias.dtype, torch.float32)
        gradient = torch.empty_like(qkv)
        gradient[:, fine:, 0] = 0  # nobody asks with a pooled token
        scores_bias, dbias = bias[0].to(wide), torch.zeros(bias.shape[1:], dtype=wide)  # [R, Q, G]
        rows, queries, keys = scores_bias.shape
        # One image's arrays, used for the next one as well: fresh memory costs page faults.
        q, do = scores_bias.new_empty(2, rows, queries, dim)
        k, v = scores_bias.new_empty(2, rows, keys, dim)
        pieces = _pieces(q, k, v, do, scores_bias, dbias)
        for image, slopes, target in zip(qkv, grad.unflatten(-1, (heads, -1)), gradient, strict=True):
            from_q, from_k, from_v = image.permute(1, 2, 0, 3)  # [N, S, D]
            _get_queries(from_q[:, :fine], q, table)
            _get_queries(slopes.transpose(0, 1), do, table)
            _get_keys(from_k, k, table)
            _get_keys(from_v, v, table)
            for piece in pieces:
                _to_gradients(ctx.scale, *piece)
            dq, dk, dv = do, k, v
            to_q, to_k, to_v = target.permute(1, 2, 0, 3)
            _put_queries(dq, to_q[:, :fine], table)
            _put_keys(dk, to_k, table)
            _put_keys(dv, to_v, table)
        return gradient, dbias[None].to(bias.dtype), None, None, None


def _pieces(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, bias: Tensor, dbias: Tensor
) -> list[tuple[Tensor, ...]]:
    """Arguments of `_to_gradients` after the first: views of some windows each, whose scores fit the cache.

    Args:
        q, do: [R, Q, D].
        k, v: [R, G, D].
        bias, dbias: [R, Q, G].
    """
    scores_at_once = SCORES_AT_ONCE * max(2, torch.get_num_threads())
    step = min(len(q), max(1, scores_at_once // bias[0].numel()))
    buffers = bias.new_empty(2, step, *bias.shape[1:])
    parts = zip(*(x.split(step) for x in (q, k, v, do, bias, dbias)), strict=True)
    return [(*part, *buffers[:, : len(part[0])]) for part in parts]


def _to_gradients(
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    bias: Tensor,
    dbias: Tensor,
    scores: Tensor,
    probabilities: Tensor,
) -> None:
    """Gradients of some windows in place of what they are computed from: dk in `k`, dv in `v`, dq in `do`.

    Args:
        scale: factor of the scores.
        q, do: queries, and the output's gradient, [r, Q, D].
        k, v: [r, G, D].
        bias: [r, Q, G].
        dbias: added to, as `bias`.
        scores, probabilities: written to, as `bias`.
    """
    torch.baddbmm(bias, q, k.mT, alpha=scale, out=scores)
    torch.softmax(scores, dim=-1, out=probabilities)
    torch.bmm(do, v.mT, out=scores)
    torch.bmm(probabilities.mT, do, out=v)
    torch.ops.aten._softmax_backward_data.out(scores, probabilities, -1, scores.dtype, grad_input=scores)
    dbias += scores
    do.baddbmm_(scores, k, beta=0, alpha=scale)
    k.baddbmm_(scores.mT, q, beta=0, alpha=scale)


def _get_queries(x: Tensor, target: Tensor, table: KeyTable) -> None:
    """Write [N, T, D] to `target` [N*P, Q, D]."""
    windows = _by_windows(x, table)
    target.view(windows.shape).copy_(windows)


def _put_queries(x: Tensor, target: Tensor, table: KeyTable) -> None:
    """Turn `_get_queries` back: write [N*P, Q, D] to `target` [N, T, D]."""
    windows = _by_windows(target, table)
    windows.copy_(x.view(windows.shape))


def _by_windows(x: Tensor, table: KeyTable) -> Tensor:
    """A view: [N, T, D] -> [N, H/s, W/s, s, s, D]; the dense form is one window, [N, 1, 1, H, W, D]."""
    height, width = (table.window,) * 2 if table.dense is None else (table.height, table.width)
    x = x.unflatten(1, (table.height // height, height, table.width // width, width))
    return x.transpose(2, 3)


def _get_keys(x: Tensor, target: Tensor, table: KeyTable) -> None:
    """Write the keys of every window, of [N, S, D], to `target` [N*P, G, D]."""
    if table.dense is not None:
        target.copy_(x)
    else:
        gather_heads(x.to(target.dtype), table.gathered_index, target.view(len(x), -1, x.shape[-1]))


def gather_heads(x: Tensor, index: Tensor, target: Tensor) -> None:
    """Keys of every window of one image, without autograd: [N, S, D], [P, G] -> `target` [N, P*G, D].

    Head by head, because the CPU copies whole rows fastest.
    """
    for head, rows in zip(x, target, strict=True):
        torch.index_select(head, 0, index.flatten(), out=rows)


def _put_keys(x: Tensor, target: Tensor, table: KeyTable) -> None:
    """Turn `_get_keys` back: add up in `target` [N, S, D] what all windows ask of a token, [N*P, G, D]."""
    if table.dense is not None:
        target.copy_(x)
        return
    for slots, head in zip(x.view(len(target), -1, x.shape[-1]), target, strict=True):
        head.copy_(F.embedding_bag(table.readers, slots, table.first_reader, mode="sum"))
