"""Draws figures/teaser.png: the tokens that a query sees in Focal-T and Focal-fast-T, over a photograph.

    python -m tools.figures [--out DIR]

The photograph comes with scikit-learn.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from config import load_config
from models import build_model

from . import attention, drawing

REPO = Path(__file__).resolve().parents[2]
MODELS = {
    "Focal-T": "focal_tiny_patch4_window7_224",
    "Focal-fast-T": "focalv2_tiny_useconv_patch4_window7_224",
}
PHOTOGRAPH, CROP, QUERY, SIDE = "china.jpg", (0, 0, 427, 427), (93, 100), 224


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw figures/teaser.png.", allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=REPO / "figures", metavar="DIR", help="folder (figures)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for what the user can correct."""
    args = parse(argv)
    try:
        from sklearn.datasets import load_sample_image

        square = Image.fromarray(load_sample_image(PHOTOGRAPH)).crop(CROP)
        picture = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)) / 255
        rows = []
        for name, config in MODELS.items():
            model = build_model(load_config(REPO / "configs" / f"{config}.yaml"))
            rows.append((f"{name}, ", attention.stage_maps(model, SIDE, SIDE)))
        title = "The tokens that one query (the cross) attends to, at their own size"
        figure = drawing.keys_figure(rows, picture, QUERY, attention.strides(model), title)
        drawing.save(figure, args.out / "teaser.png")
    except (OSError, ImportError) as error:
        print(f"error: {error}; pip install -r requirements-dev.txt has what it needs", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
