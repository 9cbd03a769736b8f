"""Draws the pictures of figures/.

    python -m tools.figures [teaser release speed] [--out DIR]

teaser   which tokens a query sees, by the index of the layers, in a photograph that scikit-learn ships
release  accuracy against throughput of the release and its peers, as the release reports them
speed    the newest benchmark in tools/results, with the ratios to Swin's speed
"""

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from config import load_config
from models import build_model
from tools import release_numbers as release
from tools.benchmarks import models
from tools.benchmarks.common import REPO, RESULTS

from . import attention, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = REPO / "figures"

TEASER_MODELS = {
    "Focal-T": "focal_tiny_patch4_window7_224",
    "Focal-fast-T": "focalv2_tiny_useconv_patch4_window7_224",
}
PHOTOGRAPH, CROP, QUERY, SIDE = "china.jpg", (0, 0, 427, 427), (93, 100), 224

FAMILIES = {  # colour and marker
    "Focal": ("#d55e00", "o"),
    "Focal-fast": ("#cc79a7", "D"),
    "Swin": ("#0072b2", "s"),
    "PVT": ("#009e73", "^"),
    "CvT": ("#56b4e9", "v"),
    "ViL": ("#e69f00", "P"),
    "DeiT": ("#555555", "X"),
    "ViT": ("#000000", "*"),
}
OFFSETS = {"Focal": (-9, -11), "Focal-fast": (9, 5)}  # of the letters at our models, in points


def photograph() -> np.ndarray:
    """A square of a photograph, [SIDE, SIDE, 3] in [0, 1].

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ImportError(
            "the photograph comes with scikit-learn: pip install -r requirements-dev.txt"
        ) from error
    square = Image.fromarray(load_sample_image(PHOTOGRAPH)).crop(CROP)
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)) / 255


def draw_teaser() -> "Figure":
    """One row per model, one panel per stage."""
    rows = []
    for name, config in TEASER_MODELS.items():
        model = build_model(load_config(REPO / "configs" / f"{config}.yaml"))
        rows.append((name, attention.stage_maps(model, SIDE, SIDE)))
    title = "The tokens that one query (the cross) attends to, at their own size"
    return drawing.keys_figure(rows, photograph(), QUERY, attention.strides(model), title)


def draw_release() -> "Figure":
    """Lines of the models of a family, over images per second at 224 x 224."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for family, (colour, marker) in FAMILIES.items():
        rows = sorted((row for row in release.SPEEDS if row.family == family), key=lambda row: row.at_224)
        ours = family.startswith("Focal")
        axes.plot(
            *([row.at_224 for row in rows], [row.top1 for row in rows]),
            color=colour,
            marker=marker,
            linewidth=2.4 if ours else 1.2,
            linestyle="-" if ours else "--",
            label=family,
        )
        for row in rows if ours else ():
            size = row.model.removesuffix(", conv").split("-")[-1][0]
            offset = OFFSETS[family]
            axes.annotate(
                *(size, (row.at_224, row.top1), offset),
                textcoords="offset points",
                ha="center",
                color=colour,
                weight="bold",
            )
    axes.set(xscale="log", xlabel="images per second, 224 x 224", ylabel="ImageNet-1K top-1 (%)")
    axes.set_xticks([150, 200, 300, 400, 600, 800])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2, loc="lower left")
    axes.margins(y=0.09)
    axes.set_title("Quoted from the original release: its models and its peers", fontsize="medium")
    return figure


def draw_speed() -> "Figure":
    """The newest benchmark.

    Raises:
        FileNotFoundError: there is none.
    """
    for path in sorted(RESULTS.glob("*.csv"), reverse=True):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if rows and "vs swin" in rows[0]:
            figure = models.draw(rows)
            figure.suptitle(f"Measured here: tools/results/{path.name}", fontsize="medium")
            return figure
    raise FileNotFoundError(f"{RESULTS}: expected a file of tools.benchmarks.models, got none; run it")


KINDS: dict[str, Callable[[], "Figure"]] = {
    "teaser": draw_teaser,
    "release": draw_release,
    "speed": draw_speed,
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="NAME", help=f"{', '.join(KINDS)} (all)")
    parser.add_argument("--out", type=Path, default=FIGURES, metavar="DIR", help="folder (figures)")
    args = parser.parse_args(argv)
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"unknown picture {', '.join(sorted(unknown))}: choose from {', '.join(KINDS)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for what the user can correct."""
    args = parse(argv)
    try:
        for name in args.kinds or KINDS:
            path = args.out / f"{name}.png"
            drawing.save(KINDS[name](), path)
            print(f"wrote {path}")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
