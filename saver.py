"""Writes checkpoints beside training: the step waits for a copy in memory, a thread does the rest.

The copy goes to buffers that are kept from one save to the next: page-locked ones on a GPU, which are filled
on its stream, in order with the updates, while the step goes on. One save is under way at a time.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import storage

logger = logging.getLogger(__name__)


class Snapshot:
    """A copy of nested plain data in host memory; its buffers serve one copy after the other."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, content: dict[str, Any]) -> dict[str, Any]:
        """The same data with tensors of its own; read it after ``wait``, and before the next ``take``."""
        copied: dict[str, Any] = self._copy(content, ())
        if torch.cuda.is_initialized():
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copied

    def wait(self) -> None:
        """Wait until the device has delivered what was taken."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, item: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(item, dict):
            return {key: self._copy(value, (*place, key)) for key, value in item.items()}
        if isinstance(item, list | tuple):
            return type(item)(self._copy(value, (*place, index)) for index, value in enumerate(item))
        if not torch.is_tensor(item):
            return item
        buffer = self._buffers.get(place)
        if buffer is None or (buffer.shape, buffer.dtype) != (item.shape, item.dtype):
            buffer = torch.empty(item.shape, dtype=item.dtype, pin_memory=item.is_cuda)
            self._buffers[place] = buffer
        buffer.copy_(item.detach(), non_blocking=item.is_cuda)
        return buffer


class Saver:
    """Writes one checkpoint after the other, and remembers what went wrong.

    A file that cannot be written is an error in the log, and training goes on with the older file; only too
    many in a row, or weights that are not finite, end it (``failure``).

    Args:
        background: write in a thread; otherwise ``submit`` writes.
        most_failures: in a row, after which there is a ``failure``.
    """

    def __init__(self, background: bool, most_failures: int) -> None:
        self.background = background
        self.most_failures = most_failures
        self.failures = 0  # in a row
        self.failure = ""  # why training cannot go on; '' if it can
        self.last_error = ""  # of the last save; '' if it succeeded
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None

    def submit(
        self,
        content: dict[str, Any],
        path: Path,
        stamp: storage.Stamp,
        then: Callable[[], None],
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy ``content`` and write it to ``path``; waits for the save before this one.

        Args:
            content: plain data; it may change as soon as this returns.
            path: file to write.
            stamp: the position it was taken at.
            then: called after a success, by the writing thread.
            before: called before the file is written, by the writing thread.
        """
        self.wait()
        copied = self._snapshot.take(content)
        self._thread = threading.Thread(
            target=self._write, args=(copied, path, stamp, then, before), name=f"save {path.name}"
        )
        self._thread.start()
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(
        self,
        content: dict[str, Any],
        path: Path,
        stamp: storage.Stamp,
        then: Callable[[], None],
        before: Callable[[], None],
    ) -> None:
        try:
            self._snapshot.wait()
            if not all_finite(content):
                self.failure = self.last_error = (
                    f"{path}: expected finite weights and optimizer moments, got nan or inf; nothing was "
                    "saved; lower the learning rate or train in bf16 or full precision"
                )
                return
            before()
            storage.write(content, path, stamp)
            self.failures, self.last_error = 0, ""
            logger.debug(f"saved {path}")
            then()
        except Exception as error:  # a thread has nobody else to tell
            self._note(storage.explain(path, error))

    def _note(self, reason: str) -> None:
        self.failures, self.last_error = self.failures + 1, reason
        if self.failures >= self.most_failures:
            self.failure = (
                f"{reason}; this was failure {self.failures} in a row (SAVE_FAILURES_MAX): make space or "
                "choose another --output, and start the same command again"
            )
        else:
            logger.error(
                f"{reason}; older files are kept, training goes on, and the next save is made as planned "
                f"(failure {self.failures} of {self.most_failures})"
            )


def all_finite(content: dict[str, Any]) -> bool:
    """Whether the weights and optimizer moments of a checkpoint are finite."""
    keys = ("model", "model_ema", "optimizer")
    return all(bool(torch.isfinite(tensor).all()) for tensor in _floats(content.get(key) for key in keys))


def _floats(items: Iterable[Any]) -> Iterable[torch.Tensor]:
    """All floating point tensors in nested data."""
    for item in items:
        if isinstance(item, dict):
            yield from _floats(item.values())
        elif isinstance(item, list | tuple):
            yield from _floats(item)
        elif torch.is_tensor(item) and item.is_floating_point():
            yield item
