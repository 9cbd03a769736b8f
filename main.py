"""Train, evaluate or time a Focal Transformer for image classification.

One command for one CPU, one GPU, or many under torchrun:

    python main.py --cfg configs/focal_tiny_patch4_window7_224.yaml --data-path DIR
    torchrun --nproc_per_node 8 main.py --cfg FILE --data-path DIR
    python main.py --cfg FILE --data-path DIR --eval --resume CHECKPOINT
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

import torch
from yacs.config import CfgNode

import train_state
import utils
from config import load_config
from data import build_loaders
from engine import Run, evaluate, prepare, train_one_epoch
from logger import Metrics, create_logger
from models import FocalTransformer, build_model, count_params_and_macs, load_checkpoint
from throughput import measure_throughput

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
    for key, _ in (*FLAGS.values(), *SWITCHES.values()):
        opts += [] if args[key] is None else [key, args[key]]
    opts += ["OUTPUT", os.environ["PT_OUTPUT_DIR"]] if os.environ.get("PT_OUTPUT_DIR") else []
    return load_config(args["cfg"], opts)


def start(config: CfgNode) -> None:
    """Set up the process, build the model, and do what the config asks for."""
    device = utils.pick_device(config.DEVICE)
    utils.init_distributed(device)
    output = Path(config.OUTPUT or "output") / config.MODEL.NAME / config.TAG
    output.mkdir(parents=True, exist_ok=True)
    create_logger(output, utils.get_rank())
    modes = {"EVAL_MODE": run_evaluation, "THROUGHPUT_MODE": run_throughput, "DEBUG_MODE": run_debug}
    action = next((action for mode, action in modes.items() if config[mode]), run_training)
    metrics = Metrics(output if action is run_training and utils.is_main_process() else None)
    precision = utils.choose_precision(config.AMP_OPT_LEVEL, config.AMP_DTYPE, device)
    logger.info(f"configuration:\n{config.dump()}")
    logger.info(f"{utils.get_world_size()} process(es) on {device}, {precision.name}, output in {output}")
    utils.seed_everything(config.SEED)
    model = build_model(config).to(device)
    logger.info(f"{config.MODEL.NAME}: {config.MODEL.NUM_CLASSES} classes, {model.attention_backends()}")
    if config.COMPILE:
        model.compile(dynamic=False)
    action(Run(config, device, precision, output, metrics), model)
    metrics.close()


def run_training(run: Run, model: FocalTransformer) -> None:
    """All epochs: train, evaluate, save."""
    config = run.config
    loaders = build_loaders(config)
    training = prepare(run, model, loaders.steps_per_epoch, soft_targets=loaders.mixup_fn is not None)
    state = training.state
    if not train_state.resume(state, run.output) and config.MODEL.PRETRAINED:
        load_checkpoint(model, config.MODEL.PRETRAINED, reset_head=config.MODEL.RESET_HEAD)
    if utils.is_main_process():
        (run.output / "config.yaml").write_text(config.dump(), encoding="utf-8")
    for epoch in range(state.position.epoch, config.TRAIN.EPOCHS):
        began = time.perf_counter()
        loaders.set_epoch(epoch)
        loss = train_one_epoch(run, training, loaders.train_loader, loaders.mixup_fn)
        result = evaluate(run, model, loaders.val_loader)
        is_best = result["acc1"] > state.max_accuracy
        state.max_accuracy = max(result["acc1"], state.max_accuracy)
        state.position = train_state.Position(epoch + 1, 0, (epoch + 1) * training.updates_per_epoch)
        train_state.save_epoch(state, run.output, is_best)
        undecodable = loaders.train_dataset.undecodable
        if undecodable:
            logger.warning(f"{undecodable} training images of this process did not decode, and were replaced")
        minutes = (time.perf_counter() - began) / 60
        left = minutes * (config.TRAIN.EPOCHS - epoch - 1)
        logger.info(f"epoch {epoch + 1}: best {state.max_accuracy:.2f}%, {minutes:.1f} min, {left:.0f} to go")
        values = {"loss": loss, "acc1": result["acc1"], "acc5": result["acc5"], "val_loss": result["loss"]}
        values |= {"max_accuracy": state.max_accuracy, "minutes": minutes, "undecodable": undecodable}
        run.metrics.write("epoch", epoch, epoch=epoch, **values)
    utils.barrier()  # the last checkpoint is on disk before any process returns


def run_evaluation(run: Run, model: FocalTransformer) -> None:
    """Load weights and evaluate them."""
    load_checkpoint(model, run.config.MODEL.RESUME or run.config.MODEL.PRETRAINED)
    evaluate(run, model, build_loaders(run.config).val_loader)


def synthetic_batch(run: Run, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images of the configured shape, and labels."""
    side = run.config.DATA.IMG_SIZE
    shape = (size, run.config.MODEL.FOCAL.IN_CHANS, *([side, side] if isinstance(side, int) else side))
    return torch.randn(shape, device=run.device), torch.randint(run.config.MODEL.NUM_CLASSES, (size,))


def run_throughput(run: Run, model: FocalTransformer) -> None:
    """Measure inference speed."""
    images, _ = synthetic_batch(run, run.config.DATA.BATCH_SIZE)
    result = measure_throughput(model, images, run.precision, model.attention_backends())
    logger.info(str(result))
    result.save(run.output / "throughput.json")


def run_debug(run: Run, model: FocalTransformer) -> None:
    """Two training steps and an evaluation on a few synthetic images."""
    parameters, macs = count_params_and_macs(run.config)
    logger.info(f"{parameters:,} parameters, {macs / 1e9:.2f} G multiply-adds per image")
    batches = [synthetic_batch(run, min(8, run.config.DATA.BATCH_SIZE)) for _ in range(2)]
    train_one_epoch(run, prepare(run, model, len(batches), soft_targets=False), batches)
    evaluate(run, model, batches)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 2 for what the user can correct, told in one message."""
    config = None
    try:
        config = read_config(argv)
        start(config)
    except (ValueError, FileNotFoundError) as error:
        logger.debug("stopped", exc_info=True)  # the traceback goes to the log file
        if os.environ.get("FOCAL_TRACEBACK") or (config is not None and config.DEBUG_MODE):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    utils.close_distributed()
    return 0


if __name__ == "__main__":
    sys.exit(main())
