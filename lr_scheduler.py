"""Learning rate schedules, counted in optimizer updates.

The rate is a pure function of the update number: the training loop calls `scheduler.step_update(n)` before
update `n` (from 0), so resuming needs only the number. As in the original recipe, the warm-up rises
linearly from WARMUP_LR over the first WARMUP_EPOCHS, and hides the beginning of the cosine rather than
delaying it.
"""

import logging

import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from yacs.config import CfgNode

logger = logging.getLogger(__name__)

IMAGES_PER_UPDATE = 512  # that the learning rates of a config are meant for


def scale_rates(config: CfgNode, world_size: int) -> CfgNode:
    """A copy of `config` with learning rates scaled linearly to the images that one update really sees."""
    images = config.DATA.BATCH_SIZE * world_size * max(1, config.TRAIN.ACCUMULATION_STEPS)
    scaled = config.clone()
    scaled.defrost()
    for name in ("BASE_LR", "WARMUP_LR", "MIN_LR"):
        scaled.TRAIN[name] = config.TRAIN[name] * images / IMAGES_PER_UPDATE
    scaled.freeze()
    is_step = config.TRAIN.LR_SCHEDULER.NAME == "step"
    logger.info(
        f"{images} images per update: learning rate {scaled.TRAIN.BASE_LR:.3e}, warm-up from "
        f"{scaled.TRAIN.WARMUP_LR:.3e}{'' if is_step else f', down to {scaled.TRAIN.MIN_LR:.3e}'}"
    )
    return scaled


def build_scheduler(config: CfgNode, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Scheduler:
    """The schedule named by TRAIN.LR_SCHEDULER.NAME.

    Args:
        config: rates and epochs; the rates as the optimizer uses them, so already scaled.
        optimizer: its param groups hold the base rate.
        updates_per_epoch: optimizer updates (not batches) per epoch.
    """
    train, schedule = config.TRAIN, config.TRAIN.LR_SCHEDULER
    total, warmup = train.EPOCHS * updates_per_epoch, train.WARMUP_EPOCHS * updates_per_epoch
    common = {"warmup_t": warmup, "warmup_lr_init": train.WARMUP_LR, "t_in_epochs": False}
    if schedule.NAME == "step":
        interval = schedule.DECAY_EPOCHS * updates_per_epoch
        return StepLRScheduler(optimizer, interval, schedule.DECAY_RATE, warmup_prefix=False, **common)
    common["lr_min"] = train.MIN_LR
    if schedule.NAME == "linear":  # from BASE_LR at the end of the warm-up to MIN_LR at the end of training
        return PolyLRScheduler(optimizer, max(total - warmup, 1), power=1.0, warmup_prefix=True, **common)
    return CosineLRScheduler(optimizer, total, **common)  # one cycle; the warm-up hides its first part
