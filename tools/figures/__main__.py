"""Draws figures/teaser.png: the tokens that a query sees in Focal-T and Focal-fast-T, over a photograph.

python -m tools.figures [--out DIR]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from config import load_config
from models import build_model
from tools.benchmarks.common import REPO
from utils import path_argument, run_command, user_input

from . import attention, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = {
    "Focal-T": "focal_tiny_patch4_window7_224",
    "Focal-fast-T": "focalv2_tiny_useconv_patch4_window7_224",
}
PHOTOGRAPH, CROP, QUERY, SIDE = "china.jpg", (0, 0, 427, 427), (93, 100), 224


def draw_teaser() -> "Figure":
    """One row per model, one panel per stage."""
    with user_input("pip install -r requirements-dev.txt has what is missing"):
        from sklearn.datasets import load_sample_image

    square = Image.fromarray(load_sample_image(PHOTOGRAPH)).crop(CROP)
    picture = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)) / 255
    rows = []
    for name, config in MODELS.items():
        model = build_model(load_config(REPO / "configs" / f"{config}.yaml"))
        rows.append((name, attention.stage_maps(model, SIDE, SIDE)))
    title = "The tokens that one query (the cross) attends to"
    return drawing.keys_figure(rows, picture, QUERY, title)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=path_argument, default=REPO / "figures", metavar="DIR", help="folder (figures)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for what the user can correct."""
    args = parse(argv)

    def draw() -> None:
        drawing.blank_figure()  # says that matplotlib is missing before anything is computed
        drawing.save(draw_teaser(), Path(args.out, "teaser.png"))

    return run_command(draw)


if __name__ == "__main__":
    sys.exit(main())
