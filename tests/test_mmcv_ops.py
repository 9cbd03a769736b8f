"""The operators that stand in for mmcv's compiled ones, through mmcv.ops, against plain definitions."""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
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


@pytest.mark.parametrize(("offset", "dtype"), product((0, 1), (torch.float32, torch.float64)))
def test_nms(offset: int, dtype: torch.dtype) -> None:
    for seed, threshold in product(range(3), (0.3, 0.6)):
        boxes, scores = random_boxes(50, seed=seed).to(dtype), rand(50, seed=seed + 10).sigmoid().to(dtype)
        dets, kept = mmcv_ops.nms(boxes, scores, threshold, offset=offset)
        assert kept.tolist() == plain_nms(boxes, scores, threshold, offset)
        assert torch.equal(dets, torch.cat([boxes[kept], scores[kept, None]], dim=1))
    assert 1 < len(kept) < 50
    _, best = mmcv_ops.nms(boxes, scores, threshold, score_threshold=0.5, max_num=3)
    assert len(best) == 3 and (scores[best] > 0.5).all()


def test_nms_of_nothing_and_in_half_precision() -> None:
    assert mmcv_ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)[1].shape == (0,)
    boxes, scores = random_boxes(30).half(), rand(30).sigmoid().half()
    assert mmcv_ops.nms(boxes, scores.float(), 0.5)[1].tolist() == plain_nms(
        boxes.float(), scores.float(), 0.5
    )


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


def test_soft_nms_of_nothing_of_one_and_of_points() -> None:
    assert mmcv_ops.soft_nms(torch.zeros(0, 4), torch.zeros(0))[1].shape == (0,)
    points = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [1, 1, 9, 9]])
    dets, kept = mmcv_ops.soft_nms(points, torch.tensor([0.5, 0.4, 0.3]))
    assert kept.tolist() == [0, 1, 2] and dets.isfinite().all()
    options = {"type": "soft_nms", "iou_threshold": 0.5}
    dets, _ = mmcv_ops.batched_nms(points, torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0, 0, 1]), options)
    assert dets.shape == (3, 5)


# --- Regions ------------------------------------------------------------------------------------------------


ROIS = torch.tensor(
    [[0, 1.5, 2.2, 20.3, 17.9], [1, 0, 0, 31, 23], [1, 5.1, 3, 9.7, 4.2], [0, -6, -4, 50, 40]],
    dtype=torch.float64,
)


@pytest.mark.parametrize(("aligned", "ratio"), product((True, False), (0, 2)))
def test_roi_align(aligned: bool, ratio: int) -> None:
    """The average of a ramp over a cell is the value at its centre, for an aligned one half a pixel less."""
    layer = RoIAlign((3, 2), 0.5, ratio, aligned=aligned)
    ramp = torch.arange(16.0) + 10 * torch.arange(12.0)[:, None]
    got = layer(ramp[None, None], torch.tensor([[0.0, 4, 2, 20, 14]]))
    expected = torch.tensor([[24.0, 28], [44, 48], [64, 68]]) - (5.5 if aligned else 0)
    torch.testing.assert_close(got[0, 0], expected)
    assert torch.autograd.gradcheck(lambda maps: layer(maps, ROIS), rand(2, 2, 12, 16).requires_grad_())


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

GEOMETRIES = {  # stride, padding, dilation, groups, deformable groups, kernel
    "plain": (1, 1, 1, 1, 1, (3, 3)),
    "strided": ((2, 1), (0, 1), (1, 2), 1, 1, (3, 2)),
    "grouped": (1, 1, 1, 2, 2, (3, 3)),
}


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def zero_padded(plane: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Planes [C, H, W] between pixels, with zeros around them; constant from -1 and from H or W on."""
    value = plane.new_zeros(len(plane))
    if not (-1 < y < plane.shape[1] and -1 < x < plane.shape[2]):
        return value
    top, left = int(y.floor()), int(x.floor())
    for row, dy in ((top, top + 1 - y), (top + 1, y - top)):
        for column, dx in ((left, left + 1 - x), (left + 1, x - left)):
            if 0 <= row < plane.shape[1] and 0 <= column < plane.shape[2]:
                value = value + plane[:, row, column] * dy * dx
    return value


def plain_deformed(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, geometry: tuple) -> Tensor:
    stride, padding, dilation, groups, deform_groups, kernel = geometry
    (sy, sx), (py, px), (dy, dx) = pair(stride), pair(padding), pair(dilation)
    taps = list(product(range(kernel[0]), range(kernel[1])))
    size = output_size(geometry, x.shape[2:])
    offset = first_values(offset, (deform_groups, len(taps), 2, *size))
    mask = first_values(mask, (deform_groups, len(taps), *size))
    columns = []  # per tap and position: all channels
    for tap, (ky, kx) in enumerate(taps):
        for row, column in product(*map(range, size)):
            samples = []
            for image, group in product(range(len(x)), range(deform_groups)):
                by, bx = offset[image, group, tap, :, row, column]
                value = zero_padded(
                    x[image].chunk(deform_groups)[group],
                    row * sy - py + ky * dy + by,
                    column * sx - px + kx * dx + bx,
                )
                samples.append(value * mask[image, group, tap, row, column])
            columns.append(torch.cat(samples).view(len(x), -1))
    stacked = torch.stack(columns, dim=-1).unflatten(-1, (len(taps), *size))  # B C taps H W
    parts = zip(stacked.chunk(groups, dim=1), weight.flatten(2).chunk(groups), strict=True)
    return torch.cat([torch.einsum("bcthw,oct->bohw", part, w) for part, w in parts], dim=1)


def output_size(geometry: tuple, size: Sequence[int]) -> list[int]:
    stride, padding, dilation, _, _, kernel = geometry
    sides = zip(size, pair(padding), pair(dilation), kernel, pair(stride), strict=True)
    return [(side + 2 * p - d * (k - 1) - 1) // s + 1 for side, p, d, k, s in sides]


def first_values(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """mmcv's kernels know the shape that they need, and read it from where an image begins."""
    return x.flatten(1)[:, : math.prod(shape)].unflatten(1, shape)


def deformable_inputs(geometry: tuple, larger: int = 0) -> dict[str, Tensor]:
    """Half of the offsets are whole numbers, which move samples to pixels and to the rows just outside."""
    *_, groups, deform_groups, kernel = geometry
    size = [side + larger for side in output_size(geometry, (6, 5))]
    taps = kernel[0] * kernel[1] * deform_groups
    offset = rand(2, 2 * taps, *size, seed=2) * 1.7
    return {
        "input": rand(2, 4, 6, 5, seed=1),
        "offset": torch.where(rand(*offset.shape, seed=6) > 0, offset, offset.round()),
        "mask": rand(2, taps, *size, seed=3).sigmoid(),
        "weight": rand(6, 4 // groups, *kernel, seed=4),
    }


@pytest.mark.parametrize("name", GEOMETRIES)
def test_deform_conv(name: str) -> None:
    geometry = GEOMETRIES[name]
    x = deformable_inputs(geometry)
    agree(
        lambda i, o, w: mmcv_ops.deform_conv2d(i, o, w, *geometry[:5]),
        lambda i, o, w: plain_deformed(i, o, torch.ones_like(x["mask"]), w, geometry),
        *(x["input"], x["offset"], x["weight"]),
    )


@pytest.mark.parametrize(
    ("name", "bias", "larger"),
    [("plain", True, 0), ("strided", True, 1), ("grouped", False, 3)],
)
def test_modulated_deform_conv(name: str, bias: bool, larger: int) -> None:
    """Offsets and mask may be larger than the output, and are parts of one tensor in DyHead."""
    geometry, shift = GEOMETRIES[name], rand(6, seed=5)
    inputs = [*deformable_inputs(geometry, larger).values(), *([shift] if bias else [])]

    def ours(i: Tensor, o: Tensor, m: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        o, m = torch.cat([o, m], dim=1).split([o.shape[1], m.shape[1]], dim=1)
        return mmcv_ops.modulated_deform_conv2d(i, o, m, w, b, *geometry[:5])

    def plain(i: Tensor, o: Tensor, m: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return plain_deformed(i, o, m, w, geometry) + (0 if b is None else b[:, None, None])

    agree(ours, plain, *inputs)


def test_offsets_and_masks_of_another_size() -> None:
    x = deformable_inputs(GEOMETRIES["plain"])
    larger = deformable_inputs(GEOMETRIES["plain"], 1)
    for name in ("offset", "mask"):
        inputs = {**larger, name: x[name][..., :-1]}
        with pytest.raises(
            ValueError, match=r"expected offsets or a mask of \(2, \d+, 6, 5\) or larger, got \(2, "
        ):
            mmcv_ops.modulated_deform_conv2d(*inputs.values(), None, 1, 1)


def test_deform_conv_with_parts_frozen_and_two_backward_passes() -> None:
    """The weight's gradient does not depend on what else needs one, nor on a pass before."""
    geometry = GEOMETRIES["plain"]
    x = deformable_inputs(geometry)
    alone, together = (x["weight"].clone().requires_grad_() for _ in range(2))
    mmcv_ops.deform_conv2d(x["input"], x["offset"], alone, *geometry[:5]).sum().backward()
    leaf = x["input"].clone().requires_grad_()
    output = mmcv_ops.deform_conv2d(leaf, x["offset"], together, *geometry[:5]).sum()
    output.backward(retain_graph=True)
    torch.testing.assert_close(together.grad, alone.grad)
    output.backward()
    torch.testing.assert_close(together.grad, 2 * alone.grad)


@pytest.mark.parametrize("name", ["DCN", "DCNv2"])
def test_deformable_layers_under_autocast(name: str) -> None:
    layer = {"DCN": mmcv_ops.DeformConv2dPack, "DCNv2": mmcv_ops.ModulatedDeformConv2dPack}[name](
        4, 6, 3, padding=1
    )
    x = rand(2, 4, 6, 5).float().requires_grad_()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    got.float().sum().backward()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *layer.parameters()])


# --- Focal loss ---------------------------------------------------------------------------------------------


def test_sigmoid_focal_loss() -> None:
    target = torch.tensor([0, 2, 3, 3, 1])  # 3 is background

    def plain(scores: Tensor, gamma: float = 1.5, shares: tuple[float, float] = (0.3, 0.7)) -> Tensor:
        p = scores.sigmoid()
        own = torch.zeros_like(scores)
        own[[0, 1, 4], [0, 2, 1]] = 1
        others = (1 - own) * shares[1] * p**gamma * (1 - p).log()
        return -own * shares[0] * (1 - p) ** gamma * p.log() - others

    agree(
        lambda scores: mmcv_ops.sigmoid_focal_loss(scores, target, 1.5, 0.3, None, "none"),
        plain,
        rand(5, 3) * 3,
    )
    agree(
        lambda scores: mmcv_ops.sigmoid_focal_loss(scores, target, 2.0, -1.0, None, "none"),
        lambda scores: plain(scores, 2.0, (1.0, 1.0)),
        rand(5, 3) * 3,
    )
    half = (rand(5, 3) * 3).bfloat16().requires_grad_()
    mmcv_ops.sigmoid_focal_loss(half, target, 1.5, 0.3, None, "mean").backward()
    assert half.grad.isfinite().all() and half.grad.any()
    for most in (20.0, float("inf")):
        sure = torch.tensor([[most, 0.0, -5 * most]], requires_grad=True)  # 1 - p is 0 in float32
        losses = mmcv_ops.sigmoid_focal_loss(sure, target[:1], 0.5, 0.3, None, "none")
        losses.sum().backward()
        assert losses[0, 0] < 1e-8 and losses[0, 2] < 1e-8 and losses[0, 1] > 0.1
        assert sure.grad.isfinite().all() and sure.grad[0, 1] > 0.1
    empty = mmcv_ops.sigmoid_focal_loss(rand(0, 3), target[:0], 1.5, 0.3, None, "sum")
    assert empty == 0


# --- The module ---------------------------------------------------------------------------------------------


def test_what_is_not_covered_says_so() -> None:
    boxes, scores = random_boxes(4), rand(4)
    dets = torch.cat([boxes, scores[:, None]], dim=1).float()
    calls = {
        "nms_match": lambda: mmcv_ops.nms_match(dets, 0.5),
        "roi_align with pool_mode='max'": lambda: RoIAlign(3, pool_mode="max")(rand(2, 3, 12, 16), ROIS),
        "sigmoid_focal_loss with a weight per class": lambda: mmcv_ops.sigmoid_focal_loss(
            rand(2, 3), torch.tensor([0, 1]), 2.0, 0.25, torch.ones(3), "none"
        ),
    }
    for name, call in calls.items():
        with pytest.raises(NotImplementedError, match=name) as raised:
            call()
        assert "choose a method without it, or compile mmcv" in str(raised.value)


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
