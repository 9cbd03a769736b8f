"""Focal Transformer (Yang et al., "Focal Self-attention for Local-Global Interactions in Vision
Transformers", NeurIPS 2021), classifier and backbone, Focal and Focal-fast, in one class.

Four stages of blocks (paper section 3.1, figure 2); every stage but the last ends in a patch embedding that
halves the map and doubles the channels. Departures from the original: any input size, whatever the model was
built for; contradictory options are refused; the maps stay [B, H, W, C] from the stem to the head.

Legend: B batch, H W rows and columns, C channels, s window side, e expand size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .block_ops import add, add_and_norm, normed_attention, takes_kernels
from .focal_attention import FocalAttention
from .layers import POOLS, PatchEmbed
from .mlp import Mlp
from .options import KINDS, StageOptions, check_options, smallest_side


class FocalBlock(nn.Module):
    """Pre-norm transformer block with focal attention.

    Args:
        options: what the stage has in common.
        index: number of the block in its stage; decides about shift and ring in alternating layouts.
        drop: dropout rate.
        drop_path: stochastic depth rate.
    """

    def __init__(self, options: StageOptions, index: int, drop: float, drop_path: float) -> None:
        super().__init__()
        dim, window = options.dim, options.window_size
        self.pool_layers = nn.ModuleList(
            POOLS[options.pool](window // 2**level, dim) for level in range(options.pooled_levels)
        )
        self.norm1 = nn.LayerNorm(dim)
        self.attn = FocalAttention(
            dim,
            options.num_heads,
            options.selection(index),
            qkv_bias=options.qkv_bias,
            qk_scale=options.qk_scale,
            proj_drop=drop,
            backend=options.attention_backend,
            shift_size=options.shift(index),
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * options.mlp_ratio), drop=drop)
        scale = options.layerscale_value
        self.gamma_1 = None if scale is None else nn.Parameter(torch.full((dim,), scale))
        self.gamma_2 = None if scale is None else nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        fused = takes_kernels(x, self.attn)
        x, attended = normed_attention(x, self.norm1, self.attn, self.pool_layers, fused)
        x, normed = add_and_norm(x, _scaled(attended, self.gamma_1), self.drop_path, self.norm2, fused)
        return add(x, _scaled(self.mlp(normed), self.gamma_2), self.drop_path)

    def __prepare_scriptable__(self) -> None:
        """What `torch.jit.script` asks for: a clear refusal."""
        raise NotImplementedError(
            "a focal model cannot be scripted, since Python chooses its keys for each input size: use "
            "torch.jit.trace at the size it will run at, or torch.export"
        )


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    """Layer scale, where there is one."""
    return x if gamma is None else x * gamma


class FocalStage(nn.Module):
    """Blocks at one resolution and the patch embedding that leads to the next.

    Args:
        options: what the blocks have in common.
        drop: dropout rate.
        drop_path: stochastic depth rate of each block.
        downsample: [B, H, W, C] -> next map; None for the last stage.
        use_checkpoint: recompute activations in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        options: StageOptions,
        drop: float,
        drop_path: Sequence[float],
        downsample: PatchEmbed | None,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FocalBlock(options, i, drop, rate) for i, rate in enumerate(drop_path))
        self.downsample = downsample
        self.use_checkpoint = use_checkpoint

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C], before the downsampler."""
        for block in self.blocks:
            if self.use_checkpoint and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class FocalTransformer(nn.Module):
    """Classifier and backbone.

    Args:
        img_size: input size the parameters are shaped for, pixels, one side or (rows, columns); any other
            size from 32 x 32 runs as well.
        patch_size: stride of the stem.
        in_chans: input channels.
        num_classes: classes; 0 for no head.
        embed_dim: channels of the first stage; each following stage doubles them.
        depths: blocks per stage.
        num_heads: heads per stage.
        window_size: window side s; a stage whose smaller side is not larger, at `img_size`, is one window.
        mlp_ratio: hidden width of the MLP over C.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the scores; None or False for (C / heads) ** -0.5.
        drop_rate: dropout.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        ape: learned absolute position embedding after the stem (resized bicubically to other sizes).
        patch_norm: LayerNorm in the stem.
        use_shift: roll the map by s // 2 in odd blocks.
        focal_pool: fc | conv | mean | max | none, how coarse tokens are made.
        focal_stages: stages that pool.
        focal_levels: per stage 0 (own window only), 1 (and the ring), 2 or 3 (and one or two pooled levels);
            in Focal-fast 1 or 2.
        focal_windows: per stage the region of the pooled levels, in windows; odd.
        focal_topk: Focal-fast: keys per level.
        expand_sizes: per stage how far the ring reaches, tokens.
        expand_layer: all | even | odd; `even` takes the ring from blocks 0, 2, ..., `odd` from 1, 3, ....
        use_conv_embed: overlapping patch embeddings.
        use_layerscale: learned factor per channel on both branches of a block.
        layerscale_value: its initial value.
        use_pre_norm: GroupNorm before the downsampling convolutions.
        use_checkpoint: gradient checkpointing of every block in training.
        kind: focal | focalv2 (Focal-fast).
        attention_backend: auto | reference | sdpa | triton.

    Raises:
        ValueError: options that contradict each other, all of them in one message.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        ape: bool = False,
        patch_norm: bool = True,
        use_shift: bool = False,
        focal_pool: str = "none",
        focal_stages: Sequence[int] = (0, 1, 2, 3),
        focal_levels: Sequence[int] = (1, 1, 1, 1),
        focal_windows: Sequence[int] = (7, 5, 3, 1),
        focal_topk: int = 128,
        expand_sizes: Sequence[int] = (3, 3, 3, 3),
        expand_layer: str = "all",
        use_conv_embed: bool = False,
        use_layerscale: bool = False,
        layerscale_value: float = 1e-4,
        use_pre_norm: bool = False,
        use_checkpoint: bool = False,
        kind: str = "focal",
        attention_backend: str = "auto",
    ) -> None:
        options = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        check_options(options)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.smallest_side = smallest_side(options)
        dims = [embed_dim * 2**i for i in range(len(depths))]
        self.feature_dims = tuple(dims)
        self.num_features = dims[-1]

        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.patch_embed = PatchEmbed(
            in_chans, embed_dim, patch_size, overlap=use_conv_embed, norm=patch_norm
        )
        height, width = self.patch_embed.output_size(height, width)
        self.built_for = (height, width)
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, height * width, embed_dim)) if ape else None
        self.pos_drop = nn.Dropout(drop_rate)

        rates = iter([drop_path_rate * block / max(sum(depths) - 1, 1) for block in range(sum(depths))])
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            last = i == len(depths) - 1
            down = (
                None
                if last
                else PatchEmbed(dims[i], dims[i + 1], 2, overlap=use_conv_embed, pre_norm=use_pre_norm)
            )
            stage_options = StageOptions.of_stage(options, i, (height, width))
            stage_rates = [next(rates) for _ in range(depth)]
            self.layers.append(FocalStage(stage_options, drop_rate, stage_rates, down, use_checkpoint))
            height, width = (height, width) if down is None else down.output_size(height, width)

        self.norm: nn.Module = nn.LayerNorm(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(initialise)
        if ape:
            trunc_normal_(self.absolute_pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W], at least 32 x 32, to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] to the normalised last map [B, H/32, W/32, C]."""
        x = self._stem(x)
        for stage in self.layers:
            x = next_map(stage, stage(x))
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last map [B, H, W, C] to logits [B, num_classes], or to the mean token [B, C] if `pre_logits`."""
        x = x.mean(dim=(1, 2))
        return x if pre_logits else self.head(x)

    def forward_intermediates(self, x: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        """Maps of chosen stages, after the stage's last block and before its downsampler, not normalised.

        Args:
            x: image, [B, in_chans, H, W].
            indices: stages, ascending; negative ones count from the end. None for all.

        Returns:
            [B, C_i, H / (4 * 2^i), W / (4 * 2^i)] per chosen stage, rounded down.

        Raises:
            ValueError: a stage that does not exist.
        """
        count = len(self.layers)
        wanted = range(count) if indices is None else [i + count if i < 0 else i for i in indices]
        if any(not 0 <= i < count for i in wanted) or len(wanted) == 0:
            raise ValueError(
                f"indices must name stages 0 to {count - 1} (or -{count} to -1), got {list(indices or ())}"
            )
        x = self._stem(x)
        maps = []
        for i, stage in enumerate(self.layers[: max(wanted) + 1]):
            x = stage(x)
            maps.append(x.permute(0, 3, 1, 2))
            x = next_map(stage, x) if i < max(wanted) else x
        return [maps[i] for i in wanted]

    def _stem(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] to the first map [B, H/4, W/4, C]."""
        check_images(x, self.in_chans, self.smallest_side)
        x = self.patch_embed(x.permute(0, 2, 3, 1))
        if self.absolute_pos_embed is not None:
            x = x + self._position_embedding(x.shape[1], x.shape[2])
        return self.pos_drop(x)

    def _position_embedding(self, height: int, width: int) -> Tensor:
        """Absolute position embedding at a map size: [1, H, W, C]."""
        assert self.absolute_pos_embed is not None
        embedding = self.absolute_pos_embed.unflatten(1, self.built_for)
        if (height, width) == self.built_for:
            return embedding
        resized = F.interpolate(
            embedding.permute(0, 3, 1, 2), (height, width), mode="bicubic", antialias=True
        )
        return resized.permute(0, 2, 3, 1)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, beyond biases and one-dimensional ones."""
        keywords = ("absolute_pos_embed", "relative_position_bias_table")
        return {name for name, _ in self.named_parameters() if any(word in name for word in keywords)}

    def attention_backends(self, dtype: torch.dtype = torch.float32) -> list[str]:
        """Attention backend of each stage, for activations of `dtype`, on the device where the model is."""
        first = [next(m for m in stage.modules() if isinstance(m, FocalAttention)) for stage in self.layers]
        return [attention.resolved_backend(dtype) for attention in first]


def check_images(x: Tensor, in_chans: int, smallest_side: int) -> None:
    """Raise ValueError for images that cannot run."""
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"expected images [B, {in_chans}, H, W], got a tensor of shape {list(x.shape)}")
    if min(x.shape[2:]) < smallest_side:
        least = f"{smallest_side} x {smallest_side}"
        raise ValueError(f"images must be at least {least} pixels, got {x.shape[2]} x {x.shape[3]}: resize")


def next_map(stage: Any, x: Tensor) -> Tensor:
    """A stage's map [B, H, W, C] on its way to the next stage (the last one's stays)."""
    return x if stage.downsample is None else stage.downsample(x)


def initialise(module: nn.Module) -> None:
    """Linear layers truncated normal 0.02 with zero bias; norms and convolutions as PyTorch has them."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


__all__ = ["KINDS", "FocalTransformer"]
