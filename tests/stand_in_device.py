"""An accelerator for tests: PyTorch knows it as "standin", and the CPU computes for it.

Importing this file registers it, for the whole process. Its tensors wrap tensors of the CPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

CPU = torch.device("cpu")


class StandInTensor(torch.Tensor):
    """A tensor that says it lies on the device."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "StandInTensor":
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, dtype=raw.dtype, device="standin:0", **layout
        )

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw = raw

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_factory = "device" in kwargs
        devices = {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim}
        is_copy = operator._schema.name in ("aten::copy_", "aten::_to_copy")
        assert is_copy or len(devices) < 2, f"{operator} of tensors on {devices}"
        unwrapped, options = tree_map(_unwrap, (args, kwargs))
        result = operator(*unwrapped, **options)
        if operator._schema.name.endswith("_"):
            return args[0]
        if is_factory and kwargs["device"] == CPU:
            return result
        return tree_map(lambda x: StandInTensor(x) if isinstance(x, torch.Tensor) else x, result)


def _unwrap(item: Any) -> Any:
    if isinstance(item, torch.device):
        return CPU
    return item.raw if isinstance(item, StandInTensor) else item


def _on_the_cpu(operator: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What makes new tensors, with the device given by its name alone."""

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        return StandInTensor(operator(*args, **kwargs | {"device": CPU, "pin_memory": False}))

    return make


_setup_privateuseone_for_python_backend("standin")
LIBRARY = torch.library.Library("aten", "IMPL")
for _operator in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default):
    LIBRARY.impl(_operator, _on_the_cpu(_operator), "PrivateUse1")
torch.accelerator.synchronize = lambda device=None: None  # the CPU has done it already
