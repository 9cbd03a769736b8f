"""Focal attention on the CPU, forward and backward, in pieces of a few windows.

A piece gathers its queries, keys and values and computes its result at once, so that gathered keys and scores
stay in the CPU's caches. The backward pass saves only qkv and the bias; it computes the probabilities again,
and the gradients of gathered keys one image at a time:

    P = softmax(scale q k' + bias),  dv = P' do,  dP = do v',  ds = P * (dP - rowsum(dP * P)),
    dq = scale ds k,  dk = scale ds' q,  dbias = sum of ds over the batch.

In a piece, q, k and v of one score matrix lie next to each other, so that a thread mostly gathers what it
multiplies. The gradient of a key is a sum over all windows that read it, in a fixed order: two runs give the
same bits.

To PyTorch `cpu_attention` is one operator with a gradient, which compile, autocast and checkpointing see as a
whole. Its second derivative is that of the plain operator.

Legend: as in `focal_transformer`; G keys of a window as they are gathered, M = N*P score matrices of an image
[Q, G], m of them in a piece. An image's qkv [S, 3, N, D] is a table of S*3*N *rows* of width D; so is its
output, of T*N rows.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from math import ceil, inf

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula, sdpa_flop_count

from ..focal_transformer import BACKENDS, AttentionIndex, Backend, Request, Unsupported
from .tables import NAMESPACE, MergedKeys, differentiable_gradients, merge_bias, merge_duplicates

SCORES_AT_ONCE = 2**17
"""Scores per thread that are worked on at once, so that two copies of them stay in a core's cache."""

KEYS_MULTIPLE = 16
"""Keys of a window are filled up to a multiple of this, so that rows of scores begin where vectors do."""


@dataclass(frozen=True, eq=False)
class CpuTables:
    """What `attend` needs of an index."""

    merged: MergedKeys
    keys: Tensor  # int64 [P, G]: the merged keys, filled up with copies of the last one
    filling: int  # G - K'
    mask: Tensor | None  # float32 [P, 1 or Q, G]: -inf where a key is absent or fills up; None without such
    rows: list[Tensor]  # of `row_numbers`


def prepare(index: AttentionIndex, request: Request) -> CpuTables:
    """See `Backend`. Keys are filled up where that adds an eighth at most."""
    if request.device.type != "cpu":
        raise Unsupported(f"needs tensors on the CPU, got {request.device}")
    if not request.dtype.is_floating_point:
        raise Unsupported(f"needs floating-point numbers, got {request.dtype}")
    merged = merge_duplicates(index)
    count = merged.keys.shape[1]
    more = -count % KEYS_MULTIPLE
    more = more if 8 * more <= count else 0
    keys, seen = torch.cat([merged.keys, merged.keys[:, -1:].expand(-1, more)], dim=1), merged.visible
    if seen is None and more:
        seen = torch.ones(len(keys), 1, count, dtype=torch.bool, device=keys.device)
    mask = None
    if seen is not None:
        zeros = torch.zeros(seen.shape, dtype=torch.float32, device=keys.device)
        mask = F.pad(zeros.masked_fill_(~seen, -inf), (0, more), value=-inf)
    return CpuTables(merged, keys, more, mask, row_numbers(index, keys, request.heads, request.trains))


def attend(qkv: Tensor, index: AttentionIndex, bias: Tensor, scale: float) -> Tensor:
    """See `Backend`."""
    made: CpuTables = index.tables
    bias = merge_bias(made.merged, bias)
    bias = F.pad(bias, (0, made.filling)) if made.filling else bias
    size = (index.height, index.width, index.window)
    return attention(qkv, bias.to(qkv.dtype), made.mask, made.keys, made.rows, *size, scale)


@torch.library.custom_op(
    f"{NAMESPACE}::cpu_attention",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor qkv, Tensor bias, Tensor? mask, Tensor keys, Tensor[] rows, int height, int width, "
    "int window, float scale) -> Tensor",
)
def attention(qkv, bias, mask, keys, rows, height, width, window, scale):
    """Output [B, T, N*D] of qkv [B, S, 3, N, D], bias [N, P or 1, Q, G] and the mask of `CpuTables`."""
    return _forward(qkv, _of_all_windows(bias, mask, len(keys)), rows, scale)


@torch.library.custom_op(
    f"{NAMESPACE}::cpu_attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor d_out, Tensor qkv, Tensor bias, Tensor? mask, Tensor keys, Tensor read, Tensor asked, "
    "Tensor slots, Tensor first, float scale) -> (Tensor, Tensor)",  # no list: batched gradients take none
)
def attention_backward(d_out, qkv, bias, mask, keys, read, asked, slots, first, scale):
    """Gradients of `qkv` and of the bias."""
    rows, windows = (read, asked, slots, first), len(keys)
    d_qkv, d_bias = _backward(d_out, qkv, _of_all_windows(bias, mask, windows), rows, scale)
    d_bias = d_bias.unflatten(0, (-1, windows))
    d_bias = d_bias.sum(dim=1, keepdim=True) if bias.shape[1] < windows else d_bias
    return d_qkv, d_bias.to(bias.dtype)


@attention.register_fake
def _attention_fake(qkv, bias, mask, keys, rows, height, width, *_):
    return qkv.new_empty(qkv.shape[0], height * width, qkv.shape[3] * qkv.shape[4])


@attention_backward.register_fake
def _attention_backward_fake(d_out, qkv, bias, *_):
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)


def _save(ctx, inputs, output) -> None:
    qkv, bias, mask, keys, rows, *ctx.numbers = inputs
    ctx.save_for_backward(qkv, bias, mask, keys, *rows)


def _gradients(ctx, d_out):
    qkv, bias, mask, keys, *rows = ctx.saved_tensors
    rest = (None, None, [None] * len(rows), *(None,) * 4)
    if torch.is_grad_enabled():  # somebody wants to differentiate the gradients
        height, width, window, scale = ctx.numbers
        visible = None if mask is None else mask == 0
        index = AttentionIndex(height, width, window, qkv.shape[1], keys, visible, ())
        return *differentiable_gradients(qkv, bias, d_out, index, scale), *rest
    read, _, *others = rows
    return *attention_backward(d_out, qkv, bias, mask, keys, read, *others, ctx.numbers[-1]), *rest


attention.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(getattr(torch.ops, NAMESPACE).cpu_attention)
def _attention_flops(qkv_shape, bias_shape, _, keys_shape, *__, **___) -> int:
    """Two products of B*N*P matrices [Q, G] with vectors of width D."""
    batch, _, _, heads, dim = qkv_shape
    return 2 * 2 * batch * heads * dim * bias_shape[2] * int(np.prod(keys_shape))


@register_flop_formula(getattr(torch.ops, NAMESPACE).cpu_attention_backward)
def _attention_backward_flops(_, *shapes, **__) -> int:
    """Five products: the scores again, and those of dv, dP, dq and dk."""
    return _attention_flops(*shapes) // 2 * 5


with suppress(RuntimeError):  # where PyTorch has a formula for its CPU kernel; 2.14 has none
    register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)(
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    )


def _forward(qkv: Tensor, bias: Tensor, rows: list[Tensor], scale: float) -> Tensor:
    """As `attention`; bias [M, Q, G]."""
    heads, dim = qkv.shape[3:]
    matrices, queries, count = bias.shape
    step = _at_once(bias)
    reads, made_by = rows[0].split(step * (queries + 2 * count)), rows[1]
    out = bias.new_empty(len(qkv), len(made_by), dim)
    results = bias.new_empty(matrices, queries, dim)
    read = bias.new_empty(step * (queries + 2 * count), dim)
    scores = bias.new_empty(step, queries, count)
    pieces = []
    for source, b, result in zip(reads, bias.split(step), results.split(step), strict=True):
        target = read[: len(source)]
        pieces.append((source, target, *_gathered_parts(target, queries, count), b, result, scores[: len(b)]))
    for image, answer in zip(_wide(qkv.flatten(1, 3)), out, strict=True):
        for source, target, q, k, v, b, result, s in pieces:
            torch.index_select(image, 0, source, out=target)
            torch.baddbmm(b, q, k.mT, alpha=scale, out=s)
            torch.softmax(s, dim=-1, out=s)
            torch.bmm(s, v, out=result)
        torch.index_select(results.view(-1, dim), 0, made_by, out=answer)
    return out.view(len(qkv), len(made_by) // heads, heads * dim).to(qkv.dtype)


def _backward(
    d_out: Tensor, qkv: Tensor, bias: Tensor, rows: tuple[Tensor, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """As `attention_backward`; bias [M, Q, G], rows without `made_by`."""
    heads, dim = qkv.shape[3:]
    d_qkv, d_bias = qkv.new_empty(qkv.shape), bias.new_zeros(bias.shape)
    matrices, queries, count = bias.shape
    step = _at_once(bias)
    read, asked, slots, first = rows
    reads, asks = read.split(step * (queries + 2 * count)), asked.split(step * queries)
    operands = bias.new_empty(step * (queries + 2 * count), dim)
    slope = bias.new_empty(step * queries, dim)
    gradients = bias.new_empty(matrices * (queries + 2 * count), dim)
    buffers = bias.new_empty(2, step, queries, count)
    parts = (bias, *_gradient_parts(gradients, queries, count), d_bias)
    pieces = []
    for source, answers, *part in zip(reads, asks, *(x.split(step) for x in parts), strict=True):
        target, do = operands[: len(source)], slope[: len(answers)]
        piece = (*_gathered_parts(target, queries, count), do.view(-1, queries, dim), *part)
        pieces.append((source, target, answers, do, (*piece, *buffers[:, : len(part[0])])))
    images, slopes = _wide(qkv.flatten(1, 3)), _wide(d_out.unflatten(2, (heads, dim)).flatten(1, 2))
    for image, d_image_out, d_image in zip(images, slopes, d_qkv.permute(0, 2, 3, 1, 4), strict=True):
        for source, target, answers, do, piece in pieces:
            torch.index_select(image, 0, source, out=target)
            torch.index_select(d_image_out, 0, answers, out=do)
            _to_gradients(scale, *piece)
        d_image.copy_(F.embedding_bag(slots, gradients, first, mode="sum").view(d_image.shape))
    return d_qkv, d_bias


def _to_gradients(
    scale: float, q: Tensor, k: Tensor, v: Tensor, do: Tensor, bias: Tensor, dq: Tensor, dk: Tensor,
    dv: Tensor, d_bias: Tensor, probabilities: Tensor, d_scores: Tensor,
) -> None:  # fmt: skip
    """Gradients of a piece: q, do, dq [m, Q, D], k, v, dk, dv [m, G, D], the others [m, Q, G].

    Adds to `d_bias`, and writes to what follows `bias` otherwise.
    """
    torch.baddbmm(bias, q, k.mT, alpha=scale, out=probabilities)
    torch.softmax(probabilities, dim=-1, out=probabilities)
    torch.bmm(do, v.mT, out=d_scores)
    torch.bmm(probabilities.mT, do, out=dv)
    d_scores *= probabilities
    d_scores.addcmul_(probabilities, d_scores.sum(dim=-1, keepdim=True), value=-1)
    d_bias += d_scores
    dq.baddbmm_(d_scores, k, beta=0, alpha=scale)
    dk.baddbmm_(d_scores.mT, q, beta=0, alpha=scale)


def _of_all_windows(bias: Tensor, mask: Tensor | None, windows: int) -> Tensor:
    """The bias [N, P or 1, Q, G] and the mask as one array in float32 or more, [N*P, Q, G]."""
    bias = _wide(bias)
    return (bias.expand(-1, windows, -1, -1) if mask is None else bias + mask).flatten(0, 1)


def _at_once(bias: Tensor) -> int:
    """Score matrices of a piece, of all in the bias [M, Q, G]; as many for each thread, if possible."""
    threads = max(2, torch.get_num_threads())
    step = ceil(len(bias) / max(1, round(bias.numel() / (SCORES_AT_ONCE * threads))))
    return min(len(bias), threads * ceil(step / threads)) if step > threads else step


def _gathered_parts(rows: Tensor, queries: int, keys: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, which lie beside each other: [m*(Q + 2G), D] -> [m, Q or G, D]."""
    return rows.unflatten(0, (-1, queries + 2 * keys)).split((queries, keys, keys), dim=1)


def _gradient_parts(rows: Tensor, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of all queries, then all keys, then all values: [M*(Q + 2G), D] -> [M, Q or G, D].

    `row_numbers` counts slots in this order; and bmm would compute arrays that are not contiguous one by one.
    """
    count = len(rows) // (queries + 2 * keys)
    q, k, v = rows.split((count * queries, count * keys, count * keys))
    return q.view(count, queries, -1), k.view(count, keys, -1), v.view(count, keys, -1)


def _wide(x: Tensor) -> Tensor:
    """`x` in float32 or more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _count(length: int) -> Tensor:
    """0, 1, ...: int32 [length], on the CPU whatever the default device is."""
    return torch.arange(length, dtype=torch.int32, device="cpu")


def row_numbers(index: AttentionIndex, keys: Tensor, heads: int, trains: bool) -> list[Tensor]:
    """Which rows of qkv and of the output are read and written, int32.

    Args:
        index: gives the sizes.
        keys: [P, G].
        heads: N.
        trains: whether to add what the backward pass needs, the last three.

    Returns:
        read: rows of qkv: q, k, v of one score matrix after the other, [M*(Q + 2G)].
        made_by: for each row of the output the query, of all M*Q, that computes it, [T*N].
        asked: the inverse: for each query the row of the output that it computes, [M*Q].
        slots: for each row of qkv, in the order [3, N, S], the places, of M*Q queries, M*G keys and M*G
            values, that it was gathered into; sorted by row.
        first: where the slots of each row begin, [3*N*S].
    """
    fine, s = index.height * index.width, index.window
    tokens = _count(fine).view(-1, s, index.width // s, s).transpose(1, 2).reshape(-1, s * s)  # [P, Q]
    query = tokens.flatten().argsort().int()  # of each token, [T]
    head = _count(heads)[:, None, None]
    parts = [tokens * (3 * heads), keys.int() * (3 * heads) + heads, keys.int() * (3 * heads) + 2 * heads]
    read = (torch.cat(parts, dim=1) + head).flatten()
    made_by = (query[:, None] + head.view(-1) * fine).flatten()
    if not trains:
        return [read, made_by]
    asked = (tokens * heads + head).flatten()
    token, readers = keys.flatten().int().sort(stable=True)
    reads, asks = token.bincount(minlength=index.tokens).int(), (_count(index.tokens) < fine).int()
    begins = heads * fine + _count(2 * heads)[:, None] * keys.numel()
    slots = torch.cat([(query + head[:, 0] * fine).flatten(), (readers.int() + begins).flatten()])
    lengths = torch.cat([asks.repeat(heads), reads.repeat(2 * heads)])  # coarse tokens have no queries
    return [read, made_by, asked, slots, lengths.cumsum(0, dtype=torch.int32) - lengths]


BACKENDS["cpu"] = Backend(prepare, attend)
