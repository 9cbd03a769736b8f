"""Input of users, files, process group, device, precision and seeds.

Every helper works without a process group, so that the same code runs on one CPU, on one GPU of any maker and
under torchrun.
"""

import argparse
import contextlib
import errno
import io
import os
import random
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

STOP_SIGNALS = {getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)}
"""Signals that ask a run to save and stop; Windows lacks SIGUSR1."""


class UserError(ValueError):
    """A mistake that the user can correct: main.py prints the message instead of a traceback."""


@contextlib.contextmanager
def user_input(option: str = "") -> Iterator[None]:
    """Around code that reads what the user named: ValueError, OSError and ImportError become `UserError`.

    The message begins with the option that holds the input, if one is given.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"{option}: {error}" if option else str(error)) from error


def print_error(message: str) -> None:
    """Print to stderr, which may be a file on a full disk."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def print_mistake(error: Exception | str, is_common: bool) -> None:
    """Print a mistake of the user, once on a machine if it `is_common` to all processes."""
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("RANK") or "0"
    if not is_common or rank == "0" or not rank.isdecimal():
        print_error(f"error: {error}")


def run_command(action: Callable[[], int | None]) -> int:
    """Run a command: its exit status, or 2 after a mistake of the user, which is printed.

    FOCAL_TRACEBACK=1 in the environment shows the traceback instead.
    """
    try:
        return action() or 0
    except (UserError, OSError) as error:
        if os.environ.get("FOCAL_TRACEBACK"):
            raise
        named = isinstance(error, UserError) or error.filename is not None
        said = f"{error}{'' if named else ' (FOCAL_TRACEBACK=1 shows where)'}"
        print_mistake(said, is_common=not in_group())  # processes of a group may fail alone
        return 2


def expand_path(path: str) -> str:
    """A path as the user gave it, with `~` and $VARIABLES replaced. Use it once, where the path comes in.

    Raises:
        UserError: a variable is not set, or there is no such user.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    if re.search(r"^~|\$(\w|\{)", expanded) and "://" not in path and not os.path.exists(expanded):
        raise UserError(f"{path}: expected a path whose variables are set, got {expanded}; write it out")
    return expanded


def path_argument(path: str) -> str:
    """`expand_path` as a type of argparse, which shows the message of one kind of error only."""
    try:
        if not path:
            raise UserError("expected a path, got ''")
        return expand_path(path)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def keep_inputs(inputs: Iterable[str | Path], outputs: Iterable[Path]) -> None:
    """Raise UserError if a file that will be written is one of those that are read."""
    read = [path for path in inputs if os.path.exists(path)]
    for path in outputs:
        if path.exists() and any(path.samefile(other) for other in read):
            raise UserError(f"--out: {path} would be replaced, which is read here; choose another place")


def env_int(name: str, default: int) -> int:
    """A number of the environment; an empty one is not set. UserError if it is no number."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name}: expected a number in the environment, got {text!r}; unset it or correct it")
    return int(text)


def escape_output() -> None:
    """Print what the console's encoding lacks, such as names of files that are not UTF-8, as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file so that at any moment `path` is absent, old or complete, on the disk too.

    Yields a temporary path beside it, `.NAME.tmp`. Write and close that file inside; at the end it is renamed
    to `path`. After any error it is removed, and what was at `path` before stays. Missing folders are made.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that cannot flush
                    raise
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file
        raise
    with contextlib.suppress(OSError):  # Windows and some file systems cannot flush folders
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
        name: '' (the accelerator if there is one, else the CPU), 'cpu', or the type of the accelerator
            ('cuda', 'mps', 'xpu', ...), alone or with an index. Under torchrun each process takes the card of
            its local rank.

    Raises:
        UserError: the device does not exist here, or several processes would share it. All processes of a
            machine raise it, though only some may lack a card.
    """
    if ":" in name and env_int("WORLD_SIZE", 1) > 1:
        raise UserError(
            "DEVICE (--device): expected a type without index with several processes, each of which takes a "
            f"card of its own, got {name!r}; choose cards with CUDA_VISIBLE_DEVICES or the like"
        )
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "cpu" or not (name or found):
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if found is None or kind not in ("", found.type) or not (number or "0").isdecimal():
        usable = "cpu" if found is None else f"{found.type} or cpu"
        raise UserError(
            f"DEVICE (--device): expected a device that PyTorch finds here ({usable}), got {name!r}; use that"
        )
    index = int(number or env_int("LOCAL_RANK", 0))
    last = int(number or env_int("LOCAL_WORLD_SIZE", 1) - 1)
    count = torch.accelerator.device_count()
    if max(index, last) >= count:
        raise UserError(
            f"DEVICE (--device): expected a card below {count}, the number of cards, got {max(index, last)}; "
            "use another one, or fewer processes; where a launcher shows each process only its own card, set "
            "LOCAL_RANK=0 and LOCAL_WORLD_SIZE=1"
        )
    torch.accelerator.set_device_index(index)
    return torch.device(found.type, index)


_cpu_group: dist.ProcessGroup | None = None  # see `cpu_group`


def init_distributed(device: torch.device, timeout_minutes: float) -> None:
    """Join the process group that torchrun describes in the environment; nothing to do for one process.

    Args:
        device: of this process.
        timeout_minutes: how long a collective waits for other processes. The group of a GPU waits a minute
            longer than that of the CPU, because NCCL's watchdog ends the process without an exception.

    Raises:
        DistError: the other processes do not come.
        UserError: on all ranks; they have devices of different types.
    """
    global _cpu_group
    if env_int("WORLD_SIZE", 1) > 1 and not in_group():
        timeout = timedelta(minutes=timeout_minutes)
        backend = dist.Backend.default_device_backend_map.get(device.type, "gloo")
        backend = backend if dist.is_backend_available(backend) else "gloo"  # as on Windows
        with user_input("the environment that torchrun sets"):
            store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        store = fresh_store(store, rank, world_size)
        check_same_device(store, rank, world_size, device)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout + timedelta(seconds=0 if backend == "gloo" else 60),
        )
        _cpu_group = dist.new_group(backend="gloo", timeout=timeout)
        any_rank(False)  # a barrier: rank 0, which hosts the store, must not end before all have joined


def fresh_store(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """An empty part of the store, which the processes of this start share. Collective.

    torchrun's store outlives a restart, with the addresses of processes that have ended, and its number of
    restarts differs between machines. So rank 0 draws a name and sends it to each process that requests it,
    until all have it: the first requests that it finds may be those of ended processes.

    Raises:
        DistError: the other processes do not come before the store's timeout.
    """
    requests = [f"request_{number}" for number in range(world_size)]
    reply_key = secrets.token_hex(8)
    store.set(requests[rank], reply_key)
    if rank > 0:
        try:
            name = store.get(reply_key).decode()  # waits
        except dist.DistStoreError as error:
            seconds = store.timeout.total_seconds()
            raise dist.DistStoreError(
                f"expected {world_size} processes, not all came within {seconds:.0f} s"
            ) from error
        store.set(f"{name}_{rank}", "")
        return dist.PrefixStore(name, store)
    name, deadline = secrets.token_hex(8), time.monotonic() + store.timeout.total_seconds()
    while missing := [number for number in range(1, world_size) if not store.check([f"{name}_{number}"])]:
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, missing))
            raise dist.DistStoreError(f"expected {world_size} processes, these ranks did not come: {ranks}")
        for number in missing:
            if store.check([requests[number]]):
                store.set(store.get(requests[number]).decode(), name)
        time.sleep(0.05)
    return dist.PrefixStore(name, store)


def check_same_device(store: dist.Store, rank: int, world_size: int, device: torch.device) -> None:
    """Raise UserError on all ranks if some have another type of device, as where one driver is broken."""
    keys = [f"device_{number}" for number in range(world_size)]
    store.set(keys[rank], f"{device.type} on {socket.gethostname()}")
    found = [value.decode() for value in store.multi_get(keys)]
    kinds = {value.split()[0]: value for value in found}  # the last machine of each
    if len(kinds) > 1:
        raise UserError(
            f"DEVICE: expected the same type of device in all processes, got {' and '.join(kinds.values())}; "
            "check the driver of the machine without one, or set DEVICE (--device)"
        )


def cpu_group() -> dist.ProcessGroup | None:
    """The group of all processes for tensors on the CPU; None without a process group."""
    return _cpu_group


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
    """The main process's `value` on every rank. Collective."""
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

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The context of the forward pass and the loss."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()  # not every device has autocast
        return torch.autocast(device.type, dtype=self.dtype)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Loss scaling: needed in fp16, disabled otherwise."""
        return torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)


def choose_precision(level: str, dtype: str, device: torch.device) -> Precision:
    """The precision that the options AMP_OPT_LEVEL and AMP_DTYPE ask for.

    Args:
        level: 'O0' is float32, 'O1' and 'O2' autocast; '' is autocast if `dtype` is given, or on a GPU of
            which PyTorch knows whether it has bf16 (CUDA, XPU).
        dtype: 'bf16' or 'fp16'; '' takes fp16 where PyTorch knows that the device lacks bf16, else bf16.
        device: where the model runs.

    Raises:
        UserError: AMP_DTYPE together with O0.
    """
    if level == "O0" and dtype:
        raise UserError(
            f"AMP_DTYPE: expected '' with AMP_OPT_LEVEL O0 (full precision), got {dtype!r}; drop one"
        )
    has_bf16 = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    level = level or ("O1" if dtype or has_bf16 else "O0")
    if level == "O0":
        return Precision(torch.float32)
    options = {"including_emulation": False} if device.type == "cuda" else {}
    dtype = dtype or ("bf16" if has_bf16 is None or has_bf16(**options) else "fp16")
    return Precision({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])


def can_pin_memory() -> bool:
    """Whether page-locked host memory speeds up copies to this machine's accelerator."""
    found = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
    return bool(found) and found.type != "mps"  # Apple's shares the memory of the host


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def memory_mb(device: torch.device) -> float:
    """Largest memory that torch has allocated so far on a GPU; on others, what the process holds now."""
    largest = getattr(torch.get_device_module(device), "max_memory_allocated", None)  # not on cpu and mps
    used = psutil.Process().memory_info().rss if largest is None else largest(device)
    return used / 2**20


def be_deterministic() -> None:
    """Have torch choose deterministic algorithms, and fail where there is none; slower on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads such memory


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and torch (all devices) with a mix of the given non-negative numbers.

    The training loop calls this with (seed, rank, epoch, step) before each step, so that what a step draws
    depends on its position alone: a resumed run draws the same numbers as one that never stopped.
    """
    high, low = np.random.SeedSequence(numbers).generate_state(2)
    random.seed(int(high))
    np.random.seed(int(high))
    torch.manual_seed((int(high) << 32 | int(low)) & (2**63 - 1))
