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
from models.focal_transformer import FocalAttention
from models.registry import VARIANTS

from .stub_driver import StubDriver

MIB = 2**20
KERNELS = {"constant_pad_nd": 2, "index_add": 2, "scatter_add": 2, "select_backward": 2, "slice_backward": 2}
"""Operations that fill or copy before their kernel runs; others with a result in memory count as one."""

WITHOUT_KERNEL = (
    "empty",
    "new_empty",
    "_unsafe_view",
    "_reshape_alias",
    "lift_fresh",
    "is_",
    "_local_scalar",
)
SORTED_INDICES, SORTED_KERNELS = 3072, 12
"""embedding_dense_backward: up to so many indices it is a fill and a kernel, else about 12 kernels: indices
are numbered, sorted (three), the gradient filled, and sums made by segments (seven)."""


class LaunchCounter(TorchDispatchMode):
    """Counts the kernels that ATen's operations would start on CUDA, by name, while it is on.

    Sees into operators that are written in Python.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.on = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operator := OPDEFS.get(func._schema.name):
            with self:
                return operator._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        if self.on and (count := kernels_of(func, args, out)):
            self.kernels[func._schema.name.removeprefix("aten::")] += count
        return out


def kernels_of(func: Any, args: Sequence[Any], out: Any) -> int:
    """Kernels that an operation of ATen starts on CUDA; views and what only allocates start none."""
    name, returns = func._schema.name.removeprefix("aten::"), func._schema.returns
    is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    if is_view or name.startswith(WITHOUT_KERNEL) or (isinstance(out, Tensor) and out.numel() == 0):
        return 0
    if name == "embedding_dense_backward":
        copies = 0 if args[0].is_contiguous() else 1
        return copies + (2 if args[1].numel() <= SORTED_INDICES else SORTED_KERNELS)
    return KERNELS.get(name, 1)


def count_launches(
    attention: FocalAttention, pools: nn.ModuleList, x: Tensor, card: str
) -> list[tuple[str, Counter[str]]]:
    """Kernels between the two projections of an attention layer in training under autocast, those of the bias
    and its gradient included: forward and backward, by name.

    Args:
        attention: on the CPU, with the backend triton.
        pools: its pooling modules.
        x: a map [B, H, W, C].
        card: of CARDS.
    """
    counter, ends = LaunchCounter(), {}

    def begin(layer: nn.Module, inputs: Any, qkv: Tensor) -> Tensor:
        counter.on = True
        return qkv.detach().requires_grad_()

    def end(layer: nn.Module, inputs: Any) -> None:
        counter.on = False
        ends["out"] = inputs[0]

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            attention(x, pools)

    passes: list[tuple[str, Counter[str]]] = []
    driver = StubDriver(card, keep_going=True)

    def record(name: str) -> None:
        kernels, counter.kernels = counter.kernels, Counter()
        passes.append((name, kernels + Counter(launch.name for launch in driver.launches)))
        driver.launches.clear()

    hooks = [attention.qkv.register_forward_hook(begin), attention.proj.register_forward_pre_hook(end)]
    with driver:
        forward()  # builds the index
        ends["out"].backward(torch.ones_like(ends["out"]))
        attention.zero_grad()
        driver.launches.clear()
        with counter:
            counter.kernels.clear()
            forward()
            record("forward")
            gradient = torch.ones_like(ends["out"])
            counter.on = True
            ends["out"].backward(gradient)
            record("backward")
    for hook in hooks:
        hook.remove()
    attention.zero_grad()
    return passes


def kept_bytes(model: nn.Module, batch: int, size: int) -> int:
    """Bytes that a forward pass in training under autocast keeps for backward, each storage once."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        out = model(torch.zeros(batch, 3, size, size))
    del out
    return sum(kept.values())


def kept_per_image(build: Callable[[], nn.Module], size: int = 224) -> float:
    """MiB that training keeps for each image: parameters and their copies cancel out."""
    model = build().train()
    return (kept_bytes(model, 6, size) - kept_bytes(model, 2, size)) / 4 / MIB


def activations(card: str) -> dict[str, float]:
    """MiB for an image of Focal-T under a card's driver, and of timm's Swin-T."""
    variant = VARIANTS["focal_tiny_patch4_window7_224"]
    with StubDriver(card, keep_going=True):
        focal = kept_per_image(lambda: FocalTransformer(**variant, attention_backend="triton"))
    return {
        "focal_tiny": focal,
        "swin_tiny": kept_per_image(lambda: timm.create_model("swin_tiny_patch4_window7_224")),
    }
