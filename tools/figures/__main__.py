"""Draws the pictures of figures/ that need no training.

    python -m tools.figures [teaser] [speed] [--out DIR]

teaser  the tokens that a query sees in Focal-T and Focal-fast-T, over a photograph of scikit-learn
speed   the newest table of tools.benchmarks.models with Focal-T, Focal-fast-T and Swin-T at 224 pixels
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from config import load_config
from models import build_model
from tools.benchmarks.common import REPO, RESULTS
from utils import path_argument

from . import attention, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = {
    "Focal-T": "focal_tiny_patch4_window7_224",
    "Focal-fast-T": "focalv2_tiny_useconv_patch4_window7_224",
}
PHOTOGRAPH, CROP, QUERY, SIDE = "china.jpg", (0, 0, 427, 427), (93, 100), 224
TIMED = {  # in the benchmark -> name, colour
    "focal-tiny": ("Focal-T", "#d55e00"),
    "focalv2-tiny": ("Focal-fast-T", "#e69f00"),
    "swin-tiny": ("Swin-T", "0.65"),
}


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
    return drawing.keys_figure(rows, picture, QUERY, attention.strides(model), title)


def newest_table() -> tuple[Path, list[dict[str, str]]]:
    """The newest file with all of TIMED, and its rows of these.

    Raises:
        FileNotFoundError: there is none.
    """
    for path in sorted(RESULTS.glob("*.csv"), reverse=True):
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("model") in TIMED and row.get("vs swin")]
        rows = [row for row in rows if row["resolution"] == "224"]
        if {row["model"] for row in rows} == {*TIMED}:
            return path, [row for row in rows if row["compile"] == rows[0]["compile"]]
    raise FileNotFoundError(f"{RESULTS}: expected a table of tools.benchmarks.models, got none; run it")


def draw_speed() -> "Figure":
    """Bars of the speed relative to Swin-T, with quartiles."""
    path, rows = newest_table()
    figure = drawing.blank_figure(figsize=(5, 2.6))
    axes = figure.subplots()
    for number, (model, (name, colour)) in enumerate(TIMED.items()):
        mine = {row["mode"]: row for row in rows if row["model"] == model}
        lower, ratio, upper = (
            np.array([float(row[key]) for row in mine.values()])
            for key in ("ratio lower", "vs swin", "ratio upper")
        )
        places = np.arange(len(mine)) + 0.27 * (number - 1)
        error = None if name == "Swin-T" else np.stack([ratio - lower, upper - ratio]).clip(min=0)
        bars = axes.bar(places, ratio, 0.25, yerr=error, color=colour, label=name, capsize=3)
        axes.bar_label(bars, [f"{value:.2f}" for value in ratio], label_type="center")
    axes.set_xticks(range(len(mine)), [{"infer": "inference", "train": "training"}[mode] for mode in mine])
    axes.set(ylabel="times Swin-T", ylim=(0, None))
    figure.suptitle(f"Images per second at 224 x 224\n{path.relative_to(REPO)}", fontsize="medium")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return figure


KINDS = {"teaser": draw_teaser, "speed": draw_speed}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="NAME", help=f"of {', '.join(KINDS)} (all)")
    parser.add_argument(
        "--out", type=path_argument, default=REPO / "figures", metavar="DIR", help="folder (figures)"
    )
    args = parser.parse_args(argv)
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"unknown picture {', '.join(sorted(unknown))}: choose from {', '.join(KINDS)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for what the user can correct."""
    args = parse(argv)
    try:
        for name in args.kinds or KINDS:
            drawing.save(KINDS[name](), Path(args.out, f"{name}.png"))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ImportError) as error:
        print(f"error: {error}; pip install -r requirements-dev.txt has what it needs", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
