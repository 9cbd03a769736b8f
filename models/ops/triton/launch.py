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

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, e, log2
from typing import Any

import torch
from torch import Tensor

from .kernels import forward_kernel, key_gradient_kernel, query_gradient_kernel
from .tables import BLOCK_KEYS, MOST_NUMBERS, Blocks, computed_keys

LOG2E = log2(e)

TARGET_PROGRAMS = {"forward": 1056, "query_gradient": 528}
"""Programs to divide a pass into, where it has as many items: eight for each of the 132 SMs of a Hopper, and
four where each leaves a gradient of the whole bias behind, to be read again and summed."""

PIPELINE_BYTES = 220 * 1024
"""Shared memory of a block from which the next item is fetched while one is computed: what Hopper has."""


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled."""

    num_warps: int
    num_stages: int  # 1 on GPUs with less shared memory than PIPELINE_BYTES
    block_queries: int  # most queries of a tile
    block_keys: int  # most keys of a tile
    static_tiles: int = 0  # of query_gradient: tiles of keys whose bias gradient fits into registers


CONFIGS: dict[tuple[str, int, int], Config] = {
    ("forward", 32, 2): Config(4, 2, 64, 64),
    ("forward", 64, 2): Config(4, 2, 64, 64),
    ("forward", 32, 4): Config(4, 1, 64, 32),
    ("forward", 64, 4): Config(4, 1, 64, 32),
    ("query_gradient", 32, 2): Config(4, 2, 64, 32, 7),
    ("query_gradient", 64, 2): Config(4, 2, 64, 32, 4),
    ("query_gradient", 32, 4): Config(4, 1, 16, 32, 1),
    ("query_gradient", 64, 4): Config(8, 1, 16, 32, 1),
    ("key_gradient", 32, 2): Config(4, 1, 32, BLOCK_KEYS),
    ("key_gradient", 64, 2): Config(4, 1, 32, BLOCK_KEYS),
    ("key_gradient", 32, 4): Config(4, 1, 32, BLOCK_KEYS),
    ("key_gradient", 64, 4): Config(8, 1, 16, BLOCK_KEYS),
}
"""By pass, head width up to which it serves, and bytes of a number. Chosen so that nothing spills on Hopper
with Triton 3.6, 3.8 and 3.9 (tests/test_triton_hopper.py compiles them); not yet timed."""


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
    fixed = compile_time("forward", qkv, bias, tables.window)
    tiles = forward_tiles(tables.count, tables.always_seen, fixed["BLOCK_K"])
    items = b * windows // groups
    slices, slice_items = divide("forward", items, n * groups * fixed["Q_BLOCKS"])
    with _on_device(qkv):
        forward_kernel[(n * groups * slices * fixed["Q_BLOCKS"],)](
            qkv, bias, tables.keys, tables.first, out, lse,
            tokens, slices, slice_items, items, windows, width, tables.scale * LOG2E, **tiles, **fixed,
        )  # fmt: skip
    return out, lse


def query_gradient(
    qkv: Tensor, bias: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, d_qkv: Tensor,
    tables: Tables, with_bias: bool,
) -> Tensor:  # fmt: skip
    """Write the queries' part of `d_qkv`, and `delta`; return the gradient of the padded bias, of each slice,
    [slices, N, groups, padded Q, padded K'] (empty if not wanted), whose padding is not written."""
    tokens, windows, width = _sizes(qkv, tables)
    b, _, _, n, d = qkv.shape
    groups = bias.shape[1]
    fixed = compile_time("query_gradient", qkv, bias, tables.window)
    most = config("query_gradient", d, qkv.element_size()).static_tiles
    items = b * windows // groups
    slices, slice_items = divide("query_gradient", items, n * groups * fixed["Q_BLOCKS"])
    d_bias = bias.new_empty((slices, *bias.shape) if with_bias else (0,), dtype=torch.float32)
    launches = gradient_tiles(tables.count, tables.always_seen, fixed["BLOCK_K"], most, with_bias)
    with _on_device(qkv):
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
    """Write the keys' and values' part of `d_qkv`, and 0 where coarse tokens would ask, after `delta` was
    written; `transposed` is the bias with keys before queries."""
    d_qkv[:, len(tables.keys) * tables.window**2 :, 0].zero_()
    tokens, windows, width = _sizes(qkv, tables)
    b, _, _, n, _ = qkv.shape
    for array in (blocks.token, blocks.column):
        check_offsets(array.numel())
    fixed = compile_time("key_gradient", qkv, transposed.transpose(-1, -2), tables.window)
    count = len(blocks.token)
    with _on_device(qkv):
        key_gradient_kernel[(b * n * count,)](
            qkv, transposed, d_out, lse, delta, d_qkv,
            *blocks.tensors(),
            tokens, blocks.heavy, count, b, windows, width, tables.scale * LOG2E, **fixed,
        )  # fmt: skip


def compile_time(kernel: str, qkv: Tensor, bias: Tensor, window: int) -> dict[str, Any]:
    """Compile-time arguments that all kernels share, and how to compile."""
    heads, dim = qkv.shape[3:]
    groups, queries, row = bias.shape[1:]
    chosen = config(kernel, dim, qkv.element_size())
    exact = qkv.dtype == torch.float32 and not tf32_allowed()
    block_queries = min(chosen.block_queries, queries)
    return {
        "HEADS": heads,
        "HEAD_DIM": dim,
        "SIDE": window,
        "SHARED": groups == 1,
        "ROW": row,
        "BLOCK_Q": block_queries,
        "Q_BLOCKS": queries // block_queries,
        "BLOCK_K": chosen.block_keys,
        "BLOCK_D": max(16, 1 << (dim - 1).bit_length()),  # the least that Triton's products take
        "PRECISION": "tf32x3" if exact else "tf32",
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages if _may_pipeline(qkv.device) else 1,
        "enable_fp_fusion": True,  # later releases of Triton leave it off unless asked
    }


def config(kernel: str, head_dim: int, element_size: int) -> Config:
    """How to compile one of the kernels for heads so wide and numbers of so many bytes."""
    return CONFIGS[kernel, 32 if head_dim <= 32 else 64, element_size]


def padded_queries(queries: int) -> int:
    """Queries of a row of the bias: whole tiles of 16, 32 or 64."""
    if queries <= 32:
        return 16 if queries <= 16 else 32
    return ceil(queries / 64) * 64


def forward_tiles(keys: int, always_seen: int, block_keys: int) -> dict[str, int]:
    """How the forward pass cuts keys into tiles.

    Args:
        keys: of a window.
        always_seen: the first so many are there for every window.
        block_keys: of a tile.
    """
    tiles, tail = divmod(computed_keys(keys), block_keys)
    return {"TILES": tiles, "TAIL": tail, "PLAIN": always_seen // block_keys}


def gradient_tiles(
    keys: int, always_seen: int, block_keys: int, most: int, with_bias: bool
) -> list[tuple[int, dict[str, Any]]]:
    """Launches of the gradients of queries and bias: first tile, and compile-time arguments.

    One launch, or where the keys fill more tiles than fit into registers, one for the queries and several
    for the bias.

    Args:
        keys: of a window.
        always_seen: the first so many are there for every window.
        block_keys: of a tile.
        most: tiles whose gradients of the bias fit into registers.
        with_bias: whether the bias wants a gradient.
    """
    tiles = computed_keys(keys) // block_keys

    def part(first: int, count: int, bias: bool, query: bool) -> tuple[int, dict[str, Any]]:
        plain = min(count, max(0, always_seen // block_keys - first)) if bias else 0
        arguments = {"TILES": count, "PLAIN": plain, "WITH_BIAS": bias, "WITH_QUERY": query}
        return first, arguments

    if not with_bias or tiles <= most:
        return [part(0, tiles, with_bias, True)]
    rest = [part(first, min(most, tiles - first), True, False) for first in range(0, tiles, most)]
    return [part(0, tiles, False, True), *rest]


def divide(kernel: str, items: int, programs: int) -> tuple[int, int]:
    """Slices to divide `items` into where there are `programs` for each slice: slices, items of a slice."""
    slices = max(1, min(items, TARGET_PROGRAMS[kernel] // programs))
    size = max(1, ceil(items / slices))
    return ceil(items / size), size


def _sizes(qkv: Tensor, tables: Tables) -> tuple[int, int, int]:
    """Tokens of an image, its windows, and columns of the map.

    Raises:
        ValueError: the kernels cannot address an image.
    """
    check_offsets(max(tables.keys.numel(), qkv[0].numel() if len(qkv) else 0))
    return qkv.shape[1], len(tables.keys), tables.width


def check_offsets(numbers: int) -> None:
    """Refuse an array, or an image of one, of so many numbers that 32 bits do not address it.

    Raises:
        ValueError: saying so.
    """
    if numbers > MOST_NUMBERS:
        raise ValueError(
            f"attention_backend triton addresses {MOST_NUMBERS} numbers of an image, got {numbers}: "
            "use smaller images or another attention_backend"
        )


def _on_device(x: Tensor) -> AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def tf32_allowed() -> bool:
    """Whether PyTorch's own products of float32 may be rounded to TF32; asked as the release at hand wants,
    since an answer by its older name is refused where the newer one was set."""
    matmul = torch.backends.cuda.matmul
    newer = getattr(matmul, "fp32_precision", None)  # PyTorch 2.9
    return matmul.allow_tf32 if newer is None else newer == "tf32"


@lru_cache
def _may_pipeline(device: torch.device) -> bool:
    """Whether a block has the shared memory to fetch one item while another is computed."""
    if device.type != "cuda":
        return True
    import triton

    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return properties["max_shared_mem"] >= PIPELINE_BYTES
