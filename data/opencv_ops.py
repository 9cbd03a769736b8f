"""Operations of timm's RandAugment and AutoAugment on arrays [height, width, 3] of bytes, with OpenCV.

timm still draws the operations and their strengths; only the computation is replaced, where OpenCV is much
faster. Moved images differ from Pillow's by OpenCV's cubic kernel and at their edge to the fill colour,
sharpened ones by rounding. All other operations run through Pillow.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment

Operation = Callable[..., np.ndarray]
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13  # Pillow's ImageFilter.SMOOTH


def sharpness(pixels: np.ndarray, factor: float, **_: Any) -> np.ndarray:
    """Towards a smoothed image, or away from it; the outermost pixels stay."""
    import cv2

    result = pixels.copy()
    smooth = cv2.filter2D(pixels, -1, _SMOOTH)[1:-1, 1:-1]
    inner = np.s_[1:-1, 1:-1]
    result[inner] = cv2.addWeighted(pixels[inner], factor, smooth, 1 - factor, 0)
    return result


def _moved(
    pixels: np.ndarray, matrix: Sequence[float], fillcolor: Any = 0, resample: Any = None
) -> np.ndarray:
    """PIL's transform with an affine matrix from points of the result to points of the image.

    Args:
        pixels: [height, width, 3].
        matrix: a, b, c, d, e, f as for PIL.Image.AFFINE, about corners of pixels, not centres.
        fillcolor: of what lies outside.
        resample: of PIL, or several to draw from.
    """
    import cv2

    if isinstance(resample, list | tuple):
        resample = random.choice(resample)  # as timm draws it
    method = cv2.INTER_CUBIC if resample == Image.Resampling.BICUBIC else cv2.INTER_LINEAR
    a, b, c, d, e, f = matrix
    return cv2.warpAffine(
        pixels,
        np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]]),  # about centres of pixels
        (pixels.shape[1], pixels.shape[0]),
        flags=method | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=tuple(fillcolor) if isinstance(fillcolor, list | tuple) else (fillcolor,) * 3,
    )


def shear_x(pixels: np.ndarray, factor: float, **options: Any) -> np.ndarray:
    """Shift rows by `factor` times their number."""
    return _moved(pixels, (1, factor, 0, 0, 1, 0), **options)


def shear_y(pixels: np.ndarray, factor: float, **options: Any) -> np.ndarray:
    """Shift columns by `factor` times their number."""
    return _moved(pixels, (1, 0, 0, factor, 1, 0), **options)


def translate_x_abs(pixels: np.ndarray, shift: float, **options: Any) -> np.ndarray:
    """Shift to the left, in pixels."""
    return _moved(pixels, (1, 0, shift, 0, 1, 0), **options)


def translate_y_abs(pixels: np.ndarray, shift: float, **options: Any) -> np.ndarray:
    """Shift up, in pixels."""
    return _moved(pixels, (1, 0, 0, 0, 1, shift), **options)


def translate_x_rel(pixels: np.ndarray, share: float, **options: Any) -> np.ndarray:
    """Shift to the left, as a share of the width."""
    return translate_x_abs(pixels, share * pixels.shape[1], **options)


def translate_y_rel(pixels: np.ndarray, share: float, **options: Any) -> np.ndarray:
    """Shift up, as a share of the height."""
    return translate_y_abs(pixels, share * pixels.shape[0], **options)


def rotate(pixels: np.ndarray, degrees: float, **options: Any) -> np.ndarray:
    """Turn counter-clockwise about the centre."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y, x = pixels.shape[0] / 2, pixels.shape[1] / 2
    return _moved(pixels, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y), **options)


OPERATIONS: dict[Callable[..., Image.Image], Operation] = {
    getattr(auto_augment, operation.__name__): operation
    for operation in (
        *(sharpness, shear_x, shear_y, rotate),
        *(translate_x_abs, translate_y_abs, translate_x_rel, translate_y_rel),
    )
}
"""By the function of timm that does the same on a PIL image."""


def flip(pixels: np.ndarray, probability: float) -> np.ndarray:
    """Mirror left and right at random, drawing like torchvision's RandomHorizontalFlip."""
    import cv2

    return cv2.flip(pixels, 1) if torch.rand(1) < probability else pixels


class ThroughPillow:
    """A step for PIL images, wrapped to work on arrays."""

    def __init__(self, step: Callable[..., Image.Image]) -> None:
        self._step = step

    def __call__(self, pixels: np.ndarray, *args: Any, **options: Any) -> np.ndarray:
        return np.array(self._step(Image.fromarray(pixels), *args, **options))


def use_array_operations(operations: Sequence[auto_augment.AugmentOp]) -> None:
    """Make timm's operations work on arrays, in place."""
    for operation in operations:
        known = OPERATIONS.get(auto_augment.NAME_TO_OP[operation.name])
        operation.aug_fn = known or ThroughPillow(operation.aug_fn)
