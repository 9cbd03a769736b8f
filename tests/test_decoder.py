"""DATA.DECODER: what OpenCV makes of image files beside what Pillow makes of them."""

import pickle
import random
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pictures import encoded, picture
from PIL import Image
from test_data import make_config, val_set

from data import Loaders, build_loaders
from data.images import EncodedImage, decode_rgb
from data.opencv_ops import OPERATIONS
from data.seeding import seeded_rngs
from data.transforms import Recipe, train_transform, with_decoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = (64, 96)
PLAIN = Recipe(auto_augment="none", color_jitter=0.0, reprob=0.0)
INTENSE = Recipe(auto_augment="rand-m9-mstd0.5-inc1", reprob=0.25)


def transformed(
    decoder: str,
    content: bytes,
    seed: int = 0,
    recipe: Recipe = PLAIN,
    size: tuple[int, int] = SIZE,
    channels: int = 3,
) -> torch.Tensor:
    """A training image from the content of a file."""
    decode, transform = with_decoder(decoder, train_transform(size, channels, MEAN, STD, "bicubic", recipe))
    with seeded_rngs(seed):
        return transform(decode(content, "image"))


def difference(content: bytes, **options: object) -> float:
    """Mean absolute difference between the decoders' images, in steps of 1/255."""
    differences = [
        transformed("pil", content, seed, **options) - transformed("opencv", content, seed, **options)
        for seed in range(8)
    ]
    return float(torch.stack(differences).abs().mean()) * 255 * sum(STD) / 3


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_same_crop_at_full_size(mode: str, options: dict[str, object]) -> None:
    content = encoded(picture(90, 131).convert(mode), **options)
    assert EncodedImage(content, "x").opencv_crop((0, 0, 80, 100), SIZE, "bicubic") is not None
    assert difference(content) < 0.1


@pytest.mark.parametrize(("height", "width"), [(300, 413), (601, 1200)])
def test_reduced_sizes_move_by_half_a_pixel_at_most(height: int, width: int) -> None:
    content = encoded(picture(height, width), quality=92)
    assert difference(content) < 4
    for top, left in ((0, 0), (1, 2), (3, 5), (2, 7)):
        box = (top, left, height - 10, width - 13)
        crop = EncodedImage(content, "x").opencv_crop(box, SIZE, "bicubic")
        corners = (left, top, left + box[3], top + box[2])
        expected = decode_rgb(content, "x").crop(corners).resize(SIZE[::-1], Image.Resampling.BICUBIC)
        assert crop.shape == (*SIZE, 3)
        expected = np.asarray(expected).astype(int)
        whole_pixel = np.abs(np.roll(expected, 1, axis=1) - expected).mean()
        assert np.abs(crop - expected).mean() < whole_pixel / 2


@pytest.mark.parametrize(
    ("policy", "interpolation"),
    [("rand-m9-mstd0.5-inc1", "bicubic"), ("v0", "random"), ("3a", "random"), ("augmix-m3", "bilinear")],
)
def test_decoders_draw_the_same(policy: str, interpolation: str) -> None:
    """Crop, flip, policy and erasing: the pictures are alike as wholes, and the generators end alike."""
    recipe = Recipe(auto_augment=policy, reprob=0.5, remode="const")
    content = encoded(picture(90, 131))
    for seed in range(4):
        ends, images = [], []
        for name in ("pil", "opencv"):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            steps = with_decoder(name, train_transform(SIZE, 3, MEAN, STD, interpolation, recipe))
            decode, transform = pickle.loads(pickle.dumps(steps))  # as spawned workers receive them
            images.append(transform(decode(content, "x")))
            ends.append((random.random(), np.random.rand(), torch.rand(1).item()))
        assert ends[0] == ends[1]
        assert (images[0] - images[1]).abs().mean() < 0.12


LEVELS: dict[str, list[float]] = {
    **{name: [0.0, 0.2, -0.3] for name in ("shear_x", "shear_y")},
    **{name: [20.4, -17.7, 500.0] for name in ("translate_x_abs", "translate_y_abs")},
    **{name: [0.3, -0.45] for name in ("translate_x_rel", "translate_y_rel")},
    "rotate": [20.0, -7.0],
}


@pytest.mark.parametrize("theirs", OPERATIONS, ids=lambda function: function.__name__)
def test_operations_are_those_of_timm(theirs) -> None:
    for image in (picture(90, 131), Image.new("RGB", (30, 20), (3, 200, 90))):
        for level in LEVELS[theirs.__name__]:
            for resample in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR):
                options = {"fillcolor": (124, 116, 104), "resample": resample}
                expected = np.asarray(theirs(image, level, **options)).astype(int)
                got = OPERATIONS[theirs](np.array(image), level, **options)
                assert (got.shape, got.dtype, got.flags["C_CONTIGUOUS"]) == (expected.shape, np.uint8, True)
                error = np.abs(got - expected)
                assert error.mean() < 2 and np.median(error) <= 1, level


@pytest.mark.parametrize("kind", ["cmyk", "palette", "alpha", "webp", "trailing"])
def test_what_opencv_would_decode_otherwise_stays_with_pillow(kind: str) -> None:
    """The results are those of Pillow to the bit."""
    image = picture(90, 131)
    content = {
        "cmyk": encoded(image.convert("CMYK")),
        "palette": encoded(image.convert("P"), "PNG", transparency=0),
        "alpha": encoded(image.convert("RGBA"), "PNG"),
        "webp": encoded(image, "WEBP"),
        "trailing": encoded(image) + b"and more",
    }[kind]
    assert EncodedImage(content, "x").opencv_crop((0, 0, 80, 100), SIZE, "bicubic") is None
    assert difference(content) == 0


@pytest.mark.parametrize(("channels", "size"), [(1, SIZE), (3, (32, 32))])
def test_gray_and_small_images(channels: int, size: tuple[int, int]) -> None:
    content = encoded(picture(90, 131))
    assert difference(content, channels=channels, size=size) < 4
    image = transformed("opencv", content, recipe=INTENSE, size=size, channels=channels)
    assert image.shape == (channels, *size)


# --- In the loaders -----------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, count in (("train", 8), ("val", 2)):
        for number in range(count):
            folder = tmp_path / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            picture(100 + number, 130, seed=number).save(folder / f"{number}.jpg")
    return tmp_path


def loaders_of(root: Path, decoder: str) -> Loaders:
    return build_loaders(make_config(root, DATA__DECODER=decoder, MODEL__NUM_CLASSES=2))


def test_a_missing_or_old_opencv_is_explained(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2, "IMREAD_COLOR_RGB")
    for _ in range(2):
        with pytest.raises(ValueError, match="DATA.DECODER: .*4.11 or newer.*pip install"):
            loaders_of(root, "opencv")
        monkeypatch.setitem(sys.modules, "cv2", None)


def test_evaluation_stays_with_pillow(root: Path) -> None:
    assert torch.equal(*(val_set(loaders_of(root, decoder))[0] for decoder in ("pil", "opencv")))
