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
    """The Markdown file: one table per mode, precision and compilation."""
    tables = []
    for panel in dict.fromkeys(row.setting.panel for row in rows):
        lines = [shown(row) for row in rows if row.setting.panel == panel]
        if lines:
            tables.append(f"## {', '.join(panel)}\n\n" + common.markdown_table(SHOWN, lines))
    return common.markdown_report("Speed", facts, notes, tables)


def shown(row: Row) -> list[common.Cell]:
    """The columns of the Markdown table; quartiles in brackets."""
    cells, rate, ratio = row.cells(), row.rate, row.ratio
    if rate is not None:
        cells["img/s"] = f"{common.show(rate.median)} ({common.show(rate.lower)}-{common.show(rate.upper)})"
    if ratio is not None:
        cells[f"vs {BASELINE}"] = f"{ratio.median:.2f} ({ratio.lower:.2f}-{ratio.upper:.2f})"
    return [cells[column] for column in SHOWN]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Images per second against resolution: one panel per mode, precision, compilation and size.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error
    panels: dict[tuple[str, ...], dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if row.rate is not None:
            lines = panels.setdefault((*row.setting.panel, row.entry.size), {})
            lines.setdefault(row.entry.label, []).append((row.setting.resolution, row.rate.median))
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(6 * across, 4 * down), layout="constrained")
    for place, (panel, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(down, across, place)
        for number, (label, points) in enumerate(lines.items()):
            is_ours = label.rpartition("-")[0] in OURS
            style = {"linewidth": 2.5} if is_ours else {"linewidth": 1.2, "linestyle": "--"}
            axes.plot(
                *zip(*sorted(points), strict=True), color=f"C{number % 10}", label=label, marker="o", **style
            )
        axes.set(title=", ".join(filter(None, panel)), xlabel="resolution (pixels)", ylabel="img/s")
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(sorted({resolution for points in lines.values() for resolution, _ in points}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_formatter("")
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_formatter("{x:.3g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="x-small", ncols=2)
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
