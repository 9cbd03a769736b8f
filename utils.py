"""Small helpers of the training loop: process group, device, precision, seeds and running sums.

Every helper gives the right answer without a process group, so the same code runs on one CPU, on one GPU and
under torchrun. What waits for the device says so.
"""

import contextlib
import os
import random
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist


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


def init_distributed(device: torch.device) -> None:
    """Join the process group that torchrun describes in the environment; nothing to do for one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not in_group():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def close_distributed() -> None:
    """Leave the process group, if there is one."""
    if in_group():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if in_group():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of ``tensor`` over all processes, in place; also returned."""
    if in_group():
        dist.all_reduce(tensor)
    return tensor


def sum_over_processes(count: int, device: torch.device) -> int:
    """Sum of a number over all processes. Waits for the device; every process must call it."""
    return int(all_reduce_sum(torch.tensor(count, device=device)))


def broadcast_text(text: str) -> str:
    """The main process's ``text``, on every process."""
    if not in_group():
        return text
    box = [text]
    dist.broadcast_object_list(box, src=0)
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
    dist.all_gather_object(messages, "" if failure is None else str(failure))
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


class FiniteWatch:
    """Remembers, on the device, the first step at which something was not finite.

    Args:
        device: where the checked tensors live.
    """

    NEVER = 2**62

    def __init__(self, device: torch.device) -> None:
        self.first = torch.full((), self.NEVER, dtype=torch.int64, device=device)

    def note(self, value: torch.Tensor, step: int) -> None:
        """Check a scalar of step ``step``."""
        self.first = torch.where(torch.isfinite(value), self.first, self.first.clamp(max=step))

    def first_bad_step(self) -> int | None:
        """The earliest such step over all processes. Waits for the device; every process must call it."""
        first = self.first.clone()
        if in_group():
            dist.all_reduce(first, op=dist.ReduceOp.MIN)
        step = int(first)
        return None if step == self.NEVER else step


@dataclass
class IntervalStats:
    """What happened between two log lines, over all processes."""

    loss: float
    grad_norm: float
    img_per_s: float
    bad_step: int | None  # first step with a non-finite loss or gradient


class TrainMeter:
    """Loss, gradient norm and speed of an epoch; collected on the device, read once per logging interval.

    Args:
        device: where training runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.totals = Totals(("loss", "images", "grad_norm", "updates"), device)
        self.watch = FiniteWatch(device)
        self.clock = time.perf_counter()
        self.loss_sum = 0.0
        self.image_sum = 0.0

    def add_batch(self, loss: torch.Tensor, images: int, step: int) -> None:
        """Count the mean loss of a batch of ``images``."""
        self.totals.add(loss=loss * images, images=images)
        self.watch.note(loss, step)

    def add_update(self, grad_norm: torch.Tensor, step: int, may_overflow: bool) -> None:
        """Count an optimizer update; with loss scaling, overflows are expected, skipped, and not counted."""
        if not may_overflow:
            self.watch.note(grad_norm, step)
        finite = torch.isfinite(grad_norm)
        self.totals.add(grad_norm=torch.where(finite, grad_norm, 0.0), updates=finite)

    def read(self) -> IntervalStats:
        """The interval since the last call. Waits for the device; every process must call it."""
        sums = self.totals.fetch(reset=True)
        now = time.perf_counter()
        elapsed, self.clock = now - self.clock, now
        self.loss_sum += sums["loss"]
        self.image_sum += sums["images"]
        return IntervalStats(
            loss=sums["loss"] / max(sums["images"], 1.0),
            grad_norm=sums["grad_norm"] / max(sums["updates"], 1.0),
            img_per_s=sums["images"] / elapsed,
            bad_step=self.watch.first_bad_step(),
        )

    @property
    def mean_loss(self) -> float:
        """Over all images read so far."""
        return self.loss_sum / max(self.image_sum, 1.0)
