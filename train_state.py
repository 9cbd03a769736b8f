"""Training checkpoints: what a run needs to go on as if it had never stopped.

A checkpoint holds plain data only (tensors, numbers, text, lists, dicts), so it loads with
``weights_only=True``; the config is kept as yaml text. ``position`` says where training stood: ``epoch``
epochs were finished, and ``step`` batches of the next one. Checkpoints are written between epochs, so
``step`` is 0 so far. Random numbers need no entry: the loop seeds them from the position.

Files appear whole or not at all: written under a temporary name in the same folder, flushed, then renamed.
"""

import logging
import os
import re
import zipfile
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

FORMAT = 1
KEYS = (
    "model",
    "optimizer",
    "lr_scheduler",
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
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    config: CfgNode
    position: Position = field(default_factory=Position)
    max_accuracy: float = 0.0

    def capture(self) -> dict[str, Any]:
        """Everything to save, as plain data.

        Raises:
            ValueError: a weight or an optimizer moment is not finite: such a state is never saved.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": {"updates": self.position.updates},
            "scaler": self.scaler.state_dict(),
            "epoch": self.position.epoch - 1,  # the last one finished, as in the original
            "position": asdict(self.position),
            "max_accuracy": self.max_accuracy,
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
        self._compare_config(path, state["config"])
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ValueError(f"{path}: expected the weights of this model, got others: {error}") from error
        self._load_optimizer(path, state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.position = Position(**state["position"])
        self.max_accuracy = float(state["max_accuracy"])

    def _load_optimizer(self, path: str | Path, saved: dict[str, Any]) -> None:
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
        self.optimizer.load_state_dict(saved)

    def _compare_config(self, path: str | Path, text: str) -> None:
        """Warn of every difference in the recipe; another optimizer is an error, its state would not fit."""
        saved = flatten(CfgNode(yaml.safe_load(text)))
        for key, value in flatten(self.config).items():
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
    """After an epoch: write ``ckpt_epoch_{n}.pth`` if SAVE_FREQ or the last epoch wants it, and the best one.

    Every process must call it, so that all of them stop if the state cannot be saved; the main one writes.
    """
    config, done = state.config, state.position.epoch
    is_due = done % config.SAVE_FREQ == 0 or done == config.TRAIN.EPOCHS
    if not (is_due or is_best):
        return
    checkpoint = state.capture()
    if not utils.is_main_process():
        return
    if is_due:
        save(checkpoint, output / f"ckpt_epoch_{done - 1}.pth")
    if is_best:
        save(checkpoint, output / BEST_NAME)


def resume(state: TrainState, output: Path) -> bool:
    """Continue from the newest checkpoint in ``output`` (TRAIN.AUTO_RESUME), else from MODEL.RESUME, if any.

    Returns:
        Whether there was one.
    """
    config = state.config
    newest = find_newest(output) if config.TRAIN.AUTO_RESUME and utils.is_main_process() else None
    found = utils.broadcast_text(str(newest or ""))
    if found and config.MODEL.RESUME and Path(found).resolve() != Path(config.MODEL.RESUME).resolve():
        logger.warning(
            f"continuing from {found}, the newest in the output folder, instead of {config.MODEL.RESUME}; "
            "choose another --tag or set TRAIN.AUTO_RESUME False to prevent this"
        )
    source = found or config.MODEL.RESUME
    if not source:
        return False
    state.restore(source)
    if found:
        state.max_accuracy = max(state.max_accuracy, best_accuracy(output))
    logger.info(f"resumed {source}: {state.position.epoch} epochs done, best {state.max_accuracy:.2f}%")
    return True


def find_newest(output: Path) -> Path | None:
    """The complete checkpoint of the highest epoch in ``output``; damaged ones are skipped with a warning."""
    numbered = [(CHECKPOINT_NAME.fullmatch(path.name), path) for path in output.glob("ckpt_epoch_*.pth")]
    newest_first = sorted(((int(match[1]), path) for match, path in numbered if match), reverse=True)
    for _, path in newest_first:
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
