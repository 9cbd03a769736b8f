"""How a loader's worker process starts."""

import multiprocessing
import os
import signal
import threading

from data.images import without_opencv_threads

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1}


def leave_signals_to_parent(worker: int = 0) -> None:
    """Keep a worker alive through a stop signal to its whole process group or job.

    Launchers send it to all processes. The training process wants the batches of the step it finishes; it
    ends its workers itself, at last by SIGTERM, which counts from it alone. Who sent a signal only
    `sigwaitinfo` tells, so a thread takes them; where there is none (macOS) workers end, and the run too.

    Args:
        worker: its number, not used.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    parent = multiprocessing.parent_process()  # not getppid, which may be the fork server
    number = os.getppid() if parent is None else parent.pid
    threading.Thread(target=_wait_for_parent, args=(number,), daemon=True, name="signals").start()


def _wait_for_parent(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(_STOP_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)


def leave_signals_to_parent_without_opencv_threads(worker: int = 0) -> None:
    """`leave_signals_to_parent` for a worker that decodes with OpenCV."""
    without_opencv_threads(worker)
    leave_signals_to_parent(worker)
