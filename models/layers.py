"""Small parts of the network: patch embedding, pooling of fine tokens to coarse ones, and a cache.

Feature maps are [B, H, W, C] throughout (batch, rows, columns, channels).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import linear

T = TypeVar("T")


class PatchEmbed(nn.Module):
    """Convolution that shrinks the map, then LayerNorm: the stem and the step between two stages.

    Departure from the original: rows and columns left over at the bottom and right are ignored, as the
    convolution does, instead of being refused.

    Args:
        in_chans: channels of the input.
        dim: channels of the output.
        stride: factor by which the map shrinks.
        overlap: use the convolutional embedding, whose patches overlap (kernel 7 stride 4, kernel 3 stride
            2).
        norm: LayerNorm after the convolution.
        pre_norm: GroupNorm with one group before it.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        stride: int,
        overlap: bool = False,
        norm: bool = True,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.kernel = 2 * stride - 1 if overlap else stride
        self.padding = stride // 2 if overlap else 0
        self.pre_norm = nn.GroupNorm(1, in_chans) if pre_norm else nn.Identity()
        # In channels-last order the kernel is a matrix for `_rows`, and suits convolutions of [B, H, W, C].
        self.proj = nn.Conv2d(in_chans, dim, self.kernel, stride, self.padding).to(
            memory_format=torch.channels_last
        )
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the map made from an input of `height` x `width`."""
        rows, columns = (
            (side + 2 * self.padding - self.kernel) // self.stride + 1 for side in (height, width)
        )
        return rows, columns

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C_in] -> [B, H/stride, W/stride, C]."""
        x = self.pre_norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(self._overlapping(x) if self.padding else self._separate(x))

    def _overlapping(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        patches = OverlappingPatches.apply(x, self.kernel, self.stride, self.padding)
        return linear.product(patches, self._rows(), self.proj.bias)

    def _separate(self, x: Tensor) -> Tensor:
        """Patches that do not overlap make the convolution a matrix product: faster in [B, H, W, C]."""
        rows, columns = self.output_size(x.shape[1], x.shape[2])
        x = x[:, : rows * self.stride, : columns * self.stride]
        x = x.unflatten(2, (columns, self.stride)).unflatten(1, (rows, self.stride)).transpose(2, 3)
        return linear.product(x.flatten(3), self._rows(), self.proj.bias)

    def _rows(self) -> Tensor:
        """The kernel as a matrix that takes patches in the order of [B, H, W, C]; no copy."""
        return self.proj.weight.permute(0, 2, 3, 1).flatten(1)


class OverlappingPatches(torch.autograd.Function):
    """Patches of a zero-padded map, side by side: [B, H, W, C] -> [B, H', W', k*k*C].

    With a matrix product this is a convolution. On the CPU its gradients come in two thirds of the time that
    those of the convolution itself take, and in half of it where the kernel is large and the map small.
    """

    @staticmethod
    def forward(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
        x = F.pad(x, (0, 0, padding, padding, padding, padding))
        rows, columns = ((side - kernel) // stride + 1 for side in x.shape[1:3])
        steps = x.stride()
        shape = (len(x), rows, columns, kernel, kernel * x.shape[3])  # a row of a patch is contiguous
        return x.as_strided(shape, (steps[0], steps[1] * stride, steps[2] * stride, steps[1], 1)).flatten(3)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, ctx.kernel, ctx.stride, ctx.padding = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (_, height, width, channels), k, p = ctx.shape, ctx.kernel, ctx.padding
        grad = grad.unflatten(3, (k, k, channels))
        total = grad.new_zeros(len(grad), height + 2 * p, width + 2 * p, channels)
        ends = [ctx.stride * (side - 1) + 1 for side in grad.shape[1:3]]
        for y in range(k):
            for x in range(k):
                total[:, y : y + ends[0] : ctx.stride, x : x + ends[1] : ctx.stride] += grad[:, :, :, y, x]
        return total[:, p : p + height, p : p + width], None, None, None


def _cells(x: Tensor, side: int, windows: tuple[int, int], scale: int) -> Tensor:
    """Cut the centred (windows*scale*side)-square out of a map into cells.

    [B, H, W, C] -> [B, gh, side, gw, side, C] with gh = windows[0]*scale and gw = windows[1]*scale.
    """
    grid = (windows[0] * scale, windows[1] * scale)
    top, left = ((have - count * side) // 2 for have, count in zip(x.shape[1:3], grid, strict=True))
    x = x[:, top : top + grid[0] * side, left : left + grid[1] * side]
    return x.unflatten(2, (grid[1], side)).unflatten(1, (grid[0], side))


class LinearPool(nn.Linear):
    """One learned weight per position of the cell, shared by all channels (`fc`)."""

    def __init__(self, side: int, dim: int) -> None:
        super().__init__(side * side, 1)
        self.side = side

    def forward(self, cells: Tensor) -> Tensor:
        """[B, gh, p, gw, p, C] -> [B, gh, gw, C].

        On the CPU by one product for a row of cells, [gw, p*gw*p] with [p*gw*p, C], most of whose factors are
        zero: that takes less than half the time of bringing the tokens of each cell together (maps of 7 to
        112 tokens a side, forward and backward; 2026-11-23, two cores of a 2.8 GHz Xeon, torch 2.15.0). A
        token that is not finite spoils its whole row there, elsewhere its cell.
        """
        weight = self.weight.view(self.side, self.side)
        if cells.device.type != "cpu":
            return torch.einsum("bhiwjc,ij->bhwc", cells, weight) + self.bias
        images, rows, _, columns, _, channels = cells.shape
        spread = torch.eye(columns, dtype=weight.dtype, device=weight.device)
        spread = spread[:, None, :, None] * weight[:, None]  # [gw, p, gw, p]
        spread = spread.reshape(1, columns, -1).expand(images * rows, -1, -1)
        tokens = cells.flatten(2, 4).flatten(0, 1)
        # No baddbmm, which PyTorch 2.6 cannot write to ONNX for batches of any length.
        pooled = torch.bmm(spread, tokens)
        bias = self.bias.to(pooled.dtype)  # under autocast the product is in half precision
        return (pooled + bias).view(images, rows, columns, channels)


class ConvPool(nn.Conv2d):
    """Depthwise convolution over the cell (`conv`)."""

    def __init__(self, side: int, dim: int) -> None:
        super().__init__(dim, dim, side, stride=side, groups=dim)

    def forward(self, cells: Tensor) -> Tensor:
        """[B, gh, p, gw, p, C] -> [B, gh, gw, C]."""
        image = cells.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        return super().forward(image).permute(0, 2, 3, 1)


class MeanPool(nn.Module):
    """Average of the cell (`mean`)."""

    def __init__(self, side: int, dim: int) -> None:
        super().__init__()

    def forward(self, cells: Tensor) -> Tensor:
        """[B, gh, p, gw, p, C] -> [B, gh, gw, C]."""
        return cells.mean(dim=(2, 4))


class MaxPool(nn.Module):
    """Maximum of the cell (`max`)."""

    def __init__(self, side: int, dim: int) -> None:
        super().__init__()

    def forward(self, cells: Tensor) -> Tensor:
        """[B, gh, p, gw, p, C] -> [B, gh, gw, C]."""
        return cells.amax(dim=(2, 4))


POOLS: dict[str, type[nn.Module]] = {"fc": LinearPool, "conv": ConvPool, "mean": MeanPool, "max": MaxPool}
"""Ways to make one coarse token of a p x p cell; each takes (p, channels). `none` makes no coarse tokens."""


def pooled_tokens(x: Tensor, pools: nn.ModuleList, window: int) -> list[Tensor]:
    """Coarse tokens of every level.

    Args:
        x: padded map, [B, H, W, C].
        pools: one module per level; level k makes 2^k x 2^k tokens of every window.
        window: window side s; a cell of level k has the side floor(s / 2^k).

    Returns:
        Per level [B, (H/s * 2^k) * (W/s * 2^k), C], row-major.
    """
    windows = (x.shape[1] // window, x.shape[2] // window)
    cells = (_cells(x, window // 2**level, windows, 2**level) for level in range(len(pools)))
    return [pool(cell).flatten(1, 2) for pool, cell in zip(pools, cells, strict=True)]


def fingerprint(tensors: Sequence[Tensor]) -> tuple:
    """Changes when one of `tensors` is replaced, moved, converted or written to in place."""
    return tuple((t.data_ptr(), t.is_inference() or t._version, t.device, t.dtype) for t in tensors)


class TensorCache(Generic[T]):
    """Keeps what was derived from some tensors until one of them changes; copies start empty.

    Two ways of writing escape PyTorch's version counter: `.data`, and optimizers with `fused=True`. Call
    `clear` where those may have been.
    """

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._value: T | None = None

    def get(self, tensors: tuple[Tensor, ...], extra: tuple, build: Callable[[], T]) -> T:
        """The cached value, or `build()` where `tensors` or `extra` differ from last time."""
        if any(t.is_inference() for t in tensors):
            return build()  # made in inference mode: changes could not be noticed
        key = (extra, fingerprint(tensors))
        if key != self._key:
            self._value, self._key = build(), key
        return cast(T, self._value)

    def clear(self) -> None:
        """Forget."""
        self._key = self._value = None

    def __reduce__(self) -> tuple:
        return TensorCache, ()
