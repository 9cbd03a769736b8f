"""What a training run does before its epochs and after each of them."""

import logging
import os
from pathlib import Path

import storage
import train_state
import utils
from checkpoints import Checkpoints
from data import Loaders
from engine import Run, Training, evaluate

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


def begin(
    run: Run, training: Training, loaders: Loaders, checkpoint: train_state.Checkpoint | None
) -> Checkpoints:
    """Connect the parts of a training run, and place them where it starts or goes on."""
    state, sampler, dataset = training.state, loaders.train_sampler, loaders.train_dataset
    checkpoints = Checkpoints(run.config, run.output, run.agreement, run.metrics)
    training.after_update, training.batch_indices = checkpoints.after_update, sampler.batch_indices
    state.meter.count_replaced = lambda: dataset.undecodable
    if checkpoint is None:
        state.run, state.position.order = storage.next_run(run.output), sampler.order
        state.meter.start_epoch()
        has_older = any(map(storage.is_of_older_version, storage.checkpoints_in(run.output)))
        # What there is comes from an attempt that was killed before it saved, or that has lost all it saved;
        # without AUTO_RESUME, from another run.
        is_lost = run.config.TRAIN.AUTO_RESUME or (state.run == 1 and not has_older)
        recorded = 0 if is_lost else None
    else:
        images = run.config.DATA.BATCH_SIZE * utils.get_world_size()
        images *= max(1, run.config.TRAIN.ACCUMULATION_STEPS)
        train_state.resume(state, checkpoint, run.output, training.updates_per_epoch, sampler.order, images)
        is_ours = Path(checkpoint.source).resolve().parent == run.output.resolve()
        recorded = checkpoint.content.get("metrics_size") if is_ours else None
        training.scheduler.step_update(max(0, state.position.updates - 1))  # as the last update left it
    if recorded is not None:
        run.metrics.rewind(recorded)
    checkpoints.start(state)
    return checkpoints


def finish_epoch(run: Run, state: train_state.TrainState, loaders: Loaders, checkpoints: Checkpoints) -> None:
    """Evaluate the model as it is now, record the epoch, and save it if it is the best so far."""
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
    is_best = accuracy > state.max_accuracy
    state.max_accuracy, state.evaluated = max(accuracy, state.max_accuracy), True
    if meter.replaced:
        logger.warning(f"{meter.replaced} training images of this epoch did not decode, and were replaced")
    minutes, left = meter.minutes, meter.minutes * (config.TRAIN.EPOCHS - epoch)
    logger.info(f"epoch {epoch}: best {state.max_accuracy:.2f}%, {minutes:.1f} min, {left:.0f} to go")
    values |= {"max_accuracy": state.max_accuracy, "minutes": minutes, "undecodable": meter.replaced}
    run.metrics.write("epoch", epoch - 1, epoch=epoch - 1, **values)
    meter.start_epoch()
    if is_best:
        checkpoints.save_best(state)
