"""Hostile images for tools/fuzz.py, through both decoders and the transforms of training and evaluation."""

import io
import os
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from fuzz_common import CANARY, Target, damage, write
from PIL import Image

from data import EvalImages, TrainImages, UndecodableImageError
from data.images import without_opencv_threads
from data.source import FileSource
from data.transforms import Recipe, eval_transform, train_transform, with_decoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = (48, 64)
Case = Callable[[Path], Path]
HUGE = 20_000


def picture(height: int = 60, width: int = 80, mode: str = "RGB") -> Image.Image:
    """Smooth colours with some noise."""
    draw = np.random.default_rng(0)
    small = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    """An image as a file of a kind."""
    buffer = io.BytesIO()
    (picture() if image is None else image).save(buffer, kind, **options)
    return buffer.getvalue()


@lru_cache
def _train(decoder: str) -> TrainImages:
    recipe = Recipe(auto_augment="rand-m9-mstd0.5-inc1", reprob=0.25)
    decode, transform = with_decoder(decoder, train_transform(SIZE, 3, MEAN, STD, "bicubic", recipe))
    return TrainImages(FileSource(Path("/"), [], []), transform, 0, decode)


@lru_cache
def _evals() -> list[EvalImages]:
    source = FileSource(Path("/"), [], [])
    return [EvalImages(source, eval_transform(SIZE, 3, MEAN, STD, "bicubic", crop)) for crop in (True, False)]


@lru_cache
def _good() -> bytes:
    return encoded("JPEG")


def check(path: Path) -> None:
    """Draw it for training with both decoders, and for evaluation; all must agree on whether it decodes.

    Training never fails, and says if it took another image; evaluation refuses what training replaces.
    """
    source = FileSource(path.parent, [path.name, *["good.jpg"] * 3], [0, 1, 1, 1])
    replaced = {}
    for decoder in ("pil", "opencv"):
        images = _train(decoder)
        images.source = source
        (tensor, label), reason = images.fetch((0, 0))
        _expect_image(tensor)
        replaced[decoder] = reason
        if bool(reason) != (label == 1):
            raise RuntimeError("an image was replaced without a word")
    reasons = [reason for reason in replaced.values() if reason]
    refused = 0
    for images in _evals():
        images.source = source
        try:
            _expect_image(images[0][0])
        except (UndecodableImageError, OSError):
            refused += 1
    if len(reasons) not in (0, 2) or refused != len(reasons):
        raise RuntimeError(f"decoders do not agree: {replaced}, {refused} of 2 evaluations refuse it")
    if reasons:
        raise UndecodableImageError(max(reasons, key=len))


def _expect_image(tensor: torch.Tensor) -> None:
    if tensor.shape != (3, *SIZE) or not tensor.isfinite().all():
        raise RuntimeError(f"a tensor of {list(tensor.shape)}, or not finite")


# --- Named cases --------------------------------------------------------------------------------------------


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG file with a header of one's own; with little data if there are no chunks."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = b"".join(chunks) or _chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + body + _chunk(b"IEND", b"")


def _jpeg_of(height: int, width: int, **options: object) -> bytes:
    """A JPEG file that claims another size."""
    content = bytearray(encoded("JPEG", **options))
    frame = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
    struct.pack_into(">HH", content, frame + 5, height, width)
    return bytes(content)


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def _animated(kind: str) -> bytes:
    frames = [picture(mode="RGB").rotate(10 * n) for n in range(4)]
    return encoded(kind, frames[0], save_all=True, append_images=frames[1:], duration=50)


def _gif_of(width: int, height: int) -> bytes:
    content = bytearray(encoded("GIF"))
    struct.pack_into("<HH", content, 6, width, height)
    return bytes(content)


def _bmp_of(width: int, height: int) -> bytes:
    content = bytearray(encoded("BMP"))
    struct.pack_into("<ii", content, 18, width, height)
    return bytes(content)


def _program(folder: Path) -> str:
    """PostScript that writes a file."""
    return (
        f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({folder / CANARY}) (w) file closefile showpage\n"
    )


def _contents() -> dict[str, bytes]:
    gray16 = Image.fromarray(np.linspace(0, 65535, 4800).reshape(60, 80).astype(np.uint16))
    palette = picture().convert("P")
    jpeg = encoded("JPEG")
    plain = {
        **{kind.lower(): encoded(kind) for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF")},
        **{f"png {mode}": encoded("PNG", picture(mode=mode)) for mode in ("1", "L", "LA", "RGBA", "P")},
        **{
            f"tiff {mode}": encoded("TIFF", picture(mode=mode)) for mode in ("CMYK", "LAB", "YCbCr", "F", "I")
        },
        "progressive": encoded("JPEG", progressive=True),
        "cmyk": encoded("JPEG", picture(mode="CMYK")),
        "gray": encoded("JPEG", picture(mode="L")),
        "16 bits": encoded("PNG", gray16),
        "16 bits tiff": encoded("TIFF", gray16),
        "palette with transparency": encoded("PNG", palette, transparency=0),
        "palette with many": encoded("PNG", palette, transparency=bytes(range(256))),
        **{f"exif {n}": encoded("JPEG", exif=_exif(n)) for n in (1, 3, 6, 8, 99)},
        "exif broken": encoded("JPEG", exif=b"Exif\0\0" + b"MM\0\x2a" + b"\xff" * 40),
        "icc broken": encoded("JPEG", icc_profile=b"\xff" * 3000),
        "icc broken png": encoded("PNG", icc_profile=b"no profile"),
        "one pixel": encoded("JPEG", picture(1, 1)),
        "one pixel png": encoded("PNG", picture(1, 1)),
        "animated gif": _animated("GIF"),
        "animated png": _animated("PNG"),
        "animated webp": _animated("WEBP"),
    }
    shapes = {
        f"{height} x {width} {kind.lower()}": encoded(kind, Image.new("RGB", (width, height), (9, 99, 200)))
        for height, width in ((1, 65000), (65000, 1), (2, 16000), (3, 400))
        for kind in ("JPEG", "PNG")
    }
    claims = {
        "png claims": png(HUGE, HUGE),
        "png of 2**27 pixels": png(16384, 8192),
        "png claims 2**31": png(2**31 - 1, 2**31 - 1),
        "png of no width": png(0, 10),
        "png of one row": png(2**26 + 1, 1),
        "png just allowed": png(8192, 8192, _chunk(b"IDAT", zlib.compress(bytes(10)))),
        "png 16 bits rgba claims": png(8192, 8191, depth=16, colour=6),
        "jpeg claims": _jpeg_of(HUGE, HUGE),
        "progressive claims": _jpeg_of(65500, 65500, progressive=True),
        "jpeg claims 8000": _jpeg_of(8000, 8000),
        "jpeg of no height": _jpeg_of(0, 80),
        "gif claims": _gif_of(HUGE, HUGE),
        "gif of no width": _gif_of(0, 9),
        "bmp claims": _bmp_of(HUGE, HUGE),
        "bmp below zero": _bmp_of(-80, -60),
        "ppm claims": b"P6 20000 20000 255\n" + bytes(100),
        "ppm of nothing": b"P6 0 0 255\n",
        "ppm of digits": b"P6 " + b"9" * 5000 + b" 1 255\n",
        "text bomb": png(9, 9, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27), 9))),
        "icc bomb": png(9, 9, _chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**27), 9))),
        "data bomb": png(9, 9, _chunk(b"IDAT", zlib.compress(bytes(2**27), 9))),
    }
    broken = {
        "empty": b"",
        "one byte": b"\xff",
        "text": b"no image",
        "zeros": bytes(1000),
        "half": jpeg[: len(jpeg) // 2],
        "no end": jpeg[:-2],
        "header": jpeg[:40],
        "two scans": jpeg[: len(jpeg) // 2] + jpeg[jpeg.index(b"\xff\xda") :],
        "more": jpeg + b"more",
        "two files": jpeg + encoded("PNG"),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>",
        "no header of webp": encoded("WEBP")[:20],
    }
    return plain | shapes | claims | broken


def _beside(make: Callable[[Path], Path]) -> Case:
    """The case, and a good image to replace it."""

    def both(folder: Path) -> Path:
        write(folder / "good.jpg", _good())
        return make(folder)

    return both


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.jpg")
    return folder / "pipe.jpg"


def _link(target: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "link.jpg").symlink_to(target)
        return folder / "link.jpg"

    return make


def _sparse(folder: Path) -> Path:
    """A file of ten gigabytes that takes no room on the disk."""
    with (folder / "sparse.jpg").open("wb") as file:
        file.truncate(10 * 2**30)
    return folder / "sparse.jpg"


def _folder(folder: Path) -> Path:
    (folder / "folder.jpg").mkdir()
    return folder / "folder.jpg"


def named() -> dict[str, Case]:
    """All cases that have a name."""
    cases: dict[str, Callable[[Path], Path]] = {
        name: lambda folder, content=content: write(folder / "image.jpg", content)
        for name, content in _contents().items()
    }
    cases["postscript"] = lambda folder: write(folder / "image.jpg", _program(folder))
    cases |= {
        "pipe": _pipe,
        "device": _link("/dev/zero"),
        "link loop": _link("link.jpg"),
        "dangling link": _link("no"),
    }
    cases |= {"sparse": _sparse, "folder": _folder, "missing": lambda folder: folder / "no.jpg"}
    return {name: _beside(make) for name, make in cases.items()}


@lru_cache
def _bases() -> list[bytes]:
    contents = _contents()
    names = (
        "jpeg",
        "jpeg",
        "progressive",
        "png",
        "bmp",
        "tiff",
        "webp",
        "ppm",
        "gif",
        "cmyk",
        "exif 6",
        "gray",
    )
    return [contents[name] for name in (*names, "16 bits tiff", "palette with many", "animated webp", "jpeg")]


def mutated(draw: random.Random, folder: Path) -> tuple[str, Path]:
    """A good image, damaged."""
    base = draw.choice(_bases())
    kind, content = damage(base, draw, (max(base.find(b"\xff\xda"), 0),))
    return kind, _beside(lambda folder: write(folder / "image.jpg", content))(folder)


def prepare() -> None:
    """Once in a process that checks images."""
    warnings.simplefilter("ignore")
    without_opencv_threads()


prepare()
TARGET = Target("images", named(), mutated, check, (UndecodableImageError,), memory=3 * 2**29)
