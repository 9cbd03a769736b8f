"""Loss, gradient norm, speed and bad steps of training, exact over all processes.

Per step, two scalars stay where they are, on the device; nothing is computed or waited for. A logging
interval or a checkpoint gathers them from all processes. Sums are exactly rounded (``math.fsum``), so neither
the number of processes nor a stop and resumption in between changes a digit of what is logged.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import utils

NO_UPDATE = -1.0  # in place of a norm, where a batch only adds to the gradient


@dataclass
class IntervalStats:
    """What happened between two log lines, over all processes.

    Attributes:
        loss: mean over images with a finite loss.
        grad_norm: mean over updates with a finite norm.
        img_per_s: of all processes together.
        skipped: updates that were not made, as their gradient was not finite.
    """

    loss: float
    grad_norm: float
    img_per_s: float
    skipped: int


@dataclass
class BadStep:
    """An update whose loss or gradient norm was not finite.

    Attributes:
        step: its last batch in the epoch.
        number: of the update in the run.
        grad_norm: before clipping.
        losses: of the batches up to that one, each a list with one loss per process.
    """

    step: int
    number: int
    grad_norm: float
    losses: list[list[float]]


class TrainMeter:
    """Collects the steps of an epoch.

    Args:
        patience: bad updates in a row that are remembered; as many make ``is_hopeless``.
    """

    def __init__(self, patience: int = 1) -> None:
        self.patience = patience
        self.streak: deque[BadStep] = deque(maxlen=patience)  # bad updates in a row, up to now
        self.is_hopeless = False
        self.count_replaced: Callable[[], int] = lambda: 0  # training images replaced, by this process
        self.start_epoch()

    def start_epoch(self) -> None:
        """Forget the epoch before; the row of bad steps goes on."""
        self.loss_sum = self.image_sum = 0.0
        self.replaced = 0  # on all processes, up to the last gathering
        self._replaced_before = self.count_replaced()
        self._began = self._interval_began = time.perf_counter()
        self._losses: list[torch.Tensor] = []
        self._images: list[float] = []
        self._norms: list[torch.Tensor | float] = []
        self._numbers: list[float] = []
        self._steps: list[float] = []
        self._gathered: list[torch.Tensor] = []  # each (processes, steps, 5)
        self._unmade: list[list[float]] = []  # losses of batches that were read before their update

    def add_batch(self, step: int, loss: torch.Tensor, images: int) -> None:
        """Count the mean loss of a batch of ``images``."""
        self._steps.append(step)
        self._losses.append(loss.detach())
        self._images.append(images)
        self._norms.append(NO_UPDATE)
        self._numbers.append(NO_UPDATE)

    def add_update(self, number: int, norm: torch.Tensor) -> None:
        """Count update ``number`` of the run, made after the last batch, by its gradient norm."""
        self._norms[-1], self._numbers[-1] = norm.detach(), number

    def gather(self) -> None:
        """Exchange what has come since the last time. Waits for the device; every process must call it."""
        replaced = self.count_replaced()
        news = utils.gather_rows(torch.tensor([float(replaced - self._replaced_before)]))
        self.replaced += int(news.sum())
        self._replaced_before = replaced
        if self._steps:
            columns = [self._steps, self._images, self._numbers, _values(self._losses), _values(self._norms)]
            rows = torch.tensor(columns, dtype=torch.float64).T
            self._gathered.append(utils.gather_rows(rows))
            for column in (self._steps, self._images, self._numbers, self._losses, self._norms):
                column.clear()

    def read(self) -> IntervalStats:
        """The interval since the last call. Waits for the device; every process must call it."""
        self.gather()
        now = time.perf_counter()
        elapsed, self._interval_began = now - self._interval_began, now
        steps = [step for chunk in self._gathered for step in chunk.transpose(0, 1).tolist()]
        self._gathered.clear()
        batches = [batch for step in steps for batch in step]
        finite = [batch for batch in batches if math.isfinite(batch[3])]
        loss_sum = math.fsum(images * loss for _, images, _, loss, _ in finite)
        image_sum = math.fsum(batch[1] for batch in finite)
        norms = [step[0][4] for step in steps if step[0][2] != NO_UPDATE]  # alike on all processes
        finite_norms = [norm for norm in norms if math.isfinite(norm)]
        self.loss_sum += loss_sum
        self.image_sum += image_sum
        self._watch(steps)
        return IntervalStats(
            loss=loss_sum / image_sum if image_sum else math.nan,
            grad_norm=math.fsum(finite_norms) / len(finite_norms) if finite_norms else math.nan,
            img_per_s=math.fsum(batch[1] for batch in batches) / elapsed,
            skipped=len(norms) - len(finite_norms),
        )

    def _watch(self, steps: list[list[list[float]]]) -> None:
        """Count bad updates in a row, each with all batches that it is made of."""
        for step in steps:
            place, _, number, _, norm = step[0]
            self._unmade.append([batch[3] for batch in step])
            if number == NO_UPDATE or self.is_hopeless:
                continue
            losses, self._unmade = self._unmade, []
            if all(map(math.isfinite, [norm, *sum(losses, [])])):
                self.streak.clear()
            else:
                self.streak.append(BadStep(int(place), int(number), norm, losses))
            self.is_hopeless = len(self.streak) == self.patience

    @property
    def mean_loss(self) -> float:
        """Over all images read so far in the epoch."""
        return self.loss_sum / self.image_sum if self.image_sum else math.nan

    @property
    def minutes(self) -> float:
        """Since the epoch began, without the time between a stop and its resumption."""
        return (time.perf_counter() - self._began) / 60

    def capture(self) -> dict[str, Any]:
        """All of it as plain data; ``gather`` first, for the steps of other processes."""
        assert not self._steps, "steps that were not gathered"
        now = time.perf_counter()
        return {
            "loss_sum": self.loss_sum,
            "image_sum": self.image_sum,
            "replaced": self.replaced,
            "seconds": now - self._began,
            "interval_seconds": now - self._interval_began,
            "gathered": list(self._gathered),
            "unmade": self._unmade,
            "streak": [vars(bad) for bad in self.streak],
        }

    def restore(self, captured: dict[str, Any]) -> None:
        """Go on from what ``capture`` made, with any number of processes."""
        self.start_epoch()
        self.loss_sum, self.image_sum = float(captured["loss_sum"]), float(captured["image_sum"])
        self.replaced = int(captured["replaced"])
        self._began -= float(captured["seconds"])
        self._interval_began -= float(captured["interval_seconds"])
        self._gathered, self._unmade = list(captured["gathered"]), list(captured.get("unmade", []))
        self.streak.extend(BadStep(**bad) for bad in captured["streak"])


def _values(scalars: list[Any]) -> list[float]:
    """Scalars on the device, and numbers, in one transfer."""
    tensors = [item for item in scalars if torch.is_tensor(item)]
    values = iter(torch.stack(tensors).double().tolist() if tensors else [])
    return [next(values) if torch.is_tensor(item) else float(item) for item in scalars]
