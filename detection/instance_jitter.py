"""A training transform that moves objects a little, after InstaBoost (Fang et al., "InstaBoost: Boosting
Instance Segmentation via Probability Map Guided Copy-Pasting", ICCV 2019, section 3.1).

Objects are cut out along their masks, the holes are filled from their surroundings, and the objects are
pasted back slightly shifted, scaled and rotated. Departures from the authors' package: no heat map of places
(mmdet does not use it either), no change of colours, and holes are filled at a low resolution, which is fast
and visible only along the edge of a moved object.

Letters of shapes: N objects; H, W image.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS
from mmdet.structures.mask import BitmapMasks
from scipy.sparse.csgraph import connected_components

FILL_SIDE = 160
"""Longer side of the image in which holes are filled, pixels."""
FILL_RADIUS = 3
RIM = np.ones((5, 5), np.uint8)
"""Holes are two pixels wider than masks: masks are seldom exact, and a visible outline would give away the
old place of an object."""


@TRANSFORMS.register_module()
class InstanceJitter(BaseTransform):
    """Belongs after `LoadAnnotations(with_bbox=True, with_mask=True)`.

    Objects whose boxes overlap move together. Crowd regions stay where they are.

    Args:
        prob: share of the images that are changed.
        scale: smallest and largest factor of size.
        shift: largest shift, as a share of the width and height of the objects that move together.
        angle: largest rotation, degrees.
    """

    def __init__(
        self,
        prob: float = 0.5,
        scale: Sequence[float] = (0.8, 1.2),
        shift: float = 1 / 15,
        angle: float = 1.0,
    ) -> None:
        if not 0 <= prob <= 1 or not 0 < scale[0] <= scale[1]:
            raise ValueError(
                f"InstanceJitter: expected prob in [0, 1] and 0 < scale[0] <= scale[1], got {prob}, {scale}"
            )
        self.prob, self.scale, self.shift, self.angle = prob, tuple(scale), shift, angle

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Change `img`, `gt_masks`, `gt_bboxes`, `gt_bboxes_labels` and `gt_ignore_flags`.

        Raises:
            ValueError: masks as polygons, or none at all.
        """
        loaded = results.get("gt_masks")
        if not isinstance(loaded, BitmapMasks):
            got = type(loaded).__name__
            raise ValueError(
                f"InstanceJitter expects bitmap masks, got {got}: "
                "put LoadAnnotations(with_bbox=True, with_mask=True) in front of it"
            )
        movable = np.flatnonzero(~results["gt_ignore_flags"])
        if len(movable) == 0 or np.random.rand() >= self.prob:
            return results
        masks = loaded.masks.astype(bool)  # [N, H, W]
        holes = cv2.dilate(masks[movable].any(axis=0).astype(np.uint8), RIM).astype(bool)
        image = fill_holes(results["img"], holes)
        moved = np.where(results["gt_ignore_flags"][:, None, None], masks, False)
        boxes = results["gt_bboxes"].numpy()
        for group in overlapping(boxes, movable):
            matrix = self._random_affine(boxes[group])
            image, covered = _paste(image, results["img"], masks[group].any(axis=0), matrix)
            moved[movable] &= ~covered
            moved[group] = [_warp(mask.astype(np.uint8), matrix, cv2.INTER_NEAREST) for mask in masks[group]]
        return _updated(results, image, moved)

    def _random_affine(self, boxes: np.ndarray) -> np.ndarray:
        """A similarity about the centre of boxes [N, 4] (left, top, right, bottom): [2, 3]."""
        corner, opposite = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
        centre = (corner + opposite) / 2
        angle, scale = np.random.uniform(-self.angle, self.angle), np.random.uniform(*self.scale)
        matrix = cv2.getRotationMatrix2D(centre.tolist(), angle, scale)
        matrix[:, 2] += np.random.uniform(-self.shift, self.shift, size=2) * (opposite - corner)
        return matrix


def overlapping(boxes: np.ndarray, chosen: np.ndarray) -> list[np.ndarray]:
    """Groups of the chosen boxes that are connected by overlaps.

    Args:
        boxes: [N, 4], left, top, right, bottom.
        chosen: indices of boxes.
    """
    boxes = boxes[chosen]
    begins_before = (boxes[:, None, :2] < boxes[:, 2:]).all(axis=2)  # box i starts before box j ends
    count, groups = connected_components(begins_before & begins_before.T)
    return [chosen[groups == group] for group in range(count)]


def fill_holes(image: np.ndarray, holes: np.ndarray) -> np.ndarray:
    """A copy of the image [H, W, 3] uint8 with `holes` [H, W] filled from their surroundings."""
    height, width = holes.shape
    factor = min(1.0, FILL_SIDE / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    small_holes = cv2.resize(holes.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0
    small = cv2.inpaint(
        cv2.resize(image, size, interpolation=cv2.INTER_AREA),
        small_holes.astype(np.uint8),
        FILL_RADIUS,
        cv2.INPAINT_TELEA,
    )
    return np.where(holes[..., None], cv2.resize(small, (width, height)), image)


def _warp(array: np.ndarray, matrix: np.ndarray, interpolation: int) -> np.ndarray:
    """An array [H, W] or [H, W, C] moved by an affine map [2, 3]; 0 outside of it."""
    height, width = array.shape[:2]
    return cv2.warpAffine(array, matrix, (width, height), flags=interpolation)


def _paste(
    canvas: np.ndarray, image: np.ndarray, mask: np.ndarray, matrix: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Move the masked part of `image` by `matrix` and paste it on the canvas, with a soft edge.

    Returns:
        The new canvas, and the pixels [H, W] bool that are mostly covered.
    """
    alpha = _warp(mask.astype(np.float32), matrix, cv2.INTER_LINEAR)
    moved = _warp(image, matrix, cv2.INTER_LINEAR)
    blend = canvas + alpha[..., None] * (moved.astype(np.float32) - canvas)
    return np.rint(blend).astype(np.uint8), alpha > 0.5


def _updated(results: dict[str, Any], image: np.ndarray, masks: np.ndarray) -> dict[str, Any]:
    """The results with a new image and masks [N, H, W]; objects without visible pixels are dropped."""
    left = masks.any(axis=(1, 2))
    ignored = results["gt_ignore_flags"][left]
    new = BitmapMasks(masks[left].astype(np.uint8), *image.shape[:2])
    boxes = new.get_bboxes(type(results["gt_bboxes"]))
    boxes.tensor[ignored] = results["gt_bboxes"].tensor[left][ignored]
    return results | {
        "img": image,
        "gt_masks": new,
        "gt_bboxes": boxes,
        "gt_bboxes_labels": results["gt_bboxes_labels"][left],
        "gt_ignore_flags": ignored,
    }
