"""Decisions that all processes take at the same step: to stop for a signal, to save, to give up.

A signal may reach one process only, and the clock of one decides when to save. Every process therefore brings
its wishes to each ``poll``, and all get the same answer. Between processes the wishes travel beside the
computation, over a CPU group of their own, and the answer is the one to the poll before: nothing waits for
the device, and hardly anything for the network.
"""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

import utils

EXIT_STOPPED = os.EX_TEMPFAIL
"""75, the exit status of a run that saved and stopped for a signal: start the same command again."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_received: list[int] = []  # stop signals that came while somebody listened


class StopRequested(Exception):
    """A process got a stop signal; all processes raise it at the same step."""


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Inside, a stop signal is noted for the next ``poll`` instead of ending the process."""
    _received.clear()
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, _note) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(number)


@dataclass(frozen=True)
class Wishes:
    """What a process wants; the answer holds what any of them wants.

    Attributes:
        stop: save and leave.
        save: write a checkpoint.
        fail: cannot go on.
    """

    stop: bool = False
    save: bool = False
    fail: bool = False


class Agreement:
    """Collects the wishes of all processes; every process must call each method equally often."""

    def __init__(self) -> None:
        self._pending: tuple[Any, torch.Tensor] | None = None

    def poll(self, save: bool = False, fail: bool = False) -> Wishes:
        """What the processes want together: now for a single one, else at the poll before."""
        mine = Wishes(stop=bool(_received), save=save, fail=fail)
        if not utils.in_group():
            return mine
        answer = self.settle()
        wishes = torch.tensor([int(getattr(mine, field.name)) for field in fields(Wishes)])
        work = dist.all_reduce(wishes, dist.ReduceOp.MAX, group=utils.control_group(), async_op=True)
        self._pending = work, wishes
        return answer

    def settle(self) -> Wishes:
        """The answer that is still out."""
        if self._pending is None:
            return Wishes()
        work, wishes = self._pending
        work.wait()
        self._pending = None
        return Wishes(*map(bool, wishes.tolist()))

    def until_stopped(self, batches: Any) -> Iterator[Any]:
        """The batches, of which processes may have different numbers, until one of them wants to stop.

        An error of one process ends it for all of them, which gather in ``utils.failing_together``.

        Raises:
            StopRequested: on all processes.
            OSError, ValueError: what ``batches`` raises, on that process.
        """
        rounds = int(utils.gather_rows(torch.tensor([float(len(batches))])).max())
        self.settle()  # wishes of the training before; who still has them repeats them there
        iterator, failure = iter(batches), None
        for _ in range(rounds):
            wanted = self.poll(fail=failure is not None)
            if wanted.stop:
                raise StopRequested
            if wanted.fail:
                break
            if failure is None:
                try:
                    yield from itertools.islice(iterator, 1)
                except (OSError, ValueError) as error:
                    failure = error
        self.settle()
        if failure is not None:
            raise failure
