"""Image transforms: the augmentation of DeiT and Swin through timm, and the evaluation transforms.

Images come in as PIL images in RGB, from a decoder that may have cropped them, and leave as normalised
float tensors [channels, height, width]. With one channel, colours are augmented first and turned to gray just
before the conversion to a tensor.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import RandomResizedCropAndInterpolation, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import ResizeKeepRatio
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

from data.images import Box, EncodedImage, decode_rgb
from data.opencv_ops import ThroughPillow, flip, use_array_operations

Size = tuple[int, int]
Pixels = Image.Image | np.ndarray
Decode = Callable[[bytes, str], Pixels]
"""From the content of an image file, and its name for errors, to what the transform takes."""
Transform = Callable[[Any], torch.Tensor]

INTERPOLATIONS = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "random": InterpolationMode.BILINEAR,  # for evaluation, as in the original
}
DEFAULT_SCALE = (0.08, 1.0)
DEFAULT_RATIO = (0.75, 1.3333)
SMALL_SIZE = 32
"""Side in pixels up to which images are padded and cropped for training, and not cropped in evaluation."""
_SMALL_PADDING = 4
_EVAL_RATIO = 256 / 224
_MAX_STRETCH = 64


@dataclass(frozen=True)
class Recipe:
    """The random part of the training transform; the names are those of the configuration's AUG section."""

    color_jitter: float = 0.4
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    reprob: float = 0.25
    remode: str = "pixel"
    recount: int = 1
    hflip: float = 0.5
    scale: Sequence[float] = DEFAULT_SCALE
    ratio: Sequence[float] = DEFAULT_RATIO


class OpencvCrop:
    """A decoder that includes the first step of a training transform, a random crop or a resize.

    It draws the same random numbers as that step, so the crop is the same, up to rounding. `upright` follows
    the EXIF orientation.
    """

    def __init__(
        self, step: RandomResizedCropAndInterpolation | transforms.Resize, upright: bool = False
    ) -> None:
        self._upright = upright
        self._size = step.size
        modes = step.interpolation
        self._modes = tuple(modes) if isinstance(modes, list | tuple) else (modes,)
        self._draw_box: Callable[[Image.Image], Box] = _whole
        if isinstance(step, RandomResizedCropAndInterpolation):
            self._draw_box = partial(step.get_params, scale=step.scale, ratio=step.ratio)

    def __call__(self, encoded: bytes, name: str) -> np.ndarray:
        """The crop of an image file, [H, W, 3]; UndecodableImageError if it does not decode."""
        import cv2

        cv2.setNumThreads(0)  # pools of several workers compete, and one can hang after a fork
        image = EncodedImage(encoded, name, self._upright)
        whole = image.decode() if image.is_turned else None  # the header has the size before turning
        box = self._draw_box(whole or image.header)
        mode = random.choice(self._modes) if len(self._modes) > 1 else self._modes[0]
        crop = None if whole else image.opencv_crop(box, self._size, mode.value)
        if crop is None:
            return np.array(functional.resized_crop(whole or image.decode(), *box, self._size, mode))
        return crop


def _draw_box(draw: Callable[..., Box], image: Image.Image, scale: Sequence[float], ratio: Any) -> Box:
    """A random crop of at least one pixel; of tiny images timm draws empty ones."""
    top, left, height, width = draw(image, scale, ratio)
    return min(top, image.height - 1), min(left, image.width - 1), max(height, 1), max(width, 1)


def _whole(image: Image.Image) -> Box:
    return 0, 0, image.height, image.width


def with_decoder(
    decoder: str, transform: transforms.Compose, upright: bool = False
) -> tuple[Decode, Transform]:
    """Divide the work between a decoder and the rest of a training transform.

    Args:
        decoder: "pil" is Pillow for everything; "opencv" decodes the crop alone, and augments with OpenCV.
        transform: from `train_transform`.
        upright: follow the EXIF orientation.
    """
    if decoder == "pil":
        return partial(decode_rgb, upright=upright), transform
    crop, *steps = transform.transforms
    return OpencvCrop(crop, upright), transforms.Compose([_on_arrays(step) for step in steps])


def _on_arrays(step: Any) -> Callable:
    """The array version of a step for PIL images; steps that take both, or tensors, stay."""
    if isinstance(step, transforms.RandomHorizontalFlip):
        return partial(flip, probability=step.p)
    if isinstance(step, auto_augment.RandAugment | auto_augment.AutoAugment):
        use_array_operations(_operations(step))
        return step
    stays = isinstance(step, transforms.ToTensor | transforms.Normalize | RandomErasing)
    return step if stays else ThroughPillow(step)


def train_transform(
    size: Size, channels: int, mean: Sequence[float], std: Sequence[float], interpolation: str, recipe: Recipe
) -> transforms.Compose:
    """The training transform: random crop and flip, rand-augment or jitter, normalisation, erasing.

    Up to 32 pixels, images are cropped at random after padding by 4 pixels instead of by area, as usual for
    CIFAR. As in the original, colour jitter only acts where `recipe.auto_augment` is "none" (or "3a").

    Args:
        size: (height, width) in pixels.
        channels: 1 or 3.
        mean: per channel, of pixels in [0, 1]; three values are averaged for one channel.
        std: like `mean`.
        interpolation: "random", "bilinear" or "bicubic".
        recipe: the random part.

    Raises:
        ValueError: channels, mean and std do not fit together.
    """
    mean, std = channel_stats(channels, mean, std)
    crop, augment, to_tensor = create_transform(
        (3, *size),
        is_training=True,
        separate=True,
        scale=(recipe.scale[0], recipe.scale[1]),
        ratio=(recipe.ratio[0], recipe.ratio[1]),
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter if recipe.color_jitter > 0 else None,  # type: ignore[arg-type]
        auto_augment=recipe.auto_augment if recipe.auto_augment not in ("", "none") else None,
        interpolation=interpolation,
        mean=_for_rgb(mean),
        std=_for_rgb(std),
        re_prob=recipe.reprob,
        re_mode=recipe.remode,
        re_count=recipe.recount,
    )
    _allow_posterize_to_black(augment.transforms)
    crop.transforms[0].get_params = partial(_draw_box, crop.transforms[0].get_params)
    if max(size) <= SMALL_SIZE:
        resize = transforms.Resize(size, INTERPOLATIONS[interpolation])
        crop.transforms[:1] = [resize, transforms.RandomCrop(size, padding=_SMALL_PADDING)]
    if channels == 1:
        augment.transforms.append(transforms.Grayscale())
    erasing = [step for step in to_tensor.transforms if isinstance(step, RandomErasing)]
    normalize = [transforms.ToTensor(), transforms.Normalize(mean, std, inplace=True)]
    return transforms.Compose([*crop.transforms, *augment.transforms, *normalize, *erasing])


def eval_transform(
    size: Size, channels: int, mean: Sequence[float], std: Sequence[float], interpolation: str, crop: bool
) -> Transform:
    """The evaluation transform: resize, centre crop, normalise. Most arguments are `train_transform`'s.

    Args:
        interpolation: "bilinear" or "bicubic"; "random" stands for bilinear.
        crop: resize to cover 256/224 of the size, then crop the centre; otherwise resize straight to the
            size, which is also done up to 32 pixels.
    """
    mean, std = channel_stats(channels, mean, std)
    mode = INTERPOLATIONS[interpolation]
    if crop and max(size) > SMALL_SIZE:
        larger = (int(_EVAL_RATIO * size[0]), int(_EVAL_RATIO * size[1]))
        is_square = size[0] == size[1]
        cover = transforms.Resize(larger[0], mode) if is_square else ResizeKeepRatio(larger, 0.0, mode.value)
        steps: list[Callable] = [_without_ends, cover, transforms.CenterCrop(size)]
    else:
        steps = [transforms.Resize(size, mode)]
    if channels == 1:
        steps.append(transforms.Grayscale())
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std, inplace=True)])


def _without_ends(image: Image.Image) -> Image.Image:
    """The middle of an image that is a thin line, which a centre crop would show anyway: resized to cover a
    square, all of it would fill the memory."""
    longest = _MAX_STRETCH * min(image.size)
    sides = [min(side, longest) for side in (image.height, image.width)]
    return functional.center_crop(image, sides) if max(image.size) > longest else image


def channel_stats(
    channels: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std, one value per channel; three values are averaged for one channel.

    Raises:
        ValueError: neither 1 nor 3 channels, or another number of values.
    """
    if channels not in (1, 3):
        raise ValueError(
            f"MODEL.FOCAL.IN_CHANS: expected 3 (colour) or 1 (gray) for image files, got {channels}; set it "
            "to 3 or 1"
        )
    for key, values in (("MEAN", mean), ("STD", std)):
        if len(values) not in (channels, 3):
            count = "3 values" if channels == 3 else "1 value, or the 3 of colours"
            raise ValueError(f"DATA.{key}: expected {count}, got {list(values)}; give one per channel")
    if channels == 1:
        return (sum(mean) / len(mean),), (sum(std) / len(std),)
    return tuple(mean), tuple(std)


def _for_rgb(values: tuple[float, ...]) -> tuple[float, ...]:
    return values * 3 if len(values) == 1 else values


def _allow_posterize_to_black(steps: Sequence[object]) -> None:
    """Make the strongest posterize of timm's policies, which Pillow refuses, a black image as it once was."""
    for operation in itertools.chain.from_iterable(map(_operations, steps)):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize


def _operations(step: object) -> list[auto_augment.AugmentOp]:
    """The operations of a policy of timm; none of another step."""
    return list(getattr(step, "ops", None) or itertools.chain(*getattr(step, "policy", ())))


def _posterize(image: Image.Image, bits_to_keep: int, **options: object) -> Image.Image:
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)
