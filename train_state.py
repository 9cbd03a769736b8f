"""Training checkpoints: what a run needs to go on as if it had never stopped.

A checkpoint holds plain data only (tensors, numbers, text, lists, dicts), so it loads with
``weights_only=True``; the config is kept as yaml text. ``position`` says where training stood: ``epoch``
epochs were finished, and of the next one ``step`` batches, and the images that ``dealt`` counts. Random
numbers need no entry: the loop seeds them from the position, and so do loaders and Mixup. The learning rate
needs none either: it follows from the number of updates, ``position.updates``. ``meters`` holds what has been
measured of the epoch and not been logged yet, ``metrics_size`` how much of metrics.jsonl belongs to it.

A checkpoint is written before its epoch is evaluated, so that an evaluation that fails loses nothing;
``evaluated`` tells. One that was not evaluated is, before a resumed run goes on.

How the files are written and found is in storage.py, when in checkpoints.py.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from yacs.config import CfgNode

import storage
import utils
from config import flatten, parse_yaml
from content_check import check_content, is_number
from meters import TrainMeter
from models import read_checkpoint
from models.checkpoint import check_state

FORMAT = 2
READABLE = (1, 2)  # 1: written between epochs only
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
RECIPE = (
    "DATA.BATCH_SIZE",
    "DATA.IMG_SIZE",
    "MODEL.",
    "TRAIN.",
    "AUG.",
    "SEED",
)  # differences worth a warning
NOT_RECIPE = (
    *("MODEL.RESUME", "MODEL.PRETRAINED", "MODEL.RESET_HEAD", "MODEL.HEAD_CLASS_MAP"),
    *("MODEL.ATTENTION_BACKEND", "MODEL.NAME"),
)

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """How far training has come.

    Attributes:
        epoch: epochs finished.
        step: batches finished of the epoch after those.
        updates: optimizer updates made.
        dealt: the images given out in that epoch, [number of processes, images of all of them], in the order
            in which the number of processes changed.
        order: what the order of the images depends on; dealing goes on only in the same one.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    dealt: list[list[int]] = field(default_factory=list)
    order: str = ""

    @property
    def images(self) -> int:
        """Given out in the running epoch."""
        return sum(images for _, images in self.dealt)

    def deal(self, processes: int, images: int) -> None:
        """Count images that were given out to so many processes."""
        if not self.dealt or self.dealt[-1][0] != processes:
            self.dealt.append([processes, 0])
        self.dealt[-1][1] += images

    def next_epoch(self, updates_per_epoch: int) -> None:
        """Go to the beginning of the next epoch; the schedule counts whole epochs."""
        self.epoch += 1
        self.step, self.dealt = 0, []
        self.updates = self.epoch * updates_per_epoch


@dataclass
class TrainState:
    """The objects that a checkpoint captures and restores.

    Attributes:
        model: the bare model, without DistributedDataParallel.
        optimizer: over the model's parameters.
        scaler: gradient scaler; a disabled one has an empty state.
        config: of this run.
        ema: moving average of the model; None without.
        meter: what was measured in the epoch.
        position: see ``Position``.
        max_accuracy: best top-1 accuracy (percent) seen so far.
        evaluated: whether ``max_accuracy`` counts the weights as they are now.
        run: counts the runs that began in the output folder.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    config: CfgNode
    ema: ModelEmaV3 | None = None
    meter: TrainMeter = field(default_factory=TrainMeter)
    position: Position = field(default_factory=Position)
    max_accuracy: float = 0.0
    evaluated: bool = True
    run: int = 0

    def capture(self) -> dict[str, Any]:
        """Everything to save, as plain data; tensors are the live ones."""
        averaged = {} if self.ema is None else {"model_ema": _floats_alone(self.ema.module.state_dict())}
        return {
            "model": self.model.state_dict(),
            **averaged,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.position.epoch - 1,  # the last one finished, as in the original
            "position": asdict(self.position),
            "meters": self.meter.capture(),
            "max_accuracy": self.max_accuracy,
            "evaluated": self.evaluated,
            "run": self.run,
            "config": self.config.dump(),
            "format": FORMAT,
        }

    @property
    def stamp(self) -> storage.Stamp:
        """What orders the checkpoints of a folder."""
        position = self.position
        return storage.Stamp(self.run, position.epoch, position.images, self.evaluated, position.step)

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
        if self.ema is not None:
            averaged = state["model"] | state.get("model_ema", {})
            self.ema.module.load_state_dict(averaged)
            if "model_ema" not in state:
                logger.warning(f"{checkpoint.source} holds no moving average; it starts from the weights")
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.position = Position(**state["position"])
        self.max_accuracy = float(state["max_accuracy"])
        self.evaluated = bool(state.get("evaluated", True))  # older files were written after the evaluation
        self.run = int(state.get("run", 0))
        if "meters" in state:
            self.meter.restore(state["meters"])

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
        self.optimizer.load_state_dict({**saved, "param_groups": merged})


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
    if not isinstance(state["format"], int) or state["format"] not in READABLE:
        raise ValueError(
            f"{path}: expected format {' or '.join(map(str, READABLE))}, got {state['format']}; update the "
            "code"
        )
    check_content(state, str(path))
    _compare_config(path, state["config"], config)
    check_state(state["model"], model.state_dict(), str(path))
    check_state(state["model"] | state.get("model_ema", {}), model.state_dict(), f"{path}, model_ema,")
    return Checkpoint(str(path), state)


def _compare_config(path: str | Path, text: str, config: CfgNode) -> None:
    """Warn of every difference in the recipe; another optimizer is an error, its state would not fit."""
    try:
        saved = flatten(CfgNode(parse_yaml(text)))
    except (ValueError, TypeError, AttributeError, AssertionError) as error:  # yacs asserts
        raise ValueError(
            f"{path}: expected config to be the yaml text of a run's options, got: {error}; the file is "
            "damaged, or not of this project"
        ) from error
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


def find_start(model: nn.Module, config: CfgNode, output: Path) -> Checkpoint | None:
    """What to continue from: the newest checkpoint in ``output`` (TRAIN.AUTO_RESUME), else MODEL.RESUME.

    It is read and compared with the model and the config, so that a mistake shows before anything else is
    built. Every process must call it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see ``open_checkpoint``; the message begins with the key.
        OSError: a checkpoint in ``output`` cannot be read.
    """
    newest = None
    with utils.failing_together():
        if config.TRAIN.AUTO_RESUME and utils.is_main_process():
            newest = storage.find_newest(output)
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


def best_accuracy(output: Path, run: int, reached: float = 0.0) -> float:
    """The accuracy (percent) of the weights in the best checkpoint of a run in ``output``; 0 without one.

    Args:
        output: the run's folder.
        run: its number.
        reached: the best accuracy that the run knows of. Where a run went back to an older checkpoint, the
            best one may still be from before, under another number.

    Raises:
        OSError: there is one, and it cannot be read.
    """
    path = output / storage.BEST_NAME
    if not storage.is_complete(path):
        return 0.0
    best = read_checkpoint(path)
    accuracy = best.get("accuracy", best.get("max_accuracy"))  # the same in older files
    if not is_number(accuracy):
        return 0.0
    return float(accuracy) if best.get("run", 0) == run or accuracy == reached else 0.0


def load_average(model: nn.Module, path: str | Path) -> None:
    """Load the moving average of a training checkpoint into ``model`` (EVAL_EMA).

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds none, or one of another model.
    """
    content = read_checkpoint(path)
    if "model_ema" not in content:
        raise ValueError(
            f"{path}: expected a checkpoint with a moving average, got one without; train with "
            "TRAIN.EMA.ENABLED True, or drop EVAL_EMA"
        )
    check_content(content, str(path))
    weights = dict(content.get("model", {})) | content["model_ema"]
    check_state(weights, model.state_dict(), str(path))
    model.load_state_dict(weights)


def _floats_alone(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The floating point tensors; the others of a moving average are the model's."""
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def _plain(value: Any) -> Any:
    """A tuple as the list that yaml makes of it."""
    return list(value) if isinstance(value, tuple) else value
