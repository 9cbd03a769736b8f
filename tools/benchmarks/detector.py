"""Times training steps of Mask R-CNN on Focal-T against mmdet's on Swin-T.

    python -m tools.benchmarks.detector
    python -m tools.benchmarks.detector --device cpu --size 320 512 --rounds 3

Both detectors are on the device together and are timed in alternating rounds. A step is forward, losses,
backward and AdamW with the config's own weight decay; on CUDA under autocast to fp16 with loss scaling, as
mmdet's mixed precision. Images are noise with random objects, normalized and padded, on the device; weights
are random.
"""

import argparse
import sys
from collections.abc import Sequence
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
COLUMNS = ("backbone", "params M", "attention", "img/s", f"vs {BASELINE}", "peak MiB")


class Contender:
    """A detector in training.

    Args:
        base: its config.
        batch: images (3, H, W) of bytes and their samples, as a data loader returns them.
        precision: of the forward pass.
        device: where it trains.

    Raises:
        ImportError: OpenMMLab's packages are missing.
    """

    def __init__(
        self, base: str, batch: dict[str, list[Any]], precision: Precision, device: torch.device
    ) -> None:
        self.device, self.precision = device, precision
        self.model, self.optimizer = build(base, device)
        self.batch = self.model.data_preprocessor(batch, training=True)
        self.scaler = precision.scaler(device)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def step(self) -> None:
        """One step of training; waits only where training itself waits for the device."""
        with self.precision.autocast(self.device):
            loss, _ = self.model.parse_losses(self.model(**self.batch, mode="loss"))
        self.loss = loss.detach()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def timer(self) -> common.Timer:
        """Of `step`, after a warm-up."""
        kind = self.device.type
        tensors = [*self.model.parameters(), *self.model.buffers(), self.batch["inputs"]]
        held = sum(tensor.nbytes for tensor in tensors)
        return common.Timer(self.step, self.device, ROUND_SECONDS[kind], WARM_UP_STEPS[kind], held)


def read_base(base: str) -> "Config":
    """A config, by path or as mmengine names those of mmdet, without pretrained weights."""
    config = import_mmengine().config.Config.fromstring(f"_base_ = {base!r}", ".py")
    config.model.backbone.init_cfg = None
    return config


def build(base: str, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A config's detector in training mode with fresh weights, and its optimizer."""
    config = read_base(base)
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


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.new_parser("Time training steps of Mask R-CNN on Focal-T against Swin-T.", "detector")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), default=[800, 1333], help="(800 1333)"
    )
    parser.add_argument("--batch-size", type=common.positive, default=2, help="images of a step (2)")
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
    contenders = {
        name: Contender(base, make_batch(args.batch_size, tuple(args.size)), precision, args.device)
        for name, base in DETECTORS.items()
    }
    timers = {name: contender.timer() for name, contender in contenders.items()}
    times, rows = common.alternate(timers, args.rounds), []
    for name, contender in contenders.items():
        if not contender.loss.isfinite():
            raise ValueError(
                f"{name}: expected a finite loss, got {contender.loss.item()}; take --precision fp32 or bf16"
            )
        rate = args.batch_size / common.Spread.of(times[name]).median
        ratio = common.speed_ratio(times[name], times[BASELINE])
        attention = attention_backends(contender.model.backbone, precision.dtype)
        rows.append([name, contender.parameters / 1e6, attention, rate, ratio, timers[name].peak_mib])
    note = (
        f"Training steps; medians of {args.rounds} alternating rounds. A ratio is the median of the ratios "
        "within a round, with quartiles. Peak memory, on CUDA only, is without the other detector."
    )
    common.publish(args, "Training a detector", facts, [note], COLUMNS, rows)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for an error that the user can correct."""
    return common.run_command(parse(argv), measure)


if __name__ == "__main__":
    sys.exit(main())
