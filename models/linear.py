"""Linear layers, which on some processors convolutions of one pixel outrun.

PyTorch hands products of float32 matrices to MKL and convolutions to oneDNN. On AMD's processors with AVX-512
oneDNN is the faster one, once there are rows enough to pay for bringing the weight into its order: forward
and backward through a linear layer of Focal-T by 1 to 29 % from 1500 rows on, not at 400 (two cores of an
EPYC of the fourth generation, tools/results/2026-11-26_linear.md), and not in one thread (there 0.74 to 1.05
of a product's speed: `tools/profile_linear.py --threads 1 --repeats 3`). Elsewhere products stay.
oneDNN sums the gradient of a bias less exactly (1e-5 of it over 100000 rows, in a product 2e-7), and keeps
0.1 MB (training: 0.3 MB) for each number of rows and shape of a layer that it met, as for any convolution on
a CPU; where maps have ever new sizes the variables LRU_CACHE_CAPACITY and ONEDNN_PRIMITIVE_CACHE_CAPACITY,
both 16, bound that. (All on 2026-11-26, with torch 2.14.1.)

Legend: R rows (tokens of all images), I and O channels of input and output.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEWEST_ROWS = 1024
"""Rows from which a convolution is the faster one."""

FEWEST_VALUES = 20481
"""Values of the input from which PyTorch gives a convolution of one image to oneDNN."""

CPU_INFO = "/proc/cpuinfo"
"""Where Linux names the maker of the processor."""


def run(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)`: [..., I] -> [..., O]; the layer itself runs, unless it is computed as a convolution."""
    if type(layer) is nn.Linear and is_convolution(x, layer.weight, layer.bias) and not is_hooked(layer):
        return convolution(x, layer.weight, layer.bias)
    return layer(x)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear`: [..., I] with a weight [O, I] -> [..., O]."""
    return (convolution if is_convolution(x, weight, bias) else F.linear)(x, weight, bias)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`product`, by oneDNN."""
    y = F.conv2d(_as_image(x.reshape(-1, x.shape[-1])), weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `product` with a bias, where its output [R, O] has `grad`: for [R, I], the weight and the bias."""
    if not is_convolution(x, weight, None):
        return grad @ weight, grad.t() @ x, grad.sum(dim=0)
    images, kernel = (_as_image(grad), _as_image(x)), weight[:, :, None, None]
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        *images, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
    )  # the bias apart: oneDNN's sum of many rows is 50 times less exact
    return dx.permute(0, 2, 3, 1).reshape(x.shape), dweight.reshape(weight.shape), grad.sum(dim=0)


def is_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the product of [..., I] with a weight [O, I] is computed as a convolution.

    Only in eager mode, between plain dense tensors (not fake or distributed ones), where nobody asked PyTorch
    for faster and less exact products, which convolutions would not be, and where all operands want gradients
    or none does: a convolution keeps its input and its weight for any of them.
    """
    # In this order: the compiler cannot follow what comes next, and the sizes of an exported program are
    # symbols, which a comparison would bind.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not _outrun_products():
        return False
    operands = (x, weight) if bias is None else (x, weight, bias)
    if not all(map(_is_dense_float32, operands)) or torch._C._are_functorch_transforms_active():
        return False
    if x.numel() < max(FEWEST_ROWS * x.shape[-1], FEWEST_VALUES) or not len(weight):
        return False
    if torch.is_grad_enabled() and len({t.requires_grad for t in operands}) > 1:
        return False
    is_exact = not torch.is_autocast_enabled("cpu") and _wants_exact_products()
    has_shapes = weight.shape[1:] == x.shape[-1:] and (bias is None or bias.shape == weight.shape[:1])
    return is_exact and has_shapes and torch.get_num_threads() > 1 and bool(torch.backends.mkldnn.enabled)


def _is_dense_float32(x: Tensor) -> bool:
    is_dense = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided
    return is_dense and x.device.type == "cpu" and x.dtype == torch.float32


def _wants_exact_products() -> bool:
    """Whether products of float32 matrices are to be as exact as float32 allows."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by newer settings, that of each library apart
        return False


@cache
def _outrun_products() -> bool:
    """Whether this is one of the processors that the rule was made for (one of them was measured)."""
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and torch.backends.cpu.get_cpu_capability() == "AVX512" and _maker() == "AuthenticAMD"


def _maker() -> str:
    """Who made the processor, as it says itself; empty where the system does not tell."""
    try:
        with open(CPU_INFO, encoding="utf-8", errors="replace") as file:
            lines = (line for line in file if line.startswith("vendor_id"))
            return next(lines, "").partition(":")[2].strip()
    except OSError:
        return ""


def _as_image(rows: Tensor) -> Tensor:
    """[R, I] -> [1, I, 1, R], channels last: without a copy where the rows are contiguous."""
    return rows.contiguous()[None, None].permute(0, 3, 1, 2)


def is_hooked(layer: nn.Module) -> bool:
    """Whether somebody looks at what goes through a layer or through all, compiled it, or replaced its
    `forward`."""
    of_all, kinds = nn.modules.module, ("forward", "forward_pre", "backward", "backward_pre")
    if any(getattr(layer, f"_{kind}_hooks") or getattr(of_all, f"_global_{kind}_hooks") for kind in kinds):
        return True
    return "forward" in layer.__dict__ or layer._compiled_call_impl is not None
