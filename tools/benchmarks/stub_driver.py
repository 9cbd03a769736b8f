"""A Triton driver for a GPU that is not there: compiles, checks resources, launches nothing.

    with StubDriver("sm_90") as driver:
        model(images).sum().backward()     # CPU tensors
    print(driver.kernels, driver.launches)

Inside the context Triton's just-in-time compiler builds for the chosen GPU, and refuses what does not fit the
card, with its own checks. CPU tensors say that they are on that GPU, so that code which asks for the device
of a tensor, for the GPU's capability or for Triton's target takes the path that it takes there. What a kernel
would have written stays uninitialised, so models use the kernels without their trial.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget

from models.ops.triton import trial

KIB = 1024


@dataclass(frozen=True)
class Card:
    """What a GPU has. An SM is a compute unit on AMD."""

    target: GPUTarget
    capability: tuple[int, int]  # as torch.cuda.get_device_capability says
    block_shared: int  # bytes of shared memory that one block may have
    sm_shared: int  # bytes of an SM
    reserved: int  # bytes of shared memory that the system takes for each block
    sm_parts: int  # parts of an SM, each with its own registers
    part_warps: int  # most warps of one
    sm_blocks: int


def _nvidia(arch: int, block_shared: int, sm_shared: int, sm_warps: int, sm_blocks: int) -> Card:
    shared = block_shared * KIB, sm_shared * KIB, KIB
    return Card(GPUTarget("cuda", arch, 32), divmod(arch, 10), *shared, 4, sm_warps // 4, sm_blocks)


def _amd(arch: str, capability: tuple[int, int], warp: int, shared: int, parts: int, warps: int) -> Card:
    shared *= KIB
    return Card(GPUTarget("hip", arch, warp), capability, shared, shared, 0, parts, warps, parts * warps)


CARDS = {
    "sm_80": _nvidia(80, 163, 164, 64, 32),  # A100
    "sm_86": _nvidia(86, 99, 100, 48, 16),  # RTX 3090, A10, A40
    "sm_89": _nvidia(89, 99, 100, 48, 24),  # RTX 4090, L4, L40
    "sm_90": _nvidia(90, 227, 228, 64, 32),  # H100, H200
    "sm_100": _nvidia(100, 227, 228, 64, 32),  # B200
    "sm_103": _nvidia(103, 227, 228, 64, 32),  # B300
    "sm_120": _nvidia(120, 99, 100, 48, 24),  # RTX 5090
    "gfx90a": _amd("gfx90a", (9, 0), 64, 64, 4, 8),  # MI200
    "gfx942": _amd("gfx942", (9, 4), 64, 64, 4, 8),  # MI300
    "gfx950": _amd("gfx950", (9, 5), 64, 160, 4, 8),  # MI350
    "gfx1100": _amd("gfx1100", (11, 0), 32, 64, 2, 16),  # RX 7900
}
"""NVIDIA: CUDA's programming guide, table of technical specifications per compute capability."""

FIRST_DEVICE = 64  # number of the first card as a device; no real one has it, so no cache mixes them up
FACTORIES = ("arange", "as_tensor", "empty", "empty_strided", "full", "linspace", "ones", "tensor", "zeros")


@dataclass
class Kernel:
    """One kernel that was to be compiled."""

    name: str
    compiled: Any  # triton.compiler.CompiledKernel; None if it does not compile
    error: Exception | None  # why it does not compile, or has no place on the card


@dataclass
class StubDriver:
    """See the module. A context manager that may be entered once."""

    card_name: str
    keep_going: bool = False  # a kernel that fails is recorded and skipped, instead of raising its error
    with_trial: bool = False  # models try the kernels first, and find that they compute nothing
    kernels: list[Kernel] = field(default_factory=list)
    launches: list[str] = field(default_factory=list)  # names of kernels

    def __post_init__(self) -> None:
        self.card = CARDS[self.card_name]
        self.device = torch.device("cuda", FIRST_DEVICE + list(CARDS).index(self.card_name))
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": self.card.block_shared,
                "warpSize": self.card.target.warp_size,
                "arch": self.card.target.arch,
            },
            load_binary=lambda name, binary, shared, device: (None, None, 0, 0, 1024),
        )
        self._functions: set[Any] = set()  # JITFunctions that were compiled
        self._stack = ExitStack()

    def __enter__(self) -> StubDriver:
        config = triton.runtime.driver
        self._stack.callback(vars(config).update, dict(vars(config)))
        config.set_active(self)
        self._compile = triton.compiler.compile
        hip = self.card.target.backend == "hip"
        for owner, name, value in (
            (triton.compiler, "compile", self._recorded),  # JITFunction imports it for each device
            (torch.Tensor, "device", property(lambda tensor: self.device)),
            (torch.Tensor, "is_cuda", property(lambda tensor: True)),
            (torch.Tensor, "to", self._on_cpu(torch.Tensor.to)),
            *((torch, name, self._on_cpu(getattr(torch, name))) for name in FACTORIES),
            (torch.cuda, "device", lambda device: nullcontext()),
            (torch.cuda, "current_device", self.get_current_device),
            (torch.cuda, "get_device_capability", lambda device=None: self.card.capability),
            (torch.cuda, "get_device_name", lambda device=None: self.card_name),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.cuda, "current_stream", lambda device=None: SimpleNamespace(synchronize=lambda: None)),
            (torch.version, "hip", "stub" if hip else None),
            (torch.version, "cuda", None if hip else "stub"),
        ):
            self._stack.enter_context(patch.object(owner, name, value))
        if not self.with_trial:
            self._stack.enter_context(patch.object(trial, "problem", lambda case: None))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for function in self._functions:
            function.device_caches.pop(self.device.index, None)
            function.compile = self._compile

    def _on_cpu(self, create: Callable) -> Callable:
        """A function of torch that creates tensors on the CPU where it is asked for the stub's device."""

        def real(x: Any) -> Any:
            return "cpu" if isinstance(x, torch.device) and x.type == "cuda" else x

        @wraps(create)
        def created(*args: Any, **kwargs: Any) -> Any:
            return create(*map(real, args), **{key: real(x) for key, x in kwargs.items()})

        return created

    def _recorded(self, src: Any, *args: Any, **kwargs: Any) -> Any:
        """`triton.compile`, and the checks that Triton makes before a kernel's first launch."""
        self._functions.add(src.fn)
        kernel, error = None, None
        try:
            kernel = self._compile(src, *args, **kwargs)
            kernel.run  # noqa: B018 loads it
        except Exception as caught:
            error = caught
        self.kernels.append(Kernel(src.name, kernel, error))
        if error is None:
            return kernel
        if not self.keep_going:
            raise error
        skip = lambda *args: None  # noqa: E731
        return SimpleNamespace(run=skip, launch_metadata=skip, function=None, packed_metadata=None)

    # What Triton asks a driver.

    def get_current_target(self) -> GPUTarget:
        return self.card.target

    def get_current_device(self) -> int:
        return self.device.index

    def get_active_torch_device(self) -> torch.device:
        return self.device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        """What launches a kernel."""

        def launch(*args: Any) -> None:
            self.launches.append(metadata.name)

        return launch
