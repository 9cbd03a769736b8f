"""Compares the speed of models by resolution, mode, precision and compilation.

    python -m tools.benchmarks.models --device cuda --precisions bf16 --batch-size 128 --sizes 224 448 896
    python -m tools.benchmarks.models --models focal-tiny focal-tiny:plain swin-tiny

Modes: `infer` is the forward pass without gradients; `train` is a training step: forward, cross entropy,
backward and AdamW. Inputs are on the device; precisions other than fp32 use autocast, fp16 also loss scaling.
All models of one size run in alternating rounds in one process; `vs swin` is the median of the ratios within
a round. The layout of a process's memory changes a model's time by several percent: compare small differences
over several runs. When memory runs out, the batch is halved for all models of the group; a model that cannot
run gets a row with the reason. Writes <date>_<name>.md, .csv and .png after every group.
"""

import argparse
import gc
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from tools.figures.drawing import blank_figure
from utils import Precision

from . import common, entries
from .common import DTYPES, Spread, Timer
from .entries import Entry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("benchmarks.models")

BASELINE = "swin"
MODES = ("infer", "train")
COMPILE = ("eager", "compiled")
ROUND_SECONDS = {"cpu": 0.5, "cuda": 0.3}
WARM_UP_STEPS = {"cpu": 1, "cuda": 5}
HALVINGS = 4
NO_MEMORY = "failed: out of memory"
COLUMNS = (
    *("model", "resolution", "mode", "precision", "compile", "batch", "img/s", f"vs {BASELINE}"),
    *("peak MiB", "params M", "GMACs", "attention", "note"),
)


class Setting(NamedTuple):
    """What the models of a group have in common."""

    size: str  # of the models
    resolution: int
    mode: str
    precision: str
    compile: str


@dataclass
class Row:
    """A line of the table; what was not measured is None."""

    entry: Entry
    setting: Setting
    batch: int
    seconds: list[float] = field(default_factory=list)  # per step, by round
    ratio: Spread | None = None
    memory_mib: float | None = None
    params: int | None = None
    macs: int | None = None
    attention: str | None = None
    note: str = ""

    @property
    def rate(self) -> Spread | None:
        """Images per second."""
        return Spread.of([self.batch / value for value in self.seconds]) if self.seconds else None

    def cells(self) -> list[common.Cell]:
        """By COLUMNS."""
        millions, billions = self.params and self.params / 1e6, self.macs and self.macs / 1e9
        speed = (self.batch, self.rate, self.ratio, self.memory_mib)
        return [self.entry.label, *self.setting[1:], *speed, millions, billions, self.attention, self.note]


# --- Measuring ----------------------------------------------------------------------------------------------


def make_step(model: nn.Module, images: torch.Tensor, setting: Setting) -> Callable[[], object]:
    """What is timed: a forward pass or a training step."""
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

    def train() -> torch.Tensor:
        with precision.autocast(device):
            loss = F.cross_entropy(call(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return train


@contextmanager
def errors_noted(row: Row, timers: dict[str, Timer]) -> Iterator[None]:
    """An error inside takes the model out of its group and becomes its note."""
    try:
        yield
    except Exception as error:  # whatever one model raises, the others go on
        lacks_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        row.note = NO_MEMORY if lacks_memory else f"failed: {common.short_reason(error)}"
        row.seconds = []
        timers.pop(row.entry.label, None)
        error.__traceback__ = None  # it holds tensors
        free_memory()


def free_memory() -> None:
    """Give back what no model uses any more."""
    gc.collect()
    torch.cuda.empty_cache()


def run_group(
    setting: Setting,
    group: Sequence[Entry],
    batch: int,
    rounds: int,
    device: torch.device,
) -> list[Row]:
    """Measure models that are on the device together.

    Args:
        setting, group: of which models.
        batch: images of a step; halved, HALVINGS times at most, until all models have enough memory.
        rounds, device: of measuring.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rows = [Row(entry, setting, batch) for entry in group]
    timers: dict[str, Timer] = {}
    least = max(1, batch >> HALVINGS)
    while True:
        images = torch.randn(batch, 3, setting.resolution, setting.resolution, device=device)
        for row in rows:
            row.batch, row.note = batch, ""
            with errors_noted(row, timers):
                timers[row.entry.label] = warmed_up(row, images)
            if row.note == NO_MEMORY and batch > least:
                break
        else:
            break
        batch = max(least, batch // 2)
        logger.info(f"{row.entry.label}: out of memory, the group goes on with batch {batch}")
        timers.clear()
        free_memory()
    for number in range(rounds):
        for row in rows if number % 2 == 0 else reversed(rows):
            if row.entry.label in timers:
                with errors_noted(row, timers):
                    row.seconds.append(timers[row.entry.label]())
    timers.clear()
    torch.compiler.reset()
    free_memory()
    for row in rows:
        base = [other for other in rows if other.entry.source == entries.FAMILIES[BASELINE].get(setting.size)]
        if base and base[0].seconds and row.seconds:
            row.ratio = common.speed_ratio(row.seconds, base[0].seconds)
    return rows


def warmed_up(row: Row, images: torch.Tensor) -> Timer:
    """Build a row's model, fill in what is known of it, and do its first steps."""
    device = images.device
    row.macs = entries.multiply_adds(row.entry, row.setting.resolution)
    others = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    torch.manual_seed(0)
    with device:
        model = entries.build(row.entry, row.setting.resolution).to(device)
    row.params = sum(parameter.numel() for parameter in model.parameters())
    row.attention = entries.attention_backends(model, DTYPES[row.setting.precision])
    step = make_step(model, images, row.setting)
    timer = Timer(step, device, ROUND_SECONDS[device.type], WARM_UP_STEPS[device.type])
    row.memory_mib = (timer.peak - others) / 2**20 if device.type == "cuda" else None
    return timer


# --- Results ------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row]) -> "Figure | None":
    """Images per second, and the ratio to the baseline: a panel per setting. None without a measurement."""
    panels: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.rate:
            panels.setdefault(row.setting[1:], []).append(row)
    if not panels:
        return None
    down, most = -(-len(panels) // 2), max(map(len, panels.values()))
    figure = blank_figure(figsize=(12, (1 + 0.25 * most) * down))
    for place, (panel, shown) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(down, 2, place)
        labels = [row.entry.label for row in shown]
        colours = ["C0" if label.rpartition("-")[0] in entries.OURS else "0.7" for label in labels]
        bars = axes.barh(labels, [row.rate.median for row in shown], color=colours)
        ratios = [f"{row.ratio.median:.2f}" if row.ratio else "" for row in shown]
        axes.bar_label(bars, ratios, padding=3, fontsize="small")
        title = ", ".join(map(str, panel))
        axes.set(title=title, xlabel=f"images per second; beside the bar: times {BASELINE}")
        axes.margins(x=0.12)
        axes.set_ylim(most - 0.5, -0.5)
    return figure


# --- Command line -------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.new_parser("Compare the speed of models.", "speed")
    models = ["focal-tiny", "focalv2-tiny", "swin-tiny"]
    parser.add_argument("--models", nargs="+", default=models, help="families, family-size, configs, timm's")
    parser.add_argument("--sizes", type=common.positive, nargs="+", default=[224], help="resolutions, pixels")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--compile", nargs="+", choices=COMPILE, default=["eager"])
    parser.add_argument("--batch-size", type=common.positive, default=8, help="halved when memory runs out")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> int:
    """Run all groups; the files are written after each."""
    blank_figure()  # says that matplotlib is missing before, not after measuring
    chosen = entries.entries(args.models)
    facts, rows = common.describe_run(args.device), []
    notes = [
        f"Median and quartiles of {args.rounds} alternating rounds; a ratio is the median of the ratios "
        "within a round. `train` is forward, cross entropy, backward and AdamW; stochastic depth "
        f"{entries.DROP_PATH} everywhere. Peak memory, on CUDA only, without other models. Where memory ran "
        f"out with batch {args.batch_size}, the column batch shows less."
    ]
    sizes = [size for size in (*entries.SIZES, "") if any(entry.size == size for entry in chosen)]
    small_first = product(args.sizes, sizes, args.modes, args.precisions, args.compile)
    for resolution, size, mode, precision, compiled in small_first:
        setting = Setting(size, resolution, mode, precision, compiled)
        group = [entry for entry in chosen if entry.size == size]
        logger.info(f"{setting}: {', '.join(entry.label for entry in group)}")
        rows += run_group(setting, group, args.batch_size, args.rounds, args.device)
        cells, figure = [row.cells() for row in rows], draw(rows)
        common.publish(args, "Speed", facts, notes, COLUMNS, cells, figure=figure)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for an error that the user can correct."""
    return common.run_command(parse(argv), measure)


if __name__ == "__main__":
    sys.exit(main())
