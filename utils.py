"""Errors of users, process group, device, precision and seeds.

Every helper works without a process group, so that the same code runs on one CPU, on one GPU and under
torchrun.
"""

import contextlib
import os
import random
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


class UserError(ValueError):
    """A mistake that the user can correct: main.py prints the message instead of a traceback."""


@contextlib.contextmanager
def user_input(option: str = "") -> Iterator[None]:
    """Use it around code that reads what the user named: its errors become `UserError`.

    Args:
        option: the option with the input, for the beginning of the message.

    Raises:
        UserError: for a ValueError, OSError or ImportError inside.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"{option}: {error}" if option else str(error)) from error


def in_group() -> bool:
    """Whether a process group has been set up."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    return dist.get_rank() if in_group() else 0


def get_world_size() -> int:
    return dist.get_world_size() if in_group() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def pick_device(name: str = "") -> torch.device:
    """The device of this process.

    Args:
        name: '' (CUDA when available, else the CPU), 'cpu', 'cuda' or 'cuda:N'. Under torchrun each process
            takes the card of its local rank.

    Raises:
        UserError: the device does not exist here, or several processes would share it. All processes of a
            machine raise it, though only some may lack a card.
    """
    if ":" in name and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "DEVICE: expected 'cuda' with several processes, each of which takes a card of its own, got "
            f"{name!r}; choose cards with CUDA_VISIBLE_DEVICES"
        )
    cuda = torch.cuda.is_available()
    device = torch.device(name or ("cuda" if cuda else "cpu"))
    if device.type == "cpu":
        return device
    if not cuda:
        raise UserError(f"DEVICE: expected a usable device, got {name!r}, but there is no CUDA; use cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    last = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1 if device.index is None else device.index
    count = torch.cuda.device_count()
    if max(index, last) >= count:
        raise UserError(
            f"DEVICE: expected a card below {count}, as many as there are, got {max(index, last)}; use "
            "another one, or fewer processes"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


_cpu_group: list[dist.ProcessGroup] = []  # one element while there is a process group


def init_distributed(device: torch.device, timeout_minutes: float) -> None:
    """Join the process group that torchrun describes in the environment; nothing to do for one process.

    Args:
        device: of this process.
        timeout_minutes: how long a collective waits for other processes. NCCL waits a minute longer than the
            CPU group, because its watchdog ends the process without an exception.

    Raises:
        DistError: the other processes do not come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not in_group():
        timeout = timedelta(minutes=timeout_minutes)
        on_cuda = device.type == "cuda"
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        # torchrun's store outlives a restart, with the addresses of the processes that have ended
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=dist.PrefixStore(f"attempt_{attempt}", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout + timedelta(seconds=60 if on_cuda else 0),
        )
        _cpu_group.append(dist.new_group(backend="gloo", timeout=timeout))


def cpu_group() -> dist.ProcessGroup | None:
    """The group of all processes for tensors on the CPU; None without a process group."""
    return _cpu_group[-1] if _cpu_group else None


def close_distributed() -> None:
    """Leave the process group, if there is one."""
    _cpu_group.clear()
    if in_group():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if in_group():
        dist.barrier(group=cpu_group())


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Stack the CPU tensors of all ranks, all of one shape, in a new first dimension. Collective."""
    if not in_group():
        return tensor[None]
    gathered = [torch.empty_like(tensor) for _ in range(get_world_size())]
    dist.all_gather(gathered, tensor.contiguous(), group=cpu_group())
    return torch.stack(gathered)


def any_rank(flag: bool) -> bool:
    """Whether the flag is True on any rank. Collective."""
    return bool(all_gather(torch.tensor(int(flag))).any())


def broadcast(value: Any) -> Any:
    """The main process's ``value`` on every rank. Collective."""
    if not in_group():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=cpu_group())
    return box[0]


@contextlib.contextmanager
def raise_on_all_ranks(*kinds: type[Exception]) -> Iterator[None]:
    """Raise an error of one rank on all ranks, so that the others do not wait for it. Collective.

    Inside, no collective may follow code that can fail on one rank alone.

    Args:
        kinds: errors to raise everywhere, besides `UserError` and OSError.

    Raises:
        UserError: with the message of the first rank that failed.
    """
    failure = None
    try:
        yield
    except (UserError, OSError, *kinds) as error:
        failure = error
    messages = ["" if failure is None else str(failure) or type(failure).__name__]
    if in_group():
        messages = messages * get_world_size()
        dist.all_gather_object(messages, messages[0], group=cpu_group())
    if any(messages):
        raise UserError(next(filter(None, messages))) from failure


@dataclass(frozen=True)
class Precision:
    """The number format of the forward pass; float32 means no autocast."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context of the forward pass and the loss."""
        if self.dtype == torch.float32:
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, dtype=self.dtype)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Loss scaling: needed in fp16, disabled otherwise."""
        return torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)


def choose_precision(level: str, dtype: str, device: torch.device) -> Precision:
    """The precision that the options AMP_OPT_LEVEL and AMP_DTYPE ask for.

    Args:
        level: 'O0' is float32, 'O1' and 'O2' autocast; '' is autocast on CUDA or if ``dtype`` is given.
        dtype: 'bf16' or 'fp16'; '' takes bf16 where the device has it, else fp16.
        device: where the model runs.
    """
    level = level or ("O1" if device.type == "cuda" or dtype else "O0")
    if level == "O0":
        return Precision(torch.float32)
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = dtype or ("bf16" if has_bf16 else "fp16")
    return Precision({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory use so far: allocated by torch on a GPU, resident of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / (2**20 if sys.platform == "darwin" else 2**10)


def be_deterministic() -> None:
    """Have torch choose deterministic algorithms, and fail where there is none; slower on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and torch (all devices) with a mix of the given non-negative numbers.

    The training loop calls this with (seed, rank, epoch, step) before each step, so that what a step draws
    depends on its position alone: a resumed run draws the same numbers as one that never stopped.
    """
    high, low = np.random.SeedSequence(numbers).generate_state(2)
    random.seed(int(high))
    np.random.seed(int(high))
    torch.manual_seed((int(high) << 32 | int(low)) & (2**63 - 1))
