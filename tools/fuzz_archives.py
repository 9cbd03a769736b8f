"""Hostile zip archives for tools/fuzz.py."""

import io
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from fuzz_common import CANARY, Target, damage, write

from data import UndecodableImageError
from data.archive import open_archive_split
from data.source import CachedSource

CLASSES = 3
NAMES = ("ant/0.png", "bee/0.png", "cat/0.png")
Case = Callable[[Path], Path]


@lru_cache
def good(method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive with a member for each name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name in NAMES:
            archive.writestr(name, name.encode() * 20)
    return buffer.getvalue()


def split_of(content: bytes, names: tuple[str, ...] = NAMES) -> Case:
    """A split with this archive, and a map of these names."""

    def make(folder: Path) -> Path:
        write(folder / "train_map.txt", "".join(f"{name}\t{label}\n" for label, name in enumerate(names)))
        return write(folder / "train.zip", content)

    return make


def check(path: Path) -> None:
    """Open the split and read all members, one by one and into a cache."""
    source = open_archive_split(path.parent, "train", CLASSES)
    for index in range(len(source)):
        if len(source.read(index)) != source.num_bytes(index):
            raise RuntimeError("a member of another size than declared")
    CachedSource(source, range(len(source)))


# --- Named cases --------------------------------------------------------------------------------------------


def _edited(old: bytes, new: bytes, base: bytes | None = None, last: bool = True) -> bytes:
    content = good() if base is None else base
    place = content.rindex(old) if last else content.index(old)
    return content[:place] + new + content[place + len(new) :]


def _central(field: int, layout: str, value: int, base: bytes | None = None) -> bytes:
    """A number in the directory's first entry, changed."""
    content = bytearray(good() if base is None else base)
    struct.pack_into(layout, content, content.index(b"PK\x01\x02") + field, value)
    return bytes(content)


def _ending(field: int, layout: str, value: int) -> bytes:
    """A number in the end record, changed."""
    content = bytearray(good())
    struct.pack_into(layout, content, content.rindex(b"PK\x05\x06") + field, value)
    return bytes(content)


def _written(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def _bomb(claimed: int) -> bytes:
    """A member of 300 MB of zeros, packed to a thousandth, that claims another size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(300)) + packer.flush()
    name = NAMES[0].encode()
    sizes = struct.pack("<III", 0, len(packed), claimed)
    local = b"PK\x03\x04\x14\0\0\0\x08\0\0\0\0\0" + sizes + struct.pack("<HH", len(name), 0) + name + packed
    entry = (
        b"PK\x01\x02\x14\0\x14\0\0\0\x08\0\0\0\0\0"
        + sizes
        + struct.pack("<HHHHHII", len(name), *[0] * 6)
        + name
    )
    return local + entry + b"PK\x05\x06\0\0\0\0\x01\0\x01\0" + struct.pack("<IIH", len(entry), len(local), 0)


def _symlink() -> bytes:
    info = zipfile.ZipInfo(NAMES[0])
    info.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(info, "/etc/passwd")
        for name in NAMES[1:]:
            archive.writestr(name, b"content")
    return buffer.getvalue()


def _zip64(size: int, offset: int) -> bytes:
    """A directory entry whose size and offset are 64 bits long."""
    content = _central(24, "<I", 2**32 - 1)
    content = bytearray(content)
    start = content.index(b"PK\x01\x02")
    struct.pack_into("<I", content, start + 42, 2**32 - 1)
    extra = struct.pack("<HHQQ", 1, 16, size, offset)
    length = struct.unpack_from("<H", content, start + 28)[0]
    struct.pack_into("<H", content, start + 30, len(extra))
    content[start + 46 + length : start + 46 + length] = extra
    end = content.rindex(b"PK\x05\x06")
    struct.pack_into("<I", content, end + 12, struct.unpack_from("<I", content, end + 12)[0] + len(extra))
    return bytes(content)


def _twice() -> bytes:
    buffer = io.BytesIO(good())
    with zipfile.ZipFile(buffer, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(NAMES[0], b"other")
    return buffer.getvalue()


def _outside(folder: Path) -> Path:
    """A map that names an archive above the data set."""
    write(folder.parent / "out.zip", good())
    return split_of(good(), ("../out.zip@/ant/0.png",))(folder)


def named() -> dict[str, Case]:
    """All cases that have a name."""
    deflated = good(zipfile.ZIP_DEFLATED)
    contents = {
        "good": good(),
        "deflated": deflated,
        "bzip2": good(zipfile.ZIP_BZIP2),
        "lzma": good(zipfile.ZIP_LZMA),
        "with something before it": b"#!/bin/sh\n" + good(),
        "with something after it": good() + b"more",
        "with a comment": _ending(20, "<H", 4) + b"more",
        "empty": b"",
        "text": b"archive",
        "no members": b"PK\x05\x06" + bytes(18),
        "half": good()[: len(good()) // 2],
        "no end": good()[:-10],
        "a hundred bytes off": _ending(16, "<I", 100),
        "directory beyond the end": _ending(16, "<I", 2**31),
        "directory of 4 GB": _ending(12, "<I", 2**32 - 1),
        "directory of no length": _ending(12, "<I", 0),
        "other disk": _ending(4, "<H", 3),
        "zip64 without record": _ending(16, "<I", 2**32 - 1),
        "encrypted": _central(8, "<H", 1),
        "strongly encrypted": _central(8, "<H", 0x41),
        "patched data": _central(8, "<H", 0x20),
        "name in utf-8 that is none": _edited(b"ant", b"\xff\xfe\xfd", _central(8, "<H", 0x800)),
        "version 99": _central(6, "<H", 99),
        "method 97": _central(10, "<H", 97),
        "wrong checksum": _central(16, "<I", 12345),
        "packed size of 4 GB": _central(20, "<I", 2**32 - 2),
        "size of 4 GB": _central(24, "<I", 2**32 - 2),
        "size of nothing": _central(24, "<I", 0),
        "name of 64 KB": _central(28, "<H", 2**16 - 1),
        "offset beyond the end": _central(42, "<I", 2**32 - 2),
        "offset of another member": _central(42, "<I", 219),
        "zip64 size": _zip64(2**63 - 1, 0),
        "zip64 beyond 63 bits": _zip64(2**64 - 1, 2**64 - 1),
        "zip64 offset": _zip64(180, 2**62),
        "zip64 as usual": _zip64(180, 0),
        "deflated as stored": _central(10, "<H", 0, deflated),
        "stored as deflated": _central(10, "<H", 8),
        "bomb": _bomb(300 * 2**20),
        "bomb that claims a byte": _bomb(1),
        "bomb that claims 200 MB": _bomb(200 * 2**20),
        "symbolic link": _symlink(),
        "names above": _written(*[(f"../{CANARY}", b"x"), (f"/tmp/{CANARY}", b"x")]),
        "folders as images": _written(*[(f"{name}/", b"") for name in NAMES]),
        "names twice": _twice(),
        "nested archive": _written(("inner.zip", good())),
        "local header is none": _edited(b"PK\x03\x04", b"PK\x03\x05", last=False),
        "local name of 64 KB": good()[:26] + b"\xff\xff\xff\xff" + good()[30:],
    }
    cases = {
        name: split_of(content, NAMES[: 1 if name.startswith("bomb") else None])
        for name, content in contents.items()
    }
    return cases | {
        "nested path": split_of(_written(("inner.zip", good())), ("train.zip@/inner.zip@/ant/0.png",)),
        "archive without name": split_of(good(), (".zip@/ant/0.png",)),
        "absolute archive": split_of(good(), ("/etc/passwd.zip@/ant/0.png",)),
        "path above": split_of(good(), ("../ant/0.png",)),
        "absolute path": split_of(good(), ("/ant/0.png",)),
        "many names of one member": split_of(good(), NAMES[:1] * CLASSES),
        "archive outside": _outside,
    }


@lru_cache
def _bases() -> list[bytes]:
    return [good(method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)] + [_zip64(180, 0)]


def mutated(draw: random.Random, folder: Path) -> tuple[str, Path]:
    """A good archive, damaged anywhere or in its directory."""
    base = draw.choice(_bases())
    kind, content = damage(
        base, draw, (base.index(b"PK\x01\x02"), base.rindex(b"PK\x01\x02"), len(base) - 22)
    )
    return kind, split_of(content)(folder)


TARGET = Target("archives", named(), mutated, check, (ValueError, FileNotFoundError, UndecodableImageError))
