"""Train, evaluate or time a Focal Transformer for image classification.

One command for one CPU, one GPU, or many under torchrun:

    python main.py --cfg configs/focal_tiny_patch4_window7_224.yaml --data-path DIR
    torchrun --nproc_per_node 8 main.py --cfg FILE --data-path DIR
    python main.py --cfg FILE --data-path DIR --eval --resume CHECKPOINT
"""

import argparse
import logging
import multiprocessing
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch
from yacs.config import CfgNode

import storage
import train_state
import utils
from config import load_config
from control import EXIT_STOPPED, StopRequested, listening
from data import UndecodableImageError, build_loaders
from engine import Run, evaluate, prepare, train_one_epoch
from models import FocalTransformer, agree_on_backends, build_model, count_params_and_macs, load_checkpoint
from models.checkpoint import read_class_map
from optimizer import freeze_stages
from run_folder import opened
from throughput import each_once, measure_throughput
from trainer import begin, finish_epoch, record_config

logger = logging.getLogger("main")

FLAGS = {  # flag -> (config key, help); one that is not given leaves the yaml file's value alone
    "batch-size": ("DATA.BATCH_SIZE", "images per process and step"),
    "dataset": ("DATA.DATASET", "imagenet, imagenet22k, imagewoof or folder"),
    "data-path": ("DATA.DATA_PATH", "root folder of the data set"),
    "cache-mode": ("DATA.CACHE_MODE", "with --zip: no, part or full"),
    "resume": ("MODEL.RESUME", "checkpoint to continue from; with --eval, to evaluate"),
    "pretrained": ("MODEL.PRETRAINED", "weights to start from"),
    "accumulation-steps": ("TRAIN.ACCUMULATION_STEPS", "batches per optimizer update"),
    "amp-opt-level": ("AMP_OPT_LEVEL", "O0: full precision; O1, O2: mixed precision"),
    "amp-dtype": ("AMP_DTYPE", "bf16 or fp16"),
    "output": ("OUTPUT", "root of the output folders (default: output)"),
    "tag": ("TAG", "name of the run; its folder is <output>/<model name>/<tag>"),
    "seed": ("SEED", "random seed"),
    "device": ("DEVICE", "cpu, cuda or cuda:N"),
}
SWITCHES = {
    "zip": ("DATA.ZIP_MODE", "read the data set from zip files"),
    "use-checkpoint": ("TRAIN.USE_CHECKPOINT", "recompute activations to save memory"),
    "compile": ("COMPILE", "compile the model"),
    "eval": ("EVAL_MODE", "evaluate and stop"),
    "throughput": ("THROUGHPUT_MODE", "measure inference speed on synthetic images and stop"),
    "debug": ("DEBUG_MODE", "two steps on synthetic images, sizes of the model, full tracebacks"),
}


def read_config(argv: list[str] | None) -> CfgNode:
    """The yaml file, overridden by --opts, then by the flags that were given, then by PT_OUTPUT_DIR."""
    parser = argparse.ArgumentParser(description="Focal Transformer: train and evaluate", allow_abbrev=False)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="yaml file, see configs/")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="any option of config.py")
    for flag, (key, text) in FLAGS.items():
        parser.add_argument(f"--{flag}", dest=key, metavar="X", help=text)
    for flag, (key, text) in SWITCHES.items():
        parser.add_argument(f"--{flag}", dest=key, action="store_const", const=True, help=text)
    parser.add_argument("--local_rank", "--local-rank", help="ignored: torchrun sets the environment")
    args = vars(parser.parse_args(argv))
    opts = list(args["opts"])
    if len(opts) % 2:
        raise ValueError(
            f"--opts: expected KEY VALUE pairs, got {len(opts)} words: {' '.join(opts)}; give every key one "
            "value"
        )
    for key, _ in (*FLAGS.values(), *SWITCHES.values()):
        opts += [] if args[key] is None else [key, args[key]]
    opts += ["OUTPUT", os.environ["PT_OUTPUT_DIR"]] if os.environ.get("PT_OUTPUT_DIR") else []
    return load_config(args["cfg"], opts)


def start(config: CfgNode) -> None:
    """Set up the process, build the model, and do what the config asks for."""
    if config.DETERMINISTIC:
        utils.be_deterministic()
    device = utils.pick_device(config.DEVICE)
    utils.init_distributed(device, config.DIST_TIMEOUT_MINUTES)
    output = Path(config.OUTPUT or "output") / config.MODEL.NAME / config.TAG
    modes = {"EVAL_MODE": run_evaluation, "THROUGHPUT_MODE": run_throughput, "DEBUG_MODE": run_debug}
    action = next((action for mode, action in modes.items() if config[mode]), run_training)
    with opened(output, action is run_training, config.DIST_TIMEOUT_MINUTES) as metrics:
        precision = utils.choose_precision(config.AMP_OPT_LEVEL, config.AMP_DTYPE, device)
        logger.info(f"configuration:\n{config.dump()}")
        logger.info(f"{utils.get_world_size()} process(es) on {device}, {precision.name}, output in {output}")
        utils.seed_everything(config.SEED)
        model = build_model(config).to(device)
        with torch.set_grad_enabled(action in (run_training, run_debug)):
            group = utils.control_group() if utils.in_group() else None
            attention = each_once(agree_on_backends(model, precision.dtype, group))
        logger.info(f"{config.MODEL.NAME}: {config.MODEL.NUM_CLASSES} classes, attention {attention}")
        if frozen := freeze_stages(model, stages := config.TRAIN.FREEZE_STAGES):
            logger.info(f"TRAIN.FREEZE_STAGES {stages}: {frozen:,} weights are not trained")
        if config.COMPILE:
            model.compile(dynamic=False)
        action(Run(config, device, precision, output, metrics), model)


def load_weights(model: FocalTransformer, config: CfgNode, key: str) -> None:
    """Load MODEL.RESUME or MODEL.PRETRAINED into the model; a mistake names the key and the flag."""
    class_map = None
    if config.MODEL.HEAD_CLASS_MAP:
        with train_state.naming("MODEL.HEAD_CLASS_MAP"):
            class_map = read_class_map(config.MODEL.HEAD_CLASS_MAP, config.MODEL.NUM_CLASSES)
    with train_state.naming(f"MODEL.{key} (--{key.lower()})"):
        try:
            if config.EVAL_EMA:
                train_state.load_average(model, config.MODEL[key])
            else:
                resize = key == "PRETRAINED" and not config.EVAL_MODE  # to start from, at any size
                load_checkpoint(model, config.MODEL[key], config.MODEL.RESET_HEAD, resize, class_map)
        except ValueError as error:
            if "reset_head" not in str(error) or config.EVAL_MODE:
                raise
            hint = "For a new classifier add: --opts MODEL.RESET_HEAD True"
            raise ValueError(f"{error}\n  {hint}") from error


def run_training(run: Run, model: FocalTransformer) -> None:
    """All epochs: train, save, evaluate, and save again what is the best so far.

    Raises:
        StopRequested: after a stop signal to any process, with the state saved.
    """
    config = run.config
    with listening():
        with utils.failing_together():  # what the user named is read first
            if utils.is_main_process():
                storage.remove_leftovers(run.output)
            checkpoint = train_state.find_start(model, config, run.output)
            if checkpoint is None and config.MODEL.PRETRAINED:
                load_weights(model, config, "PRETRAINED")
            loaders = build_loaders(config)
            if utils.is_main_process():
                record_config(run)
        training = prepare(run, model, loaders.steps_per_epoch, soft_targets=loaders.mixup_fn is not None)
        checkpoints = begin(run, training, loaders, checkpoint)
        del checkpoint  # as large as the weights, their average and the optimizer's moments
        state = training.state
        try:
            if not state.evaluated:
                finish_epoch(run, state, loaders, checkpoints)
            while state.position.epoch < config.TRAIN.EPOCHS:
                state.position.step = loaders.go_on(state.position.epoch, state.position.dealt)
                train_one_epoch(run, training, loaders.train_loader, loaders.mixup_fn)
                state.meter.gather()
                state.position.next_epoch(training.updates_per_epoch)
                state.evaluated = False
                checkpoints.after_epoch(state)
                finish_epoch(run, state, loaders, checkpoints)
        except StopRequested:
            checkpoints.stop(state)
            logger.warning(
                f"stopped by a signal after {state.position.epoch} epochs and {state.position.step} steps; "
                f"the same command goes on (exit status {EXIT_STOPPED})"
            )
            raise
        finally:
            checkpoints.saver.wait()
        checkpoints.finish()
        checkpoints.tell_of_best(state)
    utils.barrier()  # the last checkpoint is on disk before any process returns


def run_evaluation(run: Run, model: FocalTransformer) -> None:
    """Load weights and evaluate them."""
    with utils.failing_together():
        load_weights(model, run.config, "RESUME" if run.config.MODEL.RESUME else "PRETRAINED")
        loaders = build_loaders(run.config)
    evaluate(run, model, loaders.val_loader)


def synthetic_batch(run: Run, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images of the configured shape, and labels."""
    side = run.config.DATA.IMG_SIZE
    shape = (size, run.config.MODEL.FOCAL.IN_CHANS, *([side, side] if isinstance(side, int) else side))
    return torch.randn(shape, device=run.device), torch.randint(run.config.MODEL.NUM_CLASSES, (size,))


def run_throughput(run: Run, model: FocalTransformer) -> None:
    """Measure inference speed."""
    images, _ = synthetic_batch(run, run.config.DATA.BATCH_SIZE)
    with torch.no_grad():
        backends = model.attention_backends(run.precision.dtype)
    result = measure_throughput(model, images, run.precision, backends)
    logger.info(str(result))
    result.save(run.output / "throughput.json")


def run_debug(run: Run, model: FocalTransformer) -> None:
    """Two training steps and an evaluation on a few synthetic images."""
    parameters, macs = count_params_and_macs(run.config)
    logger.info(f"{parameters:,} parameters, {macs / 1e9:.2f} G multiply-adds per image")
    batches = [synthetic_batch(run, min(8, run.config.DATA.BATCH_SIZE)) for _ in range(2)]
    train_one_epoch(run, prepare(run, model, len(batches), soft_targets=False), batches)
    evaluate(run, model, batches)


def leave_group(status: int) -> NoReturn:
    """End a process with its group open: closing it may wait for processes that are gone, and an interpreter
    that ends with it open can abort in its threads, with another status."""
    try:
        for worker in multiprocessing.active_children():  # of a loader; they would notice seconds later
            worker.terminate()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, 2 for what the user can correct, told in one message, EXIT_STOPPED after a stop signal to training,
        or 1 if another process is gone. A process of a group does not return 1 or 2: it ends with them.
    """
    config = None
    try:
        config = read_config(argv)
        start(config)
    except StopRequested:
        utils.close_distributed()
        return EXIT_STOPPED
    except RuntimeError as error:
        message = config and utils.explain_lost_process(error, config.DIST_TIMEOUT_MINUTES)
        if not message:
            raise
        logger.debug("stopped", exc_info=True)
        print(f"error: {message}", file=sys.stderr)
        leave_group(1)
    except (ValueError, OSError, ImportError) as error:
        logger.debug("stopped", exc_info=True)  # the traceback goes to the log file
        if os.environ.get("FOCAL_TRACEBACK") or (config is not None and config.DEBUG_MODE):
            raise
        # Under a launcher all processes tell the same, but for a training image that only one has met.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, UndecodableImageError):
            print(f"error: {error}", file=sys.stderr)
        if utils.in_group():
            leave_group(2)
        return 2
    utils.close_distributed()
    return 0


if __name__ == "__main__":
    sys.exit(main())
