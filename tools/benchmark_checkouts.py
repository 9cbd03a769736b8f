"""Times the models of several checkouts of this repository, and timm's Swin-T, in turns in one process.

    git worktree add ../before 29dc702
    python tools/benchmark_checkouts.py ../before . --device cpu --batch-size 8 --out tools/results

Inference, and training steps (forward, cross entropy, backward, AdamW), float32, eager. Ratios to Swin-T are
medians and quartiles over rounds. With --backends a checkout's operators are timed beside each other.
"""

import argparse
import importlib.util
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import benchmark_common as common
import timm
import torch
from benchmark import MODES, make_step
from benchmark_models import CLASSES, DROP_PATH
from benchmark_report import Setting
from torch import nn

from utils import pick_device

logger = logging.getLogger("benchmark_checkouts")

VARIANTS = {
    "Focal-T": "focal_tiny_patch4_window7_224",
    "Focal-fast-T": "focalv2_tiny_useconv_patch4_window7_224",
}
COLUMNS = ("model", "checkout", "attention", "pass", "resolution", "img/s", "vs Swin-T", "quartiles")


def models_of(checkout: Path, number: int) -> ModuleType:
    """The package `models` of a checkout, under a name of its own."""
    name = f"checkout_{number}_models"
    spec = importlib.util.spec_from_file_location(name, checkout / "models" / "__init__.py")
    if spec is None or spec.loader is None or not (checkout / "models").is_dir():
        raise ValueError(f"{checkout}: expected a checkout of this repository, found no folder models/ in it")
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm: the same names are registered again
        spec.loader.exec_module(package)
    return package


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for what the user can correct."""
    parser = argparse.ArgumentParser(description="Compare the models of checkouts.", allow_abbrev=False)
    parser.add_argument("checkouts", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--backends", nargs="+", default=["auto"], help="attention_backend of the last checkout"
    )
    parser.add_argument("--size", type=int, default=224, help="resolution, pixels")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="")
    parser.add_argument("--name", default="checkouts", help="of the files")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a dated .md and .csv here")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        device = pick_device(args.device)
        packages = [models_of(folder.resolve(), i) for i, folder in enumerate(args.checkouts)]
    except (ValueError, OSError) as error:
        logger.error(f"error: {error}")
        return 2
    facts, rows = common.describe_run(device), []
    images = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=args.size, num_classes=CLASSES, drop_path_rate=DROP_PATH
    )
    made: dict[tuple[str, str, str], nn.Module] = {("Swin-T", "timm", "-"): swin.to(device)}
    for family, variant in VARIANTS.items():
        for folder, package in zip(args.checkouts, packages, strict=True):
            for backend in args.backends if folder == args.checkouts[-1] else ["auto"]:
                options = package.VARIANTS[variant] | {"img_size": args.size, "attention_backend": backend}
                model = package.FocalTransformer(num_classes=CLASSES, **options)
                made[family, str(folder), backend] = model.to(device)
    for mode in MODES:
        setting = Setting("tiny", args.size, mode, "fp32", "eager")
        steps = {name: make_step(model, images, setting) for name, model in made.items()}
        timers = {str(n): lambda run=run: common.seconds_of(run, 1, device) for n, run in steps.items()}
        common.alternate(timers, 1)
        times = common.alternate(timers, args.rounds)
        of = times[str(next(iter(made)))]
        for name in made:
            spread, ratio = common.Spread.of(times[str(name)]), common.speed_ratio(times[str(name)], of)
            rate = args.batch_size / spread.median
            quartiles = f"{ratio.lower:.2f}-{ratio.upper:.2f}"
            rows.append([*name, mode, args.size, rate, ratio.median, quartiles])
    note = f"Batch {args.batch_size}, {args.rounds} rounds in turns; stochastic depth {DROP_PATH} everywhere."
    common.publish(args.out, args.name, "Checkouts compared", facts, [note], COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
