"""Times the training data pipeline with each decoder, in turns, on made images.

    python tools/benchmark_loader.py [--workers 0 1 2] [--images 256] [--data FOLDER] [--out FILE]

The pipeline is that of training: read, decode, crop, augment, to a normalised tensor, batch. The images are
made so that they decode like photographs: noise with the spectrum of natural scenes, 500x375 pixels, JPEG at
quality 90, about 110 kB each (the mean of ImageNet). With --data they are made there once and kept; only what
this tool made is used.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import benchmark_common as common
import numpy as np
import torch
from PIL import Image
from yacs.config import CfgNode

from config import DECODERS, load_config
from data import Loaders, build_loaders

logger = logging.getLogger("benchmark_loader")

HEIGHT, WIDTH, QUALITY = 375, 500, 90
CLASSES = 2
BASELINE = "pil"


def photograph(seed: int) -> Image.Image:
    """An image with the spectrum of natural scenes, and correlated colours."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = 1.0

    def field(slope: float) -> np.ndarray:
        spectrum = np.fft.rfft2(draw.normal(size=(HEIGHT, WIDTH))) / frequency**slope
        values = np.fft.irfft2(spectrum, s=(HEIGHT, WIDTH))
        return (values - values.mean()) / values.std()

    light = field(1.0)
    pixels = np.stack([light + 0.35 * field(1.3) for _ in range(3)], axis=-1)
    return Image.fromarray((pixels * 50 + 118).clip(0, 255).astype(np.uint8))


def make_images(root: Path, count: int) -> float:
    """Write training images, and one per class for validation, unless they are there; mean size in kB."""
    sizes = []
    for split, number in (("train", count), ("val", CLASSES)):
        for index in range(number):
            path = root / split / f"class{index % CLASSES}" / f"{index:05d}.jpg"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                photograph(index + (split == "val") * 1_000_000).save(path, quality=QUALITY)
            sizes.append(path.stat().st_size / 1000)
    return statistics.mean(sizes)


def loaders_for(root: Path, decoder: str, workers: int, args: argparse.Namespace) -> Loaders:
    """The loaders of training with one decoder."""
    values = {
        "DATA.DATA_PATH": str(root),
        "DATA.DATASET": "folder",
        "DATA.DECODER": decoder,
        "DATA.BATCH_SIZE": args.batch_size,
        "DATA.IMG_SIZE": args.size,
        "DATA.NUM_WORKERS": workers,
        "MODEL.NUM_CLASSES": CLASSES,
    }
    config: CfgNode = load_config(opts=[word for pair in values.items() for word in pair])
    return build_loaders(config)


def timer_of(loaders: Loaders) -> Callable[[], float]:
    """A function that draws one epoch, the next at every call, and returns seconds per image.

    With workers, the clock starts at the first batch: that the workers wake up is not the pipeline's cost.
    """
    epoch = 0

    def timer() -> float:
        nonlocal epoch
        loaders.set_epoch(epoch)
        epoch += 1
        loader, images = loaders.train_loader, 0
        assert loader is not None
        start = time.perf_counter()
        for number, (batch, _) in enumerate(loader):
            if number == 0 and loader.num_workers:
                start = time.perf_counter()
            else:
                images += len(batch)
        return (time.perf_counter() - start) / images

    return timer


def measure(root: Path, args: argparse.Namespace) -> list[list[common.Cell]]:
    """Rows of the table: every decoder with every number of workers."""
    rows: list[list[common.Cell]] = []
    for workers in args.workers:
        timers = {name: timer_of(loaders_for(root, name, workers, args)) for name in DECODERS}
        common.alternate(timers, 1)  # starts the workers, fills the page cache
        times = common.alternate(timers, args.rounds)
        for name in DECODERS:
            rate = common.Spread.of([1 / value for value in times[name]])
            ratio = common.speed_ratio(times[name], times[BASELINE])
            spread = f"{common.show(rate.lower)}-{common.show(rate.upper)}"
            rows.append(
                [workers, name, rate.median, spread, ratio.median, f"{ratio.lower:.2f}-{ratio.upper:.2f}"]
            )
            logger.info(common.markdown_table(COLUMNS, rows[-1:]).splitlines()[-1])
    return rows


COLUMNS = ("workers", "decoder", "img/s", "quartiles", "ratio to pil", "quartiles of the ratio")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time the training data pipeline with each decoder.")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="loader processes")
    parser.add_argument("--images", type=int, default=256, help="made training images; an epoch")
    parser.add_argument("--size", type=int, default=224, help="side of the training images in pixels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7, help="epochs per decoder and number of workers")
    parser.add_argument("--data", type=Path, help="folder for the made images (default: one that is removed)")
    parser.add_argument("--out", type=Path, help="Markdown file to write; a .csv file comes beside it")
    args = parser.parse_args(argv)
    if args.images < 2 * args.batch_size:
        parser.error(f"--images: expected at least two batches of {args.batch_size}, got {args.images}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for what the user can correct."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # as in a worker
    facts = common.describe_run(torch.device("cpu"))
    try:
        with tempfile.TemporaryDirectory() as folder:
            root = args.data or Path(folder)
            facts["Images"] = (
                f"{args.images} of {WIDTH}x{HEIGHT} pixels, JPEG quality {QUALITY}, "
                f"{make_images(root, args.images):.0f} kB each; to {args.size}x{args.size}, "
                f"batches of {args.batch_size}"
            )
            rows = measure(root, args)
    except (ValueError, OSError) as error:
        logger.error(f"error: {error}")
        return 2
    note = f"Median of {args.rounds} epochs in turns; the ratio is the median of the ratios within a round."
    report = common.markdown_report(
        "Training data pipeline", facts, [note], [common.markdown_table(COLUMNS, rows)]
    )
    logger.info(report)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(report, encoding="utf-8")
        common.write_csv(args.out.with_suffix(".csv"), COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
