"""Small helpers of the training loop: process group, device, precision, seeds and running sums.

Every helper gives the right answer without a process group, so the same code runs on one CPU, on one GPU and
under torchrun. What waits for the device says so.
"""

import contextlib
import os
import random
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


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
        ValueError: the device does not exist here, or several processes would share it. All processes of a
            machine raise it, though only some may lack a card.
    """
    if ":" in name and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "DEVICE: expected 'cuda' with several processes, each of which takes a card of its own, got "
            f"{name!r}; choose cards with CUDA_VISIBLE_DEVICES"
        )
    cuda = torch.cuda.is_available()
    device = torch.device(name or ("cuda" if cuda else "cpu"))
    if device.type == "cpu":
        return device
    if not cuda:
        raise ValueError(f"DEVICE: expected a usable device, got {name!r}, but there is no CUDA; use cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    last = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1 if device.index is None else device.index
    count = torch.cuda.device_count()
    if max(index, last) >= count:
        raise ValueError(
            f"DEVICE: expected a card below {count}, as many as there are, got {max(index, last)}; use "
            "another one, or fewer processes"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


_control: list[dist.ProcessGroup] = []  # of all processes over the CPU, once there is a process group


def init_distributed(device: torch.device, timeout_minutes: float) -> None:
    """Join the process group that torchrun describes in the environment; nothing to do for one process.

    Args:
        device: of this process.
        timeout_minutes: how long a process waits for the others before it gives up. On GPUs, NCCL waits a
            little longer than the CPU group, whose error is one that can be told.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not in_group():
        patience = timedelta(minutes=timeout_minutes)
        on_cuda = device.type == "cuda"
        store, rank, world_size = next(rendezvous("env://", timeout=patience))
        # torchrun keeps its store over a restart, and in it the addresses of the processes that are gone
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=dist.PrefixStore(f"attempt_{attempt}", store),
            rank=rank,
            world_size=world_size,
            timeout=patience + timedelta(seconds=60 if on_cuda else 0),
        )
        _control.append(dist.new_group(backend="gloo", timeout=patience))


def control_group() -> dist.ProcessGroup:
    """The group of all processes over the CPU; without a process group there is none."""
    return _control[-1]


def close_distributed() -> None:
    """Leave the process group, if there is one."""
    _control.clear()
    if in_group():
        dist.destroy_process_group()


def explain_lost_process(error: RuntimeError, timeout_minutes: float) -> str | None:
    """What to tell of an error that says that another process is gone or hangs; None for other errors."""
    if not in_group() or not re.search(r"gloo|nccl|time(d )?out|connection|peer|socket", str(error), re.I):
        return None
    reason = str(error).strip().splitlines()[0]
    return (
        f"process {get_rank()}: expected an answer from every other process within {timeout_minutes:g} "
        f"minutes (DIST_TIMEOUT_MINUTES), got: {reason}; a process has died or hangs: look for the "
        "log_rank*.txt that ends first, and start the same command again to continue from the last checkpoint"
    )


def barrier() -> None:
    """Wait for all processes."""
    if in_group():
        dist.barrier(group=control_group())


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of ``tensor`` over all processes, in place; also returned."""
    if in_group():
        dist.all_reduce(tensor)
    return tensor


def sum_over_processes(count: int, device: torch.device) -> int:
    """Sum of a number over all processes. Waits for the device; every process must call it."""
    return int(all_reduce_sum(torch.tensor(count, device=device)))


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The same-shaped CPU tensors of all processes, one after the other in a new first dimension."""
    if not in_group():
        return rows[None]
    gathered = [torch.empty_like(rows) for _ in range(get_world_size())]
    dist.all_gather(gathered, rows.contiguous(), group=control_group())
    return torch.stack(gathered)


def broadcast_text(text: str) -> str:
    """The main process's ``text``, on every process."""
    if not in_group():
        return text
    box = [text]
    dist.broadcast_object_list(box, src=0, group=control_group())
    return box[0]


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """What goes wrong inside on one process, a ValueError or OSError, is raised on all of them.

    Otherwise the others would wait for it, and only its log would know why. Inside, no process may wait for
    the others after something that can fail on one alone.

    Raises:
        ValueError: with the message of the first process that failed.
    """
    failure = None
    try:
        yield
    except (ValueError, OSError) as error:
        if not in_group():
            raise
        failure = error
    if not in_group():
        return
    messages = [""] * get_world_size()
    dist.all_gather_object(messages, "" if failure is None else str(failure), group=control_group())
    message = next(filter(None, messages), "")
    if message:
        raise ValueError(message) from failure


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


class Totals:
    """Named float64 sums that live on the device and are read once per logging interval.

    Args:
        names: what is summed.
        device: where the sums live.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(len(names), dtype=torch.float64, device=device)

    def add(self, **values: torch.Tensor | float) -> None:
        """Add to the sums of the given names; tensors stay on the device."""
        for name, value in values.items():
            self.sums[self.names.index(name)] += value

    def fetch(self, reset: bool = False) -> dict[str, float]:
        """The sums over all processes. Waits for the device; every process must call it."""
        sums = all_reduce_sum(self.sums.clone()).tolist()
        if reset:
            self.sums.zero_()
        return dict(zip(self.names, sums, strict=True))
