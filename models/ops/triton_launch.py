"""What the kernels of `triton_kernel` are launched with: index tables, tile sizes, how work is divided.

Nothing here needs Triton. The tables are derived on the host, once per key table, and kept.

The gradient of a key is a sum over the windows that see it. Instead of adding into memory (atomics, or
partial sums) tokens are cut into blocks of at most `BLOCK_KEYS`, and one program per block visits every
window that sees any of its tokens: an *entry*. Blocks are windows moved by half a window, because such a
block is seen by four windows, where a window itself is seen by nine; so the keys of a window cost about as
much here as gathered.

Legend: as `key_table`; M blocks, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch import Tensor

from .key_table import kept_with_tables

BLOCK_KEYS = 64
"""Tokens of a block."""

TARGET_PROGRAMS = {"forward": 1056, "query_gradient": 528}
"""Programs to divide a pass into, where it has as many items: eight for each of the 132 SMs of a Hopper, and
four where each leaves a gradient of the whole bias behind, to be read again and summed."""

MOST_NUMBERS = 2**31 - 1
"""Kernels count with 32 bits within an image and within an index table."""

CACHED_TABLES = 128
"""Key tables whose kernel tables are kept (Focal-fast has one per layer and map size)."""

KEYS_MULTIPLE = 32
"""Keys that are computed, and those of a row of tables, are filled up to a multiple of this."""

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
class KernelTables:
    """Index tables of one key table, int32, on its device; -1 where there is no token or key."""

    index: Tensor  # [P, row] token of every key
    first: Tensor  # [P] first token of every window
    block_token: Tensor  # [M, BLOCK_KEYS] tokens of a block
    entry_start: Tensor  # [M + 1] entries of block g are entry_start[g] .. entry_start[g + 1] - 1
    entry_window: Tensor  # [E] window of an entry
    entry_first: Tensor  # [E] first token of that window
    entry_column: (
        Tensor  # [E, BLOCK_KEYS] the window's column for each token of the block; K' where it has none
    )
    keys: int  # K', not padded
    always_seen: int  # the first so many keys are there for every window
    heavy_blocks: int  # the first so many blocks have far more entries than the others and should start first


@kept_with_tables(CACHED_TABLES)
def kernel_tables(
    index: Tensor, visible: Tensor | None, height: int, width: int, window: int, tokens: int
) -> KernelTables:
    """Kernel tables of a key table; kept with the tensors they came from, which must not be written to.

    Args:
        index: `KeyTable.folded_index`, [P, K'].
        visible: `KeyTable.folded_visible`, [P, 1 or Q, K'].
        height: rows of the padded map.
        width: its columns.
        window: window side.
        tokens: S.
    """
    keys = index.cpu().numpy()
    if visible is not None:
        keys = np.where(visible.any(dim=1).cpu().numpy(), keys, -1)
    layouts = [_blocks(height, width, window, tokens, shift) for shift in (0, window // 2)]
    sights = _sights(keys, tokens)
    entries = [_entries(*sights, *layout) for layout in layouts]
    best = min(range(len(layouts)), key=lambda i: len(entries[i][0]))
    (block, slot), (entry_block, entry_window, columns) = layouts[best], entries[best]

    count = np.bincount(entry_block, minlength=block.max() + 1)
    order = np.argsort(-count, kind="stable")  # blocks with most entries first
    rank = np.argsort(order)
    block_tokens = np.full((len(order), BLOCK_KEYS), -1)
    block_tokens[rank[block], slot] = np.arange(tokens)
    by_block = np.argsort(rank[entry_block], kind="stable")
    columns, entry_window = columns[by_block], entry_window[by_block]
    columns = np.where(columns < 0, keys.shape[1], columns)
    padded = np.pad(keys, ((0, 0), (0, padded_keys(keys.shape[1]) - keys.shape[1])), constant_values=-1)
    absent = np.flatnonzero((keys < 0).any(axis=0))
    across = width // window
    number = np.arange(len(keys))
    first = number // across * (window * width) + number % across * window

    def place(array: np.ndarray) -> Tensor:
        check_offsets(array.size)
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).to(index.device)

    return KernelTables(
        index=place(padded),
        first=place(first),
        block_token=place(block_tokens),
        entry_start=place(np.concatenate([[0], np.cumsum(count[order])])),
        entry_window=place(entry_window),
        entry_first=place(first[entry_window]),
        entry_column=place(columns),
        keys=keys.shape[1],
        always_seen=int(absent[0]) if len(absent) else keys.shape[1],
        heavy_blocks=int((count > 2 * np.median(count)).sum()),
    )


def _blocks(height: int, width: int, window: int, tokens: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut all tokens into blocks: for each token its block and its place in it, two int64 [S] arrays.

    Args:
        height: rows of the fine map.
        width: its columns.
        window: window side; fine blocks hold as many whole windows, or rows of one, as fit.
        tokens: S, fine and pooled.
        shift: fine blocks begin so many tokens before a window does, across the border of the map if need be.
    """
    if tokens <= BLOCK_KEYS:
        return np.zeros(tokens, dtype=np.int64), np.arange(tokens)
    side = window * max(1, int(BLOCK_KEYS**0.5) // window)
    block = [_cells(height, width, side, min(side, BLOCK_KEYS // side), shift)]
    rows, columns = height // window, width // window
    while (rest := tokens - sum(map(len, block))) > 0:  # pooled levels
        if rows * columns > rest:
            rows, columns = 1, rest
        cells = _cells(rows, columns, int(BLOCK_KEYS**0.5), int(BLOCK_KEYS**0.5), 0)
        block.append(cells + block[-1].max() + 1)
        rows, columns = 2 * rows, 2 * columns
    number = np.concatenate(block)
    order = np.argsort(number, kind="stable")
    slot = np.empty_like(number)
    slot[order] = np.arange(tokens) - np.searchsorted(number[order], number[order])
    return number, slot


def _cells(height: int, width: int, side: int, most_rows: int, shift: int) -> np.ndarray:
    """Cell of every token of a map, [H*W]; cells are squares of `side`, cut into strips of `most_rows`."""
    strips = ceil(side / most_rows)
    strip_rows = ceil(side / strips)
    y, x = ((np.arange(length) + shift) % length for length in (height, width))
    row = y // side * strips + y % side // strip_rows
    cell = row[:, None] * ceil(width / side) + (x // side)[None]
    return np.unique(cell, return_inverse=True)[1].reshape(-1)


def _sights(keys: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Who sees what, by window and token.

    Args:
        keys: [P, K'] tokens, -1 where absent.
        tokens: S.

    Returns:
        Window, column of `keys`, token and how often the window saw the token before: four [R] arrays.
    """
    window, column = np.nonzero(keys >= 0)
    sight = window * tokens + keys[window, column]
    order = np.argsort(sight, kind="stable")
    window, column, sight = window[order], column[order], sight[order]
    copy = np.arange(len(sight)) - np.searchsorted(sight, sight)
    return window, column, sight % tokens, copy


def _entries(
    window: np.ndarray,
    column: np.ndarray,
    token: np.ndarray,
    copy: np.ndarray,
    block: np.ndarray,
    slot: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which windows see which blocks.

    Args:
        window, column, token, copy: as `_sights` returns them.
        block: [S] block of every token.
        slot: [S] its place in the block.

    Returns:
        Per entry the block [E] and the window [E], sorted, and the columns of the window's keys for the
        block's tokens [E, BLOCK_KEYS], -1 where the window does not see them. A window that sees a token of a
        block in several columns has several entries.
    """
    windows, copies = window.max() + 1, copy.max() + 1
    number = (block[token] * windows + window) * copies + copy
    distinct, entry = np.unique(number, return_inverse=True)
    columns = np.full((len(distinct), BLOCK_KEYS), -1)
    columns[entry.reshape(-1), slot[token]] = column
    return distinct // copies // windows, distinct // copies % windows, columns


def padded_keys(keys: int) -> int:
    """Keys of a row of the index table and of the bias: at least one more, which stands for absent ones."""
    return computed_keys(keys + 1)


def computed_keys(keys: int) -> int:
    """Keys whose scores are computed: whole tiles of KEYS_MULTIPLE."""
    return ceil(keys / KEYS_MULTIPLE) * KEYS_MULTIPLE


def padded_queries(queries: int) -> int:
    """Queries of a row of the bias: whole tiles of 16, 32 or 64."""
    if queries <= 32:
        return 16 if queries <= 16 else 32
    return ceil(queries / 64) * 64


def config(kernel: str, head_dim: int, element_size: int) -> Config:
    """How to compile one of the kernels for heads so wide and numbers of so many bytes."""
    return CONFIGS[kernel, 32 if head_dim <= 32 else 64, element_size]


def check_offsets(numbers: int) -> None:
    """Refuse an array, or an image of one, of so many numbers that 32 bits do not address it.

    Raises:
        ValueError: saying so.
    """
    if numbers > MOST_NUMBERS:
        raise ValueError(
            f"the triton backend addresses {MOST_NUMBERS} numbers of an image, got {numbers}: "
            "use smaller images or the backend sdpa"
        )


def divide(kernel: str, items: int, programs: int) -> tuple[int, int]:
    """Slices to divide `items` into where there are `programs` for each slice: slices, items of a slice."""
    slices = max(1, min(items, TARGET_PROGRAMS[kernel] // programs))
    size = max(1, ceil(items / slices))
    return ceil(items / size), size
