"""The MLP of a block, which on the CPU takes large maps in pieces.

An allocator asks the system for every large array anew, and on the CPU its first touch then costs more than
the GELU that fills it. In pieces of rows, what lies between the two layers is a small array that is used
again; for training the inputs of the GELU are kept, and nothing else.

Legend: R rows (tokens of all images), C channels, H hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LARGE = 2**25
"""Bytes from which the C library's allocator maps fresh memory for every array (32 MiB on 64-bit Linux)."""

HIDDEN_AT_ONCE = 2**18
"""Hidden values per thread that are worked on at once, so that two copies stay in a core's cache."""


class Mlp(timm.layers.Mlp):
    """Linear, GELU, linear: [..., C] -> [..., C]; arguments and parameters are those of timm's."""

    fc1: nn.Linear
    fc2: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        if not self._takes_pieces(x):
            return super().forward(x)
        weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        rows = x.reshape(-1, x.shape[-1])
        out = MlpInPieces.apply(rows, *weights)[0] if torch.is_grad_enabled() else _forward(rows, *weights)
        return out.view(*x.shape[:-1], -1)

    def _takes_pieces(self, x: Tensor) -> bool:
        """Whether the hidden layer is large, and this is the plain MLP that the pieces compute."""
        if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if not all(map(_is_plain, (self.fc1, self.act, self.drop1, self.norm, self.fc2, self.drop2))):
            return False
        hidden_bytes = x.numel() // x.shape[-1] * self.fc1.out_features * x.element_size()
        is_exact = x.dtype in (torch.float32, torch.float64)  # sums of pieces would lose bits of halves
        return hidden_bytes >= LARGE and is_exact and not torch.is_autocast_enabled("cpu")


PLAIN: dict[type[nn.Module], Callable[[Any], bool]] = {
    nn.Linear: lambda layer: layer.bias is not None,
    nn.GELU: lambda layer: layer.approximate == "none",
    nn.Dropout: lambda layer: not (layer.training and layer.p > 0),
    nn.Identity: lambda layer: True,
}
"""By type: whether a layer of the MLP is what the pieces compute."""


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is PyTorch's own, set as timm sets it, and without hooks."""
    return not is_hooked(layer) and PLAIN.get(type(layer), lambda layer: False)(layer)


def is_hooked(layer: nn.Module) -> bool:
    """Whether somebody looks at what goes through a layer or through all, compiled it, or replaced its
    `forward`."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    is_other = "forward" in vars(layer) or layer._compiled_call_impl is not None
    return any(hooks) or is_other or nn.modules.module._has_any_global_hook()


class MlpInPieces(torch.autograd.Function):
    """`_forward` that keeps the inputs of the GELU, an array for each piece, and its gradients."""

    @staticmethod
    def forward(rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
        hidden = [rows.new_empty(len(x), len(w1)) for x in rows.split(_rows_at_once(len(w1)))]
        return _forward(rows, w1, b1, w2, b2, hidden), *hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        rows, w1, _, w2, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros as large as the hidden layer, which nobody reads
        ctx.save_for_backward(rows, w1, w2, *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        rows, w1, w2, *hidden = ctx.saved_tensors
        step = len(hidden[0])
        drows, dw1, dw2 = torch.empty_like(rows), torch.zeros_like(w1), torch.zeros_like(w2)
        db1, db2 = w1.new_zeros(len(w1)), grad.sum(dim=0)
        buffers = rows.new_empty(2, step, len(w1))
        for x, g, h, dx in zip(rows.split(step), grad.split(step), hidden, drows.split(step), strict=True):
            after, dhidden = buffers[:, : len(h)]
            torch.ops.aten.gelu.out(h, out=after)
            dw2.addmm_(g.t(), after)
            torch.mm(g, w2, out=dhidden)
            torch.ops.aten.gelu_backward.grad_input(dhidden, h, grad_input=dhidden)
            dw1.addmm_(dhidden.t(), x)
            db1 += dhidden.sum(dim=0)
            torch.mm(dhidden, w1, out=dx)
        return drows, dw1, db1, dw2, db2


def _forward(
    rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, hidden: Iterable[Tensor] | None = None
) -> Tensor:
    """[R, C] -> [R, C], without autograd; writes the inputs of the GELU, [R, H] in pieces, to `hidden`."""
    step = _rows_at_once(len(w1))
    out, buffer = rows.new_empty(len(rows), len(w2)), rows.new_empty(min(step, len(rows)), len(w1))
    hidden = repeat(buffer) if hidden is None else hidden
    for x, y, h in zip(rows.split(step), out.split(step), hidden, strict=False):
        after = buffer[: len(x)]
        torch.addmm(b1, x, w1.t(), out=h[: len(x)])
        torch.ops.aten.gelu.out(h[: len(x)], out=after)
        torch.addmm(b2, after, w2.t(), out=y)
    return out


def _rows_at_once(width: int) -> int:
    return max(1, HIDDEN_AT_ONCE * max(2, torch.get_num_threads()) // width)
