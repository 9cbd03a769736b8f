"""Compiles the attention kernels for every GPU, without one, and reports what they take.

    python -m tools.benchmarks.compile_matrix --out tools/results
    python -m tools.benchmarks.compile_matrix --architectures sm_90 --models focal_tiny --dtypes bf16

Every distinct attention layer of really built models runs forward and backward under a `StubDriver`, for each
architecture and type of numbers, so that what is compiled is what training launches there. All of it takes
hours of one core. Resources are read from the binary with NVIDIA's cuobjdump, which Triton brings, or from
the assembly with AMD's metadata.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton.runtime.errors import OutOfResources

from models import FocalTransformer
from models.focal_transformer import FocalAttention
from models.registry import VARIANTS
from utils import path_argument

from . import common
from .common import DTYPES
from .stub_driver import CARDS, Kernel, StubDriver

logger = logging.getLogger("benchmark")

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
UNITS = ("cp.async", "wgmma", "tcgen05", "mma.sync", "mfma", "wmma")
BATCH = 2
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


# --- What a kernel takes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A kernel of one layer on one card; None is what was not compiled, or what a card does not have."""

    card: str
    dtype: str
    model: str
    stage: int
    head_width: int
    kernel: str
    verdict: str  # ok, spills, out of resource, does not compile, refused
    reason: str = ""
    warps: int | None = None
    stages: int | None = None
    shared: int | None = None  # bytes of a block
    registers: int | None = None  # of a thread
    stack: int | None = None  # bytes of a thread; AMD: scratch
    local: int | None = None  # bytes of a thread
    spilled: int | None = None  # vector registers of a thread (AMD)
    tensor: int | None = None  # columns of tensor memory
    units: str = ""  # which of UNITS it uses
    hash: str = ""  # of the compiled kernel


COLUMNS = [field.name for field in fields(Row)]


def resources(kernel: Kernel, card: str) -> dict[str, Any]:
    """Fields of `Row` for a kernel that was compiled for a card."""
    found = {"kernel": kernel.name, "reason": reason_of(kernel.error)}
    if kernel.compiled is None:
        return found | {"verdict": "does not compile"}
    asm, metadata = kernel.compiled.asm, kernel.compiled.metadata
    if CARDS[card].target.backend == "cuda":
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", resource_usage(asm["cubin"])))
        registers, stack, local = (int(usage[name]) for name in ("REG", "STACK", "LOCAL"))
        text, spilled = asm["ptx"], None
    else:
        text, local = asm["amdgcn"], None
        registers, stack, spilled = (
            int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
            for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        )
    spills = bool(stack or local or spilled)
    return found | {
        "verdict": "out of resource" if kernel.error else "spills" if spills else "ok",
        "warps": metadata.num_warps,
        "stages": metadata.num_stages,
        "shared": metadata.shared,
        "registers": registers,
        "stack": stack,
        "local": local,
        "spilled": spilled,
        "tensor": getattr(metadata, "tmem_size", None) or None,
        "units": " ".join(name for name in UNITS if re.search(rf"{re.escape(name)}(?!\.bulk)", text)),
        "hash": kernel.compiled.hash,
    }


def reason_of(error: Exception | None) -> str:
    """An error in one line: what ran out, or what Triton's compiler says last."""
    if error is None:
        return ""
    if isinstance(error, OutOfResources):
        return f"{error.name}: {error.required} of {error.limit}"
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def resource_usage(cubin: bytes) -> str:
    """What cuobjdump prints of a binary's resources."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# --- Which kernels there are --------------------------------------------------------------------------------


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
        model = FocalTransformer(**MODELS[name], attention_backend="triton")
        size = model.train_resolution
        for number, stage in enumerate(model.stages, 1):
            for block in stage.blocks:
                layer = block.attn
                numbers = {k: v for k, v in vars(layer).items() if isinstance(v, (int, float, str))}
                key = (type(layer), layer.qkv.in_features, *size, *sorted(numbers.items()))
                found.setdefault(key, Layer(name, number, layer, block.pool_layers, *size))
            size = size if stage.downsample is None else stage.downsample.output_size(*size)
    return list(found.values())


def compile_layer(layer: Layer, card: str, dtype: str) -> list[Row]:
    """The kernels that a layer's forward and backward launch."""
    driver = StubDriver(card, keep_going=True)
    try:
        layer.run(driver, DTYPES[dtype])
        found = [resources(kernel, card) for kernel in driver.kernels]
    except ValueError as error:  # the operator says that it cannot run there
        found = [{"kernel": "attention", "verdict": "refused", "reason": common.short_reason(error)}]
    where = (card, dtype, layer.model, layer.stage, layer.attention.head_dim)
    return [Row(*where, **kernel) for kernel in found]


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
        verdicts = ", ".join(row.verdict for row in rows)
        logger.info(f"{card} {dtype} {layer.model} stage {layer.stage}: {verdicts}")
        for row in rows:
            found.setdefault((card, row.hash or row), row)
    return list(found.values())


def verdict_table(rows: Sequence[Row]) -> str:
    """How many kernels got which verdict, by card and dtype."""
    verdicts = ["ok", *sorted({row.verdict for row in rows} - {"ok"})]
    counts = Counter((row.card, row.dtype, row.verdict) for row in rows)
    groups = dict.fromkeys((row.card, row.dtype) for row in rows)
    cells = [[*group, *(counts[(*group, verdict)] for verdict in verdicts)] for group in groups]
    return "## Verdicts\n\n" + common.markdown_table(["card", "dtype", *verdicts], cells)


def row_table(title: str, rows: Iterable[Row]) -> str:
    """All columns but the hash."""
    return f"## {title}\n\n" + common.markdown_table(COLUMNS[:-1], [astuple(row)[:-1] for row in rows])


NOTES = [
    "Shared memory in bytes of a block; registers, stack and local memory (bytes) of a thread, on AMD "
    "scratch and spilled vector registers; tensor memory in columns.",
    "A layer that several models share is listed under the first of them.",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a kernel is not ok."""
    parser = argparse.ArgumentParser(description="Compile the attention kernels for GPUs that are not there.")
    parser.add_argument("--architectures", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--out", type=path_argument, metavar="FOLDER", help="write <date>_compile.md and .csv"
    )
    parser.set_defaults(name="compile")
    args = parser.parse_args(argv)
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
            row_table("Kernels that are not ok", (row for row in rows if row.verdict != "ok")),
            row_table("The first stage", (row for row in rows if row.model in first and row.stage == 1)),
        ]
    title = "Attention kernels, compiled for every GPU"
    common.publish(args, title, facts, NOTES, COLUMNS, [astuple(row) for row in rows], tables)
    return int(any(row.verdict != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
