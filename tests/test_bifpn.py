"""The BiFPN neck against a plain reference, for several numbers of levels and odd sizes."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("mmdet", reason="mmdet is not installed")
import_module("openmmlab.mmcv_ops")  # before mmcv.ops
from mmdet.registry import MODELS  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402

from detection.bifpn import BiFPN  # noqa: E402

NORM = {"type": "GN", "num_groups": 4}
SHAPES = [  # widths of the backbone's maps, levels, layers
    ((8, 12, 20), 5, 2),
    ((8, 12, 20), 3, 1),
    ((8, 16), 4, 3),  # the second as wide as the neck: no 1x1 convolution there
    ((8,), 2, 1),
    ((16, 8), 2, 2),
]


@pytest.fixture(scope="module", autouse=True)
def in_mmdet() -> Iterator[None]:
    """Whatever scope an earlier Runner of the process left."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


def make(widths: tuple[int, ...], levels: int, layers: int) -> BiFPN:
    """Of 16 channels, with weights of sums that differ, one of them negative."""
    torch.manual_seed(0)
    told = {"type": "BiFPN", "in_channels": widths, "out_channels": 16, "num_outs": levels}
    neck = MODELS.build(told | {"num_repeat": layers, "norm_cfg": NORM})
    for key, parameter in neck.named_parameters():
        if key.endswith(".weights"):
            nn.init.uniform_(parameter, 0.1, 2)
    neck.layers[0].downward[0].weights.data[1] = -1.0
    return neck


def maps_of(widths: tuple[int, ...], height: int = 21, width: int = 34) -> list[Tensor]:
    """Each half the size of the one before, rounded up."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(-(-height // 2**level), -(-width // 2**level)) for level in range(len(widths))]
    return [torch.randn(2, c, *size, generator=generator) for c, size in zip(widths, sizes, strict=True)]


def plain(weights: dict[str, Tensor], maps: list[Tensor], levels: int, layers: int) -> list[Tensor]:
    """The neck from its state dict, node by node, with indices."""

    def convolved(key: str, x: Tensor) -> Tensor:
        kernel = weights[f"{key}.conv.weight"]
        x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
        return F.group_norm(x, 4, weights[f"{key}.gn.weight"], weights[f"{key}.gn.bias"])

    def node(key: str, *inputs: Tensor) -> Tensor:
        shares = [max(float(weight), 0.0) for weight in weights[f"{key}.weights"]]
        total = torch.zeros_like(inputs[0])
        for share, x in zip(shares, inputs, strict=True):
            total += share / (sum(shares) + 1e-4) * x
        return convolved(f"{key}.conv", total / (1 + torch.exp(-total)))

    def wider(x: Tensor, like: Tensor) -> Tensor:
        rows = torch.arange(like.shape[2]) * x.shape[2] // like.shape[2]
        columns = torch.arange(like.shape[3]) * x.shape[3] // like.shape[3]
        return x[:, :, rows][..., columns]

    def narrower(x: Tensor) -> Tensor:
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)

    maps = list(maps)
    while len(maps) < levels:
        maps.append(narrower(maps[-1]))
    for layer in range(layers):
        name = f"layers.{layer}"
        for level in range(levels):
            if f"{name}.laterals.{level}.conv.weight" in weights:
                maps[level] = convolved(f"{name}.laterals.{level}", maps[level])
        middle = list(maps)
        for level in range(levels - 2, -1, -1):
            above = wider(middle[level + 1], maps[level])
            middle[level] = node(f"{name}.downward.{levels - 2 - level}", maps[level], above)
        outs = [middle[0]]
        for level in range(1, levels):
            own = [maps[level], middle[level]] if level < levels - 1 else [maps[level]]
            outs.append(node(f"{name}.upward.{level - 1}", narrower(outs[-1]), *own))
        maps = outs
    return maps


@pytest.mark.parametrize(("widths", "levels", "layers"), SHAPES)
def test_neck_is_the_plain_one(widths: tuple[int, ...], levels: int, layers: int) -> None:
    neck = make(widths, levels, layers).double()
    maps = [x.double() for x in maps_of(widths)]
    outs = neck(maps)
    expected = plain(neck.state_dict(), maps, levels, layers)
    assert [x.shape[1:] for x in outs] == [
        (16, -(-21 // 2**level), -(-34 // 2**level)) for level in range(levels)
    ]
    for got, wanted in zip(outs, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_widths_of_the_coco_config_and_its_size() -> None:
    """Laterals of 192, 384 and three times 768 channels, then 16 convolutions of 3x3."""
    with torch.device("meta"):
        neck = BiFPN((192, 384, 768), 256, 5)
    norms = 2 * 256
    expected = (192 + 384 + 3 * 768) * 256 + 5 * norms + 16 * (9 * 256**2 + norms) + 2 * (4 * 2 + 3 * 3 + 2)
    assert sum(p.numel() for p in neck.parameters()) == expected == 10_185_254


def test_weights_begin_alike_and_convolutions_as_xavier() -> None:
    neck = BiFPN((8, 12), 16, 3, norm_cfg=NORM)
    neck.init_weights()
    for key, parameter in neck.named_parameters():
        if key.endswith(".weights"):
            assert parameter.eq(1).all(), key
        if parameter.dim() == 4:
            fans = sum(parameter.shape[:2]) * parameter[0, 0].numel()
            assert 0.8 < parameter.abs().max() / (6 / fans) ** 0.5 <= 1, key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_outs": 2}, "num_outs must be at least 2 and the number of in_channels, got 2"),
        ({"in_channels": (8,), "num_outs": 1}, "got 1 for in_channels"),
        ({"in_channels": ()}, "as many levels as the head has strides"),
        ({"num_repeat": 0}, "num_repeat must be 1 or more, got 0"),
    ],
)
def test_levels_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    told: dict[str, Any] = {"in_channels": (8, 12, 20), "out_channels": 16, "num_outs": 5, "norm_cfg": NORM}
    with pytest.raises(ValueError, match=message):
        BiFPN(**(told | options))


def test_another_number_of_maps_is_refused() -> None:
    neck = BiFPN((8, 12, 20), 16, 5, norm_cfg=NORM)
    with pytest.raises(ValueError, match="expected 3 maps, as in_channels names, got 2"):
        neck([torch.zeros(1, 8, 8, 8), torch.zeros(1, 12, 4, 4)])
