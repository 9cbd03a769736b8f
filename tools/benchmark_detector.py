"""Times training steps of Mask R-CNN on Focal-T against mmdet's on Swin-T.

    python tools/benchmark_detector.py
    python tools/benchmark_detector.py --device cpu --size 320 512 --repeats 3

Both detectors lie on the device together and are timed in turns, so that the ratio is the median of ratios
taken side by side. A step is forward, losses, backward and AdamW with the config's own weight decay; on CUDA
it is autocast in fp16 with loss scaling, as mmdet's mixed precision is. Images are noise with made-up
objects, normalized and padded, and lie on the device; weights are fresh, since speed needs no others. Prints
a Markdown report; with --out it is written to <date>_<name>.md and .csv there.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import benchmark_common as common
import numpy as np
import torch
from benchmark_common import DTYPES
from benchmark_models import attention_backends
from torch import nn

from openmmlab.runner import import_mmengine
from utils import Precision, pick_device

if TYPE_CHECKING:
    from mmdet.structures import DetDataSample
    from mmengine.config import Config

logger = logging.getLogger("benchmark_detector")

BASELINE = "Swin-T"
DETECTORS = {
    "Focal-T": str(common.REPO / "detection/configs/mask-rcnn_focal-tiny_fpn_1x_coco.py"),
    BASELINE: "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py",
}
PRECISION = {"cpu": "fp32", "cuda": "fp16"}
ROUNDS = {"cpu": 5, "cuda": 20}
ROUND_SECONDS = {"cpu": 0.0, "cuda": 2.0}  # aimed at; a turn is at least one step
WARM_UP_STEPS = {"cpu": 1, "cuda": 5}
CLASSES = 80
OBJECTS = 7  # of an image, as in COCO on average
PIXEL_VALUES = 256
COLUMNS = ("backbone", "params M", "attention", "img/s", f"vs {BASELINE}", "lower", "upper", "peak MB")


class Contender:
    """A detector in training.

    Args:
        base: its config.
        batch: images (3, H, W) of bytes and what is on them, as a data loader hands them over.
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
        self.data = self.model.data_preprocessor(batch, training=True)
        self.scaler = precision.scaler(device)
        self.images = len(batch["inputs"])
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.attention = attention_backends(self.model.backbone, precision.dtype)
        self.steps = 1  # of a turn
        self.memory_mb: float | None = None

    def step(self) -> None:
        """One step of training; waits for nothing that training does not wait for."""
        with self.precision.autocast(self.device):
            loss, _ = self.model.parse_losses(self.model(**self.data, mode="loss"))
        self.loss = loss.detach()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def warm_up(self) -> None:
        """Leaves the number of steps of a turn, and the peak memory without what others hold."""
        kind = self.device.type
        tensors = [*self.model.parameters(), *self.model.buffers(), self.data["inputs"]]
        held = sum(tensor.nbytes for tensor in tensors)
        self.steps, self.memory_mb = common.warm_up(
            self.step, WARM_UP_STEPS[kind], ROUND_SECONDS[kind], held, self.device
        )

    def turn(self) -> float:
        """Seconds of an image."""
        return common.seconds_of(self.step, self.steps, self.device) / self.images


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


def packages() -> str:
    """OpenMMLab's, with versions."""
    mmengine = import_mmengine()
    import mmdet

    return f"mmdet {mmdet.__version__}, mmengine {mmengine.__version__}"


def keep_quiet() -> None:
    """mmengine would list every weight that it initializes."""
    import_mmengine()
    from mmengine.logging import MMLogger

    if not MMLogger.check_instance_created(logger.name):
        MMLogger.get_instance(logger.name, log_level="ERROR")


def make_batch(images: int, size: tuple[int, int]) -> dict[str, list[Any]]:
    """Images of noise (3, H, W) and samples with boxes and elliptic masks, as a data loader hands them over.

    Args:
        images: how many.
        size: height and width in pixels.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (images, 3, *size)
    noise = torch.randint(PIXEL_VALUES, shape, generator=generator, dtype=torch.uint8)
    return {"inputs": [*noise], "data_samples": [make_sample(size, generator) for _ in range(images)]}


def make_sample(size: tuple[int, int], generator: torch.Generator) -> "DetDataSample":
    """Objects of an image, with sides of an eighth to three eighths of its own."""
    import_mmengine()
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    height, width = size
    sides = torch.tensor([width, height])
    start, extent = torch.rand(2, OBJECTS, 2, generator=generator)
    start, extent = start * 0.6 * sides, (extent + 0.5) / 4 * sides
    boxes = torch.cat([start, start + extent], dim=1)  # OBJECTS, 4
    rows, columns = np.mgrid[:height, :width]
    centres, radii = (start + extent / 2).numpy(), (extent / 2).numpy()
    masks = [
        ((columns - x) / rx) ** 2 + ((rows - y) / ry) ** 2 <= 1
        for (x, y), (rx, ry) in zip(centres, radii, strict=True)
    ]
    sizes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), size)
    return DetDataSample(
        gt_instances=InstanceData(
            bboxes=boxes,
            labels=torch.randint(CLASSES, (OBJECTS,), generator=generator),
            masks=BitmapMasks(np.stack(masks).astype(np.uint8), height, width),
        ),
        metainfo={**sizes, "scale_factor": (1.0, 1.0)},
    )


def rows_of(contenders: dict[str, Contender], times: dict[str, list[float]]) -> list[list[common.Cell]]:
    """The table's rows from seconds of an image, by round."""
    rows: list[list[common.Cell]] = []
    for name, contender in contenders.items():
        ratio = common.speed_ratio(times[name], times[BASELINE])
        rate = 1 / common.Spread.of(times[name]).median
        facts = [name, contender.parameters / 1e6, contender.attention, rate]
        rows.append([*facts, ratio.median, ratio.lower, ratio.upper, contender.memory_mb])
    return rows


def measure(args: argparse.Namespace) -> list[list[common.Cell]]:
    """Build both, warm them up, and time them in turns."""
    keep_quiet()
    precision = Precision(DTYPES[args.precision])
    batch = make_batch(args.batch_size, tuple(args.size))
    contenders = {name: Contender(base, batch, precision, args.device) for name, base in DETECTORS.items()}
    for contender in contenders.values():
        contender.warm_up()
    turns: dict[str, Callable[[], float]] = {name: each.turn for name, each in contenders.items()}
    seconds = common.alternate(turns, args.repeats)
    for name, contender in contenders.items():
        if not contender.loss.isfinite():
            raise ValueError(
                f"{name}: expected a finite loss, got {contender.loss.item()}: what was timed is no "
                "training; take --precision fp32 or bf16"
            )
    return rows_of(contenders, seconds)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), default=[800, 1333], help="(800 1333)"
    )
    parser.add_argument("--batch-size", type=int, default=2, help="images of a step (2)")
    parser.add_argument("--precision", choices=DTYPES, help=f"(default: {PRECISION})")
    parser.add_argument("--device", default="", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--repeats", type=int, help=f"rounds (default: {ROUNDS})")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write <date>_<name>.md and .csv here")
    parser.add_argument("--name", default="detector", help="of the files (detector)")
    args = parser.parse_args(argv)
    for key in ("batch_size", "repeats", "threads"):
        value = getattr(args, key)
        if value is not None and value < 1:
            parser.error(f"--{key.replace('_', '-')}: expected 1 or more, got {value}")
    if min(args.size) < 32:
        parser.error(f"--size: expected sides of 32 pixels or more, got {args.size[0]} {args.size[1]}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for what the user can correct."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        args.device = pick_device(args.device)
        args.precision = args.precision or PRECISION[args.device.type]
        args.repeats = args.repeats or ROUNDS[args.device.type]
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        facts = common.describe_run(args.device)
        facts["Versions"] += f", {packages()}"
        facts["Detector"] = (
            f"Mask R-CNN, {args.size[0]} x {args.size[1]}, batch {args.batch_size}, {args.precision}"
        )
        rows = measure(args)
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        logger.error(f"error: {common.short_reason(error)}")
        return 2
    note = (
        f"Training steps; medians of {args.repeats} rounds in turns. A ratio is the median of the ratios "
        "within a round, with quartiles. Peak memory, on CUDA only, is without the other detector."
    )
    common.publish(args.out, args.name, "Training a detector", facts, [note], COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
