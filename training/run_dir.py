"""The output folder of a run: one run at a time trains in it.

Two runs in one folder, such as a job that is queued again while its first attempt is still ending, would mix
their metrics and remove each other's files. The main rank therefore holds a lock of the operating system,
which ends with its process.
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
from utils import UserError

LOCK_NAME = ".lock"
PATIENCE = 30.0  # seconds that the process of an earlier run may take to end
PAUSE = 0.5  # seconds between two attempts

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
                    stack.enter_context(lock(output, min(PATIENCE, 30 * timeout_minutes)))
                metrics = Metrics(output if is_recording else None)
            except OSError as error:
                raise UserError(
                    f"OUTPUT (--output): expected a folder that can be written, got {output} "
                    f"({error.strerror}); choose another"
                ) from error
        stack.callback(metrics.close)
        yield metrics


@contextlib.contextmanager
def lock(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Inside, no other process can hold the lock of the folder.

    Args:
        folder: existing.
        patience: seconds to wait for another process to release it.

    Raises:
        UserError: another process holds it for longer; the message names the process.
        OSError: the folder cannot be written.
    """
    with (folder / LOCK_NAME).open("a+", encoding="utf-8", errors="replace") as file:
        if _acquire(file, folder, patience):
            with contextlib.suppress(OSError):  # a full disk; the text is only for messages
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
        yield


def _acquire(file: IO[str], folder: Path, patience: float) -> bool:
    """Lock the file as soon as it is free; False if the file system has no locks."""
    deadline, has_warned = time.monotonic() + patience, False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not shared with forked workers
            return True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logger.warning(
                    f"{file.name} cannot be locked ({error.strerror}): make sure that no other run writes to "
                    "this folder"
                )
                return False
        file.seek(0)
        holder = file.read(200) or "another process"
        if time.monotonic() >= deadline:
            raise UserError(
                f"{folder}: expected an output folder that no other run is writing to, got one that {holder} "
                "has locked: wait for it, stop it, or choose another --tag; if its machine is gone, remove "
                f"{file.name}"
            )
        if not has_warned:
            logger.warning(f"{folder} is locked by {holder}: waiting up to {patience:.0f} s for it to end")
            has_warned = True
        time.sleep(PAUSE)
