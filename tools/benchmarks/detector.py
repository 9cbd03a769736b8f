"""Times training steps of Mask R-CNN on Focal-T against mmdet's on Swin-T, or, with --multi-scale, at image
sizes that change every step against one size.

    python -m tools.benchmarks.detector
    python -m tools.benchmarks.detector --device cpu --size 320 512 --rounds 3
    python -m tools.benchmarks.detector --device cpu --size 320 512 --rounds 3 --multi-scale

Both detectors are on the device together and are timed in alternating rounds. A step is forward, losses,
backward and AdamW with the config's own weight decay; on CUDA under autocast to fp16 with loss scaling, as
mmdet's mixed precision. Images are noise with random objects, normalized and padded, on the device; weights
are random. With --multi-scale a round is four steps, whose sizes have the mean area of the one size, and no
size comes twice.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from itertools import cycle, product
from typing import TYPE_CHECKING, Any

import torch

from openmmlab.runner import import_mmengine
from utils import Precision, UserError, user_input

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
STEPS = 4  # of a round with --multi-scale, see `changing_sizes`
REGIONS = 16  # of an image with --multi-scale: the heads' time depends on how many of them hold objects
STRIDE = 32  # batches are padded to multiples
COLUMNS = ("backbone", "params M", "attention", "img/s", "vs {}", "peak MiB")


class Contender:
    """A detector with fresh weights, in training.

    Args:
        base: its config.
        batches: of the steps, in turn, as `make_batch` makes them.
        precision: of the forward pass.
        device: where it trains.
        regions: that its second stage trains on, of an image; None for the config's number.
    """

    def __init__(
        self,
        base: str,
        batches: Sequence[dict[str, list[Any]]],
        precision: Precision,
        device: torch.device,
        regions: int | None = None,
    ) -> None:
        from mmdet.registry import MODELS
        from mmengine.optim import build_optim_wrapper
        from mmengine.registry import DefaultScope

        config, self.device = read_base(base), device
        if regions is not None:
            config.model.train_cfg.rcnn.sampler.num = regions
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope("mmdet"):
            self.model = MODELS.build(config.model)
            self.model.init_weights()
            self.model.to(device).train()
            options = {**config.optim_wrapper, "type": "OptimWrapper"}
            self.optimizer = build_optim_wrapper(self.model, options).optimizer
        self.batches = [self.model.data_preprocessor(batch, training=True) for batch in batches]
        turn = cycle(self.batches)

        def loss() -> torch.Tensor:
            return self.model.parse_losses(self.model(**next(turn), mode="loss"))[0]

        self.step = common.training_step(loss, self.optimizer, precision, device)

    def timer(self, steps: int) -> common.Timer:
        """Of so many steps, after a warm-up."""
        kind = self.device.type
        images = [batch["inputs"] for batch in self.batches]
        held = sum(tensor.nbytes for tensor in [*self.model.parameters(), *self.model.buffers(), *images])

        def run() -> None:
            for _ in range(steps):
                self.step()

        seconds = ROUND_SECONDS[kind] if steps == 1 else 0.0
        return common.Timer(run, self.device, seconds, WARM_UP_STEPS[kind], held)


def read_base(base: str) -> "Config":
    """A config, by path or as mmengine names those of mmdet, without pretrained weights."""
    config = import_mmengine().config.Config.fromstring(f"_base_ = {base!r}", ".py")
    config.model.backbone.init_cfg = None
    return config


def silence_mmengine() -> None:
    """mmengine would log every weight that it initializes."""
    from mmengine.logging import MMLogger

    if not MMLogger.check_instance_created("detector"):
        MMLogger.get_instance("detector", log_level="ERROR")


def make_batch(images: int, size: tuple[int, int]) -> dict[str, list[Any]]:
    """So many images of noise (3, H, W) and samples with random objects, as a data loader returns them."""
    import_mmengine()
    from mmdet.testing import demo_mm_inputs

    return demo_mm_inputs(images, (3, *size), [OBJECTS] * images, num_classes=CLASSES, with_mask=True)


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
            f"--multi-scale: expected a --size with {rounds} changes of height and width by multiples of "
            f"{STRIDE} pixels, got {height} x {width} with {len(changes)}; take another or fewer --rounds"
        )
    drawn = random.Random(0).sample(changes, rounds)
    return [(height + h * dh, width + w * dw) for dh, dw in drawn for h, w in product((-1, 1), repeat=2)]


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
    with user_input():
        import mmdet

    silence_mmengine()
    args.precision = args.precision or PRECISION[args.device.type]
    facts = common.describe_run(args.device)
    facts["Versions"] += f", mmdet {mmdet.__version__}, mmengine {mmengine.__version__}"
    precision, size = Precision(DTYPES[args.precision]), tuple(args.size)
    facts["Detector"] = f"Mask R-CNN, {size[0]} x {size[1]}, batch {args.batch_size}, {args.precision}"
    one_size = [make_batch(args.batch_size, size)]
    cases = {name: (base, one_size) for name, base in DETECTORS.items()}
    baseline, steps, regions = BASELINE, 1, None
    if args.multi_scale:
        sizes = changing_sizes(size, WARM_UP_STEPS[args.device.type] + 1 + args.rounds)
        batches = [make_batch(args.batch_size, each) for each in sizes]
        focal = DETECTORS["Focal-T"]
        cases = {CHANGING: (focal, batches), ONE_SIZE: (focal, one_size)}
        baseline, steps, regions = ONE_SIZE, STEPS, REGIONS
        facts["Detector"] += f", {REGIONS} regions of an image"
    contenders = {name: Contender(*case, precision, args.device, regions) for name, case in cases.items()}
    timers = {name: contender.timer(steps) for name, contender in contenders.items()}
    times, rows = common.alternate(timers, args.rounds), []
    for name, contender in contenders.items():
        if not (loss := contender.step()).isfinite():
            raise UserError(f"{name}: expected a finite loss, got {loss}; take --precision fp32 or bf16")
        rate = common.Spread.of([steps * args.batch_size / value for value in times[name]])
        ratio = common.speed_ratio(times[name], times[baseline])
        attention = attention_backends(contender.model.backbone, precision.dtype)
        params = sum(parameter.numel() for parameter in contender.model.parameters())
        rows.append([name, params / 1e6, attention, rate, ratio, timers[name].peak_mib])
    note = (
        f"Training steps, {steps} a round; medians and quartiles of {args.rounds} alternating rounds, ratios "
        "within a round. Peak memory, on CUDA only, is without the other detector."
    )
    columns = [column.format(baseline) for column in COLUMNS]
    common.publish(args, "Training a detector", facts, [note], columns, rows)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for an error that the user can correct."""
    return common.run_command(parse(argv), measure)


if __name__ == "__main__":
    sys.exit(main())
