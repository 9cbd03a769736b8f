"""Focal attention on the CPU, forward and backward: products of a few windows at a time.

A piece of one image's windows gathers its queries, keys and values, and all that follows up to the result
stays in the caches: gathered keys and scores are never written to memory. The backward pass keeps q, k, v and
the bias, computes the probabilities again, and writes what gathered keys ask for, of one image at a time:

    P = softmax(scale q k' + bias),  dv = P' do,  dP = do v',  ds = P * (dP - rowsum(dP * P)),
    dq = scale ds k,  dk = scale ds' q,  dbias = sum of ds over the batch.

A piece holds q, k and v of one score matrix beside each other. PyTorch shares an operation out to threads in
equal runs of rows, so most give a thread the matrices that it had before; what another core has in its cache
is dear where the two share none. On two virtual cores of an EPYC, at times when they did not (200 ns for a
cache line from one to the other, else 50), forward took 0.74 and backward 0.85 to 0.88 of the time that it
took with all q, all k and all v of a piece after one another, as in commit 212d091; at other times both took
the same (stages 1 and 2 of Focal-T, batch 8, 2026-11-27, torch 2.14.1). Where products of float32 matrices
may run in bfloat16, oneDNN copies q, k and v first.

The gradient of a key is the sum over the slots that read it, taken in a fixed order: two runs give the same
bits. (PyTorch's fused CPU kernel has no gradient for a bias; with a learned one, autograd falls back to plain
products and keeps gathered keys, scores and probabilities.)

To PyTorch `cpu_attention` is one operator with a gradient, which compile, autocast and checkpointing
see as a whole. It has no second derivative; the reference backend has.

Legend: as `key_table`; B batch, N heads, D head width, M score matrices of an image, Q x G each: N*P windows,
or in the dense form N whole maps with Q = T and G = S; m of them in a piece. An image's packed map, [S, 3, N,
D], is a table of S*3*N *rows* of width D; so is its output, of T*N rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from .key_table import NAMESPACE, KeyTable, kept_with_tables

SCORES_AT_ONCE = 2**17
"""Scores per thread that are worked on at once, so that two copies of them stay in a core's cache."""


CACHED_TABLES = 128
"""Key tables whose row numbers are kept: some MB each for maps of 112 x 112 tokens."""


@dataclass(frozen=True)
class Rows:
    """Which rows the pieces read and write, int32."""

    read: tuple[Tensor, ...]  # [m*(Q + 2G)] rows of the packed map: q, k, v of each matrix of a piece
    asked: tuple[Tensor, ...]  # [m*Q] rows of the output that a piece makes
    made_by: Tensor  # [T*N] query, of all M*Q, that makes a row of the output


@dataclass(frozen=True)
class Slots:
    """Where the rows of the packed map were read into, of M*Q queries, M*G keys and M*G values, int32."""

    slots: Tensor  # sorted by row
    first: Tensor  # [S*3*N] where those of a row begin


def attend(qkv: Tensor, table: KeyTable, bias: Tensor, scale: float) -> Tensor:
    """See `models.ops.focal_attention`; `bias` comes from `sdpa.prepare_bias`."""
    index = table.gathered_index if table.dense is None else None
    size = (table.height, table.width, table.window)
    return attention(qkv, bias, index, table.readers, table.first_reader, *size, scale)


_TABLE = "Tensor? index, Tensor readers, Tensor first_reader, int height, int width, int window"


@torch.library.custom_op(
    f"{NAMESPACE}::cpu_attention",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor qkv, Tensor bias, {_TABLE}, float scale) -> Tensor",
)
def attention(qkv, bias, index, readers, first_reader, height, width, window, scale):
    """Output [B, T, N*D] of [B, S, 3, N, D] with the bias [1, M, Q, G]; in the dense form `index` is None."""
    if index is None:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, N, S, D]
        q = q[:, :, : height * width]
        bias = bias.detach()  # one that wants a gradient would lose the fused kernel
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        return out.transpose(1, 2).flatten(2)
    return _forward(qkv, bias, index, (height, width, window), scale)


@torch.library.custom_op(
    f"{NAMESPACE}::cpu_attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor d_out, Tensor qkv, Tensor bias, {_TABLE}, float scale) -> (Tensor, Tensor)",
)
def attention_backward(d_out, qkv, bias, index, readers, first_reader, height, width, window, scale):
    """Gradients of `qkv` and of the bias."""
    if index is None:
        return _backward_dense(d_out, qkv, bias, scale)
    return _backward(d_out, qkv, bias, index, (readers, first_reader), (height, width, window), scale)


@attention.register_fake
def _attention_fake(qkv, bias, index, readers, first_reader, height, width, window, scale):
    return qkv.new_empty(qkv.shape[0], height * width, qkv.shape[3] * qkv.shape[4])


@attention_backward.register_fake
def _attention_backward_fake(d_out, qkv, bias, index, readers, first_reader, height, width, window, scale):
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)


def _keep(ctx, inputs, output) -> None:
    qkv, bias, index, readers, first_reader, *ctx.numbers = inputs
    ctx.save_for_backward(qkv, bias, index, readers, first_reader)


def _gradients(ctx, d_out):
    return *attention_backward(d_out, *ctx.saved_tensors, *ctx.numbers), *(None,) * 7


attention.register_autograd(_gradients, setup_context=_keep)


def _forward(qkv: Tensor, bias: Tensor, index: Tensor, size: tuple[int, ...], scale: float) -> Tensor:
    """As `attention`, with gathered keys; `size` is that of the map and of a window."""
    heads, dim = qkv.shape[3:]
    bias = _wide(bias[0])
    matrices, queries, keys = bias.shape
    step = _at_once(bias)
    rows = _rows(index, *size, heads, step)
    out = qkv.new_empty(len(qkv), len(rows.made_by), dim)
    results = bias.new_empty(matrices, queries, dim)
    read = bias.new_empty(step * (queries + 2 * keys), dim)
    scores = bias.new_empty(step, queries, keys)
    pieces = []
    for source, b, result in zip(rows.read, bias.split(step), results.split(step), strict=True):
        target = read[: len(source)]
        pieces.append((source, target, *_gathered_parts(target, queries, keys), b, result, scores[: len(b)]))
    for image, answer in zip(_wide(qkv.flatten(1, 3)), out, strict=True):
        for source, target, q, k, v, b, result, s in pieces:
            torch.index_select(image, 0, source, out=target)
            torch.baddbmm(b, q, k.mT, alpha=scale, out=s)
            torch.softmax(s, dim=-1, out=s)
            torch.bmm(s, v, out=result)
        if out.dtype == results.dtype:
            torch.index_select(results.view(-1, dim), 0, rows.made_by, out=answer)
        else:
            answer.copy_(results.view(-1, dim)[rows.made_by])
    return out.view(len(qkv), size[0] * size[1], heads * dim)


def _backward(
    d_out: Tensor,
    qkv: Tensor,
    bias: Tensor,
    index: Tensor,
    readers: tuple[Tensor, Tensor],
    size: tuple[int, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `attention_backward`, with gathered keys; `size` as in `_forward`."""
    heads, dim = qkv.shape[3:]
    d_qkv, dtype, bias = qkv.new_empty(qkv.shape), bias.dtype, _wide(bias[0])
    d_bias = bias.new_zeros(bias.shape)
    matrices, queries, keys = bias.shape
    step = _at_once(bias)
    rows = _rows(index, *size, heads, step)
    slots = _slots(*readers, index.numel(), *size, heads)
    read = bias.new_empty(step * (queries + 2 * keys), dim)
    asked = bias.new_empty(step * queries, dim)
    gradients = bias.new_empty(matrices * (queries + 2 * keys), dim)
    buffers = bias.new_empty(2, step, queries, keys)
    parts = (bias, *_gradient_parts(gradients, queries, keys), d_bias)
    pieces = []
    for source, answers, *part in zip(rows.read, rows.asked, *(x.split(step) for x in parts), strict=True):
        target, do = read[: len(source)], asked[: len(answers)]
        operands = (*_gathered_parts(target, queries, keys), do.view(-1, queries, dim), *part)
        pieces.append((source, target, answers, do, (*operands, *buffers[:, : len(part[0])])))
    images, slopes = _wide(qkv.flatten(1, 3)), _wide(d_out.unflatten(2, (heads, dim)).flatten(1, 2))
    for image, slope, d_image in zip(images, slopes, d_qkv, strict=True):
        for source, target, answers, do, operands in pieces:
            torch.index_select(image, 0, source, out=target)
            torch.index_select(slope, 0, answers, out=do)
            _to_gradients(scale, *operands)
        d_image.copy_(F.embedding_bag(slots.slots, gradients, slots.first, mode="sum").view(d_image.shape))
    return d_qkv, d_bias[None].to(dtype)


def _backward_dense(d_out: Tensor, qkv: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `attention_backward`, where every query sees the whole map: nothing is gathered."""
    d_qkv, dtype, bias = qkv.new_empty(qkv.shape), bias.dtype, _wide(bias[0])
    d_bias = bias.new_zeros(bias.shape)
    heads, queries, keys = bias.shape
    step = _at_once(bias)
    dq = bias.new_empty(heads, queries, qkv.shape[4])
    dk, dv = bias.new_empty(2, heads, keys, qkv.shape[4])
    buffers = bias.new_empty(2, step, queries, keys)
    d_qkv[:, queries:, 0] = 0  # nobody asks with a pooled token
    images = _wide(qkv).permute(0, 2, 3, 1, 4)  # [B, 3, N, S, D]
    slopes = _wide(d_out).unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, N, T, D]
    for (q, k, v), do, d_image in zip(images, slopes, d_qkv.permute(0, 2, 3, 1, 4), strict=True):
        arrays = (q[:, :queries], k, v, do, bias, dq, dk, dv, d_bias)
        for operands in zip(*(array.split(step) for array in arrays), strict=True):
            _to_gradients(scale, *operands, *buffers[:, : len(operands[0])])
        for part, gradient in zip((d_image[0, :, :queries], *d_image[1:]), (dq, dk, dv), strict=True):
            part.copy_(gradient)
    return d_qkv, d_bias[None].to(dtype)


def _to_gradients(
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    bias: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    d_bias: Tensor,
    probabilities: Tensor,
    d_scores: Tensor,
) -> None:
    """Gradients of a piece.

    Args:
        scale: factor of the scores.
        q, do: queries, and the output's gradient, [m, Q, D].
        k, v: [m, G, D].
        bias: [m, Q, G].
        dq, dk, dv: written to, as q, k, v.
        d_bias: added to, as `bias`.
        probabilities, d_scores: written to, as `bias`.
    """
    torch.baddbmm(bias, q, k.mT, alpha=scale, out=probabilities)
    torch.softmax(probabilities, dim=-1, out=probabilities)
    torch.bmm(do, v.mT, out=d_scores)
    torch.bmm(probabilities.mT, do, out=dv)
    torch.ops.aten._softmax_backward_data.out(
        d_scores, probabilities, -1, d_scores.dtype, grad_input=d_scores
    )
    d_bias += d_scores
    dq.baddbmm_(d_scores, k, beta=0, alpha=scale)
    dk.baddbmm_(d_scores.mT, q, beta=0, alpha=scale)


def _at_once(bias: Tensor) -> int:
    """Score matrices of a piece, of all in the bias [M, Q, G]; as many for each thread, if possible."""
    threads = max(2, torch.get_num_threads())
    step = ceil(len(bias) / max(1, round(bias.numel() / (SCORES_AT_ONCE * threads))))
    return min(len(bias), threads * ceil(step / threads)) if step > threads else step


def _gathered_parts(rows: Tensor, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, which lie beside each other: [m*(Q + 2G), D] -> [m, Q or G, D]."""
    q, k, v = rows.unflatten(0, (-1, queries + 2 * keys)).split((queries, keys, keys), dim=1)
    return q, k, v


def _gradient_parts(rows: Tensor, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of all queries, then all keys, then all values: [m*(Q + 2G), D] -> [m, Q or G, D].

    `Slots` counts them so; and PyTorch computes products into arrays that are not contiguous one by one.
    """
    count = len(rows) // (queries + 2 * keys)
    q, k, v = rows.split((count * queries, count * keys, count * keys))
    return q.view(count, queries, -1), k.view(count, keys, -1), v.view(count, keys, -1)


def _wide(x: Tensor) -> Tensor:
    """`x` in float32 or more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _windows(height: int, width: int, window: int) -> tuple[Tensor, Tensor]:
    """Tokens of every window [P, Q], and which query each token is, [T]."""
    tokens = torch.arange(height * width).view(height // window, window, width // window, window)
    tokens = tokens.transpose(1, 2).reshape(-1, window**2)
    return tokens, tokens.flatten().argsort()


@kept_with_tables(CACHED_TABLES)
def _rows(index: Tensor, height: int, width: int, window: int, heads: int, step: int) -> Rows:
    """Rows of pieces of `step` score matrices, for keys `index` [P, G]."""
    tokens, query = _windows(height, width, window)
    head = torch.arange(heads)[:, None, None]
    q = ((tokens * 3) * heads + head).flatten(0, 1).int().split(step)
    k = ((index * 3 + 1) * heads + head).flatten(0, 1).int().split(step)
    return Rows(
        tuple(torch.cat([a, b, b + heads], dim=1).flatten() for a, b in zip(q, k, strict=True)),
        tuple(part.flatten() for part in (tokens * heads + head).flatten(0, 1).int().split(step)),
        (query[:, None] + head.view(-1) * height * width).flatten().int(),
    )


@kept_with_tables(CACHED_TABLES)
def _slots(
    readers: Tensor, first_reader: Tensor, keys: int, height: int, width: int, window: int, heads: int
) -> Slots:
    """Slots of all rows, where windows see `keys` = P*G keys in all (see `KeyTable`)."""
    _, query = _windows(height, width, window)
    tokens, fine, head = len(first_reader), height * width, torch.arange(heads)
    reads = first_reader.diff(append=torch.tensor([len(readers)]))  # [S]
    counts = torch.zeros(tokens, 3, heads, dtype=torch.long)
    counts[:fine, 0] = 1  # nobody asks with a pooled token
    counts[:, 1:] = reads[:, None, None]
    first = (counts.flatten().cumsum(0) - counts.flatten()).view(counts.shape)
    slots = torch.empty(int(counts.sum()), dtype=torch.int32)
    slots[first[:fine, 0]] = (query[:, None] + head * fine).int()
    token = torch.arange(tokens).repeat_interleave(reads)
    rank = torch.arange(len(readers)) - first_reader[token]
    for part in (1, 2):
        begin = heads * (fine + (part - 1) * keys)
        slots[first[token, part] + rank[:, None]] = (begin + readers[:, None] + head * keys).int()
    return Slots(slots, first.flatten().int())
