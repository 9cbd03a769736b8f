"""The training transform that moves objects, on real scenes."""

# ruff: noqa: E402
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

pytest.importorskip("mmdet", reason="needs OpenMMLab's packages: make setup-openmmlab")

import openmmlab.mmcv_ops  # noqa: F401  (before mmdet: makes its operators importable)

# isort: split
from mmdet.datasets import CocoDataset
from mmdet.registry import TRANSFORMS

from data.demo_scenes import DETECTION_CLASSES
from detection.instance_jitter import overlapping

pytestmark = pytest.mark.usefixtures("in_mmdet")


@pytest.fixture(scope="module")
def scene(scenes: Path) -> dict[str, Any]:
    """A scene of several digits as it comes to `InstanceJitter`."""
    root = scenes / "detection"
    dataset = CocoDataset(
        ann_file=str(root / "annotations/instances_train2017.json"),
        data_prefix={"img": str(root / "train2017")},
        metainfo={"classes": DETECTION_CLASSES},
        pipeline=[
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        ],
    )
    return max((dataset[i] for i in range(4)), key=lambda results: len(results["gt_masks"]))


def jitter(results: dict[str, Any], **options: Any) -> dict[str, Any]:
    return TRANSFORMS.build({"type": "InstanceJitter", **options})(copy.deepcopy(results))


def test_jitter_that_moves_nothing_changes_nothing(scene: dict[str, Any]) -> None:
    before = copy.deepcopy(scene)
    after = jitter(before, prob=1.0, scale=(1.0, 1.0), shift=0.0, angle=0.0)
    assert np.array_equal(before["gt_masks"].masks, after["gt_masks"].masks)
    objects = before["gt_masks"].masks.any(axis=0)
    rim = ndimage.binary_dilation(objects, np.ones((5, 5))) & ~objects
    assert np.array_equal(before["img"][~rim], after["img"][~rim])
    assert (before["gt_bboxes"].tensor - after["gt_bboxes"].tensor).abs().max() <= 1


def test_jitter_moves_objects_with_their_masks(scene: dict[str, Any]) -> None:
    """By little; what is far from any object stays; nothing remains where an object was and is no more."""
    before, moved = copy.deepcopy(scene), False
    for seed in range(5):
        np.random.seed(seed)
        after = jitter(before, prob=1.0)
        assert np.array_equal(after["gt_bboxes_labels"], before["gt_bboxes_labels"])
        old, new = before["gt_masks"].masks.any(axis=0), after["gt_masks"].masks.any(axis=0)
        near = ndimage.binary_dilation(old | new, np.ones((5, 5)))
        assert np.array_equal(before["img"][~near], after["img"][~near])
        box, was = after["gt_bboxes"].tensor, before["gt_bboxes"].tensor
        sides = was[:, 2:] - was[:, :2]
        assert ((box - was).abs() <= sides.repeat(1, 2) * (0.1 + 1 / 15) + 4).all()
        moved |= bool(((box - was).abs() > 2).any())
        assert after["gt_masks"].masks.sum(axis=0).max() == 1, "no pixel belongs to two objects"
    assert moved


def test_jitter_leaves_crowds_and_unchosen_images_alone(scene: dict[str, Any]) -> None:
    before = copy.deepcopy(scene)
    same = jitter(before, prob=0.0)
    assert np.array_equal(before["img"], same["img"])
    before["gt_ignore_flags"][:] = True
    crowds = jitter(before, prob=1.0)
    assert np.array_equal(before["img"], crowds["img"])
    before["gt_ignore_flags"][1:] = False
    after = jitter(before, prob=1.0)
    assert np.array_equal(before["gt_masks"].masks[0], after["gt_masks"].masks[0])
    assert torch.equal(before["gt_bboxes"].tensor[0], after["gt_bboxes"].tensor[0])


def test_jitter_keeps_overlapping_objects_together() -> None:
    boxes = np.array([[0, 0, 4, 4], [10, 0, 14, 4], [3, 3, 11, 6], [20, 20, 30, 30], [30, 20, 31, 21]])
    groups = overlapping(boxes, np.array([0, 1, 2, 3, 4]))
    assert sorted(map(sorted, groups)) == [[0, 1, 2], [3], [4]], "boxes that only touch do not overlap"
    assert sorted(map(sorted, overlapping(boxes, np.array([0, 1, 3])))) == [[0], [1], [3]]


def test_jitter_refuses(scene: dict[str, Any]) -> None:
    results = copy.deepcopy(scene)
    del results["gt_masks"]
    with pytest.raises(ValueError, match="with_mask=True"):
        jitter(results, prob=1.0)
    with pytest.raises(ValueError, match="scale"):
        TRANSFORMS.build({"type": "InstanceJitter", "scale": (1.2, 0.8)})
