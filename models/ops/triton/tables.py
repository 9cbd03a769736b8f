"""Index tables of the kernels, built where the index is: of a GPU's only a few numbers come to the host.

The gradient of a key is a sum over the windows that read it. Instead of adding to memory atomically, tokens
are cut into blocks of at most BLOCK_KEYS, and one program for each block visits every window that reads a
token of it. Which windows these are is a sparse matrix of blocks and windows, in compressed rows.

Legend: as in `focal_transformer`; K' keys of a window after merging, M blocks, E nonzeros of that matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...focal_transformer import AttentionIndex
from ..tables import MergedKeys, merge_duplicates

BLOCK_BITS = 6
BLOCK_KEYS = 2**BLOCK_BITS
"""Tokens of a block."""

BLOCK_SIDE = 8
"""Its rows and columns on a pooled level."""

KEYS_MULTIPLE = 32
"""Keys that are computed, and those of a row of tables, are filled up to a multiple of this."""


class Blocks(NamedTuple):
    """What the backward pass needs: which windows read each block of tokens, int32. Blocks that most windows
    read come first, since they take longest."""

    token: Tensor  # [M, BLOCK_KEYS]: tokens of a block, -1 where it has fewer
    start: Tensor  # [M + 1]: the windows of block g are numbers start[g] to start[g + 1] - 1 of those below
    window: Tensor  # [E]: a window that reads the block
    first: Tensor  # [E]: its first token
    column: Tensor  # [E, BLOCK_KEYS]: which of its K' keys each token of the block is; K' where it is none


@dataclass(frozen=True)
class TritonTables:
    """What the kernels need of an index."""

    merged: MergedKeys
    columns: Tensor  # int32 [2, K']: columns of the bias whose logaddexp a merged key has; -1 for no second
    keys: Tensor  # int32 [P, padded K']: tokens; -1 where no query of a window sees the key
    first: Tensor  # int32 [P]: first token of every window
    always_seen: int  # the first so many of a row of `keys` are tokens in every window
    blocks: Blocks | None  # for the backward pass


def padded_keys(keys: int) -> int:
    """Keys of a row of the index table and of the bias: at least one more, which stands for absent ones."""
    return computed_keys(keys + 1)


def computed_keys(keys: int) -> int:
    """Keys whose scores are computed: whole tiles of KEYS_MULTIPLE."""
    return ceil(keys / KEYS_MULTIPLE) * KEYS_MULTIPLE


def build_tables(index: AttentionIndex, trains: bool) -> TritonTables:
    """Tables of an index, with those of the backward pass if it `trains`."""
    merged = merge_duplicates(index)
    second = F.pad(merged.second, (len(merged.single), 0), value=-1)
    columns = torch.stack([torch.cat([merged.single, merged.first]), second]).int()
    keys, count = merged.keys.int(), merged.keys.shape[1]
    filling = keys[:, :1].expand(-1, padded_keys(count) - count)  # a key of the window, masked by the bias
    keys = torch.cat([keys, filling], dim=1)
    always_seen = keys.shape[1]
    if merged.visible is not None:
        seen = merged.visible[:, 0] if merged.visible.shape[1] == 1 else merged.visible.any(dim=1)
        keys[:, :count] = torch.where(seen, keys[:, :count], -1)
        always_seen = int((keys.amin(dim=0) >= 0).int().cumprod(0).sum())
    number = torch.arange(len(keys), dtype=torch.int32, device=keys.device)
    across, s = index.width // index.window, index.window
    first = number // across * (s * index.width) + number % across * s
    blocks = build_blocks(index, keys, first, count) if trains else None
    return TritonTables(merged, columns, keys, first, always_seen, blocks)


def build_blocks(index: AttentionIndex, keys: Tensor, first: Tensor, count: int) -> Blocks:
    """Blocks of an index, which gives the sizes; `keys` and `first` as in `TritonTables`, `count` is K'."""
    device, tokens = keys.device, index.tokens
    position, blocks = block_positions(keys[:, :count], index.height, index.width, index.window, tokens)
    # Every key as one number, of its block, place in it and column; absent ones are in one more block, the
    # last.
    bits = count.bit_length()
    place = torch.cat([position.new_tensor([blocks * BLOCK_KEYS]), position]) << bits
    code = place.index_select(0, (keys[:, :count] + 1).flatten()).view(-1, count)
    code = (code + torch.arange(count, device=device)).sort(dim=1).values
    place = code >> bits
    block, copies = place >> BLOCK_BITS, 1
    repeated = (place[:, 1:] == place[:, :-1]) & (block[:, 1:] < blocks)
    if bool(repeated.any()):  # a window that reads a token twice visits its block twice
        order = torch.arange(count, device=device).expand(code.shape)
        copy = order - torch.where(F.pad(repeated, (1, 0)), 0, order).cummax(dim=1).values
        copy = torch.where(block < blocks, copy, 0)
        copies = int(copy.max()) + 1
        block, order = (block * copies + copy).sort(dim=1)
        code = code.gather(1, order)
    is_new = F.pad(block[:, 1:] != block[:, :-1], (1, 0), value=1)
    visit = is_new.flatten().cumsum(0, dtype=torch.int32) - 1  # [P * K'], window by window
    at = is_new.flatten().nonzero()[:, 0]
    visiting, visited = at // count, block.flatten()[at] // copies

    lengths, order = torch.bincount(visited, minlength=blocks + 1)[:blocks].sort(descending=True, stable=True)
    rank = torch.empty(blocks + 1, dtype=torch.long, device=device)
    rank[order], rank[blocks] = torch.arange(blocks, device=device), blocks
    by_block = rank[visited.long()].argsort(stable=True)
    number = torch.empty_like(by_block)
    number[by_block] = torch.arange(len(by_block), device=device)
    column = torch.full((len(by_block), BLOCK_KEYS), count, dtype=torch.int32, device=device)
    target = (number << BLOCK_BITS).index_select(0, visit) + ((code.flatten() >> bits) & (BLOCK_KEYS - 1))
    column.view(-1).scatter_(0, target, (code.flatten() & (1 << bits) - 1).int())
    token = torch.full((blocks * BLOCK_KEYS,), -1, dtype=torch.int32, device=device)
    token[position] = torch.arange(tokens, dtype=torch.int32, device=device)
    total = int(lengths.sum())
    window_of = visiting[by_block[:total]]
    return Blocks(
        token=token.view(blocks, BLOCK_KEYS)[order],
        start=F.pad(lengths.cumsum(0), (1, 0)).int(),
        window=window_of.int(),
        first=first[window_of],
        column=column[:total],
    )


def block_positions(keys: Tensor, height: int, width: int, window: int, tokens: int) -> tuple[Tensor, int]:
    """Cut all tokens into blocks: for each token BLOCK_KEYS * its block + its place there, int64 [S]; the
    number of blocks.

    Blocks of fine tokens hold as many whole windows, or rows of one, as fit. They begin where windows do, or
    half a window before, which makes four windows read a block instead of nine where rings are half a window
    wide: whichever cuts the keys of a window into fewer. `keys` are [P, K'], -1 where absent.
    """
    device, fine = keys.device, height * width
    if tokens <= BLOCK_KEYS:
        return torch.arange(tokens, device=device), 1
    rows, columns = height // window, width // window
    middle = keys[rows // 2 * columns + columns // 2]
    middle = middle[(middle >= 0) & (middle < fine)]
    side = window * max(1, BLOCK_SIDE // window)
    layouts = [cells(height, width, side, shift, device) for shift in (0, window // 2)]
    position, blocks = min(layouts, key=lambda layout: len((layout[0][middle] // BLOCK_KEYS).unique()))
    parts, found = [position], fine
    while found < tokens:
        position, more = cells(rows, columns, BLOCK_SIDE, 0, device)
        parts.append(position + blocks * BLOCK_KEYS)
        found, blocks = found + len(position), blocks + more
        rows, columns = 2 * rows, 2 * columns
    return torch.cat(parts), blocks


def cells(height: int, width: int, side: int, shift: int, device: torch.device) -> tuple[Tensor, int]:
    """Cut a map into squares of side `side`, and these into as few strips of whole rows as have BLOCK_KEYS
    tokens at most. Squares begin `shift` tokens before the map, which goes on at its other end.

    Returns as `block_positions`, [height * width].
    """
    y, x = ((torch.arange(length, device=device) + shift) % length for length in (height, width))
    strip_rows = ceil(side / ceil(side / min(side, BLOCK_KEYS // side)))
    strips = ceil(side / strip_rows)
    row = y // side * strips + y % side // strip_rows
    slot = (y % side % strip_rows * side)[:, None] + x % side
    across = ceil(width / side)
    down = (height - 1) // side * strips + (height - 1) % side // strip_rows + 1
    block = row[:, None] * across + x // side
    return (block * BLOCK_KEYS + slot).flatten(), down * across
