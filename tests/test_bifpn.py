"""The BiFPN neck against the paper's figure, written out for three levels."""

from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("mmdet", reason="mmdet is not installed")
import_module("openmmlab.mmcv_ops")  # before mmcv.ops
from mmdet.registry import MODELS  # noqa: E402

from detection.bifpn import BiFPN, BiFPNLayer, Fusion  # noqa: E402

NORM = {"type": "GN", "num_groups": 4}

pytestmark = pytest.mark.usefixtures("in_mmdet")


def narrower(x: Tensor) -> Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


def fused(node: Fusion, *inputs: Tensor) -> Tensor:
    shares = [max(weight, 0.0) for weight in node.weights.tolist()]
    total = sum(share / (sum(shares) + 1e-4) * x for share, x in zip(shares, inputs, strict=True))
    return node.conv(F.silu(total))


def plain_layer(layer: BiFPNLayer, maps: list[Tensor]) -> list[Tensor]:
    """From coarse to fine and back."""
    fine, middle, coarse = (lateral(x) for lateral, x in zip(layer.laterals, maps, strict=True))
    between = fused(layer.downward[0], middle, F.interpolate(coarse, middle.shape[2:]))
    finest = fused(layer.downward[1], fine, F.interpolate(between, fine.shape[2:]))
    inner = fused(layer.upward[0], narrower(finest), middle, between)
    return [finest, inner, fused(layer.upward[1], narrower(inner), coarse)]


@pytest.mark.parametrize("widths", [(8, 12, 20), (8, 16)], ids=str)
def test_neck_is_the_papers(widths: tuple[int, ...]) -> None:
    """Two layers; a level that the backbone lacks is pooled; a map as wide as the neck needs no lateral."""
    torch.manual_seed(0)
    options = {"in_channels": widths, "out_channels": 16, "num_outs": 3, "num_repeat": 2, "norm_cfg": NORM}
    neck = MODELS.build({"type": "BiFPN", **options}).double()
    for key, parameter in neck.named_parameters():
        if key.endswith(".weights"):
            nn.init.uniform_(parameter, 0.1, 2)
    neck.layers[0].downward[0].weights.data[1] = -1.0  # counts as zero
    sizes = [(21, 34), (11, 17), (6, 9)]
    maps = [torch.randn(2, width, *size).double() for width, size in zip(widths, sizes, strict=False)]
    expected = maps if len(maps) == 3 else [*maps, narrower(maps[-1])]
    for layer in neck.layers:
        expected = plain_layer(layer, expected)
    assert isinstance(neck.layers[0].laterals[1], nn.Identity) == (widths[1] == 16)
    for got, wanted, size in zip(neck(maps), expected, sizes, strict=True):
        assert got.shape == (2, 16, *size)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_outs": 2}, "num_outs must be at least 2 and the number of in_channels, got 2"),
        ({"num_repeat": 0}, "num_repeat must be 1 or more, got 0"),
        ({}, "expected 3 maps, as in_channels names, got 2"),
    ],
)
def test_levels_that_cannot_be_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neck = BiFPN(
            **{"in_channels": (8, 12, 20), "out_channels": 16, "num_outs": 5, "norm_cfg": NORM, **options}
        )
        neck([torch.zeros(1, 8, 8, 8), torch.zeros(1, 12, 4, 4)])
