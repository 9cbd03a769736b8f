"""One epoch of training, and evaluation: one path for any device, precision and number of processes.

Full precision is a disabled autocast, bf16 a disabled gradient scaler, no accumulation a group of one batch.
No step waits for the device; losses and norms are collected there and read at the logging interval.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from yacs.config import CfgNode

import utils
from logger import Metrics, progress
from lr_scheduler import build_scheduler, scale_rates
from models import FocalTransformer
from optimizer import build_optimizer
from train_state import TrainState, find_newest

logger = logging.getLogger(__name__)

Batches = DataLoader | Sequence[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Run:
    """What every part of a run needs to know."""

    config: CfgNode
    device: torch.device
    precision: utils.Precision
    output: Path
    metrics: Metrics


@dataclass
class Training:
    """The moving parts of training."""

    net: nn.Module  # as the loop calls it: the model, or its distributed wrapper
    state: TrainState  # what checkpoints hold, with the bare model and its optimizer
    scheduler: Scheduler
    criterion: nn.Module
    updates_per_epoch: int


def prepare(run: Run, model: FocalTransformer, steps_per_epoch: int, soft_targets: bool) -> Training:
    """Optimizer, schedule, loss and distributed wrapper around ``model``.

    Args:
        run: of which this is a part.
        model: on its device.
        steps_per_epoch: batches per process.
        soft_targets: whether Mixup or CutMix makes the targets, and smooths them.
    """
    config = scale_rates(run.config, utils.get_world_size())
    updates_per_epoch = math.ceil(steps_per_epoch / max(1, config.TRAIN.ACCUMULATION_STEPS))
    optimizer = build_optimizer(config, model)
    scheduler = build_scheduler(config, optimizer, updates_per_epoch)
    hard = nn.CrossEntropyLoss(label_smoothing=config.MODEL.LABEL_SMOOTHING)
    state = TrainState(model, optimizer, run.precision.scaler(run.device), run.config)
    state.position.epoch = config.TRAIN.START_EPOCH
    net = DistributedDataParallel(model, broadcast_buffers=False) if utils.in_group() else model
    return Training(
        net, state, scheduler, SoftTargetCrossEntropy() if soft_targets else hard, updates_per_epoch
    )


def train_one_epoch(
    run: Run, training: Training, batches: Batches, mixup_fn: Callable | None = None
) -> float:
    """One pass over ``batches``; the mean loss.

    With accumulation, a last group of fewer batches makes an update of its own, so that no image is lost.

    Raises:
        ValueError: the loss is no longer finite.
    """
    config, epoch, steps = run.config, training.state.position.epoch, len(batches)
    accumulation = max(1, config.TRAIN.ACCUMULATION_STEPS)
    meter = utils.TrainMeter(run.device)
    training.net.train()
    for step, (images, targets) in enumerate(
        progress(batches, f"epoch {epoch + 1}", utils.is_main_process())
    ):
        utils.seed_everything(config.SEED, utils.get_rank(), epoch, step)
        images = images.to(run.device, non_blocking=True)
        targets = targets.to(run.device, non_blocking=True)
        if mixup_fn is not None:
            images, targets = mixup_fn(images, targets)
        group, place = divmod(step, accumulation)
        group_size = min(accumulation, steps - group * accumulation)
        is_update = place == group_size - 1
        with contextlib.nullcontext() if is_update or not utils.in_group() else training.net.no_sync():
            with run.precision.autocast(run.device):
                loss = training.criterion(training.net(images), targets)
            training.state.scaler.scale(loss / group_size).backward()
        meter.add_batch(loss.detach(), len(images), step)
        if is_update:
            norm = update(training, config.TRAIN.CLIP_GRAD, epoch * training.updates_per_epoch + group)
            meter.add_update(norm, step, may_overflow=training.state.scaler.is_enabled())
        if (step + 1) % config.PRINT_FREQ == 0 or step + 1 == steps:
            report(run, training, meter, step, steps)
    return meter.mean_loss


def update(training: Training, max_norm: float, number: int) -> torch.Tensor:
    """Optimizer update ``number`` of the run; the gradient norm before clipping (0: no clipping)."""
    optimizer, scaler = training.state.optimizer, training.state.scaler
    training.scheduler.step_update(number)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(training.net.parameters(), max_norm or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm


def report(run: Run, training: Training, meter: utils.TrainMeter, step: int, steps: int) -> None:
    """Log the interval that ends with ``step``; the only place of the loop that waits for the device."""
    epoch, stats = training.state.position.epoch, meter.read()
    if stats.bad_step is not None:
        raise ValueError(explain_bad_step(run, training, stats.bad_step))
    rate = training.state.optimizer.param_groups[0]["lr"]
    memory = utils.peak_memory_mb(run.device)
    logger.info(
        f"epoch {epoch + 1}/{run.config.TRAIN.EPOCHS} step {step + 1}/{steps}  loss {stats.loss:.4f}  "
        f"lr {rate:.3e}  grad norm {stats.grad_norm:.3f}  {stats.img_per_s:.0f} img/s  {memory:.0f} MB"
    )
    values = {"loss": stats.loss, "lr": rate, "grad_norm": stats.grad_norm, "img_per_s": stats.img_per_s}
    run.metrics.write("train", epoch * steps + step, epoch=epoch, step=step, memory_mb=memory, **values)


def explain_bad_step(run: Run, training: Training, step: int) -> str:
    """What the user has to know of a step whose loss or gradient is not finite; moves the schedule to it."""
    epoch = training.state.position.epoch
    group = step // max(1, run.config.TRAIN.ACCUMULATION_STEPS)
    training.scheduler.step_update(epoch * training.updates_per_epoch + group)
    rate = training.state.optimizer.param_groups[0]["lr"]
    newest = find_newest(run.output)
    start = "there is no checkpoint yet. Start anew" if newest is None else f"go on from {newest}"
    return (
        f"epoch {epoch + 1}, step {step + 1}: expected a finite loss and gradient, got nan or inf at "
        f"learning rate {rate:.3e}; {start} with a lower learning rate, or in bf16 or full precision"
    )


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, batches: Batches) -> dict[str, float]:
    """Accuracy in percent (acc1, acc5) and mean loss over all images of all processes, each counted once.

    With fewer than five classes acc5 is over all of them.

    Raises:
        ValueError: the outputs are not finite, or an image of any process does not decode.
    """
    totals = utils.Totals(("loss", "top1", "top5", "images"), run.device)
    model.eval()
    full = 0
    with utils.failing_together():
        for images, targets in progress(batches, "evaluation", utils.is_main_process()):
            images = images.to(run.device, non_blocking=True)
            targets = targets.to(run.device, non_blocking=True)
            full = max(full, len(images))
            if run.config.COMPILE:  # a last, smaller batch would be compiled anew
                images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, full - len(images)))
            with run.precision.autocast(run.device):
                logits = model(images)[: len(targets)]
            logits = logits.float()
            hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
            loss = F.cross_entropy(logits, targets, reduction="sum")
            totals.add(loss=loss, top1=hits[:, 0].sum(), top5=hits.sum(), images=len(targets))
    sums = totals.fetch()
    if not math.isfinite(sums["loss"]):
        raise ValueError(
            "expected finite outputs, got nan or inf; check the weights, or evaluate with --amp-opt-level O0"
        )
    images = sums["images"]
    acc1, acc5, mean_loss = 100 * sums["top1"] / images, 100 * sums["top5"] / images, sums["loss"] / images
    logger.info(f"{images:.0f} images: acc1 {acc1:.3f}%  acc5 {acc5:.3f}%  loss {mean_loss:.4f}")
    return {"acc1": acc1, "acc5": acc5, "loss": mean_loss}
