"""Compiles the attention kernels for every GPU, without one, and reports what they take.

    python -m tools.benchmarks.compile_matrix --out tools/results
    python -m tools.benchmarks.compile_matrix --architectures sm_90 --models focal_tiny --dtypes bf16

Every distinct attention layer of really built models runs forward and backward under a `StubDriver`, for each
architecture and type of numbers, so that what is compiled is what training launches there. All of it takes
hours of one core. Also counts launches and the memory that training keeps, see `operator_costs`.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import FocalTransformer
from models.focal_transformer import FocalAttention, FocalBlock
from models.registry import VARIANTS

from . import common
from .kernel_figures import Figures, figures
from .operator_costs import SORTED_INDICES, SORTED_KERNELS, activations, count_launches
from .stub_driver import CARDS, StubDriver

logger = logging.getLogger("benchmark")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BATCH = 2  # images
COUNTED_ON = "sm_90"  # the card of launches and activations
WIDE_HEADS: dict[str, Any] = {"num_heads": (2, 4, 8, 16)}  # of width 64 in Focal-B
WINDOW_12: dict[str, Any] = {"img_size": 384, "window_size": 12}


def short_name(variant: str) -> str:
    """Without patch, window and size, which all variants share."""
    return variant.removesuffix("_patch4_window7_224")


MODELS: dict[str, tuple[str, dict[str, Any]]] = {short_name(name): (name, {}) for name in VARIANTS}
for _name in ("focal_tiny", "focalv2_tiny_useconv"):
    MODELS[f"{_name} window 12"] = (MODELS[_name][0], WINDOW_12)
for _name in ("focal_base", "focalv2_base_useconv"):
    MODELS[f"{_name} wide heads"] = (MODELS[_name][0], WIDE_HEADS)
    MODELS[f"{_name} wide heads window 12"] = (MODELS[_name][0], WINDOW_12 | WIDE_HEADS)


@dataclass(frozen=True)
class Layer:
    """An attention layer and the map that it gets."""

    model: str  # the first one that has it
    stage: int  # from 1
    attention: FocalAttention
    pools: nn.ModuleList
    height: int
    width: int

    def run(self, driver: StubDriver, dtype: torch.dtype) -> None:
        """Forward and backward under a driver, as in training with autocast."""
        with driver, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            self.attention(self.input(), self.pools).float().sum().backward()

    def input(self) -> Tensor:
        """A map [B, H, W, C] of zeros."""
        return torch.zeros(BATCH, self.height, self.width, self.attention.qkv.in_features, requires_grad=True)


def distinct_layers(models: Iterable[str]) -> list[Layer]:
    """The attention layers of models, without those that equal one before them in all but weights."""
    found: dict[Any, Layer] = {}
    for name in models:
        variant, options = MODELS[name]
        model = FocalTransformer(**VARIANTS[variant] | options, attention_backend="triton")
        size = model.train_resolution
        for number, stage in enumerate(model.stages, 1):
            for block in stage.blocks:
                assert isinstance(block, FocalBlock)
                layer = block.attn
                numbers = {k: v for k, v in vars(layer).items() if isinstance(v, (int, float, str))}
                key = (type(layer), layer.qkv.in_features, *size, *sorted(numbers.items()))
                found.setdefault(key, Layer(name, number, layer, block.pool_layers, *size))
            size = size if stage.downsample is None else stage.downsample.output_size(*size)
    return list(found.values())


@dataclass(frozen=True)
class Row:
    """A kernel of one layer on one card."""

    card: str
    dtype: str
    model: str
    stage: int
    head_dim: int
    figures: Figures

    def cells(self) -> list[common.Cell]:
        """In the order of COLUMNS."""
        return [self.card, self.dtype, self.model, self.stage, self.head_dim, *astuple(self.figures)]


COLUMNS = ["card", "dtype", "model", "stage", "head width", *(f.name for f in fields(Figures))]


def compile_layer(layer: Layer, card: str, dtype: str) -> list[Row]:
    """The kernels that a layer's forward and backward launch."""
    driver = StubDriver(card, keep_going=True)
    try:
        layer.run(driver, DTYPES[dtype])
        found = [figures(kernel, card) for kernel in driver.kernels]
    except ValueError as error:  # the operator says that it cannot run there
        found = [Figures("attention", "refused", common.short_reason(error))]
    head = (card, dtype, layer.model, layer.stage, layer.attention.head_dim)
    return [Row(*head, kernel) for kernel in found]


Job = tuple[Layer, str, str]  # layer, card, dtype
_jobs: list[Job] = []  # which the processes inherit


def _compile_job(number: int) -> list[Row]:
    torch.set_num_threads(1)
    return compile_layer(*_jobs[number])


def compile_all(jobs: Sequence[Job]) -> Iterator[list[Row]]:
    """`compile_layer` of each job, in as many processes as there are cores."""
    _jobs[:] = jobs
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_compile_job, range(len(jobs)))


def distinct_rows(jobs: Sequence[Job]) -> list[Row]:
    """The kernels of all jobs, each once for a card."""
    found: dict[Any, Row] = {}
    for (layer, card, dtype), rows in zip(jobs, compile_all(jobs), strict=True):
        verdicts = ", ".join(row.figures.verdict for row in rows)
        logger.info(f"{card} {dtype} {layer.model} stage {layer.stage}: {verdicts}")
        for row in rows:
            found.setdefault((card, row.figures.hash or row), row)
    return list(found.values())


def verdict_table(rows: Sequence[Row]) -> str:
    """How many kernels got which verdict, by card and dtype."""
    verdicts = ["ok", *sorted({row.figures.verdict for row in rows} - {"ok"})]
    counts = Counter((row.card, row.dtype, row.figures.verdict) for row in rows)
    groups = dict.fromkeys((row.card, row.dtype) for row in rows)
    cells = [[*group, *(counts[(*group, verdict)] for verdict in verdicts)] for group in groups]
    return "## Verdicts\n\n" + common.markdown_table(["card", "dtype", *verdicts], cells)


def fault_table(rows: Sequence[Row]) -> str:
    """The kernels that are not ok, alike ones in one line."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        if row.figures.verdict != "ok":
            key = (row.card, row.dtype, row.head_dim, row.figures.kernel, row.figures.verdict)
            groups.setdefault(key, []).append(row)
    cells = []
    for key, alike in groups.items():
        stack = max(row.figures.stack or 0 for row in alike)
        where = ", ".join(dict.fromkeys(f"{row.model} {row.stage}" for row in alike))
        reasons = "; ".join(dict.fromkeys(row.figures.reason for row in alike))
        cells.append([*key, reasons, stack, len(alike), where])
    columns = ["card", "dtype", "head width", "kernel", "verdict", "reason", "most stack", "kernels", "where"]
    return "## Kernels that are not ok\n\n" + common.markdown_table(columns, cells)


def figure_table(rows: Sequence[Row], models: Sequence[str]) -> str:
    """The kernels of the first stage of some models, with the most frequent instructions."""
    shown = [row for row in rows if row.model in models and row.stage == 1]
    cells: list[list[common.Cell]] = []
    for row in shown:
        f = row.figures
        numbers = [f.warps, f.stages, f.shared, f.registers, f.stack, f.spilled, f.tensor, f.blocks]
        most = ", ".join(f.classes.split(", ")[:8])
        cells.append(
            [row.card, row.dtype, row.model, f.kernel, *numbers, f.units, f.instructions, most, f.verdict]
        )
    names = ["warps", "stages", "shared", "registers", "stack", "spilled", "tensor", "blocks", "units"]
    columns = ["card", "dtype", "model", "kernel", *names, "instructions", "most frequent", "verdict"]
    return "## Figures of the first stage\n\n" + common.markdown_table(columns, cells)


def launch_table(layers: Sequence[Layer]) -> str:
    """Kernels between the two projections of each stage's layer."""
    cells: list[list[common.Cell]] = []
    for layer in layers:
        for name, kernels in count_launches(layer.attention, layer.pools, layer.input(), COUNTED_ON):
            listed = ", ".join(f"{kernel} {count}" for kernel, count in kernels.items())
            cells.append([layer.model, layer.stage, name, sum(kernels.values()), listed])
    columns = ["model", "stage", "pass", "launches", "of these"]
    return "## Launches between the projections\n\n" + common.markdown_table(columns, cells)


def activation_table() -> str:
    """What Focal-T keeps for backward, and Swin-T."""
    kept = activations(COUNTED_ON)
    cells = [[name, value, value / kept["swin_tiny"]] for name, value in kept.items()]
    title = "## Kept for backward\n\n"
    return title + common.markdown_table(["model", "MiB per image", "of swin_tiny's"], cells)


NOTES = [
    "Shared memory in bytes of a block; registers, stack and local memory (bytes) of a thread, on AMD "
    "scratch and spilled vector registers; tensor memory in columns; blocks that fit into an SM (on AMD a "
    "compute unit) by registers, shared memory, tensor memory and warps.",
    "Instructions: of the largest loop's body, per warp: over items (windows of images) in forward and query "
    "gradient, over pairs of window and block of queries in the key gradient. A loop inside counts once.",
    "A layer that several models share is listed under the first of them.",
    f"Launches and activations: as on {COUNTED_ON}, in training under autocast to bf16, with a batch of "
    f"{BATCH}. Launches are operations of ATen that start a kernel on CUDA, plus Triton's, from the output "
    "of qkv to the input of proj and back, the bias and its gradient included. embedding_dense_backward "
    f"counts 2 up to {SORTED_INDICES} indices and {SORTED_KERNELS} beyond, and a copy where its gradient is "
    "not contiguous.",
]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compile the attention kernels for GPUs that are not there.")
    parser.add_argument("--architectures", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a dated .md and .csv here")
    parser.add_argument("--name", default="compile", help="of the files")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a kernel is not ok."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    facts = common.describe_run(torch.device("cpu"))
    facts["Command"] = shlex.join(["python", "-m", "tools.benchmarks.compile_matrix", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        layers = distinct_layers(args.models)
        jobs = [(layer, card, t) for card in args.architectures for t in args.dtypes for layer in layers]
        rows = distinct_rows(jobs)
        first = {type(layer.attention): layer.model for layer in reversed(layers)}  # of each family
        main_layers = [layer for layer in layers if layer.model in first.values()]
        tables = [
            verdict_table(rows),
            fault_table(rows),
            figure_table(rows, [*first.values()]),
            launch_table(main_layers),
            activation_table(),
        ]
    report = common.markdown_report("Attention kernels, compiled for every GPU", facts, NOTES, tables)
    logger.info(report)
    if args.out is not None:
        stem = common.result_stem(args.out, args.name)
        (stem.parent / f"{stem.name}.md").write_text(report, encoding="utf-8")
        common.write_csv(stem.parent / f"{stem.name}.csv", COLUMNS, [row.cells() for row in rows])
    return int(any(row.figures.verdict != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
