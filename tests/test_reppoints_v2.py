"""RepPoints v2: targets worked by hand, losses, corner pooling, joint inference, and detectors that learn."""

from functools import lru_cache
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from conftest import REPO
from torch import Tensor

pytest.importorskip("mmdet", reason="mmdet is not installed")
import_module("openmmlab.mmcv_ops")  # before mmcv.ops
from mmdet.models.losses import QualityFocalLoss  # noqa: E402
from mmdet.models.task_modules import ATSSAssigner  # noqa: E402
from mmdet.models.utils import gaussian_radius  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.bbox import bbox_overlaps  # noqa: E402
from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

from detection.corner_targets import (  # noqa: E402
    corner_radii,
    corner_targets,
    foreground_targets,
    level_targets,
    snap_to_corners,
)
from detection.reppoints_v2 import RepPointsV2Head, foreground_loss  # noqa: E402

CONFIG = "reppointsv2_focal-tiny_bifpn_amp-ms-crop-3x_coco"
CLASSES = 3
STRIDES = [8, 16, 32]
SURE = 30.0  # a logit whose loss rounds to zero
NO_BOXES = torch.zeros(0, 4)
pytestmark = pytest.mark.usefixtures("in_mmdet")


def boxes_of(*boxes: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(boxes, dtype=torch.float32).view(-1, 4)


# --- Targets ------------------------------------------------------------------------------------------------


def test_corners_of_one_box() -> None:
    heatmap, is_corner, offsets = corner_targets(boxes_of((22, 11, 50, 23)), (6, 8), 8)
    corners = ((1, 3, -0.25, 0.375), (3, 6, 0.25, -0.125))  # row, column, offset x, offset y
    for kind, (row, column, x, y) in enumerate(corners):
        assert is_corner[kind].nonzero().tolist() == [[row, column]]
        assert heatmap[kind, row, column] == 1
        assert offsets[2 * kind : 2 * kind + 2, row, column].tolist() == [x, y]
    assert offsets.count_nonzero() == 4


def test_bumps_are_gaussians_that_end_at_the_radius() -> None:
    """Box of 100 x 100: radius 8.167 pixels, sigma 2.889; cells are 4 apart. The radius is CornerNet's."""
    heatmap, _, _ = corner_targets(boxes_of((0, 0, 100, 100)), (26, 26), 4)
    assert heatmap[0, 0, :4].tolist() == pytest.approx([1, 0.3834, 0.0216, 0], abs=2e-4)
    assert heatmap[0, :4, 0].tolist() == heatmap[0, 0, :4].tolist()
    assert heatmap[0, 1, 1].item() == pytest.approx(0.3834**2, abs=2e-4)
    assert torch.equal(heatmap[1], heatmap[0].flip(0, 1))
    radius = corner_radii(boxes_of((5, 7, 45, 207)), 0.7).item()
    assert radius == pytest.approx(gaussian_radius((200, 40), 0.7), rel=1e-5)


def test_in_a_shared_cell_the_nearer_corner_counts() -> None:
    near, far = (9, 9, 30, 30), (11, 10, 30, 30)
    for boxes in (boxes_of(near, far), boxes_of(far, near)):
        _, is_corner, offsets = corner_targets(boxes, (6, 6), 8)
        assert is_corner[0].sum() == 1
        assert offsets[:2, 1, 1].tolist() == [0.125, 0.125]


def test_boxes_without_area_have_finite_targets() -> None:
    boxes = boxes_of((9, 9, 9, 30), (9, 9, 30, 9), (9, 9, 9, 9))
    for part in level_targets(boxes, torch.tensor([0, 1, 2]), CLASSES, (4, 4), (32, 32), (8, 8)):
        assert part.isfinite().all()


def test_foreground_is_what_a_box_touches_weighed_by_the_smallest() -> None:
    """Class 0: a box of 384 pixels around one of 64; class 1: a box at the border."""
    boxes = boxes_of((8, 0, 32, 16), (16, 7, 24, 15), (33, 20, 48, 32))
    foreground = foreground_targets(boxes, torch.tensor([0, 0, 1]), CLASSES, (4, 6), 8, 8)
    large, small, other = 1 / 384, 1 / 64, 1 / 180
    expected = torch.zeros(CLASSES, 4, 6)
    expected[0, 0:3, 1:5] = large
    expected[0, 0:2, 2:4] = small
    expected[1, 2:4, 4:6] = other
    torch.testing.assert_close(foreground, expected)


def test_coarse_foreground_samples_the_finest() -> None:
    boxes = boxes_of((7, 13, 44, 51), (3, 30, 90, 41))
    labels = torch.tensor([1, 1])
    fine = foreground_targets(boxes, labels, CLASSES, (8, 12), 8, 8)
    assert torch.equal(foreground_targets(boxes, labels, CLASSES, (4, 6), 16, 8), fine[:, ::2, ::2])
    assert torch.equal(foreground_targets(boxes, labels, CLASSES, (2, 3), 32, 8), fine[:, ::4, ::4])


# --- Joint inference ----------------------------------------------------------------------------------------


def test_corners_snap_to_the_best_of_the_four_cells_around_them() -> None:
    scores = torch.zeros(1, 3, 4)
    scores[0, 1, 2], scores[0, 2, 3] = 1, 2
    offsets = torch.tensor([0.25, -0.5]).view(1, 2, 1, 1).expand(1, 2, 3, 4)
    points = torch.tensor([[[13.0, 5], [-9, 99], [17, 9]]])  # between cells, outside, near both high scores
    expected = torch.tensor([[[18.0, 4], [2, 12], [26, 12]]])
    assert torch.equal(snap_to_corners(points, scores, offsets, 8), expected)


# --- The head -----------------------------------------------------------------------------------------------


@lru_cache
def small() -> ConfigDict:
    """The config's detector with three levels and few channels."""
    model = Config.fromfile(REPO / f"detection/configs/{CONFIG}.py").model
    norm = {"type": "GN", "num_groups": 16}
    width = dict.fromkeys(("in_channels", "feat_channels", "point_feat_channels"), 64)
    levels = {"point_strides": STRIDES, "verifying_levels": [-1, 0, 0]}
    model.bbox_head.update(num_classes=10, corner_channels=32, norm_cfg=norm, **width, **levels)
    return model


def make_head(**options: Any) -> RepPointsV2Head:
    """The small detector's head, with even fewer channels."""
    torch.manual_seed(0)
    few = dict.fromkeys(("in_channels", "feat_channels", "point_feat_channels"), 16)
    few |= {"num_classes": CLASSES, "corner_channels": 8, "stacked_convs": 1}
    few |= {"norm_cfg": {"type": "GN", "num_groups": 4}}
    configs = {"train_cfg": small().train_cfg, "test_cfg": small().test_cfg}
    head = MODELS.build({**small().bbox_head, **configs, **few, **options})
    head.init_weights()
    return head


def sample_of(
    boxes: Tensor, labels: list[int], image: tuple[int, int] = (64, 96), padded: tuple[int, int] | None = None
) -> DetDataSample:
    meta = {"img_shape": image, "ori_shape": image, "pad_shape": padded or image, "scale_factor": (1.0, 1.0)}
    sample = DetDataSample(metainfo=meta)
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor(labels, dtype=torch.long))
    return sample


def scene() -> list[DetDataSample]:
    """Two images of 64 x 96: three boxes in one, none in the other, which is smaller."""
    boxes = boxes_of((4, 6, 40, 50), (50, 10, 92, 60), (60, 20, 70, 30))
    return [sample_of(boxes, [0, 2, 1]), sample_of(NO_BOXES, [], (50, 60), (64, 64))]


def features(images: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(images, 16, 64 // stride, 96 // stride) for stride in STRIDES]


def total(losses: dict[str, Any]) -> Tensor:
    return sum(sum(part) if isinstance(part, list) else part for part in losses.values())


def test_corner_pooling_looks_into_the_box() -> None:
    """Top-left pooling looks right and down from a corner, bottom-right pooling left and up."""
    head = make_head()
    x = torch.zeros(1, 1, 5, 6)
    x[..., 2, 3] = 1
    for branch, rows, columns in (
        (head.top_left, slice(0, 3), slice(0, 4)),
        (head.bottom_right, slice(2, 5), slice(3, 6)),
    ):
        expected = torch.zeros_like(x)
        expected[..., rows, 3] += 1
        expected[..., 2, columns] += 1
        assert torch.equal(branch.direction1_pool(x) + branch.direction2_pool(x), expected)


def test_nothing_is_gained_by_turning_a_box_inside_out() -> None:
    """Points are y before x in the maps, x before y in the losses."""
    head = make_head()
    points = torch.randn(40, 9, 2)  # x before y
    boxes = head.points2bbox(points.flatten(1), y_first=False)
    assert (boxes[:, :2] <= boxes[:, 2:]).all()
    assert torch.equal(head.points2bbox(points.flip(2).flatten(1)[:, :, None, None])[..., 0, 0], boxes)


def corner_points(box: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """[4, H, W]: y and x of both corners of a box in pixels, in cells from each cell of a level."""
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    left, top, right, bottom = box / stride
    return torch.stack([top - y, left - x, bottom - y, right - x])


def perfect_maps(head: RepPointsV2Head, samples: list[DetDataSample]) -> list[list[Tensor]]:
    """What a head that knows everything says of images with one box each."""
    truths, metas = [s.gt_instances for s in samples], [s.metainfo for s in samples]
    sizes = [(64 // stride, 96 // stride) for stride in STRIDES]
    targets = head.verification_targets(sizes, truths, metas)
    maps: list[list[Tensor]] = [[] for _ in range(6)]
    for size, stride, part in zip(sizes, STRIDES, targets, strict=True):
        corners = torch.stack([corner_points(truth.bboxes[0], size, stride) for truth in truths])
        points = torch.cat([corners, torch.zeros(len(samples), 14, *size)], dim=1)
        values = (
            torch.full((len(samples), CLASSES, *size), -SURE),
            *(points, points.clone()),
            torch.where(part.is_corner, SURE, -SURE),
            part.offsets.clone(),
            torch.where(part.foreground > 0, SURE, -SURE),
        )
        for collected, value in zip(maps, values, strict=True):
            collected.append(value)
    return maps


def test_losses_vanish_at_the_truth_and_only_there() -> None:
    head = make_head()
    samples = [sample_of(boxes_of((5, 9, 44, 50)), [1]), sample_of(boxes_of((30, 4, 90, 61)), [0])]
    truths, metas = [s.gt_instances for s in samples], [s.metainfo for s in samples]
    maps = perfect_maps(head, samples)
    losses = head.loss_by_feat(*maps, truths, metas)
    names = ["loss_pts_init", "loss_pts_refine", "loss_corner", "loss_corner_offset", "loss_foreground"]
    for index, name in enumerate(names, start=1):
        assert float(torch.as_tensor(losses[name]).sum()) == pytest.approx(0, abs=1e-5), name
        worse = [list(part) for part in maps]
        worse[index] = [value.roll(1, -1) for value in maps[index]]  # one cell to the right
        assert float(torch.as_tensor(head.loss_by_feat(*worse, truths, metas)[name]).sum()) > 1e-3, name


def level_of(head: RepPointsV2Head) -> list[Any]:
    """Arguments of one level's losses: two images of 2 x 3 cells, three of which have a box of 30 x 30."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(2, CLASSES, 2, 3, generator=generator)
    labels = torch.tensor([[0, CLASSES, 2, CLASSES, CLASSES, CLASSES], [CLASSES, CLASSES, 1, CLASSES, 2, 0]])
    label_weights = torch.tensor([[1.0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    positive = ((labels < CLASSES) & (label_weights > 0))[..., None]
    boxes = torch.tensor([10.0, 20, 40, 50]) * positive
    weights = positive.float().expand_as(boxes)
    points = [torch.rand(2, 6, 18, generator=generator) * 60 for _ in range(2)]
    return [scores, *points, labels, label_weights, boxes, weights, boxes, weights, STRIDES[0]]


def test_quality_focal_loss_asks_for_the_overlap_of_the_refined_box() -> None:
    """The box itself does not move to please it."""
    head = make_head()
    arguments = level_of(head)
    scores, _, refined, labels, weights, _, _, truth, *_ = arguments
    refined.requires_grad_()
    corners = refined[0, :, :4].unflatten(1, (2, 2)).detach()
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    overlaps = bbox_overlaps(boxes, truth[0], is_aligned=True)
    expected = QualityFocalLoss(use_sigmoid=True)(
        scores[0].flatten(1).T, (labels[0], overlaps), weights[0], avg_factor=5
    )
    one_image = [part[:1] for part in arguments[:-1]]
    loss, *_ = head.loss_by_feat_single(*one_image, STRIDES[0], avg_factor_init=2, avg_factor_refine=5)
    assert overlaps.max() > 0.1 and not loss.requires_grad
    torch.testing.assert_close(loss, expected)


def test_padding_has_no_say_in_the_verification_losses() -> None:
    head = make_head()
    samples = [sample_of(boxes_of((5, 9, 30, 30)), [1], (32, 32))]
    truths, metas = [s.gt_instances for s in samples], [s.metainfo for s in samples]
    maps = head([feature[:1] for feature in features()])
    before = head.loss_by_feat(*maps, truths, metas)
    for part, level in product(maps[3:], range(3)):
        edge = 32 // STRIDES[level]
        part[level].data[:, :, edge:] += 5
        part[level].data[:, :, :, edge:] -= 3
    after = head.loss_by_feat(*maps, truths, metas)
    for name in ("loss_corner", "loss_corner_offset", "loss_foreground"):
        torch.testing.assert_close(total({name: after[name]}), total({name: before[name]}))


def test_foreground_loss_counts_boxes_alike_and_is_the_formula() -> None:
    weights = torch.tensor([0.5, 0.5, 0.1, *[0.1] * 9, 0, 0])  # boxes of 2 and 10 cells, 2 outside
    valid = torch.ones(14, dtype=torch.bool)
    right = torch.where(weights > 0, SURE, -SURE)
    assert foreground_loss(right, weights, valid).item() == pytest.approx(0, abs=1e-8)
    missed_small, missed_large = right.clone(), right.clone()
    missed_small[:2] = -1
    missed_large[2:12] = -1
    torch.testing.assert_close(
        foreground_loss(missed_small, weights, valid), foreground_loss(missed_large, weights, valid)
    )
    alarm = right.clone()
    alarm[12] = 0.0  # p = 1/2: 0.75 * 1/4 * log 2, over 12 positive cells
    assert foreground_loss(alarm, weights, valid).item() == pytest.approx(
        0.75 * 0.25 * 0.693147 / 12, rel=1e-4
    )
    valid[12] = False
    assert foreground_loss(alarm, weights, valid).item() == pytest.approx(0, abs=1e-8)
    assert foreground_loss(alarm, torch.zeros(14), valid).isfinite()


def test_boxes_of_all_levels_are_assigned_level_by_level() -> None:
    head = make_head()
    torch.manual_seed(0)
    counts = [(64 // stride) * (96 // stride) for stride in STRIDES]
    start = [torch.rand(count, 2) * 60 for count in counts]
    levels = [torch.cat([corner, corner + torch.rand_like(corner) * 40], dim=1) for corner in start]
    valid = [torch.ones(count, dtype=torch.bool) for count in counts]
    sample = scene()[0]
    labels = head.get_targets([levels], [valid], [sample.gt_instances], [sample.metainfo], stage="refine")[0]
    expected = ATSSAssigner(topk=9).assign(
        InstanceData(priors=torch.cat(levels)), counts, sample.gt_instances
    )
    found = torch.cat(labels, dim=1)[0]
    assert torch.equal(found, torch.where(expected.gt_inds > 0, expected.labels, CLASSES))
    assert (found < CLASSES).any()


def test_classification_moves_the_points_by_a_damped_part() -> None:
    gradients = []
    for share in (0.1, 0.2):
        head = make_head(gradient_mul=share)
        head(features())[0][0].square().sum().backward()
        gradients.append(head.reppoints_pts_init_out.weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], 2 * gradients[0])


def test_verification_moves_a_wrong_corner_to_the_right_one() -> None:
    """A box of level 1 is regressed 3 pixels off; level 0 knows its corners. Boxes of level 0 stay."""
    head = make_head()
    truth, regressed, small = boxes_of((10, 6, 75, 58), (12, 9, 72, 55), (70, 2, 80, 12))
    maps = perfect_maps(head, [sample_of(truth[None], [1])])
    cls_scores, refined = maps[0], maps[2]
    for level, (row, column), label, box in ((1, (2, 3), 1, regressed), (0, (1, 9), 2, small)):
        cls_scores[level][0, label, row, column] = 4
        corners = corner_points(box, refined[level].shape[2:], STRIDES[level])
        refined[level][0, :4, row, column] = corners[:, row, column]
    meta = sample_of(NO_BOXES, []).metainfo
    found = head.predict_by_feat(*maps, batch_img_metas=[meta])[0]
    by_label = dict(zip(found.labels.tolist(), found.bboxes, strict=True))
    assert sorted(by_label) == [1, 2]
    torch.testing.assert_close(by_label[1], truth, atol=1e-4, rtol=0)
    torch.testing.assert_close(by_label[2], small, atol=1e-4, rtol=0)


def test_half_precision_gives_the_same_losses_and_boxes_in_float32() -> None:
    head = make_head()
    exact = head.loss(features(), scene())
    with torch.autocast("cpu", dtype=torch.float16):
        rounded = head.loss(features(), scene())
        boxes = head.eval().predict(features(), scene())[0].bboxes
    assert boxes.dtype == torch.float32
    for name, value in rounded.items():
        value, wanted = torch.as_tensor(value).sum(), torch.as_tensor(exact[name]).sum()
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted, rtol=0.05, atol=0.01, msg=name)
    head.zero_grad()
    total(rounded).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform_method": "moment"}, "transform_method must be 'explicit_corners'"),
        ({"verifying_levels": (-1, 0, 3)}, "each of 3 levels"),
        ({"use_grid_points": True}, "use_grid_points must be False"),
        ({"loss_cls": {"type": "QualityFocalLoss"}}, "use_sigmoid=True"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_head(**options)
