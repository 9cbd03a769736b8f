"""A training run: start or resume, all epochs, finish."""

import importlib.util
import logging
import math
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

import utils
from config import flatten
from data import Loaders, build_loaders, check_same_data
from logger import TensorBoard, WeightsAndBiases
from models import FocalTransformer, load_checkpoint, read_checkpoint
from training.checkpoints import Checkpoints, Found, find_checkpoints, remove_temporary_files
from training.loop import Run, evaluate, train_one_epoch
from training.preemption import EXIT_STOPPED, StopRequested, handle_stop_signals
from training.state import TrainState, build_train_state, check_checkpoint
from utils import UserError, user_input

logger = logging.getLogger(__name__)


def train(run: Run, model: FocalTransformer) -> None:
    """All epochs: train, save, evaluate, and save again if the accuracy is the best so far.

    Raises:
        StopRequested: a rank received a stop signal; the state is saved.
        UserError: the run cannot start, or cannot go on.
    """
    with handle_stop_signals():
        state, loaders, checkpoints = setup(run, model)
        position = state.position
        try:
            if not state.evaluated:
                finish_epoch(run, state, loaders, checkpoints)
            while position.epoch < run.config.TRAIN.EPOCHS:
                loaders.resume_at(position.epoch, position.samples_seen)
                train_one_epoch(run, state, loaders.train_loader, loaders.mixup_fn, checkpoints.after_update)
                state.meter.read()  # after a resume with no whole batch left, nothing else has read it
                position.next_epoch(state.updates_per_epoch)
                state.evaluated = False
                checkpoints.after_epoch(state)
                finish_epoch(run, state, loaders, checkpoints)
        except StopRequested:
            checkpoints.stop(state)
            logger.warning(
                f"stopped by a signal after {position.epoch} epochs and {position.step} steps; start the "
                f"same command again to continue (exit status {EXIT_STOPPED})"
            )
            raise
        finally:
            checkpoints.writer.wait()
        checkpoints.finish()
        checkpoints.warn_if_best_missing(state)
        logger.info(f"training is done after {position.epoch} epoch(s): best {state.max_accuracy:.2f}%")


def setup(run: Run, model: FocalTransformer) -> tuple[TrainState, Loaders, Checkpoints]:
    """Read the weights or the checkpoint, then the data, and restore the position in training.

    The checkpoint is read and compared first, and files of the run's folder are changed last, so that a
    mistake shows early and changes nothing.

    Raises:
        UserError: on all ranks; something that the user named cannot be read, or does not fit.
    """
    config, found, content = run.config, Found(), {}
    with utils.raise_on_all_ranks():
        if utils.is_main_process():
            found = find_checkpoints(run.output)
    source, option = choose_checkpoint(run, utils.broadcast(found.newest))
    with utils.raise_on_all_ranks():
        if source:
            with user_input(option):
                content = found.content or read_checkpoint(source)
                check_checkpoint(content, source, model, config)
            check_epochs(content["position"], config.TRAIN.EPOCHS, source)
        elif config.MODEL.PRETRAINED:
            load_weights(model, config, "PRETRAINED")
        with user_input():
            loaders = build_loaders(config)
    check_same_data(loaders)
    soft_targets, steps = loaders.mixup_fn is not None, loaders.steps_per_epoch
    state = build_train_state(config, model, run.precision, run.device, steps, soft_targets)
    state.meter.count_replaced = lambda: loaders.train_dataset.undecodable
    state.meter.reset()
    if content:
        resume(state, content, source, loaders.train_sampler.order)
    position = state.position
    position.image_order = loaders.train_sampler.order
    position.step = loaders.resume_at(position.epoch, position.samples_seen)
    with utils.raise_on_all_ranks():
        if utils.is_main_process():
            prepare_folder(run, state, source)
    return state, loaders, Checkpoints(config, run.output, run.metrics, position, found.best)


def choose_checkpoint(run: Run, newest: Path | None) -> tuple[str, str]:
    """The checkpoint to continue from, '' for none, and the option that chose it, for messages.

    Args:
        run: what stays the same.
        newest: checkpoint of the output folder.

    Raises:
        UserError: there is one, without AUTO_RESUME.
    """
    named = run.config.MODEL.RESUME
    if newest is None:
        return named, "MODEL.RESUME (--resume)"
    if not run.config.TRAIN.AUTO_RESUME:
        raise UserError(
            f"TRAIN.AUTO_RESUME: expected True, or an output folder without checkpoints, got {newest}; "
            "choose another --tag"
        )
    if named and newest.resolve() != Path(named).resolve():
        logger.warning(
            f"continuing from {newest}, the newest in the output folder, instead of {named}; choose another "
            "--tag to prevent this"
        )
    return str(newest), "TRAIN.AUTO_RESUME (choose another --tag to start a new run)"


def check_epochs(position: dict[str, Any], epochs: int, source: str) -> None:
    """Warn if a checkpoint's position is the end of training; UserError if it is beyond `epochs`."""
    begun = position["epoch"] + (position["samples_seen"] > 0)
    if begun > epochs:
        raise UserError(
            f"TRAIN.EPOCHS: expected at least {begun}, as many as {source} has begun, got {epochs}; raise it"
        )
    if position["epoch"] == epochs:
        logger.warning(f"{source} has finished all {epochs} epochs (TRAIN.EPOCHS): nothing is left to train")


def resume(state: TrainState, content: dict[str, Any], source: str, image_order: str) -> None:
    """Load the content of a checkpoint, and find the position in this run's epochs.

    Warns if the running epoch cannot be continued, since `image_order` (`TrainSampler.order`) is another one,
    or if the number of updates in an epoch has changed.

    Raises:
        UserError: the optimizer has other parameters.
    """
    state.load_state_dict(content, source)
    position, config = state.position, state.config
    if position.samples_seen and position.image_order != image_order:
        logger.warning(
            f"{source} was written inside an epoch of {position.image_order}, this run has {image_order}: "
            f"epoch {position.epoch + 1} starts again from its beginning"
        )
        position.restart_epoch()
        state.meter.reset()
    per_update = config.DATA.BATCH_SIZE * max(1, config.TRAIN.ACCUMULATION_STEPS) * utils.get_world_size()
    updates = position.epoch * state.updates_per_epoch + math.ceil(position.samples_seen / per_update)
    if position.updates != updates:
        rest = "the images that the epoch has not seen" if position.samples_seen else "a whole epoch"
        logger.warning(
            f"{source} was made with other data, batch size or number of processes: {position.updates} "
            f"updates, where this run makes {updates}; it continues with {rest}, but not bit for bit"
        )
        position.updates = updates
    # The rate of the last update, since best.pth may be saved before the next one.
    state.scheduler.step_update(max(0, updates - 1))
    inside = f" and {position.samples_seen} images of the next one" if position.samples_seen else ""
    logger.info(f"resumed {source}: {position.epoch} epochs{inside}, best {state.max_accuracy:.2f}%")


def prepare_folder(run: Run, state: TrainState, source: str) -> None:
    """Bring the files of the run's folder in line with where training starts; for the main rank.

    Metrics of another run's folder are not continued.

    Raises:
        OSError: a file cannot be written.
    """
    continues = bool(source) and Path(source).parent.resolve() == run.output.resolve()  # it may be a link
    remove_temporary_files(run.output)
    with utils.atomic_write(run.output / "config.yaml") as temporary:
        temporary.write_text(run.config.dump(), encoding="utf-8")
    epoch, step = state.position.epoch_step if continues else (0, 0)
    epochs = epoch - (continues and not state.evaluated)
    next_positions = run.metrics.truncate((epoch, step), epochs)
    if importlib.util.find_spec("tensorboard"):
        run.metrics.start(TensorBoard, **next_positions)
    if project := run.config.LOG.WANDB:
        name = f"{run.config.MODEL.NAME}/{run.config.TAG}"
        run.metrics.start(WeightsAndBiases, continues, project=project, name=name, config=flatten(run.config))


def finish_epoch(run: Run, state: TrainState, loaders: Loaders, checkpoints: Checkpoints) -> None:
    """Evaluate the model, record the epoch, and save the state if it is better than best.pth."""
    meter, epoch = state.meter, state.position.epoch
    result = evaluate(run, state.model, loaders.val_loader)
    values = {"loss": meter.mean_loss, "acc1": result["acc1"], "acc5": result["acc5"]}
    values |= {"val_loss": result["loss"]}
    if state.ema is not None:
        ema = evaluate(run, state.ema.module, loaders.val_loader)
        values |= {"acc1_ema": ema["acc1"], "acc5_ema": ema["acc5"], "val_loss_ema": ema["loss"]}
    # best.pth holds the weights and their average: the better of the two counts
    accuracy = max(values["acc1"], values.get("acc1_ema", 0.0))
    state.max_accuracy, state.evaluated = max(accuracy, state.max_accuracy), True
    if meter.replaced:
        logger.warning(f"{meter.replaced} training images of this epoch did not decode, and were replaced")
    minutes, epochs = meter.minutes, run.config.TRAIN.EPOCHS
    logger.info(
        f"epoch {epoch}/{epochs} done: acc1 {accuracy:.2f}%, best {state.max_accuracy:.2f}%, took "
        f"{minutes:.1f} min, about {minutes * (epochs - epoch):.0f} min left"
    )
    values |= {"max_accuracy": state.max_accuracy, "minutes": minutes, "undecodable": meter.replaced}
    run.metrics.write("epoch", epoch - 1, epoch=epoch - 1, **values)
    meter.reset()
    checkpoints.save_if_best(state, accuracy)


def check_run_options(config: CfgNode) -> None:
    """Raise UserError for options that contradict each other, or the mode, before anything large is read.

    Evaluation takes MODEL.RESUME if both weights are given, and ignores RESET_HEAD; the other modes use no
    weights. So any run's config.yaml can be given to --eval, --throughput and --debug.
    """
    model, train, problems = config.MODEL, config.TRAIN, []
    modes = [mode for mode in ("EVAL_MODE", "THROUGHPUT_MODE", "DEBUG_MODE") if config[mode]]
    is_training = not modes
    if len(modes) > 1:
        problems.append(f"{modes[1]}: expected at most one mode, got {' and '.join(modes)}; choose one")
    if config.EVAL_MODE and not (model.RESUME or model.PRETRAINED):
        problems.append(
            "EVAL_MODE: expected weights to evaluate, got none; name them with --resume or --pretrained"
        )
    if is_training and model.RESUME and model.PRETRAINED:
        problems.append(
            f"MODEL.PRETRAINED: expected either this or MODEL.RESUME, got {model.PRETRAINED!r} and "
            f"{model.RESUME!r}; use RESUME to continue a run, PRETRAINED to start from weights"
        )
    if is_training and model.RESET_HEAD and not model.PRETRAINED:
        problems.append("MODEL.RESET_HEAD: expected MODEL.PRETRAINED, got none; name it or drop this")
    for key in ("WARMUP_EPOCHS", "START_EPOCH") if is_training else ():
        if train[key] > train.EPOCHS:
            problems.append(
                f"TRAIN.{key}: expected at most TRAIN.EPOCHS = {train.EPOCHS}, got {train[key]}; lower it"
            )
    wants_wandb = is_training and config.LOG.WANDB and utils.is_main_process()
    if wants_wandb and importlib.util.find_spec("wandb") is None:
        problems.append("LOG.WANDB: expected the library wandb; pip install wandb, or set it to ''")
    if problems:
        raise UserError("\n".join(problems))


def load_weights(model: FocalTransformer, config: CfgNode, key: str) -> None:
    """Load the weights of MODEL.RESUME or MODEL.PRETRAINED (`key`).

    Training takes weights of another image size or other classes, too.

    Raises:
        UserError: a file cannot be read or does not fit; the message begins with the option.
    """
    trains = not config.EVAL_MODE
    with user_input(f"MODEL.{key} (--{key.lower()})"):
        load_checkpoint(model, config.MODEL[key], trains and config.MODEL.RESET_HEAD, resize=trains)
