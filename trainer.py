"""What a training run does before its epochs and after each of them."""

import logging
import os
from pathlib import Path

import torch

import storage
import utils
from checkpoints import Checkpoints
from data import Loaders
from engine import Run, Training, evaluate
from train_state import Checkpoint, TrainState, best_accuracy

logger = logging.getLogger(__name__)


def record_config(run: Run) -> None:
    """Write the whole configuration to ``config.yaml``, or leave there what was.

    Raises:
        ValueError: it cannot be written.
    """
    path = run.output / "config.yaml"
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(run.config.dump(), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(
            f"{path}: expected to write the configuration, got: {error.strerror}; make space, or choose "
            "another --output"
        ) from error


def lies_in(checkpoint: Checkpoint, output: Path) -> bool:
    """Whether a checkpoint is one of the run's own folder."""
    return Path(checkpoint.source).resolve().parent == output.resolve()


def resume(
    state: TrainState, checkpoint: Checkpoint, output: Path, updates_per_epoch: int, order: str, images: int
) -> float:
    """Continue from ``checkpoint``; one that lies in ``output`` knows of the best accuracy there.

    Warns where the epochs had another number of updates, and where the running epoch cannot be continued.

    Args:
        state: to load into.
        checkpoint: where from.
        output: the run's folder.
        updates_per_epoch: of this run.
        order: what this run's order of images depends on.
        images: of all processes per update.

    Returns:
        The accuracy (percent) that ``best.pth`` in ``output`` holds for this run; 0 without one.

    Raises:
        OSError, ValueError: on all processes; a file in ``output`` cannot be read.
    """
    state.load(checkpoint)
    position = state.position
    if position.images and position.order != order:
        logger.warning(
            f"{checkpoint.source} was written inside an epoch of {position.order}, now it is {order}: epoch "
            f"{position.epoch + 1} begins anew"
        )
        position.step, position.dealt = 0, []
        state.meter.start_epoch()
    processes = utils.get_world_size()
    if position.dealt and position.dealt[-1][0] != processes:
        logger.warning(
            f"{checkpoint.source} was written by {position.dealt[-1][0]} process(es), now there are "
            f"{processes}: epoch {position.epoch + 1} goes on with the images that it has not seen, but not "
            "bit for bit"
        )
    position.order = order
    made, expected = position.updates, position.epoch * updates_per_epoch - (-position.images // images)
    if made != expected:
        logger.warning(
            f"{checkpoint.source} made {made} updates in {position.epoch} epochs and {position.images} "
            f"images, which are {expected} here (other data, batch size or number of processes); the "
            "schedule goes on by images"
        )
        position.updates = expected
    is_ours, best = lies_in(checkpoint, output), 0.0
    with utils.failing_together():
        if is_ours and utils.is_main_process():  # one reads: with different best ones they would part ways
            best = best_accuracy(output, state.run, state.max_accuracy)
        if not (is_ours and state.run and state.config.TRAIN.AUTO_RESUME):  # else later files would win
            state.run = storage.next_run(output)
    best = float(utils.gather_rows(torch.tensor([best], dtype=torch.float64)).max())
    state.max_accuracy = max(state.max_accuracy, best)
    inside = f" and {position.images} images of the next one" if position.images else ""
    logger.info(
        f"resumed {checkpoint.source}: {position.epoch} epochs{inside} done, best {state.max_accuracy:.2f}%"
    )
    if best < state.max_accuracy:
        logger.warning(
            f"{output / storage.BEST_NAME} holds {best:.2f}%, not the best so far: it is written after the "
            "next epoch that is better than what it holds"
        )
    return best


def begin(run: Run, training: Training, loaders: Loaders, checkpoint: Checkpoint | None) -> Checkpoints:
    """Connect the parts of a training run, and place them where it starts or goes on.

    Raises:
        OSError, ValueError: on all processes; a file in the run's folder cannot be read, or moved.
    """
    state, sampler, dataset = training.state, loaders.train_sampler, loaders.train_dataset
    checkpoints = Checkpoints(run.config, run.output, run.agreement, run.metrics)
    training.after_update, training.batch_indices = checkpoints.after_update, sampler.batch_indices
    state.meter.count_replaced = lambda: dataset.undecodable
    best = 0.0
    if checkpoint is None:
        state.position.order = sampler.order
        state.meter.start_epoch()
        with utils.failing_together():
            state.run = storage.next_run(run.output)
    else:
        images = run.config.DATA.BATCH_SIZE * utils.get_world_size()
        images *= max(1, run.config.TRAIN.ACCUMULATION_STEPS)
        updates = training.updates_per_epoch
        best = resume(state, checkpoint, run.output, updates, sampler.order, images)
        training.scheduler.step_update(max(0, state.position.updates - 1))  # as the last update left it
    with utils.failing_together():
        place_metrics(run, state, checkpoint)
    checkpoints.start(state, best)
    return checkpoints


def place_metrics(run: Run, state: TrainState, checkpoint: Checkpoint | None) -> None:
    """Let the metrics go on where the run does.

    Raises:
        OSError: their file cannot be changed.
    """
    if checkpoint is not None and lies_in(checkpoint, run.output):
        run.metrics.rewind(checkpoint.content.get("metrics_size", run.metrics.size))
        return
    # What there is comes from an attempt that was killed before it saved, or that has lost all it saved;
    # without AUTO_RESUME, from another run.
    has_older = any(map(storage.is_of_older_version, storage.checkpoints_in(run.output)))
    if run.config.TRAIN.AUTO_RESUME or (state.run == 1 and not has_older):
        run.metrics.set_aside()


def finish_epoch(run: Run, state: TrainState, loaders: Loaders, checkpoints: Checkpoints) -> None:
    """Evaluate the model as it is now, record the epoch, and save it if it beats ``best.pth``."""
    config, meter, epoch = run.config, state.meter, state.position.epoch
    result = evaluate(run, state.model, loaders.val_loader)
    values = {"loss": meter.mean_loss, "acc1": result["acc1"], "acc5": result["acc5"]}
    values |= {"val_loss": result["loss"]}
    if state.ema is not None:
        averaged = evaluate(run, state.ema.module, loaders.val_loader)
        values |= {
            "acc1_ema": averaged["acc1"],
            "acc5_ema": averaged["acc5"],
            "val_loss_ema": averaged["loss"],
        }
    accuracy = max(values["acc1"], values.get("acc1_ema", 0.0))  # best.pth holds both weights
    state.max_accuracy, state.evaluated = max(accuracy, state.max_accuracy), True
    if meter.replaced:
        logger.warning(f"{meter.replaced} training images of this epoch did not decode, and were replaced")
    minutes, left = meter.minutes, meter.minutes * (config.TRAIN.EPOCHS - epoch)
    logger.info(f"epoch {epoch}: best {state.max_accuracy:.2f}%, {minutes:.1f} min, {left:.0f} to go")
    values |= {"max_accuracy": state.max_accuracy, "minutes": minutes, "undecodable": meter.replaced}
    run.metrics.write("epoch", epoch - 1, epoch=epoch - 1, **values)
    meter.start_epoch()
    checkpoints.save_if_best(state, accuracy)
