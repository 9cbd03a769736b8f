"""One epoch of training, and evaluation: one path for any device, precision and number of ranks.

In full precision autocast and the gradient scaler do nothing; without accumulation a group has one batch.
No step waits for the device: losses and norms stay there until the next log line. An update whose gradient is
not finite is skipped.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from yacs.config import CfgNode

import utils
from data import UndecodableImageError
from logger import Metrics
from training.checkpoints import BEST_NAME
from training.preemption import StopRequested, stop_received
from training.state import TrainState
from utils import UserError

logger = logging.getLogger(__name__)

Batches = DataLoader | Sequence[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Run:
    """What stays the same during a run."""

    config: CfgNode
    device: torch.device  # of this rank
    precision: utils.Precision
    output: Path  # the run's folder
    metrics: Metrics  # records nothing on other ranks than the first


def train_one_epoch(
    run: Run,
    state: TrainState,
    batches: Batches,
    mixup_fn: Callable | None = None,
    after_update: Callable[[TrainState, bool], None] = lambda state, is_last: None,
) -> None:
    """Train the rest of the epoch, from the state's position on.

    A last accumulation group of fewer batches makes an update, too. All batches have the same size. What
    comes before and after an epoch (order of the images, evaluation, checkpoints) is in `training.run.train`.

    Args:
        run: what stays the same.
        state: what changes.
        batches: images [B, C, H, W] and labels [B], as many on each rank.
        mixup_fn: mixes images and makes soft targets [B, classes] of labels.
        after_update: called between updates with the state and whether the epoch ends here; it may save the
            state, and raise an exception to stop.

    Raises:
        UserError: too many updates in a row were skipped.
    """
    config, position, device = run.config, state.position, run.device
    accumulation = max(1, config.TRAIN.ACCUMULATION_STEPS)
    first_step, end_step = position.step, position.step + len(batches)
    state.ddp_model.train()
    for step, (images, targets) in enumerate(batches, start=first_step):
        utils.seed_everything(config.SEED, utils.get_rank(), position.epoch, step)
        images, targets = to_device(images, device), to_device(targets, device)
        if mixup_fn is not None:
            images, targets = mixup_fn(images, targets)
        index_in_group = (step - first_step) % accumulation
        group_start = step - index_in_group
        group_size = min(accumulation, end_step - group_start)
        is_update = index_in_group == group_size - 1
        with sync_gradients(state.ddp_model, is_update):
            with run.precision.autocast(device):
                loss = state.criterion(state.ddp_model(images), targets)
            state.scaler.scale(loss / group_size).backward()
        state.meter.add_batch(loss, len(images))
        if is_update:
            norm = update(state, config.TRAIN.CLIP_GRAD)
            state.meter.add_update(norm)
            position.step, position.updates = step + 1, position.updates + 1  # skipped ones count, too
            position.samples_seen += group_size * len(images) * utils.get_world_size()
        if (step + 1) % config.PRINT_FREQ == 0 or step + 1 == end_step:
            report(run, state, step, end_step)
            raise_if_too_many_skipped(run, state, step)
        if is_update:
            after_update(state, step + 1 == end_step)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a batch to the device; in the background if it lies in pinned memory."""
    return tensor.to(device, non_blocking=tensor.is_pinned())


def sync_gradients(model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
    """A context in which the backward pass averages gradients over all ranks, or leaves that for later."""
    if enabled or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def update(state: TrainState, max_norm: float) -> torch.Tensor:
    """Make the next optimizer update; one whose gradient norm is not finite changes nothing.

    A norm that overflows counts, too, since the optimizer squares gradients. Fused
    optimizers skip the update on the device; for others the host waits.

    Args:
        state: with gradients, which are reset.
        max_norm: to clip the gradients to; 0 does not clip.

    Returns:
        The gradient norm before clipping, a scalar on the device.
    """
    optimizer, scaler = state.optimizer, state.scaler
    state.scheduler.step_update(state.position.updates)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), max_norm or math.inf)
    is_finite = torch.isfinite(norm)
    # Not by scaler.step: it looks at the gradients, not at their norm, which can overflow.
    if optimizer.param_groups[0].get("fused"):
        optimizer.found_inf = (~is_finite).float()  # makes a fused optimizer skip this step
        optimizer.step()
    elif is_finite:
        optimizer.step()
    scaler.update()  # by the gradients that `unscale_` has seen
    optimizer.zero_grad()
    if state.ema is not None:
        update_ema(state, is_finite)
    return norm


@torch.no_grad()
def update_ema(state: TrainState, is_finite: torch.Tensor) -> None:
    """Move the average as timm's ModelEmaV3 does, but not after a skipped update; no wait for the device."""
    decay = state.ema.get_decay(state.position.updates + 1)  # with this one
    weight = (1 - decay) * is_finite
    values = state.model.state_dict()
    for name, average in state.ema.module.state_dict().items():
        if average.is_floating_point():
            average.lerp_(values[name], weight.to(average.dtype))
        else:
            average.copy_(values[name])


def report(run: Run, state: TrainState, step: int, steps: int) -> None:
    """Log the interval that ends with batch `step`. Collective; waits for the device."""
    epoch, stats = state.position.epoch, state.meter.read()
    rate, memory = state.optimizer.param_groups[0]["lr"], utils.memory_mb(run.device)
    skipped = f"  {stats.skipped} updates skipped" if stats.skipped else ""
    logger.info(
        f"epoch {epoch + 1}/{run.config.TRAIN.EPOCHS} step {step + 1}/{steps}  loss {stats.loss:.4f}  "
        f"lr {rate:.3e}  grad norm {stats.grad_norm:.3f}  {stats.img_per_s:.0f} img/s  {memory:.0f} MB"
        + skipped
    )
    values = asdict(stats) | {"lr": rate, "memory_mb": memory}
    if state.scaler.is_enabled():
        values["loss_scale"] = state.scaler.get_scale()
    values |= {"epoch": epoch, "step": step, "steps_per_epoch": state.steps_per_epoch}
    run.metrics.write("train", epoch * state.steps_per_epoch + step, **values)


def raise_if_too_many_skipped(run: Run, state: TrainState, step: int) -> None:
    """Raise UserError if TRAIN.BAD_STEPS_MAX updates in a row were skipped, as `report` has read them."""
    skipped, most = state.meter.skipped_in_a_row, run.config.TRAIN.BAD_STEPS_MAX
    if skipped < most:
        return
    rate = state.optimizer.param_groups[0]["lr"]
    precision = ", or in bf16" if state.scaler.is_enabled() else ""
    raise UserError(
        f"epoch {state.position.epoch + 1}: expected finite gradients, got nan or inf in {skipped} updates "
        f"in a row (TRAIN.BAD_STEPS_MAX is {most}), up to step {step + 1} with the learning rate {rate:.3e}; "
        f"the newest checkpoint may hold weights that are too large already: {go_back(run)}{precision}"
    )


def go_back(run: Run) -> str:
    """The advice for a run whose weights are too large, as those of its newest checkpoint may be."""
    best = run.output / BEST_NAME
    instead = " in place of --pretrained" if run.config.MODEL.PRETRAINED else ""
    source = f" and --resume {best}{instead}" if best.is_file() else ""
    return f"start again with another --tag{source}, with a lower TRAIN.BASE_LR"


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, batches: Batches) -> dict[str, float]:
    """Accuracy in percent (acc1, acc5) and mean loss over the images of all ranks, each counted once.

    With fewer than five classes acc5 is over all of them. The last batch is padded to the size of the others,
    since rounding depends on the size, and a compiled model would be compiled again for another one. So the
    accuracies do not depend on the number of ranks, and the loss only by the rounding of a sum of doubles.

    Args:
        run: what stays the same.
        model: without DistributedDataParallel.
        batches: images [B, C, H, W] and labels [B], of each rank a different part.

    Raises:
        UserError: on all ranks; the outputs are not finite, or an image of any rank cannot be read.
        StopRequested: on all ranks; one of them received a stop signal (inside `handle_stop_signals`).
    """
    model.eval()
    results = [torch.zeros(3, 0, device=run.device)]  # per batch [3, B]: loss, hit, hit among the first five
    batch_size = (batches.batch_size or 0) if isinstance(batches, DataLoader) else 0
    with utils.raise_on_all_ranks(UndecodableImageError):
        for step, (images, targets) in enumerate(batches):
            if stop_received():
                break
            if step and step % run.config.PRINT_FREQ == 0:
                logger.info(f"evaluated {step}/{len(batches)} batches")
            images, targets = to_device(images, run.device), to_device(targets, run.device)
            batch_size = max(batch_size, len(images))
            images = F.pad(images, [0] * (2 * images.ndim - 1) + [batch_size - len(images)])
            with run.precision.autocast(run.device):
                logits = model(images)[: len(targets)]
            logits = logits.float()
            hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
            loss = F.cross_entropy(logits, targets, reduction="none")
            results.append(torch.stack([loss, hits[:, 0].float(), hits.any(dim=1).float()]))
    if utils.any_rank(stop_received()):
        raise StopRequested
    values = torch.cat(results, dim=1).cpu().double()
    sums = torch.cat([values.sum(dim=1), torch.tensor([values.shape[1]])])
    loss_sum, top1, top5, count = utils.all_gather(sums).sum(dim=0).tolist()
    count = int(count)
    if not math.isfinite(loss_sum):
        advice = "check the weights, or evaluate with --amp-opt-level O0"
        advice = advice if run.config.EVAL_MODE else go_back(run)
        raise UserError(f"expected finite outputs, got nan or inf; {advice}")
    result = {"acc1": 100 * top1 / count, "acc5": 100 * top5 / count, "loss": loss_sum / count}
    logger.info(
        f"{count} images: acc1 {result['acc1']:.3f}%  acc5 {result['acc5']:.3f}%  loss {result['loss']:.4f}"
    )
    return result
