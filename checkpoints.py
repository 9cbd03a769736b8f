"""When a run saves: after epochs, every so many steps or minutes, at the best accuracy, before it stops."""

import logging
import time
from pathlib import Path

import torch
from yacs.config import CfgNode

import storage
import utils
from control import Agreement, StopRequested
from logger import Metrics
from saver import Saver
from train_state import TrainState

BEST_IS_LOST = "ends without the best weights"
"""What a run says of ``best.pth`` at its end where that is so."""

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run. Every process must call each method; the main one writes.

    Args:
        config: the whole configuration.
        output: folder of the files.
        agreement: of the processes.
        metrics: whose length a checkpoint remembers.
    """

    def __init__(self, config: CfgNode, output: Path, agreement: Agreement, metrics: Metrics) -> None:
        self.config = config
        self.output = output
        self.agreement = agreement
        self.metrics = metrics
        self.saver = Saver(config.SAVE_ASYNC, config.SAVE_FAILURES_MAX)
        self.best_accuracy = 0.0  # percent, of the weights in best.pth; known to the main process
        self._saved_step = 0
        self._saved_time = time.monotonic()
        self._has_just_saved = False
        self._newest: storage.Stamp | None = None

    def start(self, state: TrainState, best: float) -> None:
        """Say where the run begins, where nothing needs to be saved, and what accuracy ``best.pth`` holds."""
        self._newest, self._saved_step = state.stamp, state.position.step
        self.best_accuracy = best

    def after_update(self, state: TrainState, is_last: bool) -> None:
        """Save inside an epoch where SAVE_STEPS or SAVE_MINUTES asks for it.

        Args:
            state: between two updates.
            is_last: whether the epoch ends here.

        Raises:
            StopRequested: on all processes, after a stop signal to any of them.
            ValueError: on all processes; training cannot go on without being saved.
        """
        every, minutes = self.config.SAVE_STEPS, self.config.SAVE_MINUTES
        is_late = minutes > 0 and time.monotonic() - self._saved_time >= 60 * minutes
        wanted = self.agreement.poll(save=is_late and utils.is_main_process(), fail=bool(self.saver.failure))
        if wanted.fail:
            self._give_up(self.saver.failure)
        if wanted.stop:
            raise StopRequested
        step = state.position.step
        wanted_now = wanted.save and not self._has_just_saved  # the answer to a wish may be a step late
        is_due = wanted_now or (every > 0 and step // every > self._saved_step // every)
        self._saved_step = step
        self._has_just_saved = is_due and not (is_last and self._is_epoch_due(state.position.epoch + 1))
        if self._has_just_saved:
            self.save(state)

    def after_epoch(self, state: TrainState) -> None:
        """Save a finished epoch, not evaluated yet, if SAVE_FREQ wants it or it is the last."""
        self._saved_step = 0
        if self._is_epoch_due(state.position.epoch):
            self.save(state)

    def _is_epoch_due(self, done: int) -> bool:
        return done % self.config.SAVE_FREQ == 0 or done == self.config.TRAIN.EPOCHS

    def save(self, state: TrainState, best: float | None = None) -> None:
        """Write a checkpoint of ``state``, under the name of its position.

        Args:
            state: between two updates.
            best: the accuracy (percent) for which it goes to ``best.pth`` instead.
        """
        state.meter.gather()
        self._saved_time, stamp = time.monotonic(), state.stamp
        self._newest = stamp
        if not utils.is_main_process():
            return
        name, content = storage.file_name(state.position.epoch, state.position.step), state.capture()
        if best is not None:
            name, content["accuracy"] = storage.BEST_NAME, best
        content["metrics_size"] = self.metrics.flush()

        def then() -> None:
            self.best_accuracy = self.best_accuracy if best is None else best
            storage.prune(self.output, stamp, self.config.SAVE_KEEP)

        self.saver.submit(content, self.output / name, stamp, then, before=self.metrics.sync)

    def save_if_best(self, state: TrainState, accuracy: float) -> None:
        """Write ``best.pth`` if ``accuracy`` (percent) is above that of the weights on the disk.

        What was reached once does not count: its file may have been refused, or damaged since.
        """
        is_best = utils.is_main_process() and accuracy > self.best_accuracy
        if is_best:
            self.saver.wait()  # the best one so far may be on its way to the disk
            is_best = accuracy > self.best_accuracy
        if utils.gather_rows(torch.tensor([float(is_best)])).any():
            self.save_best(state, accuracy)

    def save_best(self, state: TrainState, accuracy: float) -> None:
        """Write ``best.pth``, of weights with ``accuracy`` (percent)."""
        newest = self._newest
        self.save(state, accuracy)
        self._newest = newest

    def stop(self, state: TrainState) -> None:
        """Have the last state on the disk, before a run leaves for a signal; try a failed save again."""
        self.saver.wait()
        failed = bool(utils.gather_rows(torch.tensor([float(bool(self.saver.last_error))])).any())
        newest, stamp = self._newest, state.stamp
        if failed or newest is None or (newest.epoch, newest.images) != (stamp.epoch, stamp.images):
            self.save(state)
        self.finish()

    def tell_of_best(self, state: TrainState) -> None:
        """Warn at the end of a run if ``best.pth`` does not hold the best weights that it had."""
        if utils.is_main_process() and self.best_accuracy < state.max_accuracy:
            logger.warning(
                f"{self.output / storage.BEST_NAME} {BEST_IS_LOST}: {state.max_accuracy:.2f}% was reached, "
                f"it holds {self.best_accuracy:.2f}%; it could not be written, was damaged, or lies elsewhere"
            )

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            ValueError: on all processes; it could not be written.
        """
        self.agreement.settle()
        self.saver.wait()
        self._give_up(self.saver.failure or self.saver.last_error)

    def _give_up(self, reason: str) -> None:
        """Raise the main process's reason, if there is one, on all processes."""
        with utils.failing_together():
            if reason:
                raise ValueError(reason)
