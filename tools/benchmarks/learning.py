"""Trains Focal, Focal-fast and Swin on Fashion-MNIST, and draws what they learn.

    python -m tools.benchmarks.learning --processes 2

The paper claims that focal attention learns better than the windows of Swin. ImageNet takes days of many GPUs
to show it; this set of 60,000 training and 10,000 test images (Xiao et al., 2017) takes hours of a CPU. The
three models have the same width, depth, windows, recipe (learning.yaml) and seeds, and nearly the same
parameters; they go through the training of main.py. Swin is timm's.

The images come from Debian's package dataset-fashion-mnist, or torchvision downloads them. A run that was
interrupted continues with the same command. Writes <date>_<name>.md, .csv and .png.
"""

import argparse
import gzip
import io
import logging
import multiprocessing
import statistics
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import FashionMNIST
from yacs.config import CfgNode

from config import load_config
from models import build_model
from tools.figures.drawing import blank_figure
from tools.plot_run import read_metrics
from training.loop import Run
from training.run import check_run_options, train
from training.run_dir import open_run_dir
from utils import choose_precision, path_argument, seed_everything, user_input

from . import common

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("benchmarks.learning")

RECIPE = Path(__file__).with_name("learning.yaml")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
MODELS = {"Focal": "focal", "Focal-fast": "focalv2", "Swin": "swin"}


# --- Data ---------------------------------------------------------------------------------------------------


def write_images(output: Path) -> None:
    """Write both splits as main.py reads them with --zip: data/<split>.zip of PNG files, and <split>_map.txt.

    torchvision reads the set's files from FashionMNIST/raw, and downloads them if they are not there.
    """
    raw, folder = output / "FashionMNIST" / "raw", output / "data"
    if not raw.is_dir():
        raw.mkdir(parents=True)
        for file in DEBIAN.glob("*.gz"):
            (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        lines = []
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
            for number, (image, label) in enumerate(FashionMNIST(output, split == "train", download=True)):
                png = io.BytesIO()
                image.save(png, "png")
                archive.writestr(f"{number:05}.png", png.getvalue())
                lines.append(f"{number:05}.png\t{label}\n")
        (folder / f"{split}_map.txt").write_text("".join(lines), encoding="utf-8")


# --- Training -----------------------------------------------------------------------------------------------


def configure(args: argparse.Namespace, model: str, seed: int) -> CfgNode:
    """The recipe for one run."""
    opts = ["DATA.DATA_PATH", f"{args.output}/data", "OUTPUT", args.output, "SEED", seed]
    opts += ["MODEL.NAME", MODELS[model], "TAG", f"seed{seed}", *args.opts]
    opts += ["MODEL.TYPE", "focal" if model == "Swin" else MODELS[model]]
    with user_input():
        config = load_config(RECIPE, opts)
    check_run_options(config)
    return config


def build(config: CfgNode) -> nn.Module:
    """The model of a config; timm's Swin of the same shape where it is named so."""
    if config.MODEL.NAME != "swin":
        return build_model(config)
    shape = config.MODEL.FOCAL
    return SwinTransformer(
        img_size=config.DATA.IMG_SIZE,
        patch_size=shape.PATCH_SIZE,
        in_chans=shape.IN_CHANS,
        num_classes=config.MODEL.NUM_CLASSES,
        embed_dim=shape.EMBED_DIM,
        depths=tuple(shape.DEPTHS),
        num_heads=tuple(shape.NUM_HEADS),
        window_size=shape.WINDOW_SIZE,
        drop_path_rate=config.MODEL.DROP_PATH_RATE,
    )


def train_one(config: CfgNode, device: torch.device, threads: int) -> None:
    """Train to the last epoch, in a process of its own; a run that is complete ends at once."""
    torch.set_num_threads(threads)
    output = Path(config.OUTPUT, config.MODEL.NAME, config.TAG)
    with open_run_dir(output, True, config.DIST_TIMEOUT_MINUTES) as metrics:
        precision = choose_precision(config.AMP_OPT_LEVEL, config.AMP_DTYPE, device)
        seed_everything(config.SEED)
        with user_input():
            model = build(config).to(device)
        train(Run(config, device, precision, output, metrics), model)


# --- Results ------------------------------------------------------------------------------------------------


def accuracies(config: CfgNode) -> list[float]:
    """Top-1 accuracy (percent) after each epoch of a finished run."""
    epochs = read_metrics(Path(config.OUTPUT, config.MODEL.NAME, config.TAG)).epochs
    return [record["acc1"] for record in epochs]


def publish(
    args: argparse.Namespace,
    facts: dict[str, str],
    configs: dict[tuple[str, int], CfgNode],
    curves: dict[str, list[list[float]]],
) -> None:
    """Write the table of models, all accuracies, and the picture."""
    rows: list[list[common.Cell]] = []
    lines: list[list[common.Cell]] = []
    for model, runs in curves.items():
        last = [run[-1] for run in runs]
        ahead = [ours - swin[-1] for ours, swin in zip(last, curves["Swin"], strict=True)]
        spread = f"{statistics.mean(last):.2f} ({min(last):.2f}-{max(last):.2f})"
        difference = f"{statistics.mean(ahead):+.2f} ({min(ahead):+.2f} to {max(ahead):+.2f})"
        lines.append([model, *size_of(configs[model, 0]), spread, difference if model != "Swin" else None])
        rows += [
            [model, seed, epoch, accuracy]
            for seed, run in enumerate(runs)
            for epoch, accuracy in enumerate(run, start=1)
        ]
    title = "What focal attention and Swin's windows learn on Fashion-MNIST"
    epochs = configs["Focal", 0].TRAIN.EPOCHS
    note = (
        f"Top-1 accuracy on the 10,000 test images after {epochs} epochs, which is all that the test images "
        f"are used for: mean over {args.rounds} seeds (worst to best). The .csv file has all epochs."
    )
    columns = ["Model", "params M", "MMACs", "accuracy %", "ahead of Swin, by seed"]
    table = common.markdown_table(columns, lines)
    names = ["model", "seed", "epoch", "accuracy %"]
    common.publish(args, title, facts, [note], names, rows, [table], draw(curves))


def size_of(config: CfgNode) -> tuple[float, float]:
    """Millions of parameters, and of multiply-adds of an image."""
    config = config.clone()
    config.defrost()
    config.MODEL.ATTENTION_BACKEND = "plain"  # the others count what they compute
    model = build(config).eval()
    side, channels = config.DATA.IMG_SIZE, config.MODEL.FOCAL.IN_CHANS
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, channels, side, side))
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e6


def draw(curves: dict[str, list[list[float]]]) -> "Figure":
    """Accuracy against epochs: the mean over the seeds, and a band from the worst to the best."""
    figure = blank_figure(figsize=(6, 4))
    axes = figure.subplots()
    for model, runs in curves.items():
        values = np.array(runs)
        epochs = np.arange(1, values.shape[1] + 1)
        (line,) = axes.plot(epochs, values.mean(axis=0), ".-", label=model)
        axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), alpha=0.2, color=line.get_color())
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy on the test images (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


# --- Command line -------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    text = (
        "Train Focal, Focal-fast and Swin on Fashion-MNIST; a round trains each one, from a seed of its own."
    )
    parser = common.new_parser(text, "learning")
    parser.add_argument("--output", type=path_argument, default="output/learning", help="folder of the runs")
    parser.add_argument("--processes", type=common.positive, default=1, help="runs at a time (default: 1)")
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="any option of config.py"
    )
    parser.set_defaults(rounds=3, threads=1)
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> int:
    """Train all models from all seeds, then write the results."""
    blank_figure()  # says that matplotlib is missing before, not after training
    facts = common.describe_run(args.device)
    if not Path(args.output, "data", "val_map.txt").is_file():
        write_images(Path(args.output))
    configs = {(model, seed): configure(args, model, seed) for seed in range(args.rounds) for model in MODELS}
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        runs = [pool.submit(train_one, config, args.device, args.threads) for config in configs.values()]
        try:
            for run in as_completed(runs):
                run.result()
        finally:
            pool.shutdown(cancel_futures=True)
    curves = {model: [accuracies(configs[model, seed]) for seed in range(args.rounds)] for model in MODELS}
    publish(args, facts, configs, curves)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for an error that the user can correct."""
    return common.run_command(parse(argv), measure)


if __name__ == "__main__":
    sys.exit(main())
