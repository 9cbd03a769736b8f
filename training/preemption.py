"""Stop signals, and how all ranks stop at the same step.

A signal may reach one rank only. The ranks therefore combine their flags after every update, over a CPU group
and one update late, so that no rank waits for the device or the network.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import torch
import torch.distributed as dist

import utils

EXIT_STOPPED = 75
"""The exit status of a run that saved and stopped after a signal: start the same command again."""

_received: list[int] = []  # stop signals since `handle_stop_signals` was entered


class StopRequested(Exception):
    """A rank received a signal, or cannot write checkpoints; raised on all ranks at the same step."""


@contextlib.contextmanager
def handle_stop_signals() -> Iterator[None]:
    """Inside, a stop signal is recorded instead of ending the process."""
    _received.clear()
    before = {number: signal.signal(number, _record) for number in utils.STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def _record(number: int, frame: FrameType | None) -> None:
    _received.append(number)


def stop_received() -> bool:
    """Whether this rank received a stop signal."""
    return bool(_received)


class StopSync:
    """Combines the stop flags of all ranks. All ranks must call the methods in the same order."""

    def __init__(self) -> None:
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def sync(self, flag: bool) -> bool:
        """Send this rank's flag; returns whether any rank set it in the previous call.

        A single process gets its own flag back at once.
        """
        if not utils.in_group():
            return flag
        previous = self.wait()
        tensor = torch.tensor(int(flag))
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=utils.cpu_group(), async_op=True)
        self._pending = work, tensor
        return previous

    def wait(self) -> bool:
        """Wait for the flags of the last `sync`; False if there is nothing to wait for."""
        if self._pending is None:
            return False
        work, tensor = self._pending
        work.wait()
        self._pending = None
        return bool(tensor)
