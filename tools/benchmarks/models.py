"""Compares the speed of models by resolution, mode, precision and compilation.

    python -m tools.benchmarks.models --preset cpu
    python -m tools.benchmarks.models --models focal-tiny focal-tiny:plain ../before@focal-tiny swin-tiny

Modes: `infer` is the forward pass without gradients; `train` is a training step: forward, cross entropy,
backward and AdamW. Inputs are on the device; precisions other than fp32 use autocast, fp16 also loss scaling.
All models of one size run in alternating rounds in one process; `vs swin` is the median of the ratios within
a round. The layout of a process's memory changes a model's time by several percent: compare small differences
over several runs. When memory runs out, the batch is halved for all models of the group; a model that cannot
run gets a row with the reason. Writes <date>_<name>.md, .csv and .png after every group.
"""

import argparse
import csv
import gc
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from utils import Precision

from . import common, entries
from .common import DTYPES, RESULTS
from .entries import Entry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("benchmarks.models")

BASELINE = "swin"
PRESETS = {
    "cpu": {"models": ["focal-tiny", "focalv2-tiny", "swin-tiny"], "device": "cpu"},
    "gpu": {
        "models": list(entries.FAMILIES),
        "sizes": [224, 448, 896],
        "precisions": ["bf16"],
        "compile": ["eager", "compiled"],
        "batch_size": 128,
        "device": "cuda",
    },
}
MODES = ("infer", "train")
COMPILE = ("eager", "compiled")
ROUND_SECONDS = {"cpu": 0.5, "cuda": 0.3}
WARM_UP_STEPS = {"cpu": 1, "cuda": 5}
HALVINGS = 4
NO_TIME = "left out: no time"
COLUMNS = (
    *("model", "resolution", "mode", "precision", "compile", "batch", "img/s", "lower quartile"),
    *("upper quartile", f"vs {BASELINE}", "ratio lower", "ratio upper", "peak MiB", "params M", "GMACs"),
    *("attention", "note"),
)
HIDDEN = {"mode", "precision", "compile"}  # in the heading of a table
HIDDEN |= {"lower quartile", "upper quartile", "ratio lower", "ratio upper"}  # beside the median
SHOWN = [column for column in COLUMNS if column not in HIDDEN]


@dataclass(frozen=True)
class Setting:
    """What the models of a group have in common."""

    size: str  # of the models
    resolution: int
    mode: str
    precision: str
    compile: str

    @property
    def panel(self) -> tuple[str, str, str]:
        """What the rows of a table have in common."""
        return self.mode, self.precision, self.compile

    def __str__(self) -> str:
        return f"{self.size or 'other'} {self.resolution} {self.mode} {self.precision} {self.compile}"


@dataclass
class Row:
    """A line of the table; what was not measured is None."""

    entry: Entry
    setting: Setting
    batch: int
    seconds: list[float] = field(default_factory=list)  # per step, by round
    ratio: common.Spread | None = None
    memory_mib: float | None = None
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
            *(ratio and ratio.median, ratio and ratio.lower, ratio and ratio.upper, self.memory_mib),
            *(self.params and self.params / 1e6, self.macs and self.macs / 1e9, self.attention, self.note),
        )
        return dict(zip(COLUMNS, values, strict=True))

    def shown(self) -> list[common.Cell]:
        """By column of SHOWN, with quartiles in brackets."""
        cells, rate, ratio = self.cells(), self.rate, self.ratio
        if rate is not None:
            quartiles = f"{common.show(rate.lower)}-{common.show(rate.upper)}"
            cells["img/s"] = f"{common.show(rate.median)} ({quartiles})"
        if ratio is not None:
            cells[f"vs {BASELINE}"] = f"{ratio.median:.2f} ({ratio.lower:.2f}-{ratio.upper:.2f})"
        return [cells[column] for column in SHOWN]


# --- Measuring ----------------------------------------------------------------------------------------------


def make_step(model: nn.Module, images: torch.Tensor, setting: Setting) -> Callable[[], object]:
    """One step of the setting's mode; it does not wait for the device."""
    device, precision = images.device, Precision(DTYPES[setting.precision])
    call = torch.compile(model, dynamic=False) if setting.compile == "compiled" else model
    if setting.mode == "infer":
        model.eval()

        def infer() -> torch.Tensor:
            with torch.no_grad(), precision.autocast(device):
                return call(images)

        return infer
    model.train()
    labels = torch.arange(len(images), device=device) % entries.CLASSES
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    scaler = precision.scaler(device)

    def train() -> None:
        with precision.autocast(device):
            loss = F.cross_entropy(call(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return train


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device, or of the host where PyTorch notices."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class Group:
    """The models of one setting, on the device together.

    Args:
        setting: of all models.
        group: the models.
        batch: images of a step.
        device: where they run.
        deadline: on the clock `time.monotonic`; no model is begun after it, and no round but the first.
    """

    def __init__(
        self,
        setting: Setting,
        group: Sequence[Entry],
        batch: int,
        device: torch.device,
        deadline: float = math.inf,
    ) -> None:
        self.setting, self.batch, self.device, self.deadline = setting, batch, device, deadline
        self.rows = [Row(entry, setting, batch) for entry in group]
        self.models: dict[str, nn.Module] = {}
        self.timers: dict[str, common.Timer] = {}

    def run(self, rounds: int) -> list[Row]:
        """Measure everything that runs."""
        self._each(self._build)
        self._fit_batch()
        self._each(self._warm_up)
        for number in range(rounds):
            if number and time.monotonic() > self.deadline:
                break
            for row in self._running() if number % 2 == 0 else reversed(self._running()):
                self._guarded(row, lambda row: row.seconds.append(self.timers[row.entry.label]()))
        self.models.clear()
        self.timers.clear()
        torch.compiler.reset()
        self._free_memory()
        return self.rows

    def _running(self) -> list[Row]:
        return [row for row in self.rows if not row.note]

    def _each(self, action: Callable[[Row], object]) -> None:
        for row in self._running():
            if self._in_time(row):
                self._guarded(row, action)

    def _in_time(self, row: Row) -> bool:
        if time.monotonic() > self.deadline:
            self._drop(row, NO_TIME)
        return not row.note

    def _guarded(self, row: Row, action: Callable[[Row], object]) -> None:
        """Do something; an error takes the model out of the group and becomes its note."""
        try:
            action(row)
        except Exception as error:  # whatever one model raises, the others go on
            self._fail(row, error)

    def _fail(self, row: Row, error: Exception) -> None:
        logger.debug("failed", exc_info=True)
        error.__traceback__ = None  # it holds tensors
        self._drop(row, f"failed: {common.short_reason(error)}")

    def _drop(self, row: Row, note: str) -> None:
        row.note, row.seconds = note, []
        self.models.pop(row.entry.label, None)
        self.timers.pop(row.entry.label, None)
        self._free_memory()

    def _build(self, row: Row) -> None:
        row.params, row.macs = entries.costs(row.entry, self.setting.resolution)
        torch.manual_seed(0)
        with self.device:
            model = entries.build(row.entry, self.setting.resolution)
        row.params = sum(parameter.numel() for parameter in model.parameters())
        self.models[row.entry.label] = model.to(self.device)
        row.attention = entries.attention_backends(model, DTYPES[self.setting.precision])

    def _images(self) -> torch.Tensor:
        side = self.setting.resolution
        return torch.randn(self.batch, 3, side, side, device=self.device)

    def _fit_batch(self) -> None:
        """Halve the batch until every model that runs at all can do a step."""
        least = max(1, self.batch >> HALVINGS)
        for row in self._running():
            model = self.models[row.entry.label]
            while self._in_time(row):
                try:
                    common.seconds_of(make_step(model, self._images(), self.setting), 1, self.device)
                    break
                except Exception as error:  # as in _guarded
                    if not is_out_of_memory(error) or self.batch <= least:
                        self._fail(row, error)
                        break
                    error.__traceback__ = None
                self.batch //= 2
                model.zero_grad()
                self._free_memory()
                logger.info(f"{row.entry.label}: out of memory, the group goes on with batch {self.batch}")
        for row in self.rows:
            row.batch = self.batch

    def _warm_up(self, row: Row) -> None:
        model, kind = self.models[row.entry.label], self.device.type
        model.zero_grad()
        step = make_step(model, self._images(), self.setting)
        held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        timer = common.Timer(step, self.device, ROUND_SECONDS[kind], WARM_UP_STEPS[kind], held)
        self.timers[row.entry.label], row.memory_mib = timer, timer.peak_mib

    def _free_memory(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def run_group(
    setting: Setting,
    group: Sequence[Entry],
    args: argparse.Namespace,
    deadline: float = math.inf,
) -> list[Row]:
    """Measure a group in this process; `args` has batch_size, device, threads and rounds."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    return Group(setting, group, args.batch_size, args.device, deadline).run(args.rounds)


def compare(rows: Sequence[Row]) -> None:
    """Set the ratios to the baseline of the same size."""
    for row in rows:
        name = entries.FAMILIES[BASELINE].get(row.setting.size)
        base = next((other for other in rows if other.entry.name == name), None)
        if base is not None and base.seconds and row.seconds:
            row.ratio = common.speed_ratio(row.seconds, base.seconds)


# --- Results ------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> list[str]:
    """One Markdown table per mode, precision and compilation, with a heading."""
    found = []
    for panel in dict.fromkeys(row.setting.panel for row in rows):
        lines = [row.shown() for row in rows if row.setting.panel == panel]
        found.append(f"## {', '.join(panel)}\n\n" + common.markdown_table(SHOWN, lines))
    return found


def draw(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Images per second, and the ratio to the baseline: one panel per resolution and table.

    Args:
        rows: by column of COLUMNS, as numbers or as text of a .csv file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error
    panels: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["img/s"]:
            panel = tuple(str(row[key]) for key in ("resolution", "mode", "precision", "compile"))
            panels.setdefault(panel, []).append(row)
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    most = max(map(len, panels.values()))
    figure = Figure(figsize=(6 * across, (1 + 0.25 * most) * down), layout="constrained")
    for place, (panel, shown) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(down, across, place)
        labels = [row["model"] for row in shown]
        colours = ["C0" if label.rpartition("-")[0] in entries.OURS else "0.7" for label in labels]
        bars = axes.barh(labels, [float(row["img/s"]) for row in shown], color=colours)
        ratios = [row[f"vs {BASELINE}"] for row in shown]
        axes.bar_label(bars, [f"{float(x):.2f}" if x else "" for x in ratios], padding=3, fontsize="small")
        axes.set(title=", ".join(panel), xlabel=f"images per second; beside the bar: times {BASELINE}")
        axes.margins(x=0.12)
        axes.set_ylim(most - 0.5, -0.5)
    return figure


def write(rows: Sequence[Row], facts: dict[str, str], notes: list[str], folder: Path, name: str) -> Path:
    """The three files, <folder>/<date>_<name> with their endings; returns the path of the Markdown one."""
    stem = common.result_stem(folder, name)
    path = stem.parent / f"{stem.name}.md"
    path.write_text(common.markdown_report("Speed", facts, notes, tables(rows)), encoding="utf-8")
    cells = [row.cells() for row in rows]
    common.write_csv(stem.parent / f"{stem.name}.csv", COLUMNS, [list(row.values()) for row in cells])
    if any(row.rate is not None for row in rows):
        draw(cells).savefig(stem.parent / f"{stem.name}.png", dpi=120)
    return path


NAMES_IN_CHECKOUTS = {"Focal-T": "focal-tiny", "Focal-fast-T": "focalv2-tiny"}


def committed_ratios(machine: str) -> dict[tuple[str, ...], tuple[float, str]]:
    """Ratios to Swin in the newest committed results of this kind of machine.

    Args:
        machine: as `describe_run` has it; the kind is its part before the first comma.

    Returns:
        By model, resolution and mode (float32, eager): the ratio, and the name of its file.
    """
    found: dict[tuple[str, ...], tuple[float, str]] = {}
    for name in sorted(common.git("ls-files", "--", str(RESULTS)).splitlines()):
        path = RESULTS / Path(name).name
        described = path.with_suffix(".md")
        is_table = path.suffix == ".csv" and path.is_file() and described.is_file()
        if not is_table or f"\n- Machine: {machine.split(',')[0]}," not in described.read_text("utf-8"):
            continue
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                ratio, mode = row.get("vs swin") or row.get("vs Swin-T"), row.get("mode") or row.get("pass")
                usual = (row.get("precision", "fp32"), row.get("compile", "eager"))
                today = (row.get("checkout", "."), row.get("attention") if "checkout" in row else "auto")
                if ratio and usual == ("fp32", "eager") and today == (".", "auto"):
                    model = NAMES_IN_CHECKOUTS.get(row["model"], row["model"])
                    found[model, row["resolution"], mode] = (float(ratio), path.name)
    return found


def log_regression(rows: Sequence[Row], machine: str) -> None:
    """Log each ratio beside the newest committed one of this kind of machine."""
    before, lines = committed_ratios(machine), []
    for row in rows:
        if row.ratio is not None and row.entry.label != f"{BASELINE}-{row.setting.size}":
            key = (row.entry.label, str(row.setting.resolution), row.setting.mode)
            lines.append([*key, row.ratio.median, *before.get(key, (None, None))])
    columns = ("model", "resolution", "mode", f"vs {BASELINE}", "committed", "in tools/results")
    logger.info(common.markdown_table(columns, lines))


# --- Command line -------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; its options override the preset."""
    parser = common.new_parser("Compare the speed of models.", "speed")
    parser.add_argument("--preset", choices=PRESETS, help="values of the options below")
    parser.add_argument(
        "--models", nargs="+", default=PRESETS["cpu"]["models"], help="families, family-size, configs, timm's"
    )
    parser.add_argument("--sizes", type=common.positive, nargs="+", default=[224], help="resolutions, pixels")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--compile", nargs="+", choices=COMPILE, default=["eager"])
    parser.add_argument("--batch-size", type=common.positive, default=8, help="halved when memory runs out")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time")
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(out=RESULTS, **PRESETS.get(preset, {}))
    args = parser.parse_args(argv)
    args.name = args.preset if args.preset and args.name == "speed" else args.name
    return args


def measure(args: argparse.Namespace) -> int:
    """Run all groups; the files are written after each."""
    deadline = time.monotonic() + 60 * args.minutes
    chosen = entries.entries(args.models)
    facts, rows = common.describe_run(args.device), []
    notes = [
        f"Median and quartiles of {args.rounds} alternating rounds; a ratio is the median of the ratios "
        "within a round. `train` is forward, cross entropy, backward and AdamW; stochastic depth "
        f"{entries.DROP_PATH} everywhere. Peak memory, on CUDA only, without other models."
    ]
    sizes = [size for size in (*entries.SIZES, "") if any(entry.size == size for entry in chosen)]
    settings = [
        Setting(size, resolution, mode, precision, compiled)  # in the order of running: small models first
        for resolution, size, mode, precision, compiled in product(
            args.sizes, sizes, args.modes, args.precisions, args.compile
        )
    ]
    for number, setting in enumerate(settings):
        if time.monotonic() > deadline:
            left = len(settings) - number
            notes.append(f"Stopped after {args.minutes:g} minutes with {left} groups to go.")
            break
        group = [entry for entry in chosen if entry.size == setting.size]
        logger.info(f"{setting}: {', '.join(entry.label for entry in group)}")
        new = run_group(setting, group, args, deadline)
        compare(new)
        logger.info(common.markdown_table(SHOWN, [row.shown() for row in new]))
        rows += new
        write(rows, facts, notes, args.out, args.name)
    if any(row.batch < args.batch_size for row in rows):
        notes.append(f"Memory ran out with batch {args.batch_size}; the column batch shows what was used.")
    if args.preset == "cpu":
        log_regression(rows, facts["Machine"])
    logger.info(f"wrote {write(rows, facts, notes, args.out, args.name)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for an error that the user can correct."""
    return common.run_command(parse(argv), measure)


if __name__ == "__main__":
    sys.exit(main())
