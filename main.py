"""Train, evaluate or time a Focal Transformer for image classification.

One command for one CPU, one GPU, or many under torchrun:

    python main.py --cfg configs/focal_tiny_patch4_window7_224.yaml --data-path DIR
    torchrun --nproc_per_node 8 main.py --cfg FILE --data-path DIR
    python main.py --cfg FILE --data-path DIR --eval --resume CHECKPOINT
"""

import argparse
import json
import logging
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from timm.layers import to_2tuple
from yacs.config import CfgNode

import utils
from config import CHOICES, load_config
from data import UndecodableImageError, build_loaders, check_same_data
from models import FocalTransformer, agree_on_backends, build_model, count_params_and_macs
from optimizer import freeze_stages
from training.loop import Run, evaluate, train_one_epoch
from training.preemption import EXIT_STOPPED, StopRequested
from training.run import check_run_options, load_weights, train
from training.run_dir import open_run_dir
from training.state import build_train_state
from training.throughput import measure_throughput
from utils import UserError, print_error, user_input

logger = logging.getLogger("main")

DESCRIPTION = "Focal Transformer: train, evaluate and time models for image classification"
USAGE = """python main.py --cfg FILE [options], for example

  python main.py --cfg configs/focal_tiny_patch4_window7_224.yaml --data-path imagenet --batch-size 128

trains on the images in imagenet/train/<class> and imagenet/val/<class>; --help lists the options
"""
FLAGS = {  # flag -> (config key, help); a flag that is not given does not override the yaml file
    "batch-size": ("DATA.BATCH_SIZE", "images per process and step"),
    "dataset": ("DATA.DATASET", ", ".join(CHOICES["DATA.DATASET"])),
    "data-path": ("DATA.DATA_PATH", "root folder of the data set"),
    "resume": ("MODEL.RESUME", "checkpoint to continue from; with --eval, to evaluate"),
    "pretrained": ("MODEL.PRETRAINED", "weights to start from"),
    "accumulation-steps": ("TRAIN.ACCUMULATION_STEPS", "batches per optimizer update"),
    "amp-opt-level": ("AMP_OPT_LEVEL", "O0: full precision; O1, O2: mixed precision"),
    "amp-dtype": ("AMP_DTYPE", "bf16 or fp16"),
    "output": ("OUTPUT", "root of the output folders (default: output)"),
    "tag": ("TAG", "name of the run; its folder is <output>/<model name>/<tag>"),
    "seed": ("SEED", "random seed"),
    "device": ("DEVICE", "cpu, cuda, cuda:N, mps, xpu ... (default: the accelerator if there is one)"),
}
SWITCHES = {
    "zip": ("DATA.ZIP_MODE", "read the data set from zip files"),
    "use-checkpoint": ("TRAIN.USE_CHECKPOINT", "recompute activations to save memory"),
    "compile": ("COMPILE", "compile the model"),
    "eval": ("EVAL_MODE", "evaluate and stop"),
    "throughput": ("THROUGHPUT_MODE", "measure inference speed on synthetic images and stop"),
    "debug": ("DEBUG_MODE", "two steps on synthetic images, and the size of the model"),
}


def read_config(argv: list[str] | None) -> CfgNode:
    """The yaml file, overridden by --opts, then by the flags that were given, then by PT_OUTPUT_DIR.

    Raises:
        UserError: an option is unknown or has a wrong value.
    """
    parser = argparse.ArgumentParser(usage=USAGE, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="yaml file, see configs/")
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="any option of config.py"
    )
    for flag, (key, text) in FLAGS.items():
        parser.add_argument(f"--{flag}", dest=key, metavar="X", help=text)
    for flag, (key, text) in SWITCHES.items():
        parser.add_argument(f"--{flag}", dest=key, action="store_const", const=True, help=text)
    parser.add_argument("--cache-mode", help="ignored: the system keeps files in memory while there is room")
    parser.add_argument("--local_rank", "--local-rank", help="ignored: torchrun sets the environment")
    args = vars(parser.parse_args(argv))
    flags = {key: args[key] for key, _ in (*FLAGS.values(), *SWITCHES.values()) if args[key] is not None}
    if output := os.environ.get("PT_OUTPUT_DIR"):
        flags["OUTPUT"] = output
    with user_input():
        return load_config(args["cfg"], args["opts"], flags)


def start(config: CfgNode) -> None:
    """Set up the process and the model, then do what the config asks for."""
    if config.DETERMINISTIC:
        utils.be_deterministic()
    device = utils.pick_device(config.DEVICE)
    utils.init_distributed(device, config.DIST_TIMEOUT_MINUTES)
    output = Path(config.OUTPUT or "output") / config.MODEL.NAME / config.TAG
    modes = {"EVAL_MODE": run_evaluation, "THROUGHPUT_MODE": run_throughput, "DEBUG_MODE": run_debug}
    action = next((run for mode, run in modes.items() if config[mode]), train)
    with utils.raise_on_all_ranks():
        check_run_options(config)
    with open_run_dir(output, action is train, config.DIST_TIMEOUT_MINUTES) as metrics:
        precision = utils.choose_precision(config.AMP_OPT_LEVEL, config.AMP_DTYPE, device)
        logger.info(f"configuration:\n{config.dump()}")
        logger.info(f"{utils.get_world_size()} process(es) on {device}, {precision.name}, output in {output}")
        utils.seed_everything(config.SEED)
        with user_input():
            model = build_model(config).to(device)
            with torch.set_grad_enabled(action in (train, run_debug)):  # with a backward pass or without
                attention = agree_on_backends(model, precision.dtype, utils.cpu_group())
            frozen = freeze_stages(model, config.TRAIN.FREEZE_STAGES)
        operators = " and ".join(dict.fromkeys(attention))
        logger.info(f"{config.MODEL.NAME}: {config.MODEL.NUM_CLASSES} classes, attention {operators}")
        if frozen:
            logger.info(f"{frozen:,} weights are not trained (TRAIN.FREEZE_STAGES)")
        if config.COMPILE:
            model.compile(dynamic=False)
        action(Run(config, device, precision, output, metrics), model)


def run_evaluation(run: Run, model: FocalTransformer) -> None:
    """Load weights and evaluate them."""
    key = "RESUME" if run.config.MODEL.RESUME else "PRETRAINED"
    logger.info(f"evaluating MODEL.{key}: {run.config.MODEL[key]}")
    with utils.raise_on_all_ranks():
        load_weights(model, run.config, key)
        with user_input():
            loaders = build_loaders(run.config)
    check_same_data(loaders)
    evaluate(run, model, loaders.val_loader)


def synthetic_batch(run: Run, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images [size, C, H, W] of the configured shape, and labels [size]."""
    shape = (size, run.config.MODEL.FOCAL.IN_CHANS, *to_2tuple(run.config.DATA.IMG_SIZE))
    return torch.randn(shape, device=run.device), torch.randint(run.config.MODEL.NUM_CLASSES, (size,))


def run_throughput(run: Run, model: FocalTransformer) -> None:
    """Measure inference speed."""
    images, _ = synthetic_batch(run, run.config.DATA.BATCH_SIZE)
    with torch.no_grad():
        backends = model.attention_backends(run.precision.dtype)
    result = measure_throughput(model, images, run.precision, backends)
    logger.info(
        "{images_per_second:.1f} img/s, {milliseconds:.2f} ms per batch of {batch_size} at "
        "{image_size[0]}x{image_size[1]}; "
        "{memory_mb:.0f} MB, {precision}, {device}, torch {torch}".format(**result)
    )
    if utils.is_main_process():
        (run.output / "throughput.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run_debug(run: Run, model: FocalTransformer) -> None:
    """Two training steps and an evaluation on a few synthetic images."""
    parameters, macs = count_params_and_macs(run.config)
    logger.info(f"{parameters:,} parameters, {macs / 1e9:.2f} G multiply-adds per image")
    batches = [synthetic_batch(run, min(8, run.config.DATA.BATCH_SIZE)) for _ in range(2)]
    state = build_train_state(run.config, model, run.precision, run.device, len(batches), soft_targets=False)
    train_one_epoch(run, state, batches)
    evaluate(run, model, batches)


def exit_process(status: int) -> int:
    """The exit status; a process with a process group, or whose output is a file on a full disk, ends here.

    Closing the group may wait for processes that have ended, and hangs now and then in PyTorch 2.6; and an
    interpreter that exits with the group open can abort in one of its threads. What cannot be written would
    make Python exit with 120.
    """
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None where the descriptor is closed
            stream.flush()
        if not utils.in_group():
            return status
    except OSError:
        pass
    for worker in multiprocessing.active_children():  # loader workers would notice seconds later
        worker.terminate()
    os._exit(status)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; 2 after a mistake of the user, whose message is printed; EXIT_STOPPED if training
        was stopped by a signal; with several processes 130 after Ctrl-C, or 1 after any other error in one of
        them. Their process group stays open, see `exit_process`.
    """
    utils.escape_output()
    try:
        start(read_config(argv))
    except StopRequested:
        return EXIT_STOPPED
    except (UserError, UndecodableImageError, OSError) as error:
        logger.debug("stopped", exc_info=True)  # the traceback is in the log file
        if os.environ.get("FOCAL_TRACEBACK"):
            raise
        # In a group and under torchrun all processes have the same UserError; else one may be alone.
        is_common = isinstance(error, UserError) and (utils.in_group() or "LOCAL_WORLD_SIZE" in os.environ)
        utils.print_mistake(error, is_common)
        return 2
    except KeyboardInterrupt:
        logger.debug("stopped", exc_info=True)
        print_error("interrupted; the same command starts again, training from its last checkpoint")
        if not utils.in_group():
            raise  # Python ends by the signal, which ends a shell's loop, too
        return 130
    except Exception as error:
        logger.debug("stopped", exc_info=True)
        is_known = isinstance(error, dist.DistError)  # gloo reports a process that died by a RuntimeError
        if not (utils.in_group() or is_known):
            raise
        print_error(f"error: {error}" if is_known else traceback.format_exc())
        if utils.in_group():
            print_error(
                f"error: process {utils.get_rank()} ends; if another process has died or did not answer for "
                "DIST_TIMEOUT_MINUTES, see the log_rank*.txt that ends first; the same command starts again, "
                "training from its last checkpoint"
            )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(exit_process(main()))
