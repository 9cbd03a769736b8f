"""Broken and hostile images are replaced in training and named in evaluation; nothing is run or written."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded, picture
from PIL import Image

from data import EvalImages, TrainImages, UndecodableImageError
from data.source import FileSource
from data.transforms import Recipe, eval_transform, train_transform, with_decoder

SIZE, MEAN, STD = (48, 64), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PICTURE = picture(90, 131)
JPEG = encoded(PICTURE)
HALF = len(JPEG) // 2


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(height: int, width: int) -> bytes:
    """A PNG file that claims a size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def jpeg_of(height: int, width: int) -> bytes:
    """A JPEG file that claims a size."""
    content = bytearray(JPEG)
    struct.pack_into(">HH", content, content.find(b"\xff\xc0") + 5, height, width)
    return bytes(content)


FRAMES = [PICTURE.rotate(10 * number) for number in range(3)]
GOOD = {
    **{kind: encoded(PICTURE, kind) for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")},
    **{f"PNG {mode}": encoded(PICTURE.convert(mode), "PNG") for mode in ("1", "LA", "RGBA", "P")},
    "progressive": encoded(PICTURE, progressive=True),
    "CMYK": encoded(PICTURE.convert("CMYK")),
    "16 bits": encoded(Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80)), "PNG"),
    "animated": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "broken profile": encoded(PICTURE, icc_profile=b"no profile"),
    "one pixel": encoded(PICTURE.crop((0, 0, 1, 1)), "PNG"),
}
BAD = {
    "empty": b"",
    "text": b"no image",
    "half": JPEG[:HALF],
    "no end": JPEG[:-2],
    "stray marker": JPEG[:HALF] + b"\xff\xbf" + JPEG[HALF + 2 :],
    "two scans": JPEG[:HALF] + JPEG[JPEG.index(b"\xff\xda") :],
    "png of 400 million": png_of(20_000, 20_000),
    "jpeg of 400 million": jpeg_of(20_000, 20_000),
    "no height": jpeg_of(0, 80),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) (w) file closefile showpage\n",
}


def read_image(path: Path, decoder: str) -> tuple[bool, torch.Tensor]:
    """Whether a training image was replaced by good.jpg, and its tensor."""
    (path.parent / "good.jpg").write_bytes(JPEG)
    recipe = Recipe(auto_augment="rand-m9-mstd0.5-inc1", reprob=0.25)
    decode, transform = with_decoder(decoder, train_transform(SIZE, 3, MEAN, STD, "bicubic", recipe))
    source = FileSource(path.parent, [path.name, *["good.jpg"] * 3], [0, 1, 1, 1])
    image, label, *_ = TrainImages(source, transform, 0, decode)[0, 0]
    return label == 1, image


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("decoder", ["pil", "opencv"])
@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_images_are_read_or_replaced(name: str, decoder: str, tmp_path: Path) -> None:
    """In training; evaluation refuses exactly those that training replaces. Both decoders agree."""
    path = tmp_path / "image.jpg"
    path.write_bytes((GOOD | BAD)[name])
    replaced, image = read_image(path, decoder)
    assert image.shape == (3, *SIZE) and image.isfinite().all()
    assert replaced == (name in BAD)
    transform = eval_transform(SIZE, 3, MEAN, STD, "bicubic", crop=True)
    images = EvalImages(FileSource(tmp_path, [path.name], [0]), transform)
    if name in BAD:
        with pytest.raises(UndecodableImageError, match=str(path)):
            images[0]
    else:
        assert images[0][0].isfinite().all()
    assert sorted(os.listdir(tmp_path)) == ["good.jpg", "image.jpg"]


def test_a_file_that_has_gone_is_replaced(tmp_path: Path) -> None:
    assert read_image(tmp_path / "image.jpg", "pil")[0]
