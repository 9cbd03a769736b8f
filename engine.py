"""One epoch of training, and evaluation: one path for any device, precision and number of processes.

Full precision is a disabled autocast, bf16 a disabled gradient scaler, no accumulation a group of one batch.
No step waits for the device; losses and norms are collected there and read at the logging interval. An update
whose gradient is not finite is not made, so that one bad batch spoils nothing.
"""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from yacs.config import CfgNode

import storage
import utils
from control import Agreement
from logger import Metrics, progress
from lr_scheduler import build_scheduler, scale_rates
from meters import BadStep, TrainMeter
from models import FocalTransformer
from optimizer import build_optimizer
from train_state import TrainState

DUMP_NAME = "bad_steps.json"

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
    agreement: Agreement = field(default_factory=Agreement)


@dataclass
class Training:
    """The moving parts of training."""

    net: nn.Module  # as the loop calls it: the model, or its distributed wrapper
    state: TrainState  # what checkpoints hold, with the bare model and its optimizer
    scheduler: Scheduler
    criterion: nn.Module
    updates_per_epoch: int
    after_update: Callable[[TrainState, bool], None] = lambda state, is_last: None
    batch_indices: Callable[[int, int], list[list[int]]] = lambda epoch, step: []  # of every process


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
    averaging = config.TRAIN.EMA
    ema = ModelEmaV3(model, averaging.DECAY, use_warmup=averaging.WARMUP) if averaging.ENABLED else None
    state = TrainState(model, optimizer, run.precision.scaler(run.device), run.config, ema)
    state.meter = TrainMeter(config.TRAIN.BAD_STEPS_MAX)
    state.position.epoch = config.TRAIN.START_EPOCH
    state.position.updates = config.TRAIN.START_EPOCH * updates_per_epoch
    net = DistributedDataParallel(model, broadcast_buffers=False) if utils.in_group() else model
    return Training(
        net, state, scheduler, SoftTargetCrossEntropy() if soft_targets else hard, updates_per_epoch
    )


def train_one_epoch(
    run: Run, training: Training, batches: Batches, mixup_fn: Callable | None = None
) -> float:
    """The rest of the epoch from the state's position on; the epoch's mean loss.

    With accumulation, a last group of fewer batches makes an update of its own, so that no image is lost.
    ``training.after_update`` is called between updates, where a run may be saved and stopped.

    Raises:
        ValueError: too many updates in a row had a loss or gradient that is not finite.
    """
    config, state, position = run.config, training.state, training.state.position
    accumulation = max(1, config.TRAIN.ACCUMULATION_STEPS)
    first, steps = position.step, position.step + len(batches)
    bar = progress(batches, f"epoch {position.epoch + 1}", utils.is_main_process())
    training.net.train()
    for step, (images, targets) in enumerate(bar, start=first):
        utils.seed_everything(config.SEED, utils.get_rank(), position.epoch, step)
        images = images.to(run.device, non_blocking=True)
        targets = targets.to(run.device, non_blocking=True)
        if mixup_fn is not None:
            images, targets = mixup_fn(images, targets)
        place = (step - first) % accumulation
        group_size = min(accumulation, steps - step + place)
        is_update = place == group_size - 1
        with contextlib.nullcontext() if is_update or not utils.in_group() else training.net.no_sync():
            with run.precision.autocast(run.device):
                loss = training.criterion(training.net(images), targets)
            state.scaler.scale(loss / group_size).backward()
        state.meter.add_batch(step, loss, len(images))
        if is_update:
            state.meter.add_update(position.updates, update(training, config.TRAIN.CLIP_GRAD))
            position.deal(utils.get_world_size(), group_size * len(images) * utils.get_world_size())
            position.step, position.updates = step + 1, position.updates + 1
        if (step + 1) % config.PRINT_FREQ == 0 or step + 1 == steps:
            report(run, training, step, steps)
        if is_update:
            training.after_update(state, step + 1 == steps)
    return state.meter.mean_loss


def update(training: Training, max_norm: float) -> torch.Tensor:
    """The next optimizer update; the gradient norm before clipping (0: no clipping).

    One whose norm is not finite changes nothing. The fused optimizers read that on the device, where a
    gradient scaler looks by itself; with the others, a GPU is waited for.
    """
    state = training.state
    optimizer, scaler = state.optimizer, state.scaler
    training.scheduler.step_update(state.position.updates)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(training.net.parameters(), max_norm or math.inf)
    if scaler.is_enabled():
        scaler.step(optimizer)
    elif optimizer.param_groups[0].get("fused"):
        optimizer.found_inf = (~torch.isfinite(norm)).float()  # as the scaler tells them
        optimizer.step()
    elif torch.isfinite(norm):
        optimizer.step()
    scaler.update()
    optimizer.zero_grad()
    if state.ema is not None:
        state.ema.update(state.model, step=state.position.updates)
    return norm


def report(run: Run, training: Training, step: int, steps: int) -> None:
    """Log the interval that ends with ``step``; the only place of the loop that waits for the device."""
    state = training.state
    epoch, stats = state.position.epoch, state.meter.read()
    rate = state.optimizer.param_groups[0]["lr"]
    memory = utils.peak_memory_mb(run.device)
    skipped = f"  {stats.skipped} updates skipped" if stats.skipped else ""
    logger.info(
        f"epoch {epoch + 1}/{run.config.TRAIN.EPOCHS} step {step + 1}/{steps}  loss {stats.loss:.4f}  "
        f"lr {rate:.3e}  grad norm {stats.grad_norm:.3f}  {stats.img_per_s:.0f} img/s  {memory:.0f} MB"
        + skipped
    )
    values = {"loss": stats.loss, "lr": rate, "grad_norm": stats.grad_norm, "skipped": stats.skipped}
    values |= {"img_per_s": stats.img_per_s, "memory_mb": memory}
    if state.scaler.is_enabled():
        values["loss_scale"] = state.scaler.get_scale()
    run.metrics.write("train", epoch * steps + step, epoch=epoch, step=step, **values)
    if state.meter.is_hopeless:
        with utils.failing_together():
            raise ValueError(explain_bad_steps(run, training))


def explain_bad_steps(run: Run, training: Training) -> str:
    """What the user has to know of updates that were not finite; the main process writes more to a file."""
    streak = training.state.meter.streak
    newest, start = None, "there is no checkpoint yet. Start anew"
    try:
        newest = storage.find_newest(run.output) if utils.is_main_process() else None
    except OSError as error:  # the reason for stopping counts more
        start = f"the checkpoints cannot be read ({error}). Start from one"
    steps = [describe_bad_step(training, bad) for bad in streak]
    dump = run.output / DUMP_NAME
    if utils.is_main_process():
        content = {"checkpoint": str(newest) if newest else None, "steps": steps}
        try:
            dump.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            logger.error(f"{dump}: expected to write this, got: {error.strerror}: {content}")
    start = start if newest is None else f"go on from {newest}"
    return (
        f"epoch {steps[0]['epoch'] + 1}, step {steps[0]['step'] + 1}: expected a finite loss and gradient, "
        f"got nan or inf in {len(steps)} updates in a row (TRAIN.BAD_STEPS_MAX), none of which was made, "
        f"the first one at learning rate {steps[0]['lr']:.3e}; {start} with a lower learning rate, or in "
        f"bf16 or full precision; {dump} lists the images"
    )


def describe_bad_step(training: Training, bad: BadStep) -> dict[str, Any]:
    """A bad step as plain data, with the images of each batch on every process; moves the schedule to it."""
    training.scheduler.step_update(bad.number)
    epoch = bad.number // training.updates_per_epoch
    batches = range(bad.step - len(bad.losses) + 1, bad.step + 1)
    return {
        "epoch": epoch,
        "step": bad.step,
        "update": bad.number,
        "lr": training.state.optimizer.param_groups[0]["lr"],
        "grad_norm": str(bad.grad_norm),
        "batches": [
            {
                "step": step,
                "loss": [str(loss) for loss in losses],
                "images": training.batch_indices(epoch, step),
            }
            for step, losses in zip(batches, bad.losses, strict=True)
        ],
    }


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, batches: Batches) -> dict[str, float]:
    """Accuracy in percent (acc1, acc5) and mean loss over all images of all processes, each counted once.

    With fewer than five classes acc5 is over all of them. Batches smaller than the loader's are filled up, as
    outputs are rounded otherwise in a batch of another size (which would also be compiled anew): results do
    not depend on how many processes divide the images among them.

    Raises:
        ValueError: the outputs are not finite, or an image of any process does not decode.
        StopRequested: after a stop signal to any process that listens.
    """
    totals = utils.Totals(("loss", "top1", "top5", "images"), run.device)
    model.eval()
    full = (batches.batch_size or 0) if isinstance(batches, DataLoader) else 0
    shown = progress(run.agreement.until_stopped(batches), "evaluation", utils.is_main_process())
    with utils.failing_together():
        for images, targets in shown:
            images = images.to(run.device, non_blocking=True)
            targets = targets.to(run.device, non_blocking=True)
            full = max(full, len(images))
            images = F.pad(images, [0] * (2 * images.ndim - 1) + [full - len(images)])
            with run.precision.autocast(run.device):
                logits = model(images)[: len(targets)]
            logits = logits.double()  # a sum in float32 would depend on the order
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
