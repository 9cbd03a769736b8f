"""Image files: which are read and which replaced, and what OpenCV makes of them beside what Pillow makes."""

import random
import struct
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pictures import encoded, picture
from PIL import Image
from test_data import make_config, val_set

from data import EvalImages, Loaders, TrainImages, UndecodableImageError, build_loaders
from data.images import EncodedImage, decode_rgb
from data.opencv_ops import OPERATIONS
from data.seeding import seeded_rngs
from data.source import FileSource
from data.transforms import FileTransform, Recipe, eval_transform, train_transform, with_decoder

SIZE, MEAN, STD = (64, 96), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = Recipe(auto_augment="none", color_jitter=0.0, reprob=0.0)


def transform_of(
    decoder: str,
    recipe: Recipe = PLAIN,
    size: tuple[int, int] = SIZE,
    channels: int = 3,
    interpolation: str = "bicubic",
) -> FileTransform:
    """From the content of a file to a training image."""
    return with_decoder(decoder, train_transform(size, channels, MEAN, STD, interpolation, recipe))


def difference(content: bytes, **options: object) -> float:
    """Mean absolute difference between the decoders' images, in steps of 1/255."""
    pil, opencv = (transform_of(decoder, **options) for decoder in ("pil", "opencv"))
    differences = []
    for seed in range(8):
        with seeded_rngs(seed):
            image = pil(content, "image")
        with seeded_rngs(seed):
            differences.append(image - opencv(content, "image"))
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
            images.append(transform_of(name, recipe, interpolation=interpolation)(content, "x"))
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
    image = transform_of("opencv", Recipe(), size, channels)(content, "x")
    assert image.shape == (channels, *size)


# --- Good and bad files -------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG file that claims a size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


PICTURE = picture(60, 80)
JPEG = encoded(PICTURE)
GOOD = {
    "JPEG": JPEG,
    "animated": encoded(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(10)]),
    "gray and alpha": encoded(PICTURE.convert("LA"), "PNG"),
    "16 bits": encoded(Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80)), "PNG"),
    "one pixel": encoded(PICTURE.resize((1, 1))),
    "one row": encoded(PICTURE.resize((160, 1))),
}
BAD = {
    "empty": b"",
    "text": b"no image",
    "half": JPEG[: len(JPEG) // 2],
    "floating point": encoded(Image.new("F", (9, 9)), "TIFF"),
    "too large": png(2**26 + 1, 1, chunk(b"IDAT", zlib.compress(bytes(1000)))),
    "no width": png(0, 10),
    "text bomb": png(9, 9, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**24), 9))),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("decoder", ["pil", "opencv"])
@pytest.mark.parametrize("name", [*GOOD, *BAD, "folder", "missing"])
def test_images_are_read_or_replaced(name: str, decoder: str, tmp_path: Path) -> None:
    """In training; evaluation refuses exactly those that training replaces. Both decoders agree."""
    path = tmp_path / "image.jpg"
    (tmp_path / "good.jpg").write_bytes(JPEG)
    if name == "folder":
        path.mkdir()
    elif name != "missing":
        path.write_bytes((GOOD | BAD)[name])
    source = FileSource(tmp_path, ["image.jpg", *["good.jpg"] * 3], [0, 1, 1, 1])
    for epoch in range(8):
        image, label, replaced = TrainImages(source, transform_of(decoder, Recipe()), 0)[epoch, 0]
        assert image.shape == (3, *SIZE) and image.isfinite().all()
        assert (label, bool(replaced)) == ((0, False) if name in GOOD else (1, True))
    images = EvalImages(source, with_decoder("pil", eval_transform(SIZE, 3, MEAN, STD, "bicubic", True)))
    if name in GOOD:
        assert images[0].image.isfinite().all()
    else:
        with pytest.raises(UndecodableImageError, match=str(path)):
            images[0]


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


def test_evaluation_turns_photographs_if_wanted(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture(100, 100).save(root / "val/class0/0.jpg", exif=exif, quality=100)
    options = {"MODEL__NUM_CLASSES": 2, "TEST__CROP": False}
    as_stored, upright = (
        build_loaders(make_config(root, DATA__EXIF_ORIENTATION=wanted, **options)).val_dataset[0]
        for wanted in (False, True)
    )
    torch.testing.assert_close(upright.image, as_stored.image.flip(1, 2), atol=0.05, rtol=0)


def test_evaluation_stays_with_pillow(root: Path) -> None:
    assert torch.equal(*(val_set(loaders_of(root, decoder))[0] for decoder in ("pil", "opencv")))
