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
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models import FocalTransformer
from models.focal_transformer import CoarseTokens, FocalAttention
from models.registry import VARIANTS
from utils import path_argument

from . import common
from .common import DTYPES
from .kernel_figures import Figures, figures
from .operator_costs import BATCH, activations, count_launches
from .stub_driver import CARDS, StubDriver

logger = logging.getLogger("benchmark")

COUNTED_ON = "sm_90"  # the card of launches and activations
WIDE_HEADS: dict[str, Any] = {"num_heads": (2, 4, 8, 16)}  # of width 64 in Focal-B
WINDOW_12: dict[str, Any] = {"img_size": 384, "window_size": 12}
MODELS: dict[str, dict[str, Any]] = {  # by short name: options of FocalTransformer
    name.removesuffix("_patch4_window7_224"): options for name, options in VARIANTS.items()
}
for _name in ("focal_tiny", "focalv2_tiny_useconv"):
    MODELS[f"{_name} window 12"] = MODELS[_name] | WINDOW_12
for _name in ("focal_base", "focalv2_base_useconv"):
    MODELS[f"{_name} wide heads"] = MODELS[_name] | WIDE_HEADS
    MODELS[f"{_name} wide heads window 12"] = MODELS[_name] | WINDOW_12 | WIDE_HEADS


@dataclass(frozen=True)
class Layer:
    """An attention layer and the map that it gets."""

    model: str  # the first one that has it
    stage: int  # from 1
    attention: FocalAttention
    pools: CoarseTokens
    height: int
    width: int

    def run(self, driver: StubDriver, dtype: torch.dtype) -> None:
        """Forward and backward under a driver, as in training with autocast."""
        with driver, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            x = self.input()
            self.attention(x, *self.pools(x)).float().sum().backward()

    def input(self) -> Tensor:
        """A map [B, H, W, C] of zeros."""
        return torch.zeros(BATCH, self.height, self.width, self.attention.qkv.in_features, requires_grad=True)


def distinct_layers(models: Iterable[str]) -> list[Layer]:
    """The attention layers of models, without those that equal one before them in all but weights."""
    found: dict[Any, Layer] = {}
    for name in models:
        model = FocalTransformer(**MODELS[name], attention_backend="triton")
        sizes = model.map_sizes(model.train_resolution)
        for number, (stage, size) in enumerate(zip(model.stages, sizes, strict=True), 1):
            for block in stage.blocks:
                layer = block.attn
                numbers = {k: v for k, v in vars(layer).items() if isinstance(v, (int, float, str))}
                key = (type(layer), layer.qkv.in_features, *size, *sorted(numbers.items()))
                found.setdefault(key, Layer(name, number, layer, block.pool_layers, *size))
    return list(found.values())


COLUMNS = ("card", "dtype", "model", "stage", "head width", *Figures._fields)
VERDICT, HASH = COLUMNS.index("verdict"), COLUMNS.index("hash")

Job = tuple[Layer, str, str]  # layer, card, dtype
Row = list[common.Cell]  # a kernel of one layer on one card, by COLUMNS


def _compile_job(job: Job) -> list[Row]:
    """The kernels that a layer's forward and backward launch."""
    torch.set_num_threads(1)
    layer, card, dtype = job
    driver = StubDriver(card, keep_going=True)
    try:
        layer.run(driver, DTYPES[dtype])
        found = [figures(kernel, card) for kernel in driver.kernels]
    except ValueError as error:  # the operator says that it cannot run there
        found = [Figures("attention", "refused", common.short_reason(error))]
    return [[card, dtype, layer.model, layer.stage, layer.attention.head_dim, *kernel] for kernel in found]


def compile_all(jobs: Sequence[Job]) -> Iterator[list[Row]]:
    """The kernels of each job, compiled in as many processes as there are cores."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(_compile_job, jobs)


def distinct_rows(jobs: Sequence[Job]) -> list[Row]:
    """The kernels of all jobs, each once for a card."""
    found: dict[Any, Row] = {}
    for (layer, card, dtype), rows in zip(jobs, compile_all(jobs), strict=True):
        verdicts = ", ".join(str(row[VERDICT]) for row in rows)
        logger.info(f"{card} {dtype} {layer.model} stage {layer.stage}: {verdicts}")
        for row in rows:
            found.setdefault((card, row[HASH] or tuple(row)), row)
    return list(found.values())


def verdict_table(rows: Sequence[Row]) -> str:
    """How many kernels got which verdict, by card and dtype."""
    counts = Counter((*row[:2], row[VERDICT]) for row in rows)
    cells = [[*kind, number] for kind, number in counts.items()]
    return "## Verdicts\n\n" + common.markdown_table(["card", "dtype", "verdict", "kernels"], cells)


def figure_table(title: str, rows: Iterable[Row]) -> str:
    """All columns but the hash, which is the last."""
    return f"## {title}\n\n" + common.markdown_table(COLUMNS[:-1], (row[:-1] for row in rows))


def launch_table(layers: Iterable[Layer]) -> str:
    """Kernels between the two projections of each stage's layer."""
    cells: list[list[common.Cell]] = []
    for layer in layers:
        counts = count_launches(layer.attention, layer.height, layer.width, COUNTED_ON)
        for name, kernels in counts.items():
            listed = ", ".join(f"{kernel} {count}" for kernel, count in kernels.items())
            cells.append([layer.model, layer.stage, name, kernels.total(), listed])
    columns = ["model", "stage", "pass", "launches", "of these"]
    return "## Launches between the projections\n\n" + common.markdown_table(columns, cells)


def activation_table() -> str:
    """What Focal-T keeps for backward, and Swin-T."""
    kept = activations(COUNTED_ON)
    cells = [[name, value, value / kept["swin_tiny"]] for name, value in kept.items()]
    columns = ["model", "MiB per image", "of swin_tiny's"]
    return "## Kept for backward\n\n" + common.markdown_table(columns, cells)


NOTES = [
    "Shared memory in bytes of a block; registers and stack (bytes) of a thread, on AMD vector registers and "
    "scratch; tensor memory in columns; blocks that fit into an SM (on AMD a compute unit) by registers, "
    "shared memory, tensor memory and warps.",
    "Instructions (NVIDIA): of the largest loop's body, per warp: over items (windows of images) in forward "
    "and query gradient, over pairs of window and block of queries in the key gradient. A loop inside counts "
    "once.",
    "A layer that several models share is listed under the first of them.",
    f"Launches and activations: as on {COUNTED_ON}, in training under autocast to bf16, with a batch of "
    f"{BATCH}. Launches are operations of ATen that start a kernel on CUDA, plus Triton's, from the output "
    "of qkv to the input of proj and back, the bias and its gradient included.",
]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compile the attention kernels for GPUs that are not there.")
    parser.add_argument("--architectures", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--out", type=path_argument, metavar="FOLDER", help="write a dated .md and .csv here")
    parser.add_argument("--name", default="compile", help="of the files")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a kernel is not ok."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    facts = common.describe_run(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        layers = distinct_layers(args.models)
        jobs = [(layer, card, t) for card in args.architectures for t in args.dtypes for layer in layers]
        rows = distinct_rows(jobs)
        first = {type(layer.attention): layer.model for layer in reversed(layers)}.values()  # of each family
        tables = [
            verdict_table(rows),
            figure_table("Kernels that are not ok", (row for row in rows if row[VERDICT] != "ok")),
            figure_table("The first stage", (row for row in rows if row[2] in first and row[3] == 1)),
            launch_table(layer for layer in layers if layer.model in first),
            activation_table(),
        ]
    title = "Attention kernels, compiled for every GPU"
    common.publish(args, title, facts, NOTES, COLUMNS, rows, tables)
    return int(any(row[VERDICT] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
