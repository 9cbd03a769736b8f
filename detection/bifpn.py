"""BiFPN, the neck of RepPoints v2's stronger configs, for MMDetection 3. Importing this module registers it.

Tan et al., "EfficientDet: Scalable and Efficient Object Detection" (CVPR 2020), section 3: several passes
from coarse to fine and back, in which each map is a weighted sum of its inputs. Departures from the paper, as
in the configs of RepPoints v2's authors and of Swin Transformer: plain 3x3 convolutions instead of separable
ones; group normalization, also after the 1x1 convolutions of the backbone's maps; levels beyond the
backbone's are max-pooled from its last map, each with its own 1x1 convolution.

Letters: B images; L levels, finest first; C channels of the neck; H_l, W_l cells of a level, each level half
as high and wide as the one before, rounded up.
"""

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d, relu, silu

EPSILON = 1e-4  # the paper's; added to the sum of weights
NORM = {"type": "GN", "num_groups": 32}
INIT = {"type": "Xavier", "layer": "Conv2d", "distribution": "uniform"}


class Fusion(nn.Module):
    """The paper's fast normalized fusion (section 3.3), Swish and a 3x3 convolution with a norm.

    Args:
        inputs: how many maps.
        channels: C.
        norm_cfg: of the convolution.
    """

    def __init__(self, inputs: int, channels: int, norm_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(inputs))
        self.conv = ConvModule(channels, channels, 3, padding=1, norm_cfg=norm_cfg, act_cfg=None)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, H, W) of one size to one such map."""
        positive = relu(self.weights)
        shares = positive / (positive.sum() + EPSILON)
        return self.conv(silu(sum(share * x for share, x in zip(shares, maps, strict=True))))


class BiFPNLayer(nn.Module):
    """Once from coarse to fine and once back (figure 2d of the paper).

    Args:
        in_channels: channels of each level's map; a map that has C channels gets no convolution.
        channels: C.
        norm_cfg: of all convolutions.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, norm_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(
            nn.Identity()
            if width == channels
            else ConvModule(width, channels, 1, norm_cfg=norm_cfg, act_cfg=None)
            for width in in_channels
        )
        inner = len(in_channels) - 2  # levels between the finest and the coarsest
        self.downward = nn.ModuleList(Fusion(2, channels, norm_cfg) for _ in range(inner + 1))
        self.upward = nn.ModuleList(Fusion(inputs, channels, norm_cfg) for inputs in (*[3] * inner, 2))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """L maps (B, in_channels[l], H_l, W_l) to L maps (B, C, H_l, W_l)."""
        maps = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        *finer, coarsest = maps
        passed = [coarsest]  # from coarse to fine, in that order
        for fuse, x in zip(self.downward, reversed(finer), strict=True):
            passed.append(fuse([x, interpolate(passed[-1], size=x.shape[-2:], mode="nearest")]))

        finest, *inner, _ = reversed(passed)
        own = [*([x, between] for x, between in zip(maps[1:-1], inner, strict=True)), [coarsest]]
        outs = [finest]
        for fuse, of_level in zip(self.upward, own, strict=True):
            outs.append(fuse([max_pool2d(outs[-1], 3, stride=2, padding=1), *of_level]))
        return outs


@MODELS.register_module()
class BiFPN(BaseModule):
    """Layers of `BiFPNLayer` on the maps of a backbone.

    Args:
        in_channels: of the backbone's maps, finest first.
        out_channels: C.
        num_outs: L; levels that the backbone has no map for are pooled from its last one.
        num_repeat: layers.
        norm_cfg: of all convolutions.
        init_cfg: initialization.

    Raises:
        ValueError: impossible numbers of levels or layers.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        num_repeat: int = 2,
        norm_cfg: dict[str, Any] = NORM,
        init_cfg: dict[str, Any] = INIT,
    ) -> None:
        super().__init__(init_cfg)
        self.levels, self.pooled = num_outs, num_outs - len(in_channels)
        if self.pooled < 0 or num_outs < 2 or not in_channels:
            raise ValueError(
                f"BiFPN: num_outs must be at least 2 and the number of in_channels, got {num_outs} for "
                f"in_channels={list(in_channels)}; name as many levels as the head has strides"
            )
        if num_repeat < 1:
            raise ValueError(f"BiFPN: num_repeat must be 1 or more, got {num_repeat}")
        first = [*in_channels, *[in_channels[-1]] * self.pooled]
        widths = [first, *[[out_channels] * num_outs] * (num_repeat - 1)]
        self.layers = nn.ModuleList(BiFPNLayer(levels, out_channels, norm_cfg) for levels in widths)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The backbone's maps (B, in_channels[l], H_l, W_l) to `num_outs` maps (B, C, H_l, W_l).

        Raises:
            ValueError: wrong number of maps.
        """
        maps = list(inputs)
        if len(maps) + self.pooled != self.levels:
            raise ValueError(
                f"BiFPN: expected {self.levels - self.pooled} maps, as in_channels names, got {len(maps)}; "
                "give the backbone as many out_indices"
            )
        for _ in range(self.pooled):
            maps.append(max_pool2d(maps[-1], 3, stride=2, padding=1))
        for layer in self.layers:
            maps = layer(maps)
        return tuple(maps)
