"""The files that tools/benchmark.py writes: a Markdown table, the same as CSV, and a plot."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import benchmark_common as common
from benchmark_models import OURS, Entry

BASELINE = "swin"
COLUMNS = (
    *("model", "resolution", "mode", "precision", "compile", "batch", "img/s", "lower quartile"),
    *("upper quartile", f"vs {BASELINE}", "ratio lower", "ratio upper", "peak MiB", "params M", "GMACs"),
    *("attention", "note"),
)
HIDDEN = {"mode", "precision", "compile"}  # in a table's heading
HIDDEN |= {"lower quartile", "upper quartile", "ratio lower", "ratio upper"}  # beside the median
SHOWN = [column for column in COLUMNS if column not in HIDDEN]


@dataclass(frozen=True)
class Setting:
    """What a group has in common."""

    size: str  # class of model size
    resolution: int
    mode: str
    precision: str
    compile: str

    @property
    def panel(self) -> tuple[str, str, str]:
        """What a table or panel has in common."""
        return self.mode, self.precision, self.compile

    def __str__(self) -> str:
        return f"{self.size or 'other'} {self.resolution} {self.mode} {self.precision} {self.compile}"


@dataclass
class Row:
    """A line of the table; what was not measured is None."""

    entry: Entry
    setting: Setting
    batch: int
    steps: int = 1  # of a turn
    seconds: list[float] = field(default_factory=list)  # per step, by round
    ratio: common.Spread | None = None
    memory_mb: float | None = None
    params: int | None = None
    macs: int | None = None
    attention: str | None = None
    note: str = ""

    @property
    def rate(self) -> common.Spread | None:
        """Images per second."""
        return common.Spread.of([self.batch / value for value in self.seconds]) if self.seconds else None

    def cells(self) -> dict[str, common.Cell]:
        """By column."""
        rate, ratio, setting = self.rate, self.ratio, self.setting
        values = (
            *(self.entry.label, setting.resolution, setting.mode, setting.precision, setting.compile),
            *(self.batch, rate and rate.median, rate and rate.lower, rate and rate.upper),
            *(ratio and ratio.median, ratio and ratio.lower, ratio and ratio.upper, self.memory_mb),
            *(self.params and self.params / 1e6, self.macs and self.macs / 1e9, self.attention, self.note),
        )
        return dict(zip(COLUMNS, values, strict=True))


def report(rows: Sequence[Row], facts: dict[str, str], notes: list[str]) -> str:
    """The Markdown file."""
    return common.markdown_report("Speed", facts, notes, tables(rows))


def tables(rows: Sequence[Row]) -> list[str]:
    """One Markdown table per mode, precision and compilation, each below its heading."""
    found = []
    for panel in dict.fromkeys(row.setting.panel for row in rows):
        lines = [shown(row) for row in rows if row.setting.panel == panel]
        found.append(f"## {', '.join(panel)}\n\n" + common.markdown_table(SHOWN, lines))
    return found


def shown(row: Row) -> list[common.Cell]:
    """The columns of the Markdown table; quartiles in brackets."""
    cells, rate, ratio = row.cells(), row.rate, row.ratio
    if rate is not None:
        cells["img/s"] = f"{common.show(rate.median)} ({common.show(rate.lower)}-{common.show(rate.upper)})"
    if ratio is not None:
        cells[f"vs {BASELINE}"] = f"{ratio.median:.2f} ({ratio.lower:.2f}-{ratio.upper:.2f})"
    return [cells[column] for column in SHOWN]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Images per second, and the ratio to the baseline: one panel per resolution and table.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error
    panels: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.rate is not None:
            panels.setdefault((row.setting.resolution, *row.setting.panel), []).append(row)
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    most = max(map(len, panels.values()))
    figure = Figure(figsize=(6 * across, (1 + 0.25 * most) * down), layout="constrained")
    for place, (panel, shown_rows) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(down, across, place)
        labels, rates = zip(*((row.entry.label, row.rate.median) for row in shown_rows), strict=True)
        is_ours = [label.rpartition("-")[0] in OURS for label in labels]
        bars = axes.barh(labels, rates, color=["C0" if ours else "0.7" for ours in is_ours])
        ratios = [f"{row.ratio.median:.2f}" if row.ratio else "" for row in shown_rows]
        axes.bar_label(bars, ratios, padding=3, fontsize="small")
        axes.set(title=", ".join(map(str, panel)), xlabel=f"img/s; at the bar: times {BASELINE} of its size")
        axes.margins(x=0.12)
        axes.set_ylim(most - 0.5, -0.5)
    figure.savefig(path, dpi=120)


def write(rows: Sequence[Row], facts: dict[str, str], notes: list[str], folder: Path, name: str) -> Path:
    """The three files, <folder>/<date>_<name> with their endings; the path of the Markdown one."""
    stem = common.result_stem(folder, name)
    path = stem.parent / f"{stem.name}.md"
    path.write_text(report(rows, facts, notes), encoding="utf-8")
    common.write_csv(stem.parent / f"{stem.name}.csv", COLUMNS, [list(row.cells().values()) for row in rows])
    if any(row.rate is not None for row in rows):
        draw(rows, stem.parent / f"{stem.name}.png")
    return path
