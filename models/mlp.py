"""The MLP of a block, which on the CPU takes large maps in pieces.

An allocator asks the system for every large array anew, and on the CPU its first touch then costs more than
the GELU that fills it. In pieces of rows, what lies between the two layers is a small array that is used
again; for training the inputs of the GELU are kept, and nothing else.

Legend: R rows (tokens of all images), C channels, H hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import linear

LARGE = 2**25
"""Bytes from which the C library's allocator maps fresh memory for every array (32 MiB on 64-bit Linux)."""

ROWS_AT_ONCE = 1024
"""Rows per thread that are worked on at once: enough to pay for bringing weights into the products' order."""


class Mlp(timm.layers.Mlp):
    """Linear, GELU, linear: [..., C] -> [..., C]; arguments and parameters are those of timm's."""

    fc1: nn.Linear
    fc2: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        if not self._takes_pieces(x):
            x = self.drop1(self.act(linear.run(self.fc1, x)))
            return self.drop2(linear.run(self.fc2, self.norm(x)))
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
    return not linear.is_hooked(layer) and PLAIN.get(type(layer), lambda layer: False)(layer)


class MlpInPieces(torch.autograd.Function):
    """`_forward` that keeps the inputs of the GELU, an array for each piece, and its gradients."""

    @staticmethod
    def forward(rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
        hidden: list[Tensor] = []
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
        with torch.autocast("cpu", enabled=False):  # as in the forward pass, wherever this one is called
            return _backward(grad, *ctx.saved_tensors)


def _backward(grad: Tensor, rows: Tensor, w1: Tensor, w2: Tensor, *hidden: Tensor) -> tuple[Tensor, ...]:
    """Gradients of rows, weights and biases."""
    step = len(hidden[0])
    drows, after = torch.empty_like(rows), torch.empty_like(hidden[0])
    totals = [w1.new_zeros(shape) for shape in (w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])]
    for x, g, h, dx in zip(rows.split(step), grad.split(step), hidden, drows.split(step), strict=True):
        torch.ops.aten.gelu.out(h, out=after[: len(h)])
        dhidden, *second = linear.gradients(g, after[: len(h)], w2)
        torch.ops.aten.gelu_backward.grad_input(dhidden, h, grad_input=dhidden)
        part, *first = linear.gradients(dhidden, x, w1)
        dx.copy_(part)
        for total, gradient in zip(totals, (*first, *second), strict=True):
            total += gradient
    return drows, *totals


def _forward(
    rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, hidden: list[Tensor] | None = None
) -> Tensor:
    """[R, C] -> [R, C], without autograd; appends the inputs of the GELU, [R, H] in pieces, to `hidden`."""
    step = _rows_at_once(w1)
    out, after = rows.new_empty(len(rows), len(w2)), rows.new_empty(min(step, len(rows)), len(w1))
    for x, y in zip(rows.split(step), out.split(step), strict=True):
        before = linear.product(x, w1, b1)
        torch.ops.aten.gelu.out(before, out=after[: len(x)])
        y.copy_(linear.product(after[: len(x)], w2, b2))
        if hidden is not None:
            hidden.append(before)
    return out


def _rows_at_once(w1: Tensor) -> int:
    """Rows of a piece of the hidden channels that a weight [H, C] makes, well below what is mapped anew."""
    most = LARGE // 2 // (len(w1) * w1.element_size())
    return max(1, min(ROWS_AT_ONCE * max(2, torch.get_num_threads()), most))
