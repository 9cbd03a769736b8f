"""Times the training data pipeline with each decoder and source, in alternating rounds, on the same images.

    python -m tools.benchmarks.loader --workers 0 1 2

The pipeline is that of training: read, decode, crop, augment, normalise, batch. The images are parts of a
photograph, of 500x375 pixels and about 110 kB each (the mean of ImageNet).
"""

import argparse
import io
import random
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

from PIL import Image

from config import load_config
from data import Loaders, build_loaders
from utils import user_input

from . import common

HEIGHT, WIDTH, QUALITY = 375, 500, 96
CLASSES = 2
SHARD_IMAGES = 100
CASES = {  # name -> options: class folders with each decoder, then other sources with Pillow
    "pil": {"DATA.DECODER": "pil"},
    "opencv": {"DATA.DECODER": "opencv"},
    "zip": {"DATA.ZIP_MODE": True},
    "wds": {"DATA.DATASET": "wds"},
    "hf": {"DATA.DATASET": "hf"},
}
BASELINE = "pil"
COLUMNS = ("workers", "case", "img/s", "ratio to pil")


def photograph(seed: int) -> Image.Image:
    """A part of a photograph that comes with scikit-learn."""
    with user_input("pip install -r requirements-dev.txt has what is missing"):
        from sklearn.datasets import load_sample_image

    whole = Image.fromarray(load_sample_image("china.jpg"))
    draw = random.Random(seed)
    left, top = draw.randint(0, whole.width - WIDTH), draw.randint(0, whole.height - HEIGHT)
    return whole.crop((left, top, left + WIDTH, top + HEIGHT))


def make_images(root: Path, training: int) -> None:
    """Write training images, and one per class for validation."""
    for split, number in (("train", training), ("val", CLASSES)):
        for index in range(number):
            path = root / split / f"class{index % CLASSES}" / f"{index:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(index + (split == "val") * 1_000_000).save(path, quality=QUALITY)


def pack_images(root: Path) -> None:
    """Write the images of the class folders once more, in the layouts of the other sources."""
    with user_input():  # the library may be missing
        import datasets

    datasets.disable_progress_bars()
    for split in ("train", "val"):
        paths = sorted((root / split).glob("*/*.jpg"))
        files = [(path, path.relative_to(root / split), int(path.parent.name[-1])) for path in paths]
        with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
            for path, name, _ in files:
                archive.write(path, name)
        lines = [f"{name}\t{label}\n" for _, name, label in files]
        (root / f"{split}_map.txt").write_text("".join(lines))
        for number in range(0, len(files), SHARD_IMAGES):
            with tarfile.open(root / f"{split}-{number // SHARD_IMAGES:04d}.tar", "w") as shard:
                for path, name, label in files[number : number + SHARD_IMAGES]:
                    shard.add(path, str(name))
                    entry, content = tarfile.TarInfo(f"{name.with_suffix('.cls')}"), str(label).encode()
                    entry.size = len(content)
                    shard.addfile(entry, io.BytesIO(content))
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
        images = [{"bytes": path.read_bytes(), "path": None} for path in paths]
        columns = {"image": images, "label": [label for *_, label in files]}
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(root / "hf" / split))


def loaders_for(root: Path, case: str, workers: int, args: argparse.Namespace) -> Loaders:
    """The loaders of training in one case."""
    values = {
        "DATA.DATA_PATH": str(root / "hf" if case == "hf" else root),
        "DATA.DATASET": "folder",
        **CASES[case],
        "DATA.BATCH_SIZE": args.batch_size,
        "DATA.IMG_SIZE": args.size,
        "DATA.NUM_WORKERS": workers,
        "MODEL.NUM_CLASSES": CLASSES,
    }
    with user_input():
        return build_loaders(load_config(None, [word for pair in values.items() for word in pair]))


def timer_of(loaders: Loaders) -> Callable[[], float]:
    """A function that reads one epoch, the next at every call, and returns seconds per image.

    With workers, the clock starts at the first batch, when they have started.
    """
    epochs = count()

    def timer() -> float:
        loaders.resume_at(next(epochs), 0)
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


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.new_parser("Time the training data pipeline with each decoder and source.", "loader")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="loader processes")
    parser.add_argument("--images", type=int, default=256, help="training images of an epoch")
    parser.add_argument("--size", type=int, default=224, help="side of the training images in pixels")
    parser.add_argument("--batch-size", type=common.positive, default=32)
    parser.set_defaults(device="cpu", threads=1)  # threads as in a worker
    args = parser.parse_args(argv)
    if args.images < 2 * args.batch_size:
        parser.error(f"--images: expected at least two batches of {args.batch_size}, got {args.images}")
    return args


def measure(args: argparse.Namespace) -> int:
    """Time every case with every number of workers, and publish."""
    facts, rows = common.describe_run(args.device), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root, args.images)
        pack_images(root)
        facts["Images"] = (
            f"{args.images} of {WIDTH}x{HEIGHT} pixels, JPEG quality {QUALITY}; to {args.size}x{args.size}, "
            f"batches of {args.batch_size}"
        )
        for workers in args.workers:
            timers = {name: timer_of(loaders_for(root, name, workers, args)) for name in CASES}
            common.alternate(timers, 1)  # starts the workers, fills the page cache
            times = common.alternate(timers, args.rounds)
            for name in CASES:
                rate = common.Spread.of([1 / value for value in times[name]])
                ratio = common.speed_ratio(times[name], times[BASELINE])
                rows.append([workers, name, rate, ratio])
    note = "pil and opencv are decoders, with class folders; the other cases are sources, with pil. "
    note += f"Medians and quartiles of {args.rounds} epochs in alternating rounds; ratios are within a round."
    common.publish(args, "Training data pipeline", facts, [note], COLUMNS, rows)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for an error that the user can correct."""
    return common.run_command(parse(argv), measure)


if __name__ == "__main__":
    sys.exit(main())
