"""Draws loss, accuracy and learning rate of one run, or of several runs for comparison, as one PNG.

    python tools/plot_run.py OUTPUT_FOLDER [OUTPUT_FOLDER ...] --out FILE

An output folder is what main.py writes to; its metrics.jsonl is read. The horizontal axis counts epochs.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger("plot_run")

METRICS_NAME = "metrics.jsonl"
DEFAULT_NAME = "plot.png"
MANY_POINTS = 60  # from here on, lines without markers

Record = dict[str, Any]


@dataclass
class RunMetrics:
    """What one run recorded, without what it recorded twice.

    Attributes:
        name: for the legend.
        train: one record per logging interval, in order.
        epochs: one record per epoch, in order.
    """

    name: str
    train: list[Record] = field(default_factory=list)
    epochs: list[Record] = field(default_factory=list)

    def train_positions(self) -> list[float]:
        """Where each logging interval ended, in epochs."""
        steps: dict[int, int] = {}
        for record in self.train:
            steps[record["epoch"]] = max(steps.get(record["epoch"], 0), record["step"] + 1)
        per_epoch = max(steps.values(), default=1)  # of the last epoch, perhaps unfinished, too
        return [record["epoch"] + (record["step"] + 1) / per_epoch for record in self.train]

    def epoch_positions(self) -> list[float]:
        """Where each epoch ended, in epochs."""
        return [record["epoch"] + 1.0 for record in self.epochs]


def read_metrics(folder: Path) -> RunMetrics:
    """Read metrics.jsonl of an output folder.

    A run that was stopped and resumed may have done some steps twice; what the first attempt recorded from
    the point of resumption on is dropped. A line that cannot be read is skipped with a warning.

    Raises:
        FileNotFoundError: the folder or its metrics.jsonl does not exist.
        ValueError: nothing was recorded yet.
    """
    path = folder / METRICS_NAME
    if not path.is_file():
        found = "one without it" if folder.is_dir() else "no folder"
        raise FileNotFoundError(
            f"{folder}: expected the output folder of a training run, with {METRICS_NAME}, got {found}; "
            "name <output>/<model name>/<tag>"
        )
    metrics = RunMetrics(folder.name)
    lists = {"train": metrics.train, "epoch": metrics.epochs}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            record = _parse(line)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            logger.warning(f"{path}:{number}: skipped, expected a record of an interval or epoch ({reason})")
            continue
        for records in lists.values():
            while records and _position(records[-1]) >= _position(record):
                records.pop()
        lists[record["kind"]].append(record)
    if not (metrics.train or metrics.epochs):
        raise ValueError(f"{path}: expected at least one record, got none; train for one logging interval")
    return metrics


def _parse(line: str) -> Record:
    """A line as a record of known kind, with integer position and numbers or null as values."""
    record = json.loads(line)
    if record["kind"] not in ("train", "epoch"):
        raise ValueError(f"unknown kind {record['kind']!r}")
    for key in ("epoch", "step") if record["kind"] == "train" else ("epoch",):
        record[key] = int(record[key])
    for key, value in record.items():
        if key != "kind" and not isinstance(value, int | float | None):
            raise ValueError(f"{key} is {value!r}, no number")
    return record


def _position(record: Record) -> tuple[int, float]:
    """When a record was written: an epoch's comes after all of its steps."""
    return record["epoch"], record["step"] if record["kind"] == "train" else math.inf


def _column(records: list[Record], key: str) -> list[float]:
    """One value of every record; what is missing or was not finite is a gap in the line."""
    return [math.nan if record.get(key) is None else float(record[key]) for record in records]


def name_runs(folders: Sequence[Path]) -> list[str]:
    """The shortest endings of the folders' paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    longest = max(map(len, parts))
    for length in range(1, longest + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(folder) for folder in folders]


def draw(runs: Sequence[RunMetrics], out: Path) -> None:
    """Write the figure.

    Args:
        runs: in the order of the legend.
        out: file to write; its ending decides about the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(8, 9), layout="constrained")  # without pyplot: no window system, no global state
    axes = figure.subplots(3, 1, sharex=True)
    loss, accuracy, rate = axes
    for number, run in enumerate(runs):
        colour = f"C{number % 10}"
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        steps, ends = run.train_positions(), run.epoch_positions()
        dots = {"marker": "o", "markersize": 3} if len(ends) < MANY_POINTS else {}
        losses = _column(run.train, "loss")
        loss.plot(steps, losses, color=colour, alpha=0.45, label=f"{prefix}training, by interval")
        loss.plot(ends, _column(run.epochs, "val_loss"), color=colour, label=f"{prefix}validation", **dots)
        top1, top5 = _column(run.epochs, "acc1"), _column(run.epochs, "acc5")
        best = max((value for value in top1 if not math.isnan(value)), default=math.nan)
        accuracy.plot(ends, top1, color=colour, label=f"{prefix}top-1, best {best:.2f} %", **dots)
        accuracy.plot(ends, top5, color=colour, linestyle=":", label=f"{prefix}top-5")
        rate.plot(steps, _column(run.train, "lr"), color=colour, label=run.name)
    loss.set_ylabel("loss")
    accuracy.set_ylabel("validation accuracy (%)")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("epoch")
    rate.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes if len(runs) > 1 else (loss, accuracy):
        axis.legend(fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_xlim(left=0)
    figure.suptitle(runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for what the user can correct."""
    parser = argparse.ArgumentParser(description="Draw loss, accuracy and learning rate of runs.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUTPUT_FOLDER", help="of main.py")
    parser.add_argument("--out", type=Path, help=f"file to write (default: {DEFAULT_NAME} in the folder)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.out is None and len(args.folders) > 1:
        parser.error("--out is needed to compare several runs")
    out = args.out or args.folders[0] / DEFAULT_NAME
    try:
        runs = [read_metrics(folder) for folder in args.folders]
        for run, name in zip(runs, name_runs(args.folders), strict=True):
            run.name = name if len(runs) > 1 else "/".join(args.folders[0].resolve().parts[-2:])
        draw(runs, out)
    except (ValueError, OSError, ImportError) as error:
        logger.error(f"error: {error}")
        return 2
    logger.info(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
