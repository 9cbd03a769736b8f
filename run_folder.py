"""The output folder of a run: made, logged to, and trained in by one run at a time.

Two runs in one folder, as when a job is queued again while its first one is dying, would mix their metrics
and remove each other's files. The main process therefore holds a lock, which is the kernel's: it is gone as
soon as the process is, however that ended. Only that of a machine that died may outlive it, on a file server.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import utils
from logger import Metrics, create_logger

LOCK_NAME = ".lock"
PATIENCE = 30.0  # seconds that a process of an earlier run may take to die
_HELD = (errno.EACCES, errno.EAGAIN)
_PAUSE = 0.5  # seconds

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def opened(output: Path, for_training: bool, timeout_minutes: float) -> Iterator[Metrics]:
    """Make the output folder and start the logs in it; inside, nobody else trains in it.

    Args:
        output: the folder.
        for_training: whether to hold its lock and to record metrics.
        timeout_minutes: how long the other processes wait for the main one.

    Raises:
        ValueError: on all processes; it cannot be written, or another run trains in it.
    """
    is_recording = for_training and utils.is_main_process()
    with contextlib.ExitStack() as stack:
        with utils.failing_together():
            try:
                output.mkdir(parents=True, exist_ok=True)
                create_logger(output, utils.get_rank())
                if is_recording:
                    stack.enter_context(only_run_in(output, min(PATIENCE, 30 * timeout_minutes)))
                metrics = Metrics(output if is_recording else None)
            except OSError as error:
                raise ValueError(
                    f"OUTPUT (--output): expected a folder that can be written, got {output} "
                    f"({error.strerror}); choose another"
                ) from error
        stack.callback(metrics.close)
        yield metrics


@contextlib.contextmanager
def only_run_in(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Inside, no other process gets past this for the same folder, on any machine whose locks reach it.

    Args:
        folder: existing.
        patience: seconds to wait for another process, which may be dying.

    Raises:
        ValueError: another process holds the lock for longer; the message says which.
        OSError: the folder cannot be written.
    """
    # Not truncated, for it may name another process.
    with (folder / LOCK_NAME).open("a+", encoding="utf-8", errors="replace") as file:
        if _take(file, folder, patience):
            with contextlib.suppress(OSError):  # a full disk; the name is there for the message alone
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
        yield


def _take(file: IO[str], folder: Path, patience: float) -> bool:
    """Lock the file, once it is free; whether the file system has locks at all."""
    deadline, told = time.monotonic() + patience, False
    while True:
        try:
            # The lock of a process, not of an open file (flock): a forked loader worker does not share it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in _HELD:
                logger.warning(
                    f"{file.name} cannot be locked ({error.strerror}): take care that no other run writes to "
                    "this folder"
                )
                return False
        file.seek(0)
        holder = file.read(200) or "another process"
        if time.monotonic() >= deadline:
            raise ValueError(
                f"{folder}: expected an output folder that no other run is writing to, got one that {holder} "
                "holds: wait for it, stop it, or choose another --tag; if its machine is gone, remove "
                f"{file.name}"
            )
        if not told:
            logger.warning(f"{folder} is held by {holder}: waiting up to {patience:.0f} s for it to end")
            told = True
        time.sleep(_PAUSE)
