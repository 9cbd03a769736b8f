"""Compiles the attention kernels for every GPU, without one, and reports what they take.

    python -m tools.benchmarks.compile_matrix --out tools/results
    python -m tools.benchmarks.compile_matrix --architectures sm_90 --models focal_tiny --dtypes bf16

Every distinct attention layer of really built models runs forward and backward under a `StubDriver`, for each
architecture and type of numbers, so that what is compiled is what training launches there.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models import FocalTransformer
from models.focal_transformer import FocalAttention, FocalBlock
from models.registry import VARIANTS
from tools import benchmark_common as common

from .kernel_figures import Figures, figures
from .stub_driver import CARDS, StubDriver

logger = logging.getLogger("benchmark")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BATCH = 2  # images
WIDE_HEADS: dict[str, Any] = {"num_heads": (2, 4, 8, 16)}  # of width 64 in Focal-B
LARGE: dict[str, Any] = {"img_size": 384, "window_size": 12}


def short_name(variant: str) -> str:
    """Without patch, window and size, which all variants share."""
    return variant.removesuffix("_patch4_window7_224")


MODELS: dict[str, tuple[str, dict[str, Any]]] = {short_name(name): (name, {}) for name in VARIANTS}
for _name in ("focal_tiny", "focalv2_tiny_useconv"):
    MODELS[f"{_name} window 12"] = (MODELS[_name][0], LARGE)
for _name in ("focal_base", "focalv2_base_useconv"):
    MODELS[f"{_name} wide heads"] = (MODELS[_name][0], WIDE_HEADS)
    MODELS[f"{_name} wide heads window 12"] = (MODELS[_name][0], LARGE | WIDE_HEADS)


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
        x = torch.zeros(BATCH, self.height, self.width, self.attention.qkv.in_features, requires_grad=True)
        with driver, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            self.attention(x, self.pools).float().sum().backward()


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


_layers: list[Layer] = []  # for the processes, which inherit it


def _compile_job(job: tuple[int, str, str]) -> list[Row]:
    number, card, dtype = job
    torch.set_num_threads(1)
    return compile_layer(_layers[number], card, dtype)


def compile_all(layers: Sequence[Layer], cards: Sequence[str], dtypes: Sequence[str]) -> list[Row]:
    """All kernels, each once, compiled in as many processes as there are cores."""
    jobs = [(i, card, dtype) for card in cards for dtype in dtypes for i in range(len(layers))]
    _layers[:] = layers
    found: dict[Any, Row] = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("fork")) as pool:
        for rows in pool.map(_compile_job, jobs):
            for row in rows:
                logger.debug(" ".join(map(str, row.cells())))
                found.setdefault((row.card, row.figures.hash or row), row)
    return list(found.values())


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
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        rows = compile_all(distinct_layers(args.models), args.architectures, args.dtypes)
    cells = [row.cells() for row in rows]
    common.publish(args.out, args.name, "Kernels by GPU, compiled", facts, [], COLUMNS, cells)
    logger.info(Counter(row.figures.verdict for row in rows))
    return int(any(row.figures.verdict != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
