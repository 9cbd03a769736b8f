"""Draws loss, accuracy, learning rate and speed of one run, or of several runs for comparison.

    python tools/plot_run.py OUTPUT_FOLDER [OUTPUT_FOLDER ...] --out FILE [FILE ...]

An output folder is what main.py writes to; its metrics.jsonl is read. The horizontal axis counts epochs. The
ending of a file decides about its format: a picture (.png, .svg, .pdf), or a page (.html) with the curves, a
table of what was reached, and the options in which the runs differ. The page needs no other file and no
network.
"""

import argparse
import html
import io
import json
import logging
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger("plot_run")

METRICS_NAME = "metrics.jsonl"
CONFIG_NAME = "config.yaml"
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
        options: of its configuration, by dotted key; empty if it is not there.
    """

    name: str
    train: list[Record] = field(default_factory=list)
    epochs: list[Record] = field(default_factory=list)
    options: Record = field(default_factory=dict)

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
        except (ValueError, KeyError, TypeError, OverflowError) as error:
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


def read_options(folder: Path) -> Record:
    """The options in an output folder's config.yaml, by dotted key; none if it cannot be read."""
    path = folder / CONFIG_NAME
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        if path.exists():
            reason = " ".join(str(error).split())
            logger.warning(f"{path}: skipped, expected the configuration of the run, got: {reason}")
        return {}
    return _flatten(content) if isinstance(content, dict) else {}


def _flatten(section: Record, prefix: str = "") -> Record:
    flat: Record = {}
    for key, value in section.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# --- Curves -------------------------------------------------------------------------------------------------


def draw(runs: Sequence[RunMetrics]) -> "Figure":
    """The curves of runs, in the order of the legend.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(runs) > 1 else {}
    size = (12 if beside else 8, 11)
    figure = Figure(figsize=size, layout="constrained")  # without pyplot: no window system, no global state
    axes = figure.subplots(len(PANELS), 1, sharex=True)
    for number, run in enumerate(runs):
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        for panel, axis in zip(PANELS.values(), axes, strict=True):
            panel(axis, run, f"C{number % 10}", prefix)
    for title, axis in zip(PANELS, axes, strict=True):
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.set_xlim(left=0)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small", **beside)
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    return figure


def _dots(run: RunMetrics) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(run.epochs) < MANY_POINTS else {}


def _draw_loss(axis: "Axes", run: RunMetrics, colour: str, prefix: str) -> None:
    steps, ends = run.train_positions(), run.epoch_positions()
    losses = _column(run.train, "loss")
    axis.plot(steps, losses, color=colour, alpha=0.45, label=f"{prefix}training, by interval")
    axis.plot(ends, _column(run.epochs, "val_loss"), color=colour, label=f"{prefix}validation", **_dots(run))


def _draw_accuracy(axis: "Axes", run: RunMetrics, colour: str, prefix: str) -> None:
    ends, top1 = run.epoch_positions(), _column(run.epochs, "acc1")
    best = best_of(run, "acc1")
    axis.plot(ends, top1, color=colour, label=f"{prefix}top-1, best {best:.2f} %", **_dots(run))
    axis.plot(ends, _column(run.epochs, "acc5"), color=colour, linestyle=":", label=f"{prefix}top-5")
    averaged, best = _column(run.epochs, "acc1_ema"), best_of(run, "acc1_ema")
    if not math.isnan(best):
        label = f"{prefix}top-1 of the average, best {best:.2f} %"
        axis.plot(ends, averaged, color=colour, linestyle="--", label=label)


def _draw_rate(axis: "Axes", run: RunMetrics, colour: str, prefix: str) -> None:
    name = run.name if prefix else None
    axis.plot(run.train_positions(), _column(run.train, "lr"), color=colour, label=name)


def _draw_speed(axis: "Axes", run: RunMetrics, colour: str, prefix: str) -> None:
    median = speed_of(run)
    label = f"{prefix}median {median:.3g}"
    axis.plot(run.train_positions(), _column(run.train, "img_per_s"), color=colour, label=label)
    axis.set_ylim(bottom=0)


PANELS = {
    "loss": _draw_loss,
    "validation accuracy (%)": _draw_accuracy,
    "learning rate": _draw_rate,
    "images per second": _draw_speed,
}


# --- The page -----------------------------------------------------------------------------------------------


def best_of(run: RunMetrics, *keys: str) -> float:
    """The largest value of the epochs under any of the keys, nan if there is none."""
    values = [value for key in keys for value in _column(run.epochs, key)]
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def speed_of(run: RunMetrics) -> float:
    """Median images per second of the logging intervals, nan if there is none."""
    values = [value for value in _column(run.train, "img_per_s") if not math.isnan(value)]
    return statistics.median(values) if values else math.nan


def summary(runs: Sequence[RunMetrics]) -> list[list[str]]:
    """What the runs reached, one row each, under a row of headings."""
    rows = [["run", "epochs", "best top-1 (%)", "last loss", "last validation loss", "images/s", "hours"]]
    for run in runs:
        losses = (
            _column(records, key)[-1:] for records, key in ((run.train, "loss"), (run.epochs, "val_loss"))
        )
        last, last_val = (values[0] if values else math.nan for values in losses)
        minutes = sum(value for value in _column(run.epochs, "minutes") if not math.isnan(value))
        best = best_of(run, "acc1", "acc1_ema")  # as best.pth, which holds both weights
        numbers = ((best, ".2f"), (last, ".4g"), (last_val, ".4g"))
        numbers += ((speed_of(run), ".4g"), (minutes / 60, ".2f"))
        shown = ["-" if math.isnan(value) else f"{value:{form}}" for value, form in numbers]
        rows.append([run.name, str(len(run.epochs)), *shown])
    return rows


def differences(runs: Sequence[RunMetrics]) -> list[list[str]]:
    """The options in which the runs differ, one row each, under a row of their names."""
    keys = sorted({key for run in runs for key in run.options})
    rows = [["option", *(run.name for run in runs)]]
    for key in keys:
        values = [str(run.options.get(key, "-")) for run in runs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return rows


STYLE = (
    "body{font:15px/1.5 sans-serif;margin:2em auto;max-width:60em;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}"
    "th,td{border-bottom:1px solid #ccc;padding:.3em .8em;text-align:right;white-space:nowrap}"
    "th:first-child,td:first-child{text-align:left}svg{max-width:100%;height:auto}"
)


def _as_table(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def page(runs: Sequence[RunMetrics], figure: "Figure") -> str:
    """One HTML file with everything in it: the curves as SVG, what was reached, and what differs."""
    drawn = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(drawn, format="svg", metadata=no_metadata)
    curves = drawn.getvalue()
    title = html.escape(runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    different = differences(runs)
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        _as_table(summary(runs)),
        curves[curves.index("<svg") :],
        f"<h2>Options that differ</h2>\n{_as_table(different)}" if len(different) > 1 else "",
        "</body></html>",
    ]
    return "\n".join(filter(None, parts)) + "\n"


def write(runs: Sequence[RunMetrics], out: Path) -> None:
    """Write a picture, or a page if the name ends in .html.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: it does not know the format.
    """
    if not out.suffix:
        raise ValueError(f"--out: expected a name that ends in .png, .html or the like, got {out}")
    figure = draw(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix.lower() in (".html", ".htm"):
        out.write_text(page(runs, figure), encoding="utf-8")
    else:
        figure.savefig(out, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for what the user can correct."""
    parser = argparse.ArgumentParser(description="Draw loss, accuracy, learning rate and speed of runs.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUTPUT_FOLDER", help="of main.py")
    parser.add_argument(
        "--out",
        nargs="+",
        type=Path,
        metavar="FILE",
        help=f"files to write, .png or .html (default: {DEFAULT_NAME} in the folder)",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.out is None and len(args.folders) > 1:
        parser.error("--out is needed to compare several runs")
    try:
        runs = [read_metrics(folder) for folder in args.folders]
        for run, folder, name in zip(runs, args.folders, name_runs(args.folders), strict=True):
            run.name = name if len(runs) > 1 else "/".join(folder.resolve().parts[-2:])
            run.options = read_options(folder)
        for out in args.out or [args.folders[0] / DEFAULT_NAME]:
            write(runs, out)
            logger.info(f"wrote {out}")
    except (ValueError, OSError, ImportError) as error:
        logger.error(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
