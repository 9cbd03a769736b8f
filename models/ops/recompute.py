"""Attention for training on the CPU: keeps q, k, v, the bias and the output for the backward pass, nothing
else.

PyTorch's fused CPU kernel has no gradient for a bias, so with a learned one autograd falls back to plain
products and keeps gathered keys, scores and probabilities. Here the forward pass stays fused, and the
backward pass computes the probabilities again, a few heads of one image at a time, so that they never leave
the cache:

    P = softmax(scale q k' + bias),  dv = P' do,  ds = P * (do v' - rowsum(do * o)),
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

SCORES_AT_ONCE = 2**19
"""Scores per thread that are worked on at once; some copies of them should fit the cache of a core."""

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
        ctx.save_for_backward(qkv, bias, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, out = ctx.saved_tensors
        heads, fine = qkv.shape[3], out.shape[1]
        grad, out = grad.unflatten(-1, (heads, -1)), out.unflatten(-1, (heads, -1))  # [B, T, N, D]
        gradient = torch.empty_like(qkv)
        gradient[:, fine:, 0] = 0  # nobody asks with a pooled token
        parts = [gradient[:, :fine, 0], gradient[:, :, 1], gradient[:, :, 2]]
        sources = [qkv[:, :fine, 0], qkv[:, :, 1], qkv[:, :, 2], out, grad]
        wide = torch.promote_types(bias.dtype, torch.float32)
        dbias = torch.zeros_like(bias, dtype=wide)
        bias_of, dbias_of = (
            bias[0].unflatten(0, (heads, -1)),
            dbias[0].unflatten(0, (heads, -1)),
        )  # [N, P, Q, K']
        together = max(1, SCORES_AT_ONCE * torch.get_num_threads() // bias_of[0].numel())
        for start in range(0, heads, together):
            group = slice(start, start + together)
            scores_bias, scores_grad = bias_of[group].flatten(0, 1).to(wide), dbias_of[group].flatten(0, 1)
            for b in range(len(qkv)):
                inputs = [x[b, :, group].transpose(0, 1).to(wide) for x in sources]
                results = _group_gradients(inputs, scores_bias, scores_grad, ctx.table, ctx.scale)
                for target, result in zip(parts, results, strict=True):
                    target[b, :, group] = result.transpose(0, 1)
        return gradient, dbias.to(bias.dtype), None, None, None


def _group_gradients(
    inputs: list[Tensor], bias: Tensor, dbias: Tensor, table: KeyTable, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of some heads of one image.

    Args:
        inputs: q [G, T, D], k [G, S, D], v [G, S, D], the output [G, T, D] and its gradient [G, T, D].
        bias: [G*P, Q, K'], with P = 1, Q = T, K' = S for the dense form.
        dbias: added to, as `bias`.

    Returns:
        dq [G, T, D], dk and dv [G, S, D].
    """
    q, k, v, out, grad = inputs
    if table.dense is None:
        q, out, grad = (_to_windows(x, table) for x in (q, out, grad))  # [G*P, Q, D]
        k, v = (_gather(x, table) for x in (k, v))  # [G*P, K', D]
    probabilities = torch.baddbmm(bias, q, k.mT, alpha=scale).softmax(dim=-1)
    dv = torch.bmm(probabilities.mT, grad)
    delta = (grad * out).sum(dim=-1, keepdim=True)
    dscores = torch.bmm(grad, v.mT).sub_(delta).mul_(probabilities)
    dbias += dscores
    dq = torch.bmm(dscores, k).mul_(scale)
    dk = torch.bmm(dscores.mT, q).mul_(scale)
    if table.dense is not None:
        return dq, dk, dv
    heads = len(inputs[0])
    return _from_windows(dq, table), _sum_readers(dk, table, heads), _sum_readers(dv, table, heads)


def _to_windows(x: Tensor, table: KeyTable) -> Tensor:
    """[G, T, D] -> [G*P, Q, D]."""
    s, (g, _, d) = table.window, x.shape
    x = x.reshape(g, table.height // s, s, table.width // s, s, d)
    return x.transpose(2, 3).reshape(-1, s * s, d)


def _from_windows(x: Tensor, table: KeyTable) -> Tensor:
    """[G*P, Q, D] -> [G, T, D]."""
    s, d = table.window, x.shape[-1]
    x = x.reshape(-1, table.height // s, table.width // s, s, s, d)
    return x.transpose(2, 3).reshape(len(x), -1, d)


def _gather(x: Tensor, table: KeyTable) -> Tensor:
    """[G, S, D] -> [G*P, K', D]."""
    windows, keys = table.folded_index.shape
    return x.index_select(1, table.folded_index.flatten()).reshape(len(x) * windows, keys, -1)


def _sum_readers(x: Tensor, table: KeyTable, heads: int) -> Tensor:
    """What every slot asks of its token, summed per token: [G*P, K', D] -> [G, S, D]."""
    slots = x.reshape(heads, -1, x.shape[-1])
    sums = [F.embedding_bag(table.readers, head, table.first_reader, mode="sum") for head in slots]
    return torch.stack(sums)
