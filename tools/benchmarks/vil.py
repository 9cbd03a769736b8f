"""Multi-Scale Vision Longformer (ViL; Zhang et al., ICCV 2021); for the release's table of throughput.

Section 3 and table 1 of the paper, with absolute position embeddings, whole neighbouring chunks, and weights
that global and local tokens share. The first two stages use sliding chunks, the last two full attention. Each
stage but the last adds a global token of its own and drops it at its end.
Letters: B images, H x W tokens of a map, C channels, G global tokens, N chunks of L = side * side tokens.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 7  # of a chunk, in tokens


class Plan(NamedTuple):
    """Of a stage: channels, heads, pixels or tokens of a patch's side, global tokens, kind of attention."""

    dim: int
    heads: int
    patch: int
    global_tokens: int
    sliding: bool


PLANS = (
    Plan(96, 3, 4, 1, True),
    Plan(192, 3, 2, 1, True),
    Plan(384, 6, 2, 1, False),
    Plan(768, 12, 2, 0, False),
)


def windows(maps: Tensor, side: int, margin: int) -> Tensor:
    """The tokens of each chunk and of a margin around it, zeros beyond the map.

    [B, H, W, C] -> [B, N, (side + 2 * margin)**2, C]
    """
    height, width = maps.shape[1:3]
    maps = F.pad(maps, (0, 0, margin, margin + -width % side, margin, margin + -height % side))
    size = side + 2 * margin
    parts = maps.unfold(1, size, side).unfold(2, size, side)  # [B, rows, columns, C, size, size]
    return parts.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).flatten(1, 2)


def join_chunks(chunks: Tensor, height: int, width: int) -> Tensor:
    """The reverse of `windows` without a margin: [B, N, L, C] -> [B, H, W, C]."""
    side = math.isqrt(chunks.shape[2])
    maps = chunks.unflatten(2, (side, side)).unflatten(1, (-1, -(-width // side))).transpose(2, 3)
    return maps.flatten(3, 4).flatten(1, 2)[:, :height, :width]


class SlidingAttention(Attention):
    """Tokens see the global tokens, which come first and see all, and their own and the neighbouring chunks.

    Args:
        dim, num_heads: as in timm.
        size: height and width of the map, in tokens.
        side: of a chunk.
    """

    def __init__(self, dim: int, num_heads: int, size: tuple[int, int], side: int = SIDE) -> None:
        super().__init__(dim, num_heads, qkv_bias=True)
        self.size, self.side = size, side
        inside = windows(torch.ones(1, *size, 1), side, side)[0, :, :, 0] > 0
        self.register_buffer("visible", inside[:, None, None], persistent=False)  # [N, 1, 1, 9 * L]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None) -> Tensor:
        """Attention within the last dimension but one: [..., Q, C], twice [..., K, C] -> [..., Q, C]."""
        heads = (
            tokens.flatten(0, -3).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for tokens in (queries, keys, values)
        )
        return (
            F.scaled_dot_product_attention(*heads, attn_mask=visible).transpose(1, 2).reshape(queries.shape)
        )

    def forward(self, x: Tensor, **masks: None) -> Tensor:
        """[B, G + H * W, C] -> the same; timm's blocks pass masks that are None."""
        B, G = x.shape[0], x.shape[1] - self.size[0] * self.size[1]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        queries, *around = (
            windows(tokens[:, G:].unflatten(1, self.size), self.side, margin)
            for tokens, margin in ((q, 0), (k, self.side), (v, self.side))
        )  # [B, N, L, C] and twice [B, N, 9 * L, C]
        N = queries.shape[1]
        keys, values = (
            torch.cat([tokens[:, None, :G].expand(-1, N, -1, -1), near], dim=2)
            for tokens, near in zip((k, v), around, strict=True)
        )
        visible = F.pad(self.visible, (G, 0), value=True).repeat(B, 1, 1, 1)
        local = join_chunks(self.attend(queries, keys, values, visible), *self.size)
        return self.proj(torch.cat([self.attend(q[:, :G], k, v), local.flatten(1, 2)], dim=1))


class Stage(nn.Module):
    """Patch embedding, position embeddings by row and by column, global tokens, blocks."""

    def __init__(self, inputs: int, plan: Plan, size: tuple[int, int], depth: int) -> None:
        super().__init__()
        dim = plan.dim
        self.embed = nn.Conv2d(inputs, dim, plan.patch, plan.patch)
        self.norm = nn.LayerNorm(dim)
        self.rows = nn.Parameter(torch.zeros(size[0], 1, dim // 2))
        self.columns = nn.Parameter(torch.zeros(1, size[1], dim // 2))
        self.tokens = nn.Parameter(torch.zeros(1, plan.global_tokens, dim))
        self.blocks = nn.Sequential(*(Block(dim, plan.heads, qkv_bias=True) for _ in range(depth)))
        if plan.sliding:
            for block in self.blocks:
                block.attn = SlidingAttention(dim, plan.heads, size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, inputs, patch * H, patch * W] -> [B, C, H, W]."""
        maps = self.norm(self.embed(images).permute(0, 2, 3, 1))
        B, H, W, _ = maps.shape
        places = torch.cat([self.rows.expand(-1, W, -1), self.columns.expand(H, -1, -1)], dim=-1)
        x = torch.cat([self.tokens.expand(B, -1, -1), (maps + places).flatten(1, 2)], dim=1)
        x = self.blocks(x)[:, self.tokens.shape[1] :]
        return x.unflatten(1, (H, W)).permute(0, 3, 1, 2)


class ViL(nn.Module):
    """The classifier; small, medium (deep) and base (deep) differ in depths.

    Args:
        depths: blocks of the four stages.
        img_size: side of the images in pixels, a multiple of 32.
        num_classes: as in timm.

    Raises:
        ValueError: the size is no multiple of 32.
    """

    def __init__(self, depths: Sequence[int], img_size: int = 224, num_classes: int = 1000) -> None:
        super().__init__()
        if img_size % 32:
            raise ValueError(f"expected an img_size that is a multiple of 32, got {img_size}")
        channels, side, stages = 3, img_size, []
        for plan, depth in zip(PLANS, depths, strict=True):
            side //= plan.patch
            stages.append(Stage(channels, plan, (side, side), depth))
            channels = plan.dim
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, img_size, img_size] -> [B, num_classes]."""
        return self.head(self.norm(self.stages(images).flatten(2).transpose(1, 2)).mean(dim=1))
