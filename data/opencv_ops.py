"""Operations of timm's RandAugment and AutoAugment on arrays [height, width, 3] of bytes.

timm still draws the operations and their strengths; only the computation is replaced. Those that move the
image run in OpenCV, which is much faster; they differ from Pillow's by OpenCV's cubic kernel and at their
edge to the fill colour. All others run through Pillow.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment

Operation = Callable[..., np.ndarray]
Matrix = tuple[float, float, float, float, float, float]
"""As for PIL.Image.AFFINE: from points of the result to points of the image, about corners of pixels."""


def _rotation(pixels: np.ndarray, degrees: float) -> Matrix:
    """Counter-clockwise about the centre."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y, x = pixels.shape[0] / 2, pixels.shape[1] / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


MATRICES: dict[Callable[..., Image.Image], Callable[[np.ndarray, float], Matrix]] = {
    auto_augment.shear_x: lambda _, factor: (1, factor, 0, 0, 1, 0),
    auto_augment.shear_y: lambda _, factor: (1, 0, 0, factor, 1, 0),
    auto_augment.translate_x_abs: lambda _, shift: (1, 0, shift, 0, 1, 0),
    auto_augment.translate_y_abs: lambda _, shift: (1, 0, 0, 0, 1, shift),
    auto_augment.translate_x_rel: lambda pixels, share: (1, 0, share * pixels.shape[1], 0, 1, 0),
    auto_augment.translate_y_rel: lambda pixels, share: (1, 0, 0, 0, 1, share * pixels.shape[0]),
    auto_augment.rotate: _rotation,
}
"""What timm's functions do to an image, by their strength."""


def _move(
    function: Callable[..., Image.Image],
    pixels: np.ndarray,
    strength: float,
    fillcolor: Any = 0,
    resample: Any = None,
) -> np.ndarray:
    """Move the pixels of an image.

    Args:
        function: of timm, a key of MATRICES: processes that do not fork receive it by name.
        pixels: [height, width, 3].
        strength: as timm draws it.
        fillcolor: of what lies outside.
        resample: of PIL, or several to draw from.
    """
    import cv2

    if isinstance(resample, list | tuple):
        resample = random.choice(resample)  # as timm draws it
    method = cv2.INTER_CUBIC if resample == Image.Resampling.BICUBIC else cv2.INTER_LINEAR
    a, b, c, d, e, f = MATRICES[function](pixels, strength)
    return cv2.warpAffine(
        pixels,
        np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]]),  # about centres of pixels
        (pixels.shape[1], pixels.shape[0]),
        flags=method | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=tuple(fillcolor) if isinstance(fillcolor, list | tuple) else (fillcolor,) * 3,
    )


OPERATIONS: dict[Callable[..., Image.Image], Operation] = {
    function: partial(_move, function) for function in MATRICES
}
"""By the function of timm that does the same to a PIL image."""


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
