"""The operators that stand in for mmcv's compiled ones, through mmcv.ops, against plain definitions."""

import importlib
import math
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor

from openmmlab import mmcv_ops as bridge

mmcv = importlib.import_module("mmcv")
mmcv_ops = importlib.import_module("mmcv.ops")  # after the bridge, on which it depends
RoIAlign = mmcv_ops.RoIAlign


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_boxes(count: int, size: float = 40, seed: int = 0) -> Tensor:
    """Overlapping boxes of a few sizes within 0 to 60."""
    x = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([x[:, :2] * 20, x[:, :2] * 20 + 2 + x[:, 2:] * size], dim=1)


def agree(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Two functions have the same output, and the same gradient of every input."""
    results = []
    for function in (ours, plain):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = function(*leaves)
        (output * rand(*output.shape, seed=9)).sum().backward()
        results.append([output.detach(), *[leaf.grad for leaf in leaves]])
    for got, expected in zip(*results, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


# --- Boxes --------------------------------------------------------------------------------------------------


def iou(box: Tensor, other: Tensor, offset: int) -> float:
    low, high = torch.maximum(box[:2], other[:2]), torch.minimum(box[2:], other[2:])
    shared = (high - low + offset).clamp(min=0).prod()
    areas = [(b[2:] - b[:2] + offset).prod() for b in (box, other)]
    return float(shared / (areas[0] + areas[1] - shared))


def plain_nms(boxes: Tensor, scores: Tensor, threshold: float, offset: int = 0) -> list[int]:
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("offset", [0, 1])
def test_nms(offset: int) -> None:
    for seed, threshold in product(range(3), (0.3, 0.6)):
        boxes, scores = random_boxes(50, seed=seed), rand(50, seed=seed + 10).sigmoid()
        dets, kept = mmcv_ops.nms(boxes, scores, threshold, offset=offset)
        assert kept.tolist() == plain_nms(boxes, scores, threshold, offset)
        assert torch.equal(dets, torch.cat([boxes[kept], scores[kept, None]], dim=1))
    assert 1 < len(kept) < 50


def test_nms_of_nothing_and_in_half_precision() -> None:
    assert mmcv_ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)[1].shape == (0,)
    boxes, scores = random_boxes(30).half(), rand(30).sigmoid().float()
    assert mmcv_ops.nms(boxes, scores, 0.5)[1].tolist() == plain_nms(boxes.float(), scores, 0.5)


def plain_soft_nms(
    boxes: Tensor, scores: Tensor, threshold: float, sigma: float, least: float, method: str, offset: int
) -> list[tuple[int, float]]:
    left = dict(enumerate(scores.tolist()))
    taken = []
    while left:
        best = max(left, key=lambda i: left[i])
        taken.append((best, left.pop(best)))
        for i in list(left):
            overlap = iou(boxes[best], boxes[i], offset)
            factors = {"naive": 0.0, "linear": 1 - overlap, "gaussian": 1.0}
            factor = factors[method] if overlap >= threshold else 1.0
            factor = torch.tensor(-overlap * overlap / sigma).exp().item() if method == "gaussian" else factor
            left[i] *= factor
            if left[i] < least:
                del left[i]
    return taken


@pytest.mark.parametrize(("method", "offset"), product(("naive", "linear", "gaussian"), (0, 1)))
def test_soft_nms(method: str, offset: int) -> None:
    boxes, scores = random_boxes(40), rand(40).sigmoid()
    dets, kept = mmcv_ops.soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
    expected = plain_soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
    assert kept.tolist() == [i for i, _ in expected]
    assert torch.equal(dets[:, :4], boxes[kept])
    torch.testing.assert_close(dets[:, 4], torch.tensor([s for _, s in expected], dtype=torch.float64))
    assert 3 < len(kept) < 40, "nothing left, or nothing kept"


def test_soft_nms_of_nothing_and_of_points() -> None:
    assert mmcv_ops.soft_nms(torch.zeros(0, 4), torch.zeros(0))[1].shape == (0,)
    points = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [1, 1, 9, 9]])
    dets, kept = mmcv_ops.soft_nms(points, torch.tensor([0.5, 0.4, 0.3]))
    assert kept.tolist() == [0, 1, 2] and dets.isfinite().all()


# --- Regions ------------------------------------------------------------------------------------------------


ROIS = torch.tensor(
    [[0, 1.5, 2.2, 20.3, 17.9], [1, 0, 0, 31, 23], [1, 5.1, 3, 9.7, 4.2], [0, -6, -4, 50, 40]],
    dtype=torch.float64,
)


@pytest.mark.parametrize(("aligned", "ratio"), product((True, False), (0, 2)))
def test_roi_align(aligned: bool, ratio: int) -> None:
    """torchvision's, which has the same definition; its arguments come in another order."""
    layer = RoIAlign((3, 2), 0.5, ratio, aligned=aligned)
    grid = dict(output_size=(3, 2), spatial_scale=0.5, sampling_ratio=ratio, aligned=aligned)
    agree(
        lambda maps: layer(maps, ROIS),
        lambda maps: torchvision.ops.roi_align(maps, ROIS, **grid),
        rand(2, 3, 12, 16),
    )


def test_roi_align_of_no_region_has_a_gradient_of_zeros() -> None:
    maps = rand(2, 3, 12, 16).requires_grad_()
    pooled = RoIAlign(7, 0.25)(maps, ROIS[:0])
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert maps.grad is not None and not maps.grad.any()


def test_roi_align_in_half_precision() -> None:
    """As mixed precision has it: maps of low precision, regions of any; the arithmetic is float32."""
    dtype = torch.bfloat16
    layer, maps = RoIAlign(3, 0.5), rand(2, 3, 12, 16).to(dtype)
    full = maps.float().requires_grad_()
    expected = layer(full, ROIS.to(dtype).float())
    expected.sum().backward()
    half = maps.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(half, ROIS.to(dtype))
    got.sum().backward()
    assert got.dtype == half.grad.dtype == dtype
    assert torch.equal(got, expected.to(dtype)) and torch.equal(half.grad, full.grad.to(dtype))


# --- Deformable convolution ---------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """A convolution on maps of 6 x 5; deformable groups are as many as groups."""

    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (6, 5)  # of the output
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def steps(self) -> tuple[tuple[int, int], ...]:
        return self.stride, self.padding, self.dilation


GEOMETRIES = {
    "plain": Geometry(),
    "strided": Geometry((3, 2), (2, 5), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
    "grouped": Geometry(groups=2),
}


def deformable_inputs(geometry: Geometry, larger: int = 0) -> list[Tensor]:
    """Maps, offsets, mask, weight; offsets and mask are `larger` than the output at two sides."""
    size = [side + larger for side in geometry.size]
    samples = math.prod(geometry.kernel) * geometry.groups
    return [
        rand(2, 4, 6, 5, seed=1),
        rand(2, 2 * samples, *size, seed=2) * 1.7,
        rand(2, samples, *size, seed=3).sigmoid(),
        rand(6, 4 // geometry.groups, *geometry.kernel, seed=4),
    ]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_deform_conv(name: str) -> None:
    """torchvision's, which has the same definition; its arguments come in another order."""
    geometry = GEOMETRIES[name]
    x, offset, _, weight = deformable_inputs(geometry)
    groups = (geometry.groups, geometry.groups)
    agree(
        lambda x, o, w: mmcv_ops.deform_conv2d(x, o, w, *geometry.steps(), *groups),
        lambda x, o, w: torchvision.ops.deform_conv2d(x, o, w, None, *geometry.steps()),
        *(x, offset, weight),
    )


@pytest.mark.parametrize(
    ("name", "bias", "larger"),
    [("plain", True, 0), ("strided", False, 0), ("grouped", True, 0), ("strided", True, 1)],
)
def test_modulated_deform_conv(name: str, bias: bool, larger: int) -> None:
    """Offsets and mask are parts of one tensor in DyHead, and may be larger than the output.

    mmcv then reads their first values, as many as it needs.
    """
    geometry, shift = GEOMETRIES[name], rand(6, seed=5)
    inputs = [*deformable_inputs(geometry, larger), *([shift] if bias else [])]

    def ours(x: Tensor, o: Tensor, m: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        o, m = torch.cat([o, m], dim=1).split([o.shape[1], m.shape[1]], dim=1)
        groups = (geometry.groups, geometry.groups)
        return mmcv_ops.modulated_deform_conv2d(x, o, m, w, b, *geometry.steps(), *groups)

    def plain(x: Tensor, o: Tensor, m: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        o, m = (part.flatten(1)[:, : part.shape[1] * math.prod(geometry.size)] for part in (o, m))
        o, m = (part.unflatten(1, (-1, *geometry.size)) for part in (o, m))
        return torchvision.ops.deform_conv2d(x, o, w, b, *geometry.steps(), m)

    agree(ours, plain, *inputs)


def test_offsets_at_the_border_have_no_gradient() -> None:
    """In row or column -1, as in mmcv; torchvision has one there, where new layers take their samples."""
    geometry = Geometry((3, 2), (3, 5), stride=(2, 1), dilation=(1, 2))
    x, offset, _, weight = deformable_inputs(geometry)
    ours, theirs = (torch.zeros_like(offset).requires_grad_() for _ in range(2))
    mmcv_ops.deform_conv2d(x, ours, weight, *geometry.steps()).sum().backward()
    torchvision.ops.deform_conv2d(x, theirs, weight, None, *geometry.steps()).sum().backward()
    expected = theirs.grad.unflatten(1, (*geometry.kernel, 2))  # B, tap's row and column, y or x, H, W
    for border in (expected[:, 0, :, :, 0], expected[:, :, 0, :, :, 0]):
        assert border.any()
        border.zero_()
    assert expected.any()
    torch.testing.assert_close(ours.grad.view_as(expected), expected)


def test_modulated_deform_conv_refuses_a_mask_that_is_too_small() -> None:
    x, offset, mask, weight = deformable_inputs(GEOMETRIES["plain"])
    with pytest.raises(
        ValueError, match=r"expected offsets or a mask of \(2, \d+, 6, 5\) or larger, got \(2, "
    ):
        mmcv_ops.modulated_deform_conv2d(x, offset, mask[..., :-1], weight, None, 1, 1)


def test_deform_conv_with_parts_frozen_and_two_backward_passes() -> None:
    """The weight's gradient does not depend on what else needs one, nor on a pass before."""
    x, offset, _, weight = deformable_inputs(GEOMETRIES["plain"])
    alone, together = (weight.clone().requires_grad_() for _ in range(2))
    mmcv_ops.deform_conv2d(x, offset, alone, 1, 1).sum().backward()
    output = mmcv_ops.deform_conv2d(x.requires_grad_(), offset, together, 1, 1).sum()
    output.backward(retain_graph=True)
    torch.testing.assert_close(together.grad, alone.grad)
    output.backward()
    torch.testing.assert_close(together.grad, 2 * alone.grad)


@pytest.mark.parametrize("layer", [mmcv_ops.DeformConv2dPack, mmcv_ops.ModulatedDeformConv2dPack])
def test_deformable_layers_under_autocast(layer: type) -> None:
    convolution = layer(4, 6, 3, padding=1)
    x = rand(2, 4, 6, 5).float().requires_grad_()
    expected = convolution(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = convolution(x)
    got.float().sum().backward()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *convolution.parameters()])


# --- Focal loss ---------------------------------------------------------------------------------------------


def test_sigmoid_focal_loss() -> None:
    target = torch.tensor([0, 2, 3, 3, 1])  # 3 is background

    def plain(scores: Tensor) -> Tensor:
        p = scores.sigmoid()
        own = torch.zeros_like(scores)
        own[[0, 1, 4], [0, 2, 1]] = 1
        return -own * 0.3 * (1 - p) ** 1.5 * p.log() - (1 - own) * 0.7 * p**1.5 * (1 - p).log()

    agree(
        lambda scores: mmcv_ops.sigmoid_focal_loss(scores, target, 1.5, 0.3, None, "none"),
        plain,
        rand(5, 3) * 3,
    )
    half = (rand(5, 3) * 3).bfloat16().requires_grad_()
    mmcv_ops.sigmoid_focal_loss(half, target, 1.5, 0.3, None, "mean").backward()
    assert half.grad.isfinite().all() and half.grad.any()
    assert mmcv_ops.sigmoid_focal_loss(rand(0, 3), target[:0], 1.5, 0.3, None, "sum") == 0


# --- The module ---------------------------------------------------------------------------------------------


def test_what_is_not_covered_says_so() -> None:
    scores, weights = rand(2, 3), torch.ones(3)
    calls = {
        "roi_pool_forward": lambda: mmcv_ops.RoIPool(3)(rand(2, 3, 12, 16), ROIS),
        "roi_align with pool_mode='max'": lambda: RoIAlign(3, pool_mode="max")(rand(2, 3, 12, 16), ROIS),
        "sigmoid_focal_loss with a weight per class": lambda: mmcv_ops.sigmoid_focal_loss(
            scores, torch.tensor([0, 1]), 2.0, 0.25, weights, "none"
        ),
    }
    for name, call in calls.items():
        with pytest.raises(NotImplementedError, match=f"{name}.*choose a method without it, or compile mmcv"):
            call()


def test_it_is_in_place_here_unless_there_are_compiled_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an environment with compiled operators these tests would compare mmcv's own."""
    assert isinstance(sys.modules[bridge.NAME], bridge.BridgedOperators)
    assert not bridge.install()
    monkeypatch.delitem(sys.modules, bridge.NAME)
    (tmp_path / "_ext.py").touch()
    with monkeypatch.context() as patch:
        patch.setattr(mmcv, "__path__", [*mmcv.__path__, str(tmp_path)])
        assert not bridge.install() and bridge.NAME not in sys.modules
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mmcv", None)
        with pytest.raises(ImportError, match="mmcv is not installed .*: run `make setup-openmmlab`"):
            bridge.install()
