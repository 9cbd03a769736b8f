"""Training checkpoints: what a run needs to go on as if it had never stopped.

A checkpoint holds plain data only (tensors, numbers, text, lists, dicts), so it loads with
``weights_only=True``; the config is kept as yaml text. ``position`` says where training stood: ``epoch``
epochs were finished, and ``step`` batches of the next one. Checkpoints are written between epochs, so
``step`` is 0 so far, and another value is refused. Random numbers need no entry: the loop seeds them from the
position. The learning rate needs none either: it follows from the number of updates, ``position.updates``.

A checkpoint is written before its epoch is evaluated, so that an evaluation that fails loses nothing;
``evaluated`` tells. One that was not evaluated is, before a resumed run goes on.

Files appear whole or not at all: written under a temporary name in the same folder, flushed, then renamed.
"""

import contextlib
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from yacs.config import CfgNode

import utils
from config import flatten
from models import read_checkpoint
from models.checkpoint import check_state

FORMAT = 1
KEYS = (
    "model",
    "optimizer",
    "scaler",
    "epoch",
    "position",
    "max_accuracy",
    "config",
    "format",
)
CHECKPOINT_NAME = re.compile(r"ckpt_epoch_(\d+)\.pth")
BEST_NAME = "best.pth"
RECIPE = (
    "DATA.BATCH_SIZE",
    "DATA.IMG_SIZE",
    "MODEL.",
    "TRAIN.",
    "AUG.",
    "SEED",
)  # differences worth a warning
NOT_RECIPE = ("MODEL.RESUME", "MODEL.PRETRAINED", "MODEL.RESET_HEAD", "MODEL.ATTENTION_BACKEND", "MODEL.NAME")

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """How far training has come."""

    epoch: int = 0  # epochs finished
    step: int = 0  # batches finished of the epoch after those
    updates: int = 0  # optimizer updates made


@dataclass
class TrainState:
    """The objects that a checkpoint captures and restores.

    Attributes:
        model: the bare model, without DistributedDataParallel.
        optimizer: over the model's parameters.
        scaler: gradient scaler; a disabled one has an empty state.
        config: of this run.
        position: see ``Position``.
        max_accuracy: best top-1 accuracy (percent) seen so far.
        evaluated: whether ``max_accuracy`` counts the weights as they are now.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    config: CfgNode
    position: Position = field(default_factory=Position)
    max_accuracy: float = 0.0
    evaluated: bool = True

    def capture(self) -> dict[str, Any]:
        """Everything to save, as plain data.

        Raises:
            ValueError: a weight or an optimizer moment is not finite: such a state is never saved.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.position.epoch - 1,  # the last one finished, as in the original
            "position": asdict(self.position),
            "max_accuracy": self.max_accuracy,
            "evaluated": self.evaluated,
            "config": self.config.dump(),
            "format": FORMAT,
        }
        if not _all_finite(state["model"], state["optimizer"]["state"]):
            raise ValueError(
                f"epoch {self.position.epoch}: expected finite weights and optimizer moments, got nan or "
                "inf; nothing was saved; lower the learning rate or train in bf16 or full precision"
            )
        return state

    def restore(self, path: str | Path) -> None:
        """Load all objects from the checkpoint at ``path``, a file or an address.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a training checkpoint, or one of another model or optimizer.
        """
        self.load(open_checkpoint(path, self.model, self.config))

    def load(self, checkpoint: "Checkpoint") -> None:
        """Load all objects from an opened checkpoint.

        Raises:
            ValueError: it has the state of another optimizer.
        """
        state = checkpoint.content
        self._load_optimizer(checkpoint.source, state["optimizer"])
        try:
            self.model.load_state_dict(state["model"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{checkpoint.source}: the weights cannot be loaded: {error}") from error
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.position = Position(**state["position"])
        self.max_accuracy = float(state["max_accuracy"])
        self.evaluated = bool(state.get("evaluated", True))  # older files were written after the evaluation

    def _load_optimizer(self, path: str, saved: dict[str, Any]) -> None:
        """Moments and counters from ``saved``; the options stay those of this run.

        The options go in before the state is loaded: where torch puts the step counters depends on ``fused``.
        """
        groups = self.optimizer.param_groups
        same = len(saved["param_groups"]) == len(groups)
        for old, new in zip(saved["param_groups"], groups, strict=False):
            same = same and len(old["params"]) == len(new["params"])
            for index, parameter in zip(old["params"], new["params"], strict=False):
                moments = [m for m in saved["state"].get(index, {}).values() if torch.is_tensor(m) and m.ndim]
                same = same and all(moment.shape == parameter.shape for moment in moments)
        if not same:
            raise ValueError(
                f"{path}: expected the optimizer state of this model, got another's (groups or shapes "
                "differ); use --pretrained to start from its weights alone"
            )
        merged = [
            old | {name: value for name, value in new.items() if name != "params"}
            for old, new in zip(saved["param_groups"], groups, strict=True)
        ]
        self.optimizer.load_state_dict(saved | {"param_groups": merged})


@dataclass(frozen=True)
class Checkpoint:
    """A training checkpoint that was read and fits the model.

    Attributes:
        source: the file or address.
        content: what ``TrainState.capture`` made.
    """

    source: str
    content: dict[str, Any]


def open_checkpoint(path: str | Path, model: nn.Module, config: CfgNode) -> Checkpoint:
    """Read the training checkpoint at ``path``, a file or an address, and compare it; nothing is changed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a training checkpoint, or one of another model or optimizer.
    """
    state = read_checkpoint(path)
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise ValueError(
            f"{path}: expected a training checkpoint of this project, got one without "
            f"{', '.join(missing)}; use --pretrained to start from its weights"
        )
    if state["format"] != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}, got {state['format']}; update the code")
    if state["position"]["step"]:
        raise ValueError(
            f"{path}: expected a checkpoint written between epochs, got one written after step "
            f"{state['position']['step']} of an epoch; going on from there is not supported yet: use another "
            "one, or --pretrained to start from its weights"
        )
    _compare_config(path, state["config"], config)
    check_state(state["model"], model.state_dict(), str(path))
    return Checkpoint(str(path), state)


def _compare_config(path: str | Path, text: str, config: CfgNode) -> None:
    """Warn of every difference in the recipe; another optimizer is an error, its state would not fit."""
    saved = flatten(CfgNode(yaml.safe_load(text)))
    for key, value in flatten(config).items():
        was = saved.get(key, value)
        if _plain(value) == _plain(was):
            continue
        if key == "TRAIN.OPTIMIZER.NAME":
            raise ValueError(
                f"{path}: expected {key} {value!r}, got a checkpoint of {was!r}; set it to that, "
                "or use --pretrained to start from its weights alone"
            )
        if key.startswith(RECIPE) and key not in NOT_RECIPE:
            logger.warning(f"{path} was written with {key} {was!r}; going on with {value!r}")


def save(state: dict[str, Any], path: Path) -> None:
    """Write ``state`` (from ``TrainState.capture``) so that ``path`` is either absent, old or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def save_epoch(state: TrainState, output: Path, is_best: bool) -> None:
    """Write ``ckpt_epoch_{n}.pth`` if SAVE_FREQ or the last epoch wants it, and ``best.pth`` if it is.

    Called after training an epoch, and again after its evaluation if that was the best. Every process must
    call it, so that all of them stop if the state cannot be saved; the main one writes.
    """
    config, done = state.config, state.position.epoch
    is_due = done % config.SAVE_FREQ == 0 or done == config.TRAIN.EPOCHS
    if not (is_due or is_best):
        return
    checkpoint = state.capture()
    if not utils.is_main_process():
        return
    if is_best:
        save(checkpoint, output / BEST_NAME)
    if is_due:
        save(checkpoint, output / f"ckpt_epoch_{done - 1}.pth")


def find_start(model: nn.Module, config: CfgNode, output: Path) -> Checkpoint | None:
    """What to continue from: the newest checkpoint in ``output`` (TRAIN.AUTO_RESUME), else MODEL.RESUME.

    It is read and compared with the model and the config, so that a mistake shows before anything else is
    built. Every process must call it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see ``open_checkpoint``; the message begins with the key.
    """
    newest = find_newest(output) if config.TRAIN.AUTO_RESUME and utils.is_main_process() else None
    found = utils.broadcast_text(str(newest or ""))
    if found and config.MODEL.RESUME and Path(found).resolve() != Path(config.MODEL.RESUME).resolve():
        logger.warning(
            f"continuing from {found}, the newest in the output folder, instead of {config.MODEL.RESUME}; "
            "choose another --tag or set TRAIN.AUTO_RESUME False to prevent this"
        )
    if not (found or config.MODEL.RESUME):
        return None
    with naming(
        "TRAIN.AUTO_RESUME (choose another --tag to start anew)" if found else "MODEL.RESUME (--resume)"
    ):
        return open_checkpoint(found or config.MODEL.RESUME, model, config)


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Put the key in front of the messages of what goes wrong with a checkpoint inside."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def resume(state: TrainState, checkpoint: Checkpoint, output: Path, updates_per_epoch: int) -> None:
    """Continue from ``checkpoint``; one that lies in ``output`` knows of the best accuracy there.

    Warns if its epochs had another number of updates than ``updates_per_epoch``.
    """
    state.load(checkpoint)
    made, expected = state.position.updates, state.position.epoch * updates_per_epoch
    if made != expected:
        logger.warning(
            f"{checkpoint.source} made {made} updates in {state.position.epoch} epochs, which are {expected} "
            "here (other data, batch size or number of processes); the schedule goes on by epochs"
        )
        state.position.updates = expected
    if Path(checkpoint.source).resolve().parent == output.resolve():
        state.max_accuracy = max(state.max_accuracy, best_accuracy(output))
    logger.info(
        f"resumed {checkpoint.source}: {state.position.epoch} epochs done, best {state.max_accuracy:.2f}%"
    )


def find_newest(output: Path) -> Path | None:
    """The complete checkpoint in ``output`` that was written last; damaged ones are skipped with a warning.

    Of files written at the same time, that of the highest epoch; ``best.pth`` comes after all of these.
    """
    numbers = {output / BEST_NAME: -1}
    for path in output.glob("ckpt_epoch_*.pth"):
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if match:
            numbers[path] = int(match[1])
    times = {path: path.stat().st_mtime_ns for path in numbers if path.is_file()}
    for path in sorted(times, key=lambda path: (times[path], numbers[path]), reverse=True):
        if is_complete(path):
            return path
        logger.warning(f"{path} is damaged or incomplete and was skipped")
    return None


def is_complete(path: Path) -> bool:
    """Whether the file is a whole archive: its directory is there and every checksum holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def best_accuracy(output: Path) -> float:
    """The accuracy that the best checkpoint in ``output`` was saved with; 0 if there is none."""
    path = output / BEST_NAME
    return float(read_checkpoint(path)["max_accuracy"]) if path.exists() and is_complete(path) else 0.0


def _plain(value: Any) -> Any:
    """A tuple as the list that yaml makes of it."""
    return list(value) if isinstance(value, tuple) else value


def _all_finite(*trees: Any) -> bool:
    """Whether all floating point tensors in nested dicts are finite; waits for the device once."""
    checks: list[torch.Tensor] = []
    pending = list(trees)
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(item.values())
        elif torch.is_tensor(item) and item.is_floating_point():
            checks.append(torch.isfinite(item).all().cpu() if item.ndim == 0 else torch.isfinite(item).all())
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for check in checks:
        by_device.setdefault(check.device, []).append(check)
    return all(bool(torch.stack(group).all()) for group in by_device.values())


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, where the platform can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
