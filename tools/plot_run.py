"""Draws loss, accuracy, learning rate and speed of one run, or of several for comparison.

    python -m tools.plot_run OUTPUT_FOLDER [OUTPUT_FOLDER ...] --out FILE

An output folder is what main.py writes to; its metrics.jsonl is read. The horizontal axis counts epochs.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.figures.drawing import blank_figure
from utils import UserError, path_argument, run_command, user_input

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("plot_run")

METRICS_NAME = "metrics.jsonl"
DOTS = {"marker": ".", "markersize": 4}
PANELS = ("loss", "validation accuracy (%)", "learning rate", "images per second")

Record = dict[str, Any]


@dataclass
class RunMetrics:
    """What one run recorded."""

    name: str  # the output folder, for the legend
    train: list[Record] = field(default_factory=list)  # one per logging interval, in order
    epochs: list[Record] = field(default_factory=list)  # one per epoch, in order


def end_of(record: Record) -> float:
    """Where the interval or epoch of a record ends, in epochs."""
    done = (record["step"] + 1) / record["steps_per_epoch"] if record["kind"] == "train" else 1.0
    return record["epoch"] + done


def read_metrics(folder: Path) -> RunMetrics:
    """Read metrics.jsonl of an output folder.

    A line that is damaged, such as the last one of a killed run, is skipped with a warning.

    Raises:
        FileNotFoundError: the folder or its metrics.jsonl does not exist.
        UserError: nothing was recorded yet.
    """
    path = folder / METRICS_NAME
    if not path.is_file():
        found = "one without it" if folder.is_dir() else "no folder"
        raise FileNotFoundError(
            f"{folder}: expected the output folder of a training run, with {METRICS_NAME}, got {found}; "
            "name <output>/<model name>/<tag>"
        )
    metrics = RunMetrics(os.fsencode(folder).decode("utf-8", "replace"))  # matplotlib draws Unicode alone
    lists = {"train": metrics.train, "epoch": metrics.epochs}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line)
            lists[record["kind"]].append(record | {"end": end_of(record)})
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            logger.warning(f"{path}:{number}: skipped, expected a record ({type(error).__name__}: {error})")
    if not (metrics.train or metrics.epochs):
        raise UserError(f"{path}: expected a record of this version, got none; train for a logging interval")
    return metrics


def column(records: list[Record], key: str) -> np.ndarray:
    """One value of every record; nan, a gap in the line, where it is missing or was not finite."""
    return np.array([record.get(key) for record in records], dtype=float)


def draw(runs: Sequence[RunMetrics]) -> "Figure":
    """The curves of runs, in the order of the legend.

    Raises:
        UserError: matplotlib is not installed.
    """
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(runs) > 1 else {}
    figure = blank_figure(figsize=(9 if beside else 5, 7))
    panels = figure.subplots(len(PANELS), 1, sharex=True)
    for number, run in enumerate(runs):
        _draw_run(panels, run, f"C{number % 10}", f"{run.name}, " if len(runs) > 1 else "")
    for title, axes in zip(PANELS, panels, strict=True):
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", **beside)
    panels[-1].set_xlabel("epoch")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    panels[-1].set_ylim(bottom=0)
    figure.suptitle(runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    return figure


def _draw_run(panels: Any, run: RunMetrics, colour: str, prefix: str) -> None:
    """The lines of one run in all panels; `prefix` is that of their labels."""
    loss, accuracy, rate, speed = panels
    steps, ends = column(run.train, "end"), column(run.epochs, "end")
    losses = column(run.train, "loss")
    loss.plot(steps, losses, color=colour, alpha=0.45, label=f"{prefix}training, by interval")
    loss.plot(ends, column(run.epochs, "val_loss"), color=colour, label=f"{prefix}validation", **DOTS)
    for key, name, style in (("acc1", "top-1", "-"), ("acc1_ema", "top-1 of the average", "--")):
        values = column(run.epochs, key)
        if not np.isnan(values).all():
            label = f"{prefix}{name}, best {np.nanmax(values):.2f} %"
            accuracy.plot(ends, values, style, color=colour, label=label, **DOTS)
    accuracy.plot(ends, column(run.epochs, "acc5"), ":", color=colour, label=f"{prefix}top-5")
    rate.plot(steps, column(run.train, "lr"), color=colour, label=run.name if prefix else None)
    if run.train:
        speeds = column(run.train, "img_per_s")
        speed.plot(steps, speeds, color=colour, label=f"{prefix}median {np.nanmedian(speeds):.3g}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(description="Draw loss, accuracy, learning rate and speed of runs.")
    parser.add_argument("folders", nargs="+", type=path_argument, metavar="OUTPUT_FOLDER", help="of main.py")
    parser.add_argument("--out", type=path_argument, metavar="FILE", help="(default: plot.png in the folder)")
    args = parser.parse_args(argv)
    if args.out is None and len(args.folders) > 1:
        parser.error("--out is needed to compare several runs")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for an error that the user can correct."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folders = [Path(folder) for folder in args.folders]
    out = Path(args.out or folders[0] / "plot.png")

    def plot() -> None:
        figure = draw([read_metrics(folder) for folder in folders])
        out.parent.mkdir(parents=True, exist_ok=True)
        with user_input("--out"):  # the ending may be none that matplotlib knows
            figure.savefig(out, dpi=120)
        logger.info(f"wrote {out}")

    return run_command(plot)


if __name__ == "__main__":
    sys.exit(main())
