"""Draws figures/teaser.png: the tokens that a query sees in Focal-T and Focal-fast-T, over a photograph.

python -m tools.figures
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from config import load_config
from models import build_model
from tools.benchmarks.common import REPO
from utils import path_argument

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
    from sklearn.datasets import load_sample_image

    square = Image.fromarray(load_sample_image(PHOTOGRAPH)).crop(CROP)
    picture = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)) / 255
    rows = []
    for name, config in MODELS.items():
        model = build_model(load_config(REPO / "configs" / f"{config}.yaml"))
        rows.append((name, attention.stage_maps(model, SIDE, SIDE)))
    title = "The tokens that one query (the cross) attends to"
    return drawing.keys_figure(rows, picture, QUERY, title)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = REPO / "figures" / "teaser.png"
    parser.add_argument("--out", type=path_argument, default=str(default), help="file (figures/teaser.png)")
    drawing.save(draw_teaser(), Path(parser.parse_args().out))


if __name__ == "__main__":
    main()
