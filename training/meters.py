"""Loss, gradient norm, speed and skipped updates of an epoch, over all ranks.

A step only stores references to scalars on the device. A log line or a checkpoint reads them and gathers them
from all ranks. Sums are rounded once (`math.fsum`), so that a checkpoint inside an interval changes no digit.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import utils


@dataclass
class IntervalStats:
    """What happened between two log lines, over all ranks."""

    loss: float  # mean over images with a finite loss
    grad_norm: float  # mean over updates with a finite norm, before clipping
    img_per_s: float
    skipped: int  # updates that were not made because their gradient was not finite


class TrainMeter:
    """Collects the steps of an epoch.

    Attributes:
        skipped_in_a_row: number of skipped updates since the last one that was made.
        count_replaced: how many training images this rank has replaced because they did not decode.
    """

    def __init__(self) -> None:
        self.skipped_in_a_row = 0
        self.count_replaced: Callable[[], int] = lambda: 0
        self.reset()

    def reset(self) -> None:
        """Begin an epoch; skipped updates in a row carry over."""
        self.loss_sum = self.image_sum = 0.0  # of finished intervals
        self.replaced = 0  # of all ranks
        self._replaced_before = self.count_replaced()
        self._epoch_start = self._interval_start = time.perf_counter()
        self._interval_images = 0  # of this rank
        self._batches: list[list[float]] = []  # gathered: [loss, images] of every rank
        self._norms: list[float] = []  # read: of each update
        self._pending_batches: list[tuple[torch.Tensor, int]] = []
        self._pending_norms: list[torch.Tensor] = []

    def add_batch(self, loss: torch.Tensor, images: int) -> None:
        """Add the mean loss of a batch, a scalar on any device, and its number of images."""
        self._pending_batches.append((loss.detach(), images))
        self._interval_images += images

    def add_update(self, norm: torch.Tensor) -> None:
        """Add the gradient norm of an update, a scalar on any device."""
        self._pending_norms.append(norm.detach())

    def gather(self) -> None:
        """Read the scalars and exchange them between the ranks. Collective; waits for the device."""
        replaced = self.count_replaced()
        self.replaced += int(utils.all_gather(torch.tensor(replaced - self._replaced_before)).sum())
        self._replaced_before = replaced
        if self._pending_batches:
            losses, images = zip(*self._pending_batches, strict=True)
            columns = [torch.stack(losses).cpu().double(), torch.tensor(images, dtype=torch.float64)]
            self._batches += utils.all_gather(torch.stack(columns, dim=1)).flatten(0, 1).tolist()
        if self._pending_norms:
            self._norms += torch.stack(self._pending_norms).cpu().tolist()
        self._pending_batches, self._pending_norms = [], []

    def read(self) -> IntervalStats:
        """The interval since the last call. Collective; waits for the device."""
        self.gather()
        now = time.perf_counter()
        img_per_s = self._interval_images * utils.get_world_size() / (now - self._interval_start)
        finite = [(loss, images) for loss, images in self._batches if math.isfinite(loss)]
        loss_sum = math.fsum(loss * images for loss, images in finite)
        image_sum = math.fsum(images for _, images in finite)
        norms = [norm for norm in self._norms if math.isfinite(norm)]
        stats = IntervalStats(
            loss=loss_sum / image_sum if image_sum else math.nan,
            grad_norm=math.fsum(norms) / len(norms) if norms else math.nan,
            img_per_s=img_per_s,
            skipped=len(self._norms) - len(norms),
        )
        for norm in self._norms:
            self.skipped_in_a_row = 0 if math.isfinite(norm) else self.skipped_in_a_row + 1
        self.loss_sum += loss_sum
        self.image_sum += image_sum
        self._batches, self._norms = [], []
        self._interval_start, self._interval_images = now, 0
        return stats

    @property
    def mean_loss(self) -> float:
        """Over all images of the epoch that were read so far."""
        return self.loss_sum / self.image_sum if self.image_sum else math.nan

    @property
    def minutes(self) -> float:
        """Time since the epoch began, without that between a stop and its continuation."""
        return (time.perf_counter() - self._epoch_start) / 60

    def state_dict(self) -> dict[str, Any]:
        """The epoch so far as plain data. Call `gather` first."""
        assert not self._pending_batches, "steps that were not gathered"
        return {
            "loss_sum": self.loss_sum,
            "image_sum": self.image_sum,
            "replaced": self.replaced,
            "batches": list(self._batches),
            "norms": list(self._norms),
            "skipped_in_a_row": self.skipped_in_a_row,
            "seconds": time.perf_counter() - self._epoch_start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue an epoch, with any number of ranks."""
        self.reset()
        self.loss_sum, self.image_sum = state["loss_sum"], state["image_sum"]
        self.replaced = state["replaced"]
        self._batches, self._norms = list(state["batches"]), list(state["norms"])
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self._epoch_start -= state["seconds"]
