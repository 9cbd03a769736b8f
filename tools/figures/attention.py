"""What focal attention looks at, in numbers: its weights, and maps of the tokens that they belong to.

The fused operators never form the weights. Here they are computed again from what the layers use: hooks
record the queries, keys and values, and the layer gives the keys of each window and their bias.

Legend: B batch, H W rows and columns of a stage's map, S fine and pooled tokens, N heads, P windows,
Q queries of a window, K keys of a window, s window side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models import FocalTransformer
from models.focal_transformer import AttentionIndex, FocalAttention, padded_size

OWN_WINDOW, AROUND = "own window", "fine tokens around"


@dataclass(frozen=True)
class Grain:
    """The tokens of one granularity that a query sees, on the stage's map.

    Attributes:
        name: for people.
        cells: int64 [H, W], the token that stands for each place of the map; -1 where none is seen.
        area: fine tokens per token.
    """

    name: str
    cells: Tensor
    area: int

    def spread(self, values: Tensor) -> Tensor:
        """Values of all tokens [S] at the places of these: [H, W], nan where none is seen."""
        return torch.where(self.cells >= 0, values[self.cells.clamp(min=0)], float("nan"))

    @property
    def tokens(self) -> Tensor:
        """Each token once."""
        return self.cells[self.cells >= 0].unique()


@dataclass(frozen=True)
class TokenMap:
    """Where the tokens of an attention layer lie on its map of `height` x `width` tokens.

    `stride` is the side of a token in pixels of the model's input.
    """

    layer: FocalAttention
    height: int
    width: int
    stride: int

    @property
    def index(self) -> AttentionIndex:
        """Which keys each window sees."""
        device = self.layer.qkv.weight.device
        return self.layer.index(self.height, self.width, torch.empty(0, device=device))

    @property
    def padded(self) -> tuple[int, int]:
        return padded_size(self.height, self.width, self.layer.window_size)

    def grains(self) -> list[Grain]:
        """All tokens, fine ones first."""
        (rows, columns), s = self.padded, self.layer.window_size
        fine = torch.arange(rows * columns).view(rows, columns)
        grains, tokens = [Grain("fine", self._in_place(fine), 1)], rows * columns
        for level in range(self.layer.pooled_levels):
            side, down, across = s // 2**level, rows // s * 2**level, columns // s * 2**level
            numbers = tokens + torch.arange(down * across).view(down, across)
            block = numbers.repeat_interleave(side, 0).repeat_interleave(side, 1)
            top, left = (rows - down * side) // 2, (columns - across * side) // 2
            cells = torch.full((rows, columns), -1)
            cells[top : top + down * side, left : left + across * side] = block
            grains.append(Grain(f"pooled {side} x {side}", self._in_place(cells), side**2))
            tokens += down * across
        return grains

    def _in_place(self, cells: Tensor) -> Tensor:
        """[rows, columns] of the padded and rolled map at the places of the map, [H, W]."""
        return self.layer.unroll_and_crop(cells[None, ..., None], self.height, self.width)[0, ..., 0]

    def at_pixel(self, x: int, y: int) -> tuple[int, int]:
        """Row and column of the token at a pixel; pixels beyond the last patch count to it."""
        return min(y // self.stride, self.height - 1), min(x // self.stride, self.width - 1)

    def place_of(self, row: int, column: int) -> tuple[int, int]:
        """Window and query within it of the token at a place of the map."""
        token = self.grains()[0].cells[row, column]
        window, query = (window_tokens(self.index) == token).nonzero()[0].tolist()
        return window, query

    def seen_from(self, row: int, column: int) -> list[Grain]:
        """The tokens that the query at a place sees, by granularity; empty ones are left out."""
        window, query = self.place_of(row, column)
        index = self.index
        keys = index.keys[window].cpu()
        if index.visible is not None:
            keys = keys[index.visible[window].expand(index.window**2, -1)[query].cpu()]
        fine, *pooled = [
            Grain(each.name, each.cells.masked_fill(~torch.isin(each.cells, keys), -1), each.area)
            for each in self.grains()
        ]
        mine = torch.isin(fine.cells, window_tokens(index)[window])
        own = Grain(OWN_WINDOW, fine.cells.masked_fill(~mine, -1), 1)
        around = Grain(AROUND, fine.cells.masked_fill(mine, -1), 1)
        return [grain for grain in (own, around, *pooled) if len(grain.tokens)]

    def evenly(self, values: Tensor) -> Tensor:
        """Values of all tokens [S], each divided evenly among the places that it stands for: [H, W]."""
        return sum(grain.spread(values).nan_to_num() / grain.area for grain in self.grains())


def window_tokens(index: AttentionIndex) -> Tensor:
    """The fine tokens of each window, [P, Q], on the CPU."""
    s = index.window
    tokens = torch.arange(index.height * index.width)
    return tokens.view(index.height // s, s, index.width // s, s).transpose(1, 2).reshape(-1, s * s)


@torch.no_grad()
def weights_of_query(tokens: TokenMap, qkv: Tensor, row: int, column: int) -> Tensor:
    """softmax(q k^T * scale + bias) of the query at a place of the first image's map, by token: [N, S].

    Args:
        tokens: the layer and its map.
        qkv: what the layer computed in a forward pass, [B, S, 3, N, D].
        row, column: of the query.
    """
    layer, index, (window, query) = tokens.layer, tokens.index, tokens.place_of(row, column)
    keys = index.keys[window]
    q = qkv[0, window_tokens(index)[window, query], 0]  # [N, D]
    bias = layer.bias(index, qkv.dtype)  # [N, P or 1, Q, K]
    scores = layer.scale * torch.einsum("nd,knd->nk", q, qkv[0, keys, 1])
    scores = scores + bias[:, window if bias.shape[1] > 1 else 0, query]
    if index.visible is not None:
        visible = index.visible[window].expand(index.window**2, -1)[query]
        scores = scores.masked_fill(~visible, float("-inf"))
    total = scores.new_zeros(len(scores), qkv.shape[1])
    return total.index_add(1, keys, scores.softmax(dim=-1)).cpu()


# --- Of a model ---------------------------------------------------------------------------------------------


def token_maps(model: FocalTransformer, height: int, width: int) -> list[list[TokenMap]]:
    """The map of every block, by stage, for an input of `height` x `width` pixels."""
    sizes = model.map_sizes(model.patch_embed.output_size(height, width))
    maps, stride = [], model.patch_embed.stride
    for stage, size in zip(model.stages, sizes, strict=True):
        maps.append([TokenMap(block.attn, *size, stride) for block in stage.blocks])
        stride *= 1 if stage.downsample is None else stage.downsample.stride
    return maps


def stage_maps(model: FocalTransformer, height: int, width: int, block: int = -1) -> list[TokenMap]:
    """The map of one block of each stage, of the last one if none is named."""
    return [blocks[block] for blocks in token_maps(model, height, width)]


def record(model: FocalTransformer, image: Tensor, maps: Sequence[TokenMap]) -> list[Tensor]:
    """Queries, keys and values [1, S, 3, N, D] of some layers in a forward pass of an image [1, C, H, W]."""
    outputs: list[Tensor] = []
    handles = [
        tokens.layer.qkv.register_forward_hook(lambda _, __, qkv: outputs.append(qkv)) for tokens in maps
    ]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return [
        qkv.unflatten(-1, (3, tokens.layer.num_heads, -1)) for tokens, qkv in zip(maps, outputs, strict=True)
    ]
