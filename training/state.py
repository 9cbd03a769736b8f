"""The state of training, and the content of its checkpoints.

A checkpoint holds plain data only (tensors, numbers, text, lists, dicts), so that it loads with
`weights_only=True`. Random states are not in it: every step seeds the generators from its position
(`utils.seed_everything`), and so do the samplers. The learning rate follows from the number of updates.
A checkpoint is written before its epoch is evaluated; `evaluated` says whether that has been done.
"""

import logging
import math
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

import utils
from config import flatten
from lr_scheduler import build_scheduler, scale_rates
from models.checkpoint import check_state
from optimizer import build_optimizer
from training.meters import TrainMeter
from utils import UserError, user_input

CHECKPOINT_KEYS = {"model", "optimizer", "scaler", "position", "meter", "max_accuracy", "evaluated", "config"}
"""What resuming needs: files that lack an entry are refused, so read later additions with `.get` instead of
listing them here. All have `epoch` (the original's), with TRAIN.EMA `model_ema`; best.pth has `accuracy`."""

EpochStep = tuple[int, int]
"""(finished epochs, finished batches of the running epoch): sorts checkpoints by progress."""

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """How far training has come.

    `samples_seen` is valid for one order of the images only; `image_order` says what that depends on, see
    `TrainSampler.order`.
    """

    epoch: int = 0  # finished epochs
    step: int = 0  # finished batches per rank of the running epoch
    updates: int = 0  # number of the next update in this run's schedule; skipped ones count
    samples_seen: int = 0  # images of the running epoch that all ranks together have seen
    image_order: str = ""

    @property
    def epoch_step(self) -> EpochStep:
        return self.epoch, self.step

    def restart_epoch(self) -> None:
        """Go back to the beginning of the running epoch."""
        self.step = self.samples_seen = 0

    def next_epoch(self, updates_per_epoch: int) -> None:
        """Go to the beginning of the next epoch, and set `updates` to that of whole epochs."""
        self.restart_epoch()
        self.epoch += 1
        self.updates = self.epoch * updates_per_epoch


@dataclass
class TrainState:
    """What training works on: model, optimizer, and how far it has come."""

    config: CfgNode  # that of `Run`
    model: nn.Module  # itself, without DistributedDataParallel
    ddp_model: nn.Module  # what the forward pass calls: the model, or its wrapper
    criterion: nn.Module  # of logits and targets
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler  # of the learning rate, by number of updates
    scaler: torch.amp.GradScaler  # enabled in fp16 only
    steps_per_epoch: int  # batches per rank of a whole epoch
    ema: ModelEmaV3 | None = None  # moving average of the model
    meter: TrainMeter = field(default_factory=TrainMeter)  # of the running epoch
    position: Position = field(default_factory=Position)
    max_accuracy: float = 0.0  # best top-1 accuracy so far, in percent
    evaluated: bool = True  # whether the model was evaluated after the last finished epoch

    @property
    def updates_per_epoch(self) -> int:
        return updates_in(self.steps_per_epoch, self.config)

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint; tensors are not copied. `Checkpoints` adds `accuracy` to best.pth."""
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.position.epoch - 1,  # index of the last finished epoch, as in the original
            "position": asdict(self.position),
            "meter": self.meter.state_dict(),
            "max_accuracy": self.max_accuracy,
            "evaluated": self.evaluated,
            "config": self.config.dump(),
        }
        if self.ema is not None:
            average = self.ema.module.state_dict()
            content["model_ema"] = {name: t for name, t in average.items() if t.is_floating_point()}
        return content

    def load_state_dict(self, content: dict[str, Any], origin: str) -> None:
        """Load what `check_checkpoint` has seen; UserError if the optimizer has other parameters."""
        self._load_optimizer(content["optimizer"], origin)
        self.model.load_state_dict(content["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(content["model"] | content.get("model_ema", {}))
            if "model_ema" not in content:
                logger.warning(f"{origin} has no moving average (TRAIN.EMA); it starts from the weights")
        if self.scaler.is_enabled() and content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        self.position = Position(**content["position"])
        self.max_accuracy, self.evaluated = float(content["max_accuracy"]), content["evaluated"]
        self.meter.load_state_dict(content["meter"])

    def _load_optimizer(self, saved: dict[str, Any], origin: str) -> None:
        """Load the optimizer's moments; options such as the weight decay stay those of this run."""
        groups, saved_groups = self.optimizer.param_groups, saved["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved_groups]:
            raise UserError(
                f"{origin}: expected the optimizer state of this model, got other parameter groups; use the "
                "same options (TRAIN.FREEZE_STAGES, TRAIN.LAYER_DECAY), or another --tag and --pretrained to "
                "start from the weights alone"
            )
        # The options of this run go in first: where torch puts the step counters depends on `fused`.
        merged = [
            old | {name: value for name, value in new.items() if name != "params"}
            for old, new in zip(saved_groups, groups, strict=True)
        ]
        self.optimizer.load_state_dict({**saved, "param_groups": merged})


def build_train_state(
    config: CfgNode,
    model: nn.Module,
    precision: utils.Precision,
    device: torch.device,
    steps_per_epoch: int,
    soft_targets: bool,
) -> TrainState:
    """Optimizer, schedule, loss and distributed wrapper of a model.

    Args:
        config: the whole configuration.
        model: on its device.
        precision: of the forward pass.
        device: of this rank.
        steps_per_epoch: batches per rank.
        soft_targets: whether Mixup or CutMix makes the targets, label smoothing included.

    Raises:
        UserError: options of the optimizer that do not fit.
    """
    train = config.TRAIN
    scaled = scale_rates(config, utils.get_world_size())
    updates_per_epoch = updates_in(steps_per_epoch, config)
    with user_input():
        optimizer = build_optimizer(scaled, model)
        scheduler = build_scheduler(scaled, optimizer, updates_per_epoch)
    hard = nn.CrossEntropyLoss(label_smoothing=config.MODEL.LABEL_SMOOTHING)
    return TrainState(
        config=config,
        model=model,
        ddp_model=data_parallel(model) if utils.in_group() else model,
        criterion=SoftTargetCrossEntropy() if soft_targets else hard,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=precision.scaler(device),
        steps_per_epoch=steps_per_epoch,
        ema=ModelEmaV3(model, train.EMA.DECAY, use_warmup=train.EMA.WARMUP) if train.EMA.ENABLED else None,
        position=Position(train.START_EPOCH, updates=train.START_EPOCH * updates_per_epoch),
    )


def updates_in(steps: int, config: CfgNode) -> int:
    """Optimizer updates of so many batches; the last may be of fewer than the others."""
    return math.ceil(steps / max(1, config.TRAIN.ACCUMULATION_STEPS))


def data_parallel(model: nn.Module) -> nn.Module:
    """The model with gradients averaged over all ranks. Its buffers are the same on all, and never change."""
    with warnings.catch_warnings():  # newer releases have a new name for the option
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False)


def check_checkpoint(content: dict[str, Any], path: str, model: nn.Module, config: CfgNode) -> None:
    """Compare the content of a checkpoint with the model and the configuration, which stay as they are.

    Raises:
        ValueError: not a training checkpoint, or one of another model or optimizer.
    """
    if missing := CHECKPOINT_KEYS - content.keys():
        raise UserError(
            f"{path}: expected a training checkpoint of this project, got one without "
            f"{', '.join(sorted(missing))}; use --pretrained to start from its weights"
        )
    check_state(content["model"], model.state_dict(), path)
    if "model_ema" in content:
        check_state(content["model"] | content["model_ema"], model.state_dict(), f"{path}, model_ema,")
    _compare_config(content["config"], config, path)


def _compare_config(saved_text: str, config: CfgNode, origin: str) -> None:
    """Warn about options that differ; another optimizer is an error, its state does not fit."""
    saved = flatten(CfgNode.load_cfg(saved_text))
    options = flatten(CfgNode.load_cfg(config.dump()))  # YAML turns tuples into lists
    others = {key: value for key, value in options.items() if saved.get(key, value) != value}
    if (key := "TRAIN.OPTIMIZER.NAME") in others:
        raise UserError(
            f"{origin}: expected a checkpoint with {key} {others[key]!r}, got one with {saved[key]!r}; set "
            "the option to that, or use --pretrained to start from the weights alone"
        )
    if others:
        changes = ", ".join(f"{key} {value!r} instead of {saved[key]!r}" for key, value in others.items())
        logger.warning(f"{origin} continues with {changes}")
