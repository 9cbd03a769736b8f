"""Checkpoint files: how they are written, found again and removed, and when a run saves.

A file is written under a temporary name, flushed to the disk and renamed, so that at any moment it is absent,
old or complete. The checksums that `torch.save` stores in its zip archive verify it on reading. The names
order the files:

    ckpt_epoch_4.pth            epoch 4 (counted from 0) is finished
    ckpt_epoch_5_step_120.pth   inside epoch 5, after 120 of its batches
    best.pth                    the state after the epoch with the best accuracy
"""

import contextlib
import io
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from yacs.config import CfgNode

import utils
from logger import Metrics
from models import read_checkpoint
from training.preemption import StopRequested, StopSync, stop_received
from training.state import EpochStep, Position, TrainState
from utils import UserError, user_input

BEST_NAME = "best.pth"
NAME = re.compile(r"ckpt_epoch_(\d+)(?:_step_(\d+))?\.pth")
KEPT_IN_EPOCH = 2  # checkpoints of the running epoch, so that a damaged one has a predecessor

logger = logging.getLogger(__name__)


# --- Files --------------------------------------------------------------------------------------------------


def file_name(position: Position) -> str:
    """The name of a checkpoint at a position."""
    if position.step:
        return f"ckpt_epoch_{position.epoch}_step_{position.step}.pth"
    return f"ckpt_epoch_{position.epoch - 1}.pth"


def checkpoints_in(folder: Path) -> list[tuple[EpochStep, Path]]:
    """All checkpoints of a folder but best.pth, complete or not, sorted by progress.

    Raises:
        OSError: the folder cannot be read.
    """
    found = []
    for name in os.listdir(folder) if folder.exists() else []:
        if (match := NAME.fullmatch(name)) and not (folder / name).is_dir():
            epoch, step = int(match[1]), match[2]
            found.append(((epoch, int(step)) if step else (epoch + 1, 0), folder / name))
    return sorted(found)


class _ErrorKeepingFile:
    """A file for `torch.save`; keeps the first OSError, since torch's own does not name a full disk."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self.file.write(content) if self.error is None else len(content)
        except OSError as error:
            self.error = error
            return len(content)

    def flush(self) -> None:
        """Called by `torch.save`; closing the file flushes."""


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write plain data, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    with utils.atomic_write(path) as temporary, temporary.open("wb") as file:
        target = _ErrorKeepingFile(file)
        torch.save(content, target)
        if target.error is not None:
            raise target.error


def is_valid(path: Path) -> bool:
    """Whether a file is a zip archive in which all checksums hold.

    Raises:
        UserError: the disk cannot read it, which says nothing about the file.
    """
    try:
        content = path.read_bytes()  # first, since zipfile reports errors of the disk as damage
    except (FileNotFoundError, IsADirectoryError):
        return False
    except OSError as error:
        raise UserError(
            f"{path}: expected to read the checkpoint, got: {error.strerror or error}; nothing was changed: "
            "start the same command again when the disk works, or move the file away to continue without it"
        ) from error
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile raises many types on damaged archives
        return False


@dataclass
class Found:
    """What the folder of a run holds."""

    newest: Path | None = None  # the valid checkpoint that is furthest in training
    content: dict[str, Any] = field(default_factory=dict)  # what it holds
    best: float = 0.0  # accuracy (percent) of best.pth


def find_checkpoints(folder: Path) -> Found:
    """Read the valid checkpoint that is furthest in training, and the accuracy of best.pth.

    Of two at the same position it is best.pth, since that one was written after the evaluation. A file whose
    content is of another position than its name says is skipped.

    Raises:
        UserError: a file cannot be read, or no checkpoint can be used.
    """
    candidates, best_path = checkpoints_in(folder), folder / BEST_NAME
    best = read_best(best_path)
    if best_path.is_file():
        candidates.append((best[0] if best else (0, 0), best_path))  # damaged: skipped below, with a warning
    for place, path in sorted(candidates, key=lambda item: (item[0], item[1] == best_path), reverse=True):
        if not (best if path == best_path else is_valid(path)):
            logger.warning(f"{path} is damaged or incomplete and was skipped")
            continue
        with user_input():
            content = read_checkpoint(path)
        if path == best_path or position_of(content) in (place, None):  # None: `check_checkpoint` refuses it
            return Found(path, content, best[1] if best else 0.0)
        logger.warning(f"{path} holds another position in training than its name says, and was skipped")
    if candidates:
        raise UserError(
            f"{folder}: expected a checkpoint to continue from, got only what was skipped; move it away to "
            "start anew, or choose another --tag"
        )
    return Found()


def read_best(path: Path) -> tuple[EpochStep, float] | None:
    """The position and the accuracy (percent) of best.pth, zeros if it has none; None if it is not valid.

    Its content is not kept, since that of two checkpoints would need much memory.
    """
    with user_input():
        content = read_checkpoint(path) if is_valid(path) else None
    if content is None:
        return None
    place, accuracy = position_of(content), content.get("accuracy")
    return (place, accuracy) if place and isinstance(accuracy, int | float) else ((0, 0), 0.0)


def position_of(content: dict[str, Any]) -> EpochStep | None:
    """The position in the content of a checkpoint; None if it is not one of this project."""
    position = content.get("position")
    place = (position.get("epoch"), position.get("step")) if isinstance(position, dict) else ()
    return place if place and all(isinstance(number, int) for number in place) else None


def prune(folder: Path, newest: EpochStep, keep: int) -> None:
    """Remove the checkpoints that a new one supersedes. best.pth stays.

    Of the checkpoints inside epochs, those before the last whole epoch go; of the rest, the newest
    KEPT_IN_EPOCH stay. Those of the running epoch that come after the new one belong to a continuation that
    was given up.

    Args:
        folder: of the checkpoints.
        newest: the one that was just written; later epochs are not touched.
        keep: how many stay at most; 0 for all those of whole epochs.
    """
    found = checkpoints_in(folder)
    known = [(place, path) for place, path in found if place <= newest]
    last_whole = max((place for place, _ in known if not place[1]), default=(0, 0))
    current = [path for place, path in known if place[1] and place > last_whole][-KEPT_IN_EPOCH:]
    left = [path for place, path in known if not place[1] or path in current]
    left = left[-keep:] if keep else left
    for place, path in found:
        is_abandoned = newest[1] > 0 and newest < place < (newest[0] + 1, 0)
        if is_abandoned or (place <= newest and path not in left):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning(f"{path} is superseded and cannot be removed: {error}")


def remove_temporary_files(folder: Path) -> None:
    """Remove what killed writers have left. Nobody may be writing."""
    for path in folder.glob(".*.pth.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()
            logger.info(f"removed {path}, the unfinished file of a process that was killed")


# --- Writing in the background ------------------------------------------------------------------------------


class AsyncCheckpointWriter:
    """Copies a checkpoint to host memory and writes it in a thread, one at a time, while training goes on.

    A failed write is logged and training goes on. After too many in a row, `failure` is set, and training
    must stop. Failures of best.pth are counted apart from the others.
    """

    def __init__(self, max_failures: int) -> None:
        self.max_failures = max_failures  # in a row
        self.failure = ""  # why training cannot go on
        self.errors: list[str] = []  # of the checkpoints that failed since the last one that was written
        self.best_errors: list[str] = []  # of best.pth, likewise
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def submit(self, content: dict[str, Any], path: Path, write: Callable[[dict[str, Any]], None]) -> None:
        """Copy `content` and pass the copy to `write` in the thread, after the previous save has ended.

        Args:
            content: plain data; it may change as soon as this returns.
            path: the file that `write` writes, for messages.
            write: may raise OSError.
        """
        self.wait()
        self._running = self._executor.submit(self._run, copied(content), path, write)

    def wait(self) -> None:
        """Wait for the running save.

        Raises:
            Exception: a bug in `write`.
        """
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def _run(self, content: dict[str, Any], path: Path, write: Callable[[dict[str, Any]], None]) -> None:
        errors = self.best_errors if path.name == BEST_NAME else self.errors
        try:
            write(content)
            errors.clear()
        except OSError as error:
            message = f"{path}: expected to write a checkpoint, got: {error.strerror or error}"
            with contextlib.suppress(OSError):
                message += f" ({shutil.disk_usage(path.parent).free:,} bytes free)"
            errors.append(message)
            count = f"failure {len(errors)} of {self.max_failures} in a row (SAVE_FAILURES_MAX)"
            if len(errors) < self.max_failures:
                logger.error(f"{message}; older files stay, training goes on; {count}")
            else:
                self.failure = (
                    f"{message}; {count}: make space or choose another --output, and start the same command "
                    "again"
                )


def copied(item: Any) -> Any:
    """Nested data with copies of its tensors in host memory."""
    if isinstance(item, dict):
        return {name: copied(value) for name, value in item.items()}
    if isinstance(item, list | tuple):
        return type(item)(map(copied, item))
    return item.detach().to("cpu", copy=True) if torch.is_tensor(item) else item


# --- When a run saves ---------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of a run. All ranks must call each method; the main one writes.

    `position` is where the run starts; nothing is saved there. `best` is the accuracy (percent) of best.pth,
    known to the main rank only.
    """

    def __init__(
        self, config: CfgNode, folder: Path, metrics: Metrics, position: Position, best: float
    ) -> None:
        self.config = config
        self.folder = folder
        self.metrics = metrics
        self.best = best
        self.writer = AsyncCheckpointWriter(config.SAVE_FAILURES_MAX)
        self.stop_sync = StopSync()
        self._saved = position.epoch_step  # of the last save
        self._last_step = position.step

    def after_update(self, state: TrainState, is_last: bool) -> None:
        """Stop, or save inside an epoch (SAVE_STEPS), on all ranks at the same step.

        Args:
            state: between two updates.
            is_last: whether the epoch ends here.

        Raises:
            StopRequested: a rank received a stop signal, or checkpoints cannot be written; call `stop`.
        """
        if self.stop_sync.sync(stop_received() or bool(self.writer.failure)):
            raise StopRequested
        step, every = state.position.step, self.config.SAVE_STEPS
        is_due = every > 0 and step // every > self._last_step // every
        self._last_step = step
        if is_due and not (is_last and self._is_epoch_due(state.position.epoch + 1)):
            self.save(state)

    def after_epoch(self, state: TrainState) -> None:
        """Save a finished epoch before its evaluation, if SAVE_FREQ says so or it is the last."""
        self._last_step = 0
        if self._is_epoch_due(state.position.epoch):
            self.save(state)

    def _is_epoch_due(self, epochs: int) -> bool:
        return epochs % self.config.SAVE_FREQ == 0 or epochs == self.config.TRAIN.EPOCHS

    def save_if_best(self, state: TrainState, accuracy: float) -> None:
        """Write best.pth if `accuracy` (percent) is above that of the file, which may be missing."""
        if utils.is_main_process() and accuracy > self.best:
            self.writer.wait()  # `best` may be about to change
        if utils.any_rank(utils.is_main_process() and accuracy > self.best):
            self._submit(state, BEST_NAME, accuracy)

    def save(self, state: TrainState) -> None:
        """Write a checkpoint of `state`, which is between two updates."""
        self._saved = state.position.epoch_step
        self._submit(state, file_name(state.position))

    def _submit(self, state: TrainState, name: str, accuracy: float | None = None) -> None:
        state.meter.gather()
        if not utils.is_main_process():
            return
        self.metrics.flush()
        content = state.state_dict() | ({} if accuracy is None else {"accuracy": accuracy})
        newest, path = state.position.epoch_step, self.folder / name

        def write(saved: dict[str, Any]) -> None:
            self.metrics.sync()
            write_checkpoint(saved, path)
            logger.debug(f"saved {path}")
            if accuracy is None:
                prune(self.folder, newest, self.config.SAVE_KEEP)
            else:
                self.best = accuracy

        self.writer.submit(content, path, write)

    def stop(self, state: TrainState) -> None:
        """Save before a run ends after StopRequested, if the state is not on the disk yet.

        Raises:
            UserError: checkpoints cannot be written.
        """
        self.writer.wait()
        self._raise(self.writer.failure)
        if utils.any_rank(self._saved != state.position.epoch_step or bool(self.writer.errors)):
            self.save(state)
        self.finish(with_best=False)

    def finish(self, with_best: bool = True) -> None:
        """Wait for the last save.

        Args:
            with_best: whether best.pth must have been written, too.

        Raises:
            UserError: the last checkpoint, or the last best.pth, could not be written.
        """
        self.stop_sync.wait()
        self.writer.wait()
        errors = self.writer.errors or (self.writer.best_errors if with_best else [])
        self._raise(self.writer.failure or "".join(errors[-1:]))

    def _raise(self, reason: str) -> None:
        """Raise the main rank's reason, if there is one, on all ranks."""
        with utils.raise_on_all_ranks():
            if reason:
                raise UserError(reason)

    def warn_if_best_missing(self, state: TrainState) -> None:
        """Warn at the end of a run if best.pth does not hold the best weights."""
        if utils.is_main_process() and self.best < state.max_accuracy:
            logger.warning(
                f"{self.folder / BEST_NAME} ends without the best weights: {state.max_accuracy:.2f}% was "
                f"reached, it holds {self.best:.2f}%; it could not be written, was damaged, or is elsewhere"
            )
