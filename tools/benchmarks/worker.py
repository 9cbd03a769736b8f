"""A process that runs functions for another one, so that a crash or a hang there stops nothing else.

Nothing here imports torch: a new process starts quickly.
"""

import logging
import multiprocessing
import multiprocessing.process
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

DIED = "its process ended, out of memory or with the error above"


class WorkerError(Exception):
    """Why a call in a worker's process failed, in one line."""


class Worker:
    """A process that calls functions one after another; after a failure the next call starts a new one."""

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
        """What the function returns there.

        Args:
            function, arguments: are pickled.
            seconds: after which the process is killed; None for never.

        Raises:
            TimeoutError: the time is over.
            WorkerError: the function raised an exception, or its process ended.
        """
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, its_end = context.Pipe()
            self._process = context.Process(target=_serve, args=(its_end,))
            self._process.start()
            its_end.close()
        try:
            self._pipe.send((function, arguments))
            in_time = self._pipe.poll(seconds)
            result, reason = self._pipe.recv() if in_time else (None, "")
        except (EOFError, ConnectionError):
            in_time, reason = True, DIED
        if not in_time:
            self.close(wait=0.0)
            raise TimeoutError
        if reason:
            self.close()
            raise WorkerError(reason)
        return result

    def close(self, wait: float = 10.0) -> None:
        """End the process; kill it if it is still there after `wait` seconds."""
        if self._process is not None:
            self._pipe.close()
            self._process.join(wait)
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(pipe: Connection) -> None:
    """Call functions until one raises an exception or the other end is closed."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    threading.Thread(target=_exit_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    reason = ""
    while not reason:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result = function(*arguments)
        except Exception as error:
            result, reason = None, short_reason(error)
        pipe.send((result, reason))


def _exit_with(parent: multiprocessing.process.BaseProcess) -> None:
    """Exit when the parent is killed."""
    parent.join()
    os._exit(1)


def short_reason(error: BaseException, length: int = 160) -> str:
    """An error in one line."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return text if len(text) <= length else text[: length - 3] + "..."
