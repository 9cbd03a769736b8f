"""Hostile and broken files are read, or refused with an error that names them; nothing is run or written."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded, picture
from PIL import Image

from config import load_config
from data import EvalImages, TrainImages, UndecodableImageError
from data.archive import open_archive_split
from data.folder import read_map_of_files
from data.source import FileSource
from data.transforms import Recipe, eval_transform, train_transform, with_decoder

SIZE, MEAN, STD = (48, 64), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- Yaml ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "DATA: {BATCH_SIZE: 2001-99-99}",
        "DATA: {BATCH_SIZE: !!int x}",
        "TRAIN: {BASE_LR: .nan}",
        "DATA: [1]",
        "? [1, 2]\n: 3",
        b"DATA: {DATA_PATH: '\xff\xfe'}",
        bytes(5000),
    ],
)
def test_yaml_is_refused(content: bytes | str, tmp_path: Path) -> None:
    path = write(tmp_path / "input.yaml", content)
    with pytest.raises(ValueError, match=str(path)):
        load_config(path)


# --- Maps of images and classes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        *("a.png", "\ta", "a.png\t0\ta", "a.png\tcat", "a.png\t1.5", "", "a.png\t0\n\na.png\t1"),
        *("a" * 2**20, b"\xff\xfe\t0", bytes(500)),
        *('[["a.png", 0', '[["a.png"]]', '[["a.png", "x"]]', '[["a.png", NaN]]', "[1]"),
    ],
)
def test_maps_are_refused(line: bytes | str, tmp_path: Path) -> None:
    write(tmp_path / "a.png", b"")
    path = write(tmp_path / "map.txt", line)
    with pytest.raises(ValueError, match="map.txt") as caught:
        read_map_of_files(tmp_path, path.name)
    assert len(str(caught.value)) < 20_000


# --- Archives -----------------------------------------------------------------------------------------------

NAMES = ("ant/0.png", "bee/0.png", "cat/0.png")


def archive(*members: str, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name in members or NAMES:
            file.writestr(name, name.encode() * 20)
    return buffer.getvalue()


def changed(record: bytes, field: int, layout: str, value: int) -> bytes:
    """An archive with another number in its directory's first entry (PK12) or its end (PK56)."""
    content = bytearray(archive())
    struct.pack_into(layout, content, content.index(record) + field, value)
    return bytes(content)


def bomb(claimed: int) -> bytes:
    """One member of 20 MB of zeros that claims another size."""
    deflate = zlib.compressobj(9, wbits=-15)  # Python 3.10's zlib.compress has no wbits
    packed = deflate.compress(bytes(20 * 2**20)) + deflate.flush()
    name, sizes = NAMES[0].encode(), struct.pack("<III", 0, len(packed), claimed)
    start = b"\x14\0\0\0\x08\0\0\0\0\0" + sizes + struct.pack("<H", len(name))
    local = b"PK\x03\x04" + start + bytes(2) + name + packed
    entry = b"PK\x01\x02\x14\0" + start + bytes(16) + name
    return local + entry + b"PK\x05\x06\0\0\0\0\x01\0\x01\0" + struct.pack("<IIH", len(entry), len(local), 0)


def read_split(folder: Path, content: bytes, names: tuple[str, ...] = NAMES) -> None:
    write(folder / "train.zip", content)
    write(folder / "train_map.txt", "".join(f"{name}\t{label}\n" for label, name in enumerate(names)))
    source = open_archive_split(folder, "train")
    for index in range(len(source)):
        assert source.read(index)


ENTRY, END = b"PK\x01\x02", b"PK\x05\x06"


DAMAGED = [
    *(b"", b"archive", archive()[:100], archive()[:-10], archive().replace(b"PK\3\4", b"PK\3\5", 1)),
    *(changed(END, 16, "<I", 100), changed(END, 12, "<I", 2**32 - 1)),
    *(changed(ENTRY, 8, "<H", 1), changed(ENTRY, 10, "<H", 97), changed(ENTRY, 10, "<H", 8)),
    *(changed(ENTRY, 16, "<I", 12345), changed(ENTRY, 20, "<I", 2**32 - 2), changed(ENTRY, 24, "<I", 0)),
    *(changed(ENTRY, 28, "<H", 2**16 - 1), changed(ENTRY, 42, "<I", 2**32 - 2), archive("../ant/0.png")),
    *(archive("inner.zip"), archive(*[f"{name}/" for name in NAMES])),
]
BOMBS = [bomb(claimed) for claimed in (1, 200 * 2**20, 300 * 2**20)]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        *((content, NAMES) for content in DAMAGED),
        *((content, NAMES[:1]) for content in BOMBS),
    ],
    ids=lambda _: "archive",  # not its bytes, which hold the time
)
def test_archives_are_refused(content: bytes, names: tuple[str, ...], tmp_path: Path) -> None:
    """Damaged ones, and members that claim another size."""
    with pytest.raises((ValueError, FileNotFoundError, UndecodableImageError), match=str(tmp_path)):
        read_split(tmp_path, content, names)
    assert sorted(os.listdir(tmp_path)) == ["train.zip", "train_map.txt"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_good_archives_are_read(method: int, tmp_path: Path) -> None:
    read_split(tmp_path, b"#!/bin/sh\n" + archive(method=method))


# --- Images -------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG file that claims a size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = b"".join(chunks) or chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def jpeg_of(height: int, width: int) -> bytes:
    content = bytearray(JPEG)
    struct.pack_into(">HH", content, content.find(b"\xff\xc0") + 5, height, width)
    return bytes(content)


PICTURE = picture(60, 80)
JPEG = encoded(PICTURE)
FRAMES = [PICTURE.rotate(10 * n) for n in range(3)]
GOOD = {
    **{kind: encoded(PICTURE, kind) for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF")},
    **{f"PNG {mode}": encoded(PICTURE.convert(mode), "PNG") for mode in ("1", "L", "LA", "RGBA", "P")},
    "progressive": encoded(PICTURE, progressive=True),
    "CMYK": encoded(PICTURE.convert("CMYK")),
    "16 bits": encoded(Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80)), "PNG"),
    "animated": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "broken profile": encoded(PICTURE, icc_profile=b"no profile"),
    "one pixel": encoded(PICTURE.resize((1, 1)), "PNG"),
    "one column": encoded(PICTURE.resize((1, 160)), "PNG"),
    "one row": encoded(PICTURE.resize((160, 1))),
}
BAD = {
    **{"empty": b"", "text": b"no image", "zeros": bytes(1000), "half": JPEG[: len(JPEG) // 2]},
    "two scans": JPEG[: len(JPEG) // 2] + JPEG[JPEG.index(b"\xff\xda") :],
    **{"png of 400 million": png(20_000, 20_000), "png of a row": png(2**26 + 1, 1), "no width": png(0, 10)},
    **{"jpeg of 400 million": jpeg_of(20_000, 20_000), "no height": jpeg_of(0, 80)},
    "text bomb": png(9, 9, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**24), 9))),
    "ppm of digits": b"P6 " + b"9" * 5000 + b" 1 255\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) (w) file closefile showpage\n",
}


def read_image(path: Path, decoder: str) -> tuple[bool, torch.Tensor]:
    """Whether a training image was replaced by good.jpg, and its tensor."""
    write(path.parent / "good.jpg", JPEG)
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
    path = write(tmp_path / "image.jpg", (GOOD | BAD)[name])
    replaced, image = read_image(path, decoder)
    assert image.shape == (3, *SIZE) and image.isfinite().all()
    assert replaced == (name in BAD)
    for crop in (True, False):
        images = EvalImages(
            FileSource(tmp_path, [path.name], [0]), eval_transform(SIZE, 3, MEAN, STD, "bicubic", crop)
        )
        if name in BAD:
            with pytest.raises(UndecodableImageError, match=str(path)):
                images[0]
        else:
            assert images[0][0].isfinite().all()
    assert sorted(os.listdir(tmp_path)) == ["good.jpg", "image.jpg"]


def test_what_cannot_be_read_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.truncate(10 * 2**30)
    for name in ("loop.jpg", "folder.jpg", "sparse.jpg", "missing.jpg"):
        assert read_image(tmp_path / name, "pil")[0], name
