"""Starts the kernels: tile sizes, and how work is divided among programs.

A program takes the queries of one window and head, reads that window's keys and values by index straight from
the projection's output, and writes the result in the order of the tokens. Gathered keys, scores and
probabilities never reach memory; scores, softmax and sums are in float32. The backward pass computes the
scores again from the log-sum-exp that was saved, in two kernels: one over windows, for queries and bias, and
one over blocks of tokens, for keys and values.

Legend: as in `tables`; a *group* is the windows that share a bias (all of them, or one), an *item* one window
of one image.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, e, log2
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .kernels import INTERPRETED, forward_kernel, key_gradient_kernel, query_gradient_kernel, triton
from .tables import BLOCK_KEYS, Blocks, computed_keys

LOG2E = log2(e)

MOST_NUMBERS = 2**31 - 1
"""Kernels count with 32 bits within an image and within a table."""

TARGET_PROGRAMS = {"forward": 1056, "query_gradient": 528}
"""Programs to divide a pass into, where it has as many items: eight for each of the 132 SMs of a Hopper, and
four where each leaves a gradient of the whole bias behind, to be read again and summed."""


most_slices: ContextVar[int] = ContextVar("most_slices", default=MOST_NUMBERS)
"""Most slices of a pass: the trial (trial.py) takes few, so that a program goes through several items."""


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled."""

    num_warps: int
    num_stages: int  # from 2 on, loops copy to shared memory asynchronously
    block_queries: int  # most queries of a tile
    block_keys: int  # most keys of a tile
    static_keys: int = 0  # that registers hold: at most 4 tiles in forward, 7 in query_gradient


AMPERE: dict[tuple[str, int, int], Config] = {
    ("forward", 32, 2): Config(4, 2, 64, 32, 64),
    ("forward", 64, 2): Config(4, 2, 64, 32, 64),
    ("forward", 32, 4): Config(4, 1, 64, 32),
    ("forward", 64, 4): Config(4, 1, 32, 32),
    ("query_gradient", 32, 2): Config(4, 3, 64, 32, 64),
    ("query_gradient", 64, 2): Config(4, 2, 32, 32, 96),
    ("query_gradient", 32, 4): Config(4, 1, 16, 32, 32),
    ("query_gradient", 64, 4): Config(8, 1, 16, 32, 32),
    ("key_gradient", 32, 2): Config(4, 2, 64, BLOCK_KEYS),
    ("key_gradient", 64, 2): Config(4, 2, 32, BLOCK_KEYS),
    ("key_gradient", 32, 4): Config(4, 1, 16, BLOCK_KEYS),
    ("key_gradient", 64, 4): Config(8, 1, 16, BLOCK_KEYS),
}
if triton.__version__.startswith("3.2."):  # it cannot arrange three stages, says so, and copies at once
    AMPERE["query_gradient", 32, 2] = Config(4, 2, 64, 32, 64)
HOPPER = AMPERE | {
    ("forward", 32, 2): Config(4, 1, 64, 64, 224),
    ("forward", 64, 2): Config(4, 2, 64, 64, 128),
    ("query_gradient", 32, 2): Config(4, 2, 64, 32, 224),
    ("query_gradient", 64, 2): Config(4, 1, 64, 32, 128),
    ("key_gradient", 64, 2): Config(4, 2, 64, BLOCK_KEYS),
}
BLACKWELL = HOPPER | {
    ("forward", 64, 2): Config(4, 1, 64, 64, 224),
    ("query_gradient", 32, 2): Config(4, 1, 64, 64, 192),  # 256 fit into tensor memory from Triton 3.8 on
    ("query_gradient", 64, 2): Config(4, 1, 64, 64, 128),
    ("key_gradient", 32, 2): Config(4, 1, 64, BLOCK_KEYS),
    ("key_gradient", 64, 2): Config(4, 1, 64, BLOCK_KEYS),
}
CDNA = BLACKWELL | {("query_gradient", 64, 2): Config(4, 1, 64, 32, 128)}
RDNA = AMPERE | {
    ("forward", 32, 2): Config(4, 1, 64, 32, 64),
    ("forward", 64, 2): Config(8, 1, 64, 32, 64),
    ("forward", 32, 4): Config(4, 1, 32, 32),
    ("query_gradient", 32, 2): Config(8, 1, 64, 32, 32),
    ("query_gradient", 64, 2): Config(8, 1, 16, 32, 32),
    ("key_gradient", 32, 2): Config(8, 1, 32, BLOCK_KEYS),
    ("key_gradient", 64, 2): Config(8, 1, 16, BLOCK_KEYS),
}
CONFIGS = {
    "ampere": AMPERE,  # and Ada
    "blackwell_rtx": AMPERE,
    "hopper": HOPPER,
    "blackwell": BLACKWELL,  # of data centers
    "cdna": CDNA,
    "rdna": RDNA,
}
"""By family of GPUs, then by pass, head width up to which it serves, and bytes of a number. Chosen by what
compilers report: nothing should spill, and two blocks or more fit into a multiprocessor. Not yet timed."""


def target_family(target: Any) -> str:
    """The key of CONFIGS for Triton's `GPUTarget`; ValueError for a GPU without tensor cores. What is newer
    than those that are known is compiled as the newest consumer GPUs are, which is the safest."""
    if target.backend == "hip":
        if target.arch.startswith(("gfx90", "gfx10")) and target.arch not in ("gfx908", "gfx90a"):
            raise ValueError(f"needs a GPU with matrix cores (CDNA, RDNA 3 or later), got {target.arch}")
        return "rdna" if target.warp_size == 32 else "cdna"
    if target.arch < 80:
        raise ValueError("needs a GPU of compute capability 8.0 or later")
    if target.arch < 100:
        return "ampere" if target.arch < 90 else "hopper"
    return "blackwell" if target.arch < 120 else "blackwell_rtx"


@lru_cache
def device_family(device: torch.device) -> str:
    """`target_family` of a GPU; in the interpreter Hopper's."""
    if INTERPRETED:
        return "hopper"
    from triton.runtime import driver

    with _on_device(device):
        return target_family(driver.active.get_current_target())


def explain(failure: Exception) -> str:
    """What went wrong, in a line, and what to do about it."""
    first = next((line.strip() for line in str(failure).splitlines() if line.strip()), "")
    said = f"{type(failure).__name__}: {first}" if first else type(failure).__name__
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang") if name):
        return f"{said}; Triton needs a C compiler: install gcc, or let CC name one"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"{said}; Triton needs Python's header files: install python3-dev (or python3-devel)"
    if isinstance(failure, OSError | ImportError):  # of the folder, or of what is compiled into it
        return f"{said}; let TRITON_CACHE_DIR name a folder on a local disk that can be written to"
    return said


@dataclass(frozen=True)
class Tables:
    """What all kernels need besides the arrays of numbers."""

    keys: Tensor  # int32 [P, padded K'], as in `TritonTables`
    first: Tensor  # int32 [P]
    count: int  # K'
    always_seen: int
    width: int  # of the padded map
    window: int  # s
    scale: float


def forward(qkv: Tensor, bias: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as `attention.attention` returns them; `bias` is what the kernels read."""
    tokens, windows, width = _sizes(qkv, tables)
    b, _, _, n, d = qkv.shape
    groups, queries = bias.shape[1:3]
    out = qkv.new_empty((b, windows * tables.window**2, n * d))
    lse = qkv.new_empty((b, n, windows, queries), dtype=torch.float32)
    chosen, fixed = compile_time("forward", device_family(qkv.device), qkv, bias, tables.window)
    tiles = forward_tiles(tables.count, tables.always_seen, chosen)
    items = b * windows // groups
    slices, slice_items = divide("forward", items, n * groups * fixed["Q_BLOCKS"])
    with _on_device(qkv.device):
        forward_kernel[(n * groups * slices * fixed["Q_BLOCKS"],)](
            qkv, bias, tables.keys, tables.first, out, lse,
            tokens, slices, slice_items, items, windows, width, tables.scale * LOG2E, **tiles, **fixed,
        )  # fmt: skip
    return out, lse


def query_gradient(
    qkv: Tensor, bias: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, d_qkv: Tensor,
    tables: Tables,
) -> Tensor:  # fmt: skip
    """Write `delta`, and `d_qkv` of the queries of fine tokens; return the gradient of the padded bias by
    slice of the items: float32 [slices, N, P or 1, padded Q, padded K'], whose padding is not written."""
    tokens, windows, width = _sizes(qkv, tables)
    b, _, _, n, _ = qkv.shape
    groups = bias.shape[1]
    chosen, fixed = compile_time("query_gradient", device_family(qkv.device), qkv, bias, tables.window)
    items = b * windows // groups
    slices, slice_items = divide("query_gradient", items, n * groups * fixed["Q_BLOCKS"])
    d_bias = bias.new_empty((slices, *bias.shape), dtype=torch.float32)
    launches = gradient_tiles(tables.count, tables.always_seen, chosen)
    with _on_device(qkv.device):
        for first_tile, tiles in launches:
            query_gradient_kernel[(n * groups * slices * fixed["Q_BLOCKS"],)](
                qkv, bias, tables.keys, tables.first, out, d_out, lse, delta, d_qkv, d_bias,
                tokens, slices, slice_items, items, first_tile, windows, width, tables.scale * LOG2E,
                **tiles, **fixed,
            )  # fmt: skip
    return d_bias


def key_gradient(
    qkv: Tensor, transposed: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, d_qkv: Tensor,
    tables: Tables, blocks: Blocks,
) -> None:  # fmt: skip
    """Write the rest of `d_qkv`, after `delta` was written; `transposed` is the bias with keys before
    queries, [N, P or 1, padded K', padded Q]."""
    tokens, windows, width = _sizes(qkv, tables)
    b, _, _, n, _ = qkv.shape
    check_offsets(max(blocks.token.numel(), blocks.column.numel()))
    _, fixed = compile_time("key_gradient", device_family(qkv.device), qkv, transposed.mT, tables.window)
    count = len(blocks.token)
    with _on_device(qkv.device):
        key_gradient_kernel[(b * n * count,)](
            qkv, transposed, d_out, lse, delta, d_qkv, *blocks,
            tokens, count, windows, width, tables.scale * LOG2E, **fixed,
        )  # fmt: skip


def compile_time(
    kernel: str, family: str, qkv: Tensor, bias: Tensor, window: int
) -> tuple[Config, dict[str, Any]]:
    """What was chosen for a kernel, and compile-time arguments that all kernels share."""
    heads, dim = qkv.shape[3:]
    groups, queries, row = bias.shape[1:]
    chosen = CONFIGS[family][kernel, 32 if dim <= 32 else 64, qkv.element_size()]
    block_queries = min(chosen.block_queries, queries)
    return chosen, {
        "HEADS": heads,
        "HEAD_DIM": dim,
        "SIDE": window,
        "SHARED": groups == 1,
        "ROW": row,
        "BLOCK_Q": block_queries,
        "Q_BLOCKS": queries // block_queries,
        "BLOCK_K": chosen.block_keys,
        "BLOCK_D": max(16, 1 << (dim - 1).bit_length()),  # the least that Triton's products take
        "PRECISION": precision(family, qkv.dtype),
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
        "enable_fp_fusion": True,  # later releases of Triton leave it off unless asked
    }


def precision(family: str, dtype: torch.dtype) -> str:
    """How products round float32; AMD's backend knows no other way than the exact one, for all types."""
    if family in ("cdna", "rdna"):
        return "ieee"
    return "tf32x3" if dtype == torch.float32 and not tf32_allowed() else "tf32"


def padded_queries(queries: int) -> int:
    """Queries of a row of the bias: whole tiles of 16, 32 or 64."""
    if queries <= 32:
        return 16 if queries <= 16 else 32
    return ceil(queries / 64) * 64


def forward_tiles(keys: int, always_seen: int, chosen: Config) -> dict[str, Any]:
    """Compile-time arguments of the forward pass for so many keys of a window; `always_seen` as in
    `TritonTables`."""
    keys, block = computed_keys(keys), chosen.block_keys
    static = keys <= chosen.static_keys
    return {"KEYS": keys, "PLAIN": plain_tiles(keys, always_seen, block) if static else 0, "STATIC": static}


def gradient_tiles(keys: int, always_seen: int, chosen: Config) -> list[tuple[int, dict[str, Any]]]:
    """Launches of the gradients of queries and bias: first tile, and compile-time arguments. One launch, or
    if the keys do not fit into registers, several of some keys each."""
    keys, block = computed_keys(keys), chosen.block_keys
    launches = []
    for first in range(0, keys, chosen.static_keys):
        count = min(chosen.static_keys, keys - first)
        plain = plain_tiles(count, always_seen - first, block)
        launches.append((first // block, {"KEYS": count, "PLAIN": plain, "IS_FIRST": first == 0}))
    return launches


def plain_tiles(keys: int, always_seen: int, block: int) -> int:
    """Tiles of so many keys, the last may be smaller, before the first that has an absent key."""
    return ceil(keys / block) if always_seen >= keys else max(0, always_seen) // block


def divide(kernel: str, items: int, programs: int) -> tuple[int, int]:
    """Slices to divide `items` into where there are `programs` for each slice: slices, items of a slice."""
    slices = max(1, min(items, most_slices.get(), TARGET_PROGRAMS[kernel] // programs))
    size = max(1, ceil(items / slices))
    return ceil(items / size), size


def _sizes(qkv: Tensor, tables: Tables) -> tuple[int, int, int]:
    """Tokens of an image, its windows, and columns of the map; ValueError for images that are too large."""
    check_offsets(max(tables.keys.numel(), qkv.shape[1:].numel()))
    return qkv.shape[1], len(tables.keys), tables.width


def check_offsets(numbers: int) -> None:
    """Raise ValueError for an array, or an image of one, of more numbers than 32 bits address."""
    if numbers > MOST_NUMBERS:
        raise ValueError(
            f"attention_backend triton addresses {MOST_NUMBERS} numbers of an image, got {numbers}: "
            "use smaller images or another attention_backend"
        )


def _on_device(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def tf32_allowed() -> bool:
    """Whether PyTorch's own products of float32 may be rounded to TF32. The older name of the setting cannot
    be read where the newer one was set."""
    matmul = torch.backends.cuda.matmul
    newer = getattr(matmul, "fp32_precision", None)  # PyTorch 2.9
    return matmul.allow_tf32 if newer is None else newer == "tf32"
