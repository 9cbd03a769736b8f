"""How many worker processes a loader has, and how they start."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

import psutil

from utils import STOP_SIGNALS, env_int

logger = logging.getLogger(__name__)


def limit_workers(wanted: int) -> int:
    """The number of workers of a process: no more than its share of the cores that this machine lends it.

    A launcher that binds each process to cores of its own has made the shares already.
    """
    cores, processes = os.cpu_count() or 1, max(1, env_int("LOCAL_WORLD_SIZE", 1))
    with contextlib.suppress(AttributeError, psutil.Error):  # macOS binds no process
        process = psutil.Process()
        cores = len(process.cpu_affinity())
        if cores < len(process.parent().cpu_affinity()):
            processes = 1
    most = max(1, cores // processes)
    if wanted > most:
        logger.warning(
            f"DATA.NUM_WORKERS: {wanted} is more than this machine has cores ({cores}, for {processes} "
            f"process(es)); {most} are used"
        )
    return min(wanted, most)


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Start the workers inside: processes that begin here, fork servers too, inherit blocked stop signals.

    Launchers signal all processes of a job, but the training process needs the batches of the step that it
    finishes. Its own signals are delivered when the block ends. Not on macOS and Windows, see
    `leave_signals_to_parent`.
    """
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    resource_tracker.ensure_running()  # which unblocks SIGTERM when it starts, for spawn and forkserver
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker: int = 0) -> None:
    """In a worker: end on SIGTERM from the training process, and on no other stop signal.

    Only `sigwaitinfo` shows the sender of a signal, so a thread waits for them; where it is missing (macOS,
    Windows) a stop signal to the whole job ends workers, and so the run.

    Args:
        worker: its number, not used.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    parent = multiprocessing.parent_process()  # not getppid, which may be the fork server
    number = os.getppid() if parent is None else parent.pid
    threading.Thread(target=_wait_for_parent, args=(number,), daemon=True, name="signals").start()


def _wait_for_parent(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(STOP_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
