"""The output folder of a run: one run at a time trains in it.

Two runs in one folder, such as a job that is queued again while its first attempt is still ending, would mix
their metrics and remove each other's files. The main rank therefore holds a lock of the operating system,
which ends with its process; data workers of a process that was killed may hold it some seconds longer.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

import utils
from logger import Metrics, create_logger
from training.preemption import StopRequested
from utils import UserError

LOCK_NAME = ".lock"
HOLDER_NAME = ".lock_holder"
"""The process that took the lock last, for messages."""
LOCK_TIMEOUT = 60.0  # seconds that the process of an earlier run may take to end

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def open_run_dir(output: Path, for_training: bool, timeout_minutes: float) -> Iterator[Metrics]:
    """Create the output folder and its logs; inside, no other run trains in it. Collective.

    Args:
        output: the folder.
        for_training: whether to lock it and to record metrics.
        timeout_minutes: how long the other ranks wait for the main one.

    Raises:
        UserError: the folder cannot be written, or another run trains in it.
    """
    is_recording = for_training and utils.is_main_process()
    with contextlib.ExitStack() as stack:
        with utils.raise_on_all_ranks():
            try:
                output.mkdir(parents=True, exist_ok=True)
                create_logger(output, utils.get_rank())
                if is_recording:
                    half = 30 * timeout_minutes  # in seconds: the other ranks are still waiting then
                    stack.enter_context(lock(output, min(LOCK_TIMEOUT, half)))
                metrics = Metrics(output if is_recording else None)
            except OSError as error:
                raise UserError(
                    f"OUTPUT (--output): expected a folder that can be written, got {output} "
                    f"({error.strerror}); choose another"
                ) from error
        stack.push(lambda kind, *_: metrics.close(kind is not None, kind is StopRequested))
        yield metrics


@contextlib.contextmanager
def lock(folder: Path, timeout: float) -> Iterator[None]:
    """Inside, no other process can hold the lock of the folder.

    Args:
        folder: existing.
        timeout: seconds to wait for another process to release it.

    Raises:
        UserError: another process holds it for longer; the message names the process.
    """
    path, holder, name = folder / LOCK_NAME, folder / HOLDER_NAME, "another process"
    file_lock = FileLock(path, fallback_to_soft=False)  # the fallback is a file that outlives a killed run
    try:
        try:
            file_lock.acquire(timeout=0)
        except Timeout:
            with contextlib.suppress(OSError):
                name = holder.read_text(encoding="utf-8", errors="replace")
            logger.warning(f"{folder} is locked by {name}: waiting up to {timeout:.0f} s for it to end")
            file_lock.acquire(timeout, poll_interval=0.5)
    except Timeout as error:
        raise UserError(
            f"{folder}: expected an output folder that no other run is writing to, got one that {name} has "
            f"locked: wait for it, stop it, or choose another --tag; if its machine is gone, remove {path}"
        ) from error
    except OSError as error:  # the file system has no locks
        logger.warning(
            f"{path} cannot be locked ({error}): make sure that no other run writes to this folder"
        )
    with contextlib.suppress(OSError):  # a full disk
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    try:
        yield
    finally:
        file_lock.release()
