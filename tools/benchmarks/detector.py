"""Times training steps of Mask R-CNN on Focal-T at image sizes that change every step, against one size.

    python -m tools.benchmarks.detector
    python -m tools.benchmarks.detector --device cpu --size 320 512 --rounds 3

Both detectors are on the device together and are timed in alternating rounds. A round is four steps; those
that change have the mean area of the one size, and no size comes twice. A step is mmengine's `train_step`
with the config's optimizer: batches are moved, normalized and padded, then forward, losses, backward and
AdamW; on CUDA in mixed precision (fp16). Images are noise with random objects; weights are random.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from itertools import cycle, product
from typing import Any

import torch

from openmmlab.runner import import_mmengine
from utils import UserError, user_input

from . import common
from .common import DTYPES
from .entries import attention_backends

CONFIG = common.REPO / "detection/configs/mask-rcnn_focal-tiny_fpn_1x_coco.py"
PRECISION = {"cpu": "fp32", "cuda": "fp16"}
WARM_UP_ROUNDS = {"cpu": 1, "cuda": 5}
OBJECTS = 7  # of an image, as in COCO on average
CHANGING, ONE_SIZE = "changing sizes", "one size"
STEPS = 4  # of a round, see `changing_sizes`
REGIONS = 16  # of an image, for the heads: their time depends on how many of them hold objects
STRIDE = 32  # batches are padded to multiples
COLUMNS = ("images", "attention", "img/s", f"vs {ONE_SIZE}")


def new_timer(batches: Sequence[dict[str, list[Any]]], device: torch.device) -> tuple[common.Timer, str]:
    """Of the steps of a round of a detector with fresh weights, after a warm-up; and its attention operators.

    Batches, as `make_batch` makes them, are taken in turn.
    """
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import DefaultScope

    config = Config.fromfile(CONFIG)
    config.model.backbone.init_cfg = None  # no pretrained weights
    config.model.train_cfg.rcnn.sampler.num = REGIONS
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(config.model)
        model.init_weights()
        model.to(device).train()
        kind = "AmpOptimWrapper" if device.type == "cuda" else "OptimWrapper"
        wrapper = build_optim_wrapper(model, {**config.optim_wrapper, "type": kind})
    turn = cycle(batches)

    def run() -> None:
        for _ in range(STEPS):
            model.train_step(next(turn), wrapper)

    timer = common.Timer(run, device, warm_up=WARM_UP_ROUNDS[device.type])
    return timer, attention_backends(model.backbone, DTYPES[PRECISION[device.type]])


def make_batch(images: int, size: tuple[int, int]) -> dict[str, list[Any]]:
    """So many images of noise (3, H, W) and samples with random objects, as a data loader returns them."""
    from mmdet.testing import demo_mm_inputs

    return demo_mm_inputs(images, (3, *size), [OBJECTS] * images, num_classes=80, with_mask=True)


def changing_sizes(size: tuple[int, int], rounds: int) -> list[tuple[int, int]]:
    """Sizes (height, width) for `rounds` rounds of STEPS steps, none twice.

    Sides are 0.7 to 1.3 times those of `size`. In a round they are longer or shorter by the same number of
    pixels, in all four ways, so that its mean area is that of `size` after padding.

    Raises:
        UserError: there are not so many sizes.
    """
    height, width = (-(-side // STRIDE) * STRIDE for side in size)
    changes = list(product(*(range(STRIDE, side * 3 // 10 + 1, STRIDE) for side in (height, width))))
    if len(changes) < rounds:
        raise UserError(
            f"--size: expected one with {rounds} changes of height and width by multiples of {STRIDE} "
            f"pixels, got {height} x {width} with {len(changes)}; take another or fewer --rounds"
        )
    drawn = random.Random(0).sample(changes, rounds)
    return [(height + h * dh, width + w * dw) for dh, dw in drawn for h, w in product((-1, 1), repeat=2)]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.new_parser("Time training steps of Mask R-CNN at sizes that change.", "detector")
    parser.add_argument(
        "--size",
        type=common.positive,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        default=[800, 1333],
        help="(800 1333)",
    )
    parser.add_argument("--batch-size", type=common.positive, default=2, help="images of a step (2)")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> int:
    """Build both detectors, time them in alternating rounds, and publish."""
    mmengine = import_mmengine()
    with user_input():
        import mmdet
    mmengine.logging.MMLogger.get_instance("detector", log_level="ERROR")  # not every weight that it sets
    dtype, size, warm_up = PRECISION[args.device.type], tuple(args.size), WARM_UP_ROUNDS[args.device.type]
    facts = common.describe_run(args.device)
    facts["Versions"] += f", mmdet {mmdet.__version__}, mmengine {mmengine.__version__}"
    facts["Detector"] = (
        f"Mask R-CNN on Focal-T, {size[0]} x {size[1]}, batch {args.batch_size}, {dtype}, {REGIONS} regions "
        "of an image"
    )
    timers, attention = {}, {}
    sizes = {CHANGING: changing_sizes(size, warm_up + 1 + args.rounds), ONE_SIZE: [size]}
    for name in sizes:
        batches = [make_batch(args.batch_size, each) for each in sizes[name]]
        timers[name], attention[name] = new_timer(batches, args.device)
    times, rows = common.alternate(timers, args.rounds), []
    for name, seconds in times.items():
        rate = common.Spread.of([STEPS * args.batch_size / value for value in seconds])
        rows.append([name, attention[name], rate, common.speed_ratio(seconds, times[ONE_SIZE])])
    note = (
        f"Training steps, {STEPS} a round; medians and quartiles of {args.rounds} alternating rounds, ratios "
        "within a round."
    )
    common.publish(args, "Training a detector at sizes that change", facts, [note], COLUMNS, rows)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for an error that the user can correct."""
    return common.run_command(parse(argv), measure)


if __name__ == "__main__":
    sys.exit(main())
