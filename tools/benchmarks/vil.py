"""Multi-Scale Vision Longformer (ViL; Zhang et al., ICCV 2021); for the release's table of throughput.

Section 3 and table 1 of the paper, with absolute position embeddings, whole neighbouring chunks, and weights
that global and local tokens share. The first two stages use sliding chunks, the last two full attention. Each
stage but the last adds a global token of its own and drops it at its end.
Letters: B images, H x W tokens of a map, C channels, G global tokens, N chunks of L = side * side tokens.
"""

from collections.abc import Sequence

import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 7  # of a chunk, in tokens
WIDTHS, HEADS, PATCHES = (96, 192, 384, 768), (3, 3, 6, 12), (4, 2, 2, 2)
GLOBAL_TOKENS, SLIDING = (1, 1, 1, 0), (True, True, False, False)


def neighbourhoods(maps: Tensor, side: int) -> Tensor:
    """The tokens of each chunk and its eight neighbours: [B, H, W, C] -> [B, N, 9 * L, C].

    Zeros beyond the map.
    """
    height, width = maps.shape[1:3]
    maps = F.pad(maps, (0, 0, side, side + -width % side, side, side + -height % side))
    windows = maps.unfold(1, 3 * side, side).unfold(
        2, 3 * side, side
    )  # [B, rows, columns, C, 3 * side, 3 * side]
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).flatten(1, 2)


def chunks(maps: Tensor, side: int) -> Tensor:
    """The tokens of each chunk: [B, H, W, C] -> [B, N, L, C]; zeros fill up the last ones."""
    height, width = maps.shape[1:3]
    maps = F.pad(maps, (0, 0, 0, -width % side, 0, -height % side))
    return maps.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def join_chunks(parts: Tensor, height: int, width: int, side: int) -> Tensor:
    """The reverse of `chunks`: [B, N, L, C] -> [B, H, W, C]."""
    columns = -(-width // side)
    maps = parts.unflatten(2, (side, side)).unflatten(1, (-1, columns)).transpose(2, 3)
    return maps.flatten(3, 4).flatten(1, 2)[:, :height, :width]


class SlidingAttention(Attention):
    """Tokens see the global tokens and those of their own and the eight neighbouring chunks.

    Global tokens, which come first, see all. Parameters are those of timm's `Attention`.

    Args:
        dim, num_heads: as in timm.
        size: height and width of the map, in tokens.
        side: of a chunk.
    """

    def __init__(self, dim: int, num_heads: int, size: tuple[int, int], side: int = SIDE) -> None:
        super().__init__(dim, num_heads, qkv_bias=True)
        self.size, self.side = size, side
        visible = (
            neighbourhoods(torch.ones(1, *size, 1), side)[0, :, None, None, :, 0] > 0
        )  # [N, 1, 1, 9 * L]
        self.register_buffer("visible", visible, persistent=False)

    def split_heads(self, tokens: Tensor) -> Tensor:
        """[..., L, C] -> [-1, heads, L, C / heads]."""
        return tokens.flatten(0, -3).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, **masks: None) -> Tensor:
        """[B, G + H * W, C] -> the same; timm's blocks pass masks that are None."""
        B, count, C = x.shape
        G = count - self.size[0] * self.size[1]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        everywhere = F.scaled_dot_product_attention(
            *map(self.split_heads, (q[:, :G], k, v))
        )  # of global tokens

        q_map, k_map, v_map = (part[:, G:].unflatten(1, self.size) for part in (q, k, v))
        queries = chunks(q_map, self.side)  # [B, N, L, C]
        N = queries.shape[1]
        keys, values = (
            torch.cat(
                [tokens[:, None, :G].expand(-1, N, -1, -1), neighbourhoods(token_map, self.side)], dim=2
            )
            for tokens, token_map in ((k, k_map), (v, v_map))
        )  # [B, N, G + 9 * L, C]
        visible = F.pad(self.visible, (G, 0), value=True).repeat(B, 1, 1, 1)
        heads = map(self.split_heads, (queries, keys, values))
        local = F.scaled_dot_product_attention(*heads, attn_mask=visible)
        local = local.transpose(1, 2).reshape(B, N, -1, C)
        local = join_chunks(local, *self.size, self.side).flatten(1, 2)
        return self.proj(torch.cat([everywhere.transpose(1, 2).reshape(B, G, C), local], dim=1))


class Stage(nn.Module):
    """Patch embedding, position embeddings by row and by column, global tokens, blocks."""

    def __init__(
        self,
        inputs: int,
        dim: int,
        heads: int,
        patch: int,
        size: tuple[int, int],
        global_tokens: int,
        sliding: bool,
        drop_paths: Sequence[float],
    ) -> None:
        super().__init__()
        self.global_tokens = global_tokens
        self.embed = nn.Conv2d(inputs, dim, patch, patch)
        self.norm = nn.LayerNorm(dim)
        self.rows = nn.Parameter(torch.zeros(size[0], 1, dim // 2))
        self.columns = nn.Parameter(torch.zeros(1, size[1], dim // 2))
        self.tokens = nn.Parameter(torch.zeros(1, global_tokens, dim))
        self.blocks = nn.Sequential(
            *(Block(dim, heads, qkv_bias=True, drop_path=rate) for rate in drop_paths)
        )
        if sliding:
            for block in self.blocks:
                block.attn = SlidingAttention(dim, heads, size)
        for parameter in (self.rows, self.columns, self.tokens):
            trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """[B, inputs, patch * H, patch * W] -> [B, C, H, W]."""
        maps = self.norm(self.embed(images).permute(0, 2, 3, 1))
        B, H, W, _ = maps.shape
        places = torch.cat([self.rows.expand(-1, W, -1), self.columns.expand(H, -1, -1)], dim=-1)
        x = torch.cat([self.tokens.expand(B, -1, -1), (maps + places).flatten(1, 2)], dim=1)
        x = self.blocks(x)[:, self.global_tokens :]
        return x.unflatten(1, (H, W)).permute(0, 3, 1, 2)


class ViL(nn.Module):
    """The classifier; small, medium (deep) and base (deep) differ in depths.

    Args:
        depths: blocks of the four stages.
        img_size: side of the images in pixels, a multiple of 32.
        num_classes, drop_path_rate: as in timm.

    Raises:
        ValueError: the size is no multiple of 32.
    """

    def __init__(
        self, depths: Sequence[int], img_size: int = 224, num_classes: int = 1000, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        if img_size % 32:
            raise ValueError(f"expected an img_size that is a multiple of 32, got {img_size}")
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        inputs, side, stages = 3, img_size, []
        for i, dim in enumerate(WIDTHS):
            side //= PATCHES[i]
            stages.append(
                Stage(
                    inputs,
                    dim,
                    HEADS[i],
                    PATCHES[i],
                    (side, side),
                    GLOBAL_TOKENS[i],
                    SLIDING[i],
                    rates[i].tolist(),
                )
            )
            inputs = dim
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(WIDTHS[-1])
        self.head = nn.Linear(WIDTHS[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, img_size, img_size] -> [B, num_classes]."""
        return self.head(self.norm(self.stages(images).flatten(2).transpose(1, 2)).mean(dim=1))
