"""The operations of timm's RandAugment and AutoAugment on arrays [height, width, 3] of bytes, with OpenCV.

timm still draws the operations and their strengths; only the computation is replaced. Operations that map
each value to another are bit for bit what Pillow computes. Blends differ by rounding, moved images by
OpenCV's cubic kernel and at their edge to the fill colour.
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
_VALUES = np.arange(256)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13  # Pillow's ImageFilter.SMOOTH


def _mapped(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Every value looked up in a table: [256], or [256, 3] with one for each channel."""
    import cv2

    return cv2.LUT(pixels, table.astype(np.uint8).reshape(1, 256, -1))


def _histograms(pixels: np.ndarray) -> np.ndarray:
    """How often each value occurs in each channel: [3, 256]."""
    import cv2

    counts = [cv2.calcHist([pixels], [channel], None, [256], [0, 256]) for channel in range(3)]
    return np.stack(counts).reshape(3, 256).astype(np.int64)


def _highest(counts: np.ndarray) -> np.ndarray:
    """The highest value that occurs in each channel: [3, 1]."""
    return 255 - (counts[:, ::-1] > 0).argmax(axis=1, keepdims=True)


def _blend_table(base: int, factor: float) -> np.ndarray:
    """From `base` at factor 0 to the value itself at factor 1, in the arithmetic of PIL.Image.blend."""
    return np.clip(np.float32(base) + np.float32(factor) * (_VALUES - base).astype(np.float32), 0, 255)


def auto_contrast(pixels: np.ndarray, **_: Any) -> np.ndarray:
    """Stretch every channel to the whole range."""
    counts = _histograms(pixels)
    low, high = (counts > 0).argmax(axis=1, keepdims=True), _highest(counts)
    scale = 255 / np.maximum(high - low, 1)
    stretched = (_VALUES * scale - low * scale).astype(np.int64).clip(0, 255)
    return _mapped(pixels, np.where(high > low, stretched, _VALUES).T)


def equalize(pixels: np.ndarray, **_: Any) -> np.ndarray:
    """Spread the values of every channel evenly."""
    counts = _histograms(pixels)
    below = counts.cumsum(axis=1) - counts
    step = np.take_along_axis(below, _highest(counts), axis=1) // 255
    spread = ((step // 2 + below) // np.maximum(step, 1)).clip(0, 255)
    return _mapped(pixels, np.where(step > 0, spread, _VALUES).T)


def invert(pixels: np.ndarray, **_: Any) -> np.ndarray:
    """The negative."""
    return _mapped(pixels, 255 - _VALUES)


def solarize(pixels: np.ndarray, thresh: int, **_: Any) -> np.ndarray:
    """Invert values from `thresh` on."""
    return _mapped(pixels, np.where(thresh > _VALUES, _VALUES, 255 - _VALUES))


def solarize_add(pixels: np.ndarray, add: int, thresh: int = 128, **_: Any) -> np.ndarray:
    """Add to values below `thresh`."""
    return _mapped(pixels, np.where(thresh > _VALUES, np.minimum(_VALUES + add, 255), _VALUES))


def posterize(pixels: np.ndarray, bits_to_keep: int, **_: Any) -> np.ndarray:
    """Keep the highest bits; none of them is a black image."""
    return pixels if bits_to_keep >= 8 else _mapped(pixels, _VALUES & ~(2 ** (8 - bits_to_keep) - 1))


def brightness(pixels: np.ndarray, factor: float, **_: Any) -> np.ndarray:
    """Towards black, or away from it."""
    return _mapped(pixels, _blend_table(0, factor))


def contrast(pixels: np.ndarray, factor: float, **_: Any) -> np.ndarray:
    """Towards the mean gray, or away from it."""
    import cv2

    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return _mapped(pixels, _blend_table(int(cv2.mean(gray)[0] + 0.5), factor))


def color(pixels: np.ndarray, factor: float, **_: Any) -> np.ndarray:
    """Towards gray, or away from it."""
    import cv2

    gray = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(pixels, factor, gray, 1 - factor, 0)


def desaturate(pixels: np.ndarray, factor: float, **_: Any) -> np.ndarray:
    """Towards gray."""
    return color(pixels, min(1.0, max(0.0, 1.0 - factor)))


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
        *(auto_contrast, equalize, invert, solarize, solarize_add, posterize),
        *(brightness, contrast, color, desaturate, sharpness),
        *(shear_x, shear_y, translate_x_abs, translate_y_abs, translate_x_rel, translate_y_rel, rotate),
    )
}
"""By the function of timm that does the same on a PIL image."""


class ThroughPillow:
    """A step for PIL images, wrapped to work on arrays."""

    def __init__(self, step: Callable[..., Image.Image]) -> None:
        """
        Args:
            step: takes a PIL image, and perhaps more.
        """
        self._step = step

    def __call__(self, pixels: np.ndarray, *args: Any, **options: Any) -> np.ndarray:
        return np.array(self._step(Image.fromarray(pixels), *args, **options))


class Flip:
    """Mirror left and right at random, drawing like torchvision's RandomHorizontalFlip."""

    def __init__(self, probability: float) -> None:
        """
        Args:
            probability: of mirroring.
        """
        self._probability = probability

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        import cv2

        return cv2.flip(pixels, 1) if torch.rand(1) < self._probability else pixels


def use_array_operations(operations: Sequence[auto_augment.AugmentOp]) -> None:
    """Make timm's operations work on arrays, in place."""
    for operation in operations:
        known = OPERATIONS.get(auto_augment.NAME_TO_OP[operation.name])
        operation.aug_fn = ThroughPillow(operation.aug_fn) if known is None else known
