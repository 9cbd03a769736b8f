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

from ...focal_transformer import AttentionIndex, Request
from ..tables import NAMESPACE, differentiable_gradients
from . import bias as bias_kernels
from . import launch
from .tables import Blocks, TritonTables

MAX_HEAD_DIM = 64
MAX_WINDOW = 12
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST_SCALE = 2**-6


def why_not(request: Request, window: int) -> str | None:
    """Why the kernels cannot serve a request, whatever the keys; None if they can."""
    try:
        launch.device_family(request.device)
    except ValueError as error:
        return str(error)
    except Exception as failure:  # whatever Triton meets when it starts
        return f"Triton does not start on {request.device}: {launch.explain(failure)}"
    if request.dtype not in DTYPES:
        return f"needs float16, bfloat16 or float32, got {request.dtype}"
    if request.head_dim % 8 or not 0 < request.head_dim <= MAX_HEAD_DIM:
        return f"needs heads whose width is a multiple of 8 up to {MAX_HEAD_DIM}, got {request.head_dim}"
    return None if window <= MAX_WINDOW else f"needs windows of up to {MAX_WINDOW} a side, got {window}"


def attend(qkv: Tensor, index: AttentionIndex, bias: Tensor, scale: float) -> Tensor:
    """See `Backend`."""
    if not LEAST_SCALE <= scale <= 1 / LEAST_SCALE:  # the bias is divided by it
        qkv, scale = torch.cat((scale * qkv[:, :, :1], qkv[:, :, 1:]), dim=2), 1.0
    return attention(qkv, bias, index.visible, *_tables(index), scale)[0]


def _tables(index: AttentionIndex) -> tuple[list[Tensor], int, int, int, int]:
    """What `attention` gets of an index."""
    made: TritonTables = index.tables
    tables = [index.keys, made.columns, made.keys, made.first, *(made.blocks or ())]
    return tables, made.always_seen, index.height, index.width, index.window


@torch.no_grad()
def without_autograd(
    qkv: Tensor, index: AttentionIndex, bias: Tensor, scale: float, d_out: Tensor | None
) -> list[Tensor]:
    """As `attend`, and for a gradient of the output the gradients of qkv and bias.

    Autograd computes gradients of a GPU in one thread. A caller in that very thread, as where activations are
    computed again in a backward pass, would wait for itself.
    """
    tables, always_seen, height, width, window = _tables(index)
    out, lse = attention(qkv, bias, index.visible, tables, always_seen, height, width, window, scale)
    if d_out is None:
        return [out]
    numbers = (always_seen, width, window, scale)
    return [out, *attention_backward(d_out, out, lse, qkv, bias, index.visible, *tables[1:], *numbers)]


_INPUTS = (
    "Tensor qkv, Tensor bias, Tensor? visible, Tensor[] tables, int always_seen, int height, int width, "
    "int window, float scale"
)


@torch.library.custom_op(
    f"{NAMESPACE}::triton_attention",
    mutates_args=(),
    schema=f"({_INPUTS}) -> (Tensor, Tensor)",
)
def attention(qkv, bias, visible, tables, always_seen, height, width, window, scale):
    """Attention with the keys of `TritonTables`.

    Args:
        qkv: [B, S, 3, N, D].
        bias: [N, P or 1, Q, K].
        visible: of `AttentionIndex`.
        tables: `keys` of `AttentionIndex`; `columns`, `keys` and `first` of `TritonTables`; with a backward
            pass also those of `Blocks`.
        always_seen: of `TritonTables`.
        height, width, window: of the padded map.
        scale: factor of the scores.

    Returns:
        Output [B, T, N*D]; logarithm to base 2 of the softmax's denominator, [B, N, P, padded Q].
    """
    _, columns, keys, first, *_ = tables
    made = launch.Tables(keys, first, columns.shape[1], always_seen, width, window, scale)
    (prepared,) = bias_kernels.prepare(bias, columns, visible, scale, qkv.dtype, with_transposed=False)
    return launch.forward(qkv.contiguous(), prepared, made)


@torch.library.custom_op(
    f"{NAMESPACE}::triton_attention_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor out, Tensor lse, Tensor qkv, Tensor bias, Tensor? visible, Tensor columns, "
    "Tensor keys, Tensor first, Tensor token, Tensor start, Tensor window_of, Tensor first_of, "
    "Tensor column, int always_seen, int width, int window, float scale) -> (Tensor, Tensor)",
)  # without lists, which batched gradients cannot take
def attention_backward(
    d_out, out, lse, qkv, bias, visible, columns, keys, first, token, start, window_of, first_of, column,
    always_seen, width, window, scale,
):  # fmt: skip
    """Gradients of `qkv` and of the bias."""
    made = launch.Tables(keys, first, columns.shape[1], always_seen, width, window, scale)
    qkv, d_out = qkv.contiguous(), d_out.contiguous()
    prepared, transposed = bias_kernels.prepare(bias, columns, visible, scale, qkv.dtype, True)
    d_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    d_prepared = launch.query_gradient(qkv, prepared, out, d_out, lse, delta, d_qkv, made)
    launch.key_gradient(
        qkv, transposed, d_out, lse, delta, d_qkv, made, Blocks(token, start, window_of, first_of, column)
    )
    return d_qkv, bias_kernels.gradient(d_prepared, bias, columns)


@attention.register_fake
def _attention_fake(qkv, bias, visible, tables, always_seen, height, width, *_):
    (b, _, _, n, d), windows, queries = qkv.shape, len(tables[0]), bias.shape[2]
    lse = qkv.new_empty(b, n, windows, launch.padded_queries(queries), dtype=torch.float32)
    return qkv.new_empty(b, height * width, n * d), lse


@attention_backward.register_fake
def _attention_backward_fake(d_out, out, lse, qkv, bias, *_):
    return qkv.new_empty(qkv.shape), bias_kernels.new_gradient(bias)


def _save(ctx, inputs, output) -> None:
    qkv, bias, visible, tables, *ctx.numbers = inputs
    ctx.save_for_backward(qkv, bias, visible, *output, *tables)
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_out, d_lse):
    qkv, bias, visible, out, lse, *tables = ctx.saved_tensors
    rest = (None, [None] * len(tables), *(None,) * 5)
    if d_out is None:
        return None, None, *rest
    always_seen, height, width, window, scale = ctx.numbers
    if torch.is_grad_enabled():  # somebody wants to differentiate the gradients
        index = AttentionIndex(height, width, window, qkv.shape[1], tables[0], visible, ())
        return *differentiable_gradients(qkv, bias, d_out, index, scale), *rest
    numbers = (always_seen, width, window, scale)
    return *attention_backward(d_out, out, lse, qkv, bias, visible, *tables[1:], *numbers), *rest


attention.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(getattr(torch.ops, NAMESPACE).triton_attention)
def _attention_flops(qkv_shape, bias_shape, _, table_shapes, *__, **___) -> int:
    """Two products of B*N*P matrices [Q, K'] with vectors of width D."""
    batch, _, _, heads, dim = qkv_shape
    windows, keys = table_shapes[0][0], table_shapes[1][1]
    return 2 * 2 * batch * heads * windows * bias_shape[2] * keys * dim


@register_flop_formula(getattr(torch.ops, NAMESPACE).triton_attention_backward)
def _attention_backward_flops(*shapes, **__) -> int:
    """Five products, as PyTorch counts for its own kernels: those of gradients, and the scores once more."""
    qkv, bias, visible, columns, keys, *_ = shapes[3:]
    return _attention_flops(qkv, bias, visible, [keys, columns]) // 2 * 5
