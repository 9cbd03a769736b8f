"""Launches around the attention operator, and activations that training keeps, counted without a GPU.

Both run under a `StubDriver`, so the operator and its launch code are the GPU's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from models import FocalTransformer
from models.focal_transformer import BACKENDS, FocalAttention, padded_size
from models.registry import VARIANTS

from .stub_driver import StubDriver

BATCH = 2  # images whose launches are counted
KERNELS = {"constant_pad_nd": 2, "index_add": 2, "scatter_add": 2, "select_backward": 2, "slice_backward": 2}
"""Operations that fill or copy before their kernel runs; others with a result in memory count as one."""

ALLOCATING = ("empty", "new_empty", "_unsafe_view", "_reshape_alias", "lift_fresh", "is_", "_local_scalar")
"""Beginnings of the names of operations that start no kernel, beside views."""

SORTED_INDICES, SORTED_KERNELS = 3072, 12
"""embedding_dense_backward: up to so many indices it is a fill and a kernel, else about 12 kernels: indices
are numbered, sorted (three), the gradient filled, and sums made by segments (seven)."""


class LaunchCounter(TorchDispatchMode):
    """Counts the kernels that ATen's operations would start on CUDA, by name.

    Sees into operators that are written in Python.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operator := OPDEFS.get(func._schema.name):
            with self:
                return operator._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        if count := kernels_of(func, args, out):
            self.kernels[func._schema.name.removeprefix("aten::")] += count
        return out


def kernels_of(func: Any, args: Sequence[Any], out: Any) -> int:
    """Kernels that an operation of ATen starts on CUDA; views and what only allocates start none."""
    name, returns = func._schema.name.removeprefix("aten::"), func._schema.returns
    is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    if is_view or name.startswith(ALLOCATING) or (isinstance(out, Tensor) and out.numel() == 0):
        return 0
    if name == "embedding_dense_backward":
        copies = 0 if args[0].is_contiguous() else 1
        return copies + (2 if args[1].numel() <= SORTED_INDICES else SORTED_KERNELS)
    return KERNELS.get(name, 1)


def count_launches(layer: FocalAttention, height: int, width: int, card: str) -> dict[str, Counter[str]]:
    """Kernels between the two projections of an attention layer in training under autocast, those of the bias
    and its gradient included: by name, for the passes forward and backward. The layer has the backend triton.
    """
    driver = StubDriver(card, keep_going=True)
    padded = padded_size(height, width, layer.window_size)

    def forward(qkv: Tensor) -> Tensor:
        index = layer.index(height, width, qkv)
        x = BACKENDS[index.backend].attend(qkv, index, layer.bias(index, torch.float32), layer.scale)
        return layer.unroll_and_crop(x.unflatten(1, padded), height, width)

    def counted(action: Callable[[], Any]) -> tuple[Any, Counter[str]]:
        driver.launches.clear()
        with LaunchCounter() as counter:
            out = action()
        return out, counter.kernels + Counter(driver.launches)

    with driver, torch.autocast("cpu", torch.bfloat16):
        tokens = layer.index(height, width, torch.empty(0, dtype=torch.bfloat16)).tokens
        shape = (BATCH, tokens, 3, layer.num_heads, layer.head_dim)
        qkv = torch.zeros(shape, dtype=torch.bfloat16).requires_grad_()
        forward(qkv).sum().backward()  # derives tables from the index
        layer.zero_grad()
        qkv.grad = None
        out, in_forward = counted(lambda: forward(qkv))
        gradient = torch.ones_like(out)
        _, in_backward = counted(lambda: out.backward(gradient))
    return {"forward": in_forward, "backward": in_backward}


def kept_per_image(model: nn.Module, size: int = 224) -> float:
    """MiB that a forward pass in training under autocast keeps for backward, for each image: the difference
    of two batches, in which parameters and their copies cancel out."""
    kept: dict[int, int] = {}  # bytes by storage

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    totals = []
    for batch in (2, 6):
        kept.clear()
        with saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            out = model.train()(torch.zeros(batch, 3, size, size))
        totals.append(sum(kept.values()))
        del out
    return (totals[1] - totals[0]) / 4 / 2**20


def activations(card: str) -> dict[str, float]:
    """MiB for an image of Focal-T under a card's driver, and of timm's Swin-T."""
    variant = VARIANTS["focal_tiny_patch4_window7_224"]
    with StubDriver(card, keep_going=True):
        focal = kept_per_image(FocalTransformer(**variant, attention_backend="triton"))
    swin = kept_per_image(timm.create_model("swin_tiny_patch4_window7_224"))
    return {"focal_tiny": focal, "swin_tiny": swin}
