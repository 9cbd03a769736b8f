"""Writes small demo data sets from real handwritten digits, for trying out every task without a download.

    python -m data.demo OUT [--kinds imagenet zip detection segmentation]

The digits are the 1797 scans of 8x8 pixels that scikit-learn ships. Four kinds are written, each into its own
folder of OUT:

- imagenet: `train/<digit>/*.png`, `val/<digit>/*.png`;
- zip: the same images as `train.zip`, `val.zip` with `train_map.txt`, `val_map.txt`, one map in each of the
  two styles;
- detection: scenes of several digits in the layout of COCO 2017, with boxes and polygon masks;
- segmentation: such scenes in the layout of ADE20K, with label images.

About a fifth of the scans of every digit is held out, for the validation splits of all kinds. Equal
options give equal bytes. A folder that is there stays as it is.
"""

import argparse
import logging
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from data import demo_scenes
from utils import path_argument, run_command, user_input

logger = logging.getLogger(__name__)

_HELD_OUT = 0.2
_SIDE = 32  # of single digits, in pixels
_ZIP_DATE = (2021, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class DemoOptions:
    """What to write; two calls with equal options write equal bytes."""

    seed: int = 0
    train_scenes: int = 240
    val_scenes: int = 30
    scene_width: int = 160
    scene_height: int = 128


@dataclass(frozen=True)
class DigitSplit:
    """Scans of one split: `images` (N, 8, 8) uint8 with ink from 0 to 255, `labels` (N,) with the digits."""

    images: np.ndarray
    labels: np.ndarray


def load_digit_splits(seed: int) -> dict[str, DigitSplit]:
    """The scans as "train" and "val", divided at random within every digit.

    Args:
        seed: of the division.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the demo data need scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        held_out[members[: round(_HELD_OUT * len(members))]] = True
    return {
        "train": DigitSplit(images[~held_out], labels[~held_out]),
        "val": DigitSplit(images[held_out], labels[held_out]),
    }


def write_demo(out: Path, kinds: Sequence[str], options: DemoOptions) -> dict[str, Path]:
    """Write demo data sets (keys of WRITERS) to `out`; one that is there stays.

    Returns:
        The folder of each kind.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    folders = {kind: out / kind for kind in kinds}
    for kind, folder in folders.items():
        if folder.exists():
            logger.info("%s: already there", folder)
            continue
        unfinished = out / f".{kind}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        WRITERS[kind](unfinished, options)
        os.replace(unfinished, folder)
        logger.info("%s: written", folder)
    return folders


def _encoded_digits(split: DigitSplit) -> Iterator[tuple[str, int, bytes]]:
    """(file name, label, PNG bytes) of every scan of a split, enlarged."""
    for number, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
        enlarged = cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC)
        colour = cv2.cvtColor(enlarged, cv2.COLOR_GRAY2BGR)
        yield f"{label}/{number:04d}.png", label, demo_scenes.encode(".png", colour)


def _write_imagenet(folder: Path, options: DemoOptions) -> None:
    for name, split in load_digit_splits(options.seed).items():
        for digit in range(10):
            (folder / name / str(digit)).mkdir(parents=True)
        for file_name, _, content in _encoded_digits(split):
            (folder / name / file_name).write_bytes(content)


def _write_zip(folder: Path, options: DemoOptions) -> None:
    prefixes = {"train": "", "val": "val.zip@/"}
    for name, split in load_digit_splits(options.seed).items():
        lines = []
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for file_name, label, content in _encoded_digits(split):
                archive.writestr(zipfile.ZipInfo(file_name, _ZIP_DATE), content)
                lines.append(f"{prefixes[name]}{file_name}\t{label}\n")
        (folder / f"{name}_map.txt").write_text("".join(lines), encoding="utf-8")


def _scenes(options: DemoOptions) -> Iterator[tuple[str, Iterator[demo_scenes.Scene]]]:
    """The scenes of each split; those of detection and segmentation are the same."""
    counts = {"train": options.train_scenes, "val": options.val_scenes}
    canvas = (options.scene_height, options.scene_width)
    for number, (name, split) in enumerate(load_digit_splits(options.seed).items()):
        rng = np.random.default_rng([options.seed, number])
        draw = partial(demo_scenes.draw_scene, split.images, split.labels, canvas, rng)
        yield name, (draw() for _ in range(counts[name]))


def _write_detection(folder: Path, options: DemoOptions) -> None:
    for name, scenes in _scenes(options):
        demo_scenes.write_coco(folder, name, scenes)


def _write_segmentation(folder: Path, options: DemoOptions) -> None:
    split_folders = {"train": "training", "val": "validation"}
    for name, scenes in _scenes(options):
        demo_scenes.write_ade(folder, split_folders[name], scenes)


WRITERS: dict[str, Callable[[Path, DemoOptions], None]] = {
    "imagenet": _write_imagenet,
    "zip": _write_zip,
    "detection": _write_detection,
    "segmentation": _write_segmentation,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (by default that of the process); 2 for an error that the user can correct."""
    parser = argparse.ArgumentParser(prog="python -m data.demo", description="Write the demo data sets.")
    parser.add_argument("out", type=path_argument, help="folder to write into")
    parser.add_argument("--kinds", nargs="+", choices=WRITERS, default=list(WRITERS), help="default: all")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def write() -> None:
        with user_input():
            write_demo(Path(args.out), args.kinds, DemoOptions())

    return run_command(write)


if __name__ == "__main__":
    sys.exit(main())
