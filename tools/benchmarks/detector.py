"""Times training steps of Mask R-CNN on Focal-T against mmdet's on Swin-T, or, with --multi-scale, at image
sizes that change every step against one size.

    python -m tools.benchmarks.detector
    python -m tools.benchmarks.detector --device cpu --size 320 512 --rounds 3
    python -m tools.benchmarks.detector --device cpu --size 320 512 --rounds 3 --multi-scale

Both detectors are on the device together and are timed in alternating rounds. A step is forward, losses,
backward and AdamW with the config's own weight decay; on CUDA under autocast to fp16 with loss scaling, as
mmdet's mixed precision. Images are noise with random objects, normalized and padded, on the device; weights
are random. With --multi-scale a round is a few steps, whose sizes have the mean area of the one size, and no
size comes twice.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from itertools import cycle, product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from openmmlab.runner import import_mmengine
from utils import Precision

from . import common
from .common import DTYPES
from .entries import attention_backends

if TYPE_CHECKING:
    from mmengine.config import Config

BASELINE = "Swin-T"
DETECTORS = {
    "Focal-T": str(common.REPO / "detection/configs/mask-rcnn_focal-tiny_fpn_1x_coco.py"),
    BASELINE: "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py",
}
PRECISION = {"cpu": "fp32", "cuda": "fp16"}
ROUND_SECONDS = {"cpu": 0.0, "cuda": 2.0}
WARM_UP_STEPS = {"cpu": 1, "cuda": 5}
CLASSES = 80
OBJECTS = 7  # of an image, as in COCO on average
CHANGING, ONE_SIZE = "Focal-T, changing sizes", "Focal-T, one size"
STEPS = 4  # of a round with --multi-scale
REGIONS = 16  # of an image with --multi-scale: the heads' time depends on how many of them hold objects
STRIDE = 32  # batches are padded to multiples
COLUMNS = ("backbone", "params M", "attention", "img/s", "vs {}", "lower", "upper", "peak MiB")


class Contender:
    """A detector in training.

    Args:
        base: its config.
        batches: of the steps, in turn: images (3, H, W) of bytes and their samples, as a data loader returns
            them.
        steps: of one call of the timer.
        regions: that its second stage trains on, of an image; None for the config's number.
        precision: of the forward pass.
        device: where it trains.

    Raises:
        ImportError: OpenMMLab's packages are missing.
    """

    def __init__(
        self,
        base: str,
        batches: Sequence[dict[str, list[Any]]],
        precision: Precision,
        device: torch.device,
        steps: int = 1,
        regions: int | None = None,
    ) -> None:
        self.device, self.precision, self.steps = device, precision, steps
        self.model, self.optimizer = build(base, device, regions)
        self.batches = [self.model.data_preprocessor(batch, training=True) for batch in batches]
        self.turn = cycle(self.batches)
        self.scaler = precision.scaler(device)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def step(self) -> None:
        """One step of training; waits only where training itself waits for the device."""
        with self.precision.autocast(self.device):
            loss, _ = self.model.parse_losses(self.model(**next(self.turn), mode="loss"))
        self.loss = loss.detach()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def run(self) -> None:
        """The steps of one call of the timer."""
        for _ in range(self.steps):
            self.step()

    def timer(self) -> common.Timer:
        """Of `run`, after a warm-up."""
        kind = self.device.type
        images = [batch["inputs"] for batch in self.batches]
        held = sum(tensor.nbytes for tensor in [*self.model.parameters(), *self.model.buffers(), *images])
        seconds = ROUND_SECONDS[kind] if self.steps == 1 else 0.0
        return common.Timer(self.run, self.device, seconds, WARM_UP_STEPS[kind], held)


def read_base(base: str) -> "Config":
    """A config, by path or as mmengine names those of mmdet, without pretrained weights."""
    config = import_mmengine().config.Config.fromstring(f"_base_ = {base!r}", ".py")
    config.model.backbone.init_cfg = None
    return config


def build(
    base: str, device: torch.device, regions: int | None = None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A config's detector in training mode with fresh weights, and its optimizer; see Contender."""
    config = read_base(base)
    if regions is not None:
        config.model.train_cfg.rcnn.sampler.num = regions
    from mmdet.registry import MODELS
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import DefaultScope

    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(config.model)
        model.init_weights()
        model.to(device).train()
        wrapper = build_optim_wrapper(model, {**config.optim_wrapper, "type": "OptimWrapper"})
    return model, wrapper.optimizer


def silence_mmengine() -> None:
    """mmengine would log every weight that it initializes."""
    from mmengine.logging import MMLogger

    if not MMLogger.check_instance_created("detector"):
        MMLogger.get_instance("detector", log_level="ERROR")


def make_batch(images: int, size: tuple[int, int]) -> dict[str, list[Any]]:
    """Images of noise (3, H, W) and samples with random objects, as a data loader returns them.

    Args:
        images: how many.
        size: height and width in pixels.
    """
    import_mmengine()
    from mmdet.testing import demo_mm_inputs

    return demo_mm_inputs(images, (3, *size), [OBJECTS] * images, num_classes=CLASSES, with_mask=True)


def changing_sizes(size: tuple[int, int], rounds: int) -> list[tuple[int, int]]:
    """Sizes (height, width) for `rounds` rounds of STEPS steps, none twice.

    Sides are 0.7 to 1.3 times those of `size`; the mean area of a round is within 2 % of that of `size`.

    Raises:
        ValueError: there are not so many sizes.
    """
    sides = [range(side * 7 // 10 // STRIDE * STRIDE, side * 13 // 10 + 1, STRIDE) for side in size]
    left, drawn = [each for each in product(*sides) if min(each) > 0], []
    area, draw = padded(size[0]) * padded(size[1]), random.Random(0)
    for _ in range(10_000):
        if len(drawn) == rounds * STEPS:
            break
        some = draw.sample(left, min(STEPS, len(left)))
        if abs(sum(h * w for h, w in some) / (STEPS * area) - 1) < 0.02:
            drawn += some
            left = [each for each in left if each not in some]
    else:
        raise ValueError(
            f"--multi-scale: expected {rounds * STEPS} sizes around {size[0]} x {size[1]}, got {len(drawn)}; "
            "take fewer --rounds or a larger --size"
        )
    return drawn


def padded(side: int) -> int:
    """A side in pixels after padding."""
    return -(-side // STRIDE) * STRIDE


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.new_parser("Time training steps of Mask R-CNN on Focal-T against Swin-T.", "detector")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), default=[800, 1333], help="(800 1333)"
    )
    parser.add_argument("--batch-size", type=common.positive, default=2, help="images of a step (2)")
    parser.add_argument(
        "--multi-scale", action="store_true", help="Focal-T alone, at sizes that change against one size"
    )
    parser.add_argument("--precision", choices=DTYPES, help=f"(default: {PRECISION})")
    args = parser.parse_args(argv)
    if min(args.size) < 32:
        parser.error(f"--size: expected sides of 32 pixels or more, got {args.size[0]} {args.size[1]}")
    return args


def measure(args: argparse.Namespace) -> int:
    """Build both detectors, time them in alternating rounds, and publish."""
    mmengine = import_mmengine()
    import mmdet

    silence_mmengine()
    args.precision = args.precision or PRECISION[args.device.type]
    facts = common.describe_run(args.device)
    facts["Versions"] += f", mmdet {mmdet.__version__}, mmengine {mmengine.__version__}"
    shown = " x ".join(map(str, args.size))
    facts["Detector"] = f"Mask R-CNN, {shown}, batch {args.batch_size}, {args.precision}"
    precision = Precision(DTYPES[args.precision])
    size, kind = tuple(args.size), args.device.type
    batches = {name: [make_batch(args.batch_size, size)] for name in DETECTORS}
    bases, baseline, steps, regions = DETECTORS, BASELINE, 1, None
    if args.multi_scale:
        sizes = changing_sizes(size, WARM_UP_STEPS[kind] + 1 + args.rounds)
        batches = {
            CHANGING: [make_batch(args.batch_size, each) for each in sizes],
            ONE_SIZE: batches["Focal-T"],
        }
        bases = dict.fromkeys(batches, DETECTORS["Focal-T"])
        baseline, steps, regions = ONE_SIZE, STEPS, REGIONS
        facts["Detector"] += f", {REGIONS} regions of an image"
    contenders = {
        name: Contender(base, batches[name], precision, args.device, steps, regions)
        for name, base in bases.items()
    }
    timers = {name: contender.timer() for name, contender in contenders.items()}
    times, rows = common.alternate(timers, args.rounds), []
    for name, contender in contenders.items():
        if not contender.loss.isfinite():
            raise ValueError(
                f"{name}: expected a finite loss, got {contender.loss.item()}; take --precision fp32 or bf16"
            )
        rate = steps * args.batch_size / common.Spread.of(times[name]).median
        ratio = common.speed_ratio(times[name], times[baseline])
        attention = attention_backends(contender.model.backbone, precision.dtype)
        row = [name, contender.parameters / 1e6, attention, rate, ratio.median, ratio.lower, ratio.upper]
        rows.append([*row, timers[name].peak_mib])
    note = (
        f"Training steps, {steps} a round; medians of {args.rounds} alternating rounds. A ratio is the "
        "median of the ratios within a round, with quartiles. Peak memory, on CUDA only, is without the "
        "other detector."
    )
    columns = [column.format(baseline) for column in COLUMNS]
    common.publish(args, "Training a detector", facts, [note], columns, rows)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for an error that the user can correct."""
    return common.run_command(parse(argv), measure)


if __name__ == "__main__":
    sys.exit(main())
