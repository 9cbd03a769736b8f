"""Data sets in tar shards, in the layout of WebDataset.

The files of a sample share a key, which is the path up to the first dot of the file's name: an image
(`key.jpg`, `.jpeg`, `.png` or `.webp`) and its label, as a number in `key.cls` or as `label` in `key.json`.
Other files of a sample, such as `key.txt` or `key.mask.png`, are left out.

The shards are indexed once, and images are read by their position in the file. The index is kept beside the
shards, or in the output folder where those cannot be written to, until a shard changes.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from data.images import UndecodableImageError
from data.source import SPLITS, PackedSource, check_size, some
from utils import atomic_write

logger = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp")
_LABELS = ("cls", "json")
_BLOCK = 512  # bytes; everything in a tar file begins at a multiple
_LOCK_TIMEOUT = 3600.0  # seconds to wait for another process that indexes
_THREADS = 8  # shards indexed at a time; on network disks most of it is waiting
Row = tuple[str, int, int, int]
"""Name, offset, size and label of an image."""
Index = dict[str, np.ndarray]
"""names: of the images, as bytes separated by NUL; members: [images, 3] number of the shard, offset, size;
labels: [images]; shards: name, size and time of each shard, as JSON."""


class ShardSource(PackedSource):
    """Images in tar files, read by position. Nothing is open between reads, so workers share nothing."""

    def read(self, index: int) -> bytes:
        """The content of the image file.

        Raises:
            OSError: the shard cannot be read.
            UndecodableImageError: the shard has become shorter, or the file is larger than any image.
        """
        shard, offset, size = self._members[index].tolist()
        check_size(self.name(index), size)
        with open(self._paths[shard], "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise UndecodableImageError(
                f"{self.name(index)}: expected {size} bytes at {offset}, got {len(content)}; copy the shard "
                "again"
            )
        return content


def open_shards(root: Path, split: str, output: Path) -> ShardSource:
    """The images of a split in tar shards.

    Args:
        root: has the shards in a folder for each split, or side by side with the split in their names.
        split: "train" or "val", which may also be called "validation" or "test".
        output: folder that keeps the index if the folder of the shards cannot be written to.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: a shard is damaged or incomplete, or an image lacks a label.
    """
    shards = _find_shards(root, split)
    stats = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    facts, folder = json.dumps(stats), shards[0].parent.resolve()
    name = f"index_{split}.npz"
    which = zlib.crc32(os.fsencode(folder) + facts.encode())  # machines may have copies, with other times
    files = [folder / name, output / f"{which:08x}_{name}"]
    index = _load_index(files, facts)
    if index is None:
        logger.info(f"indexing {len(shards)} shards of {root}, or waiting for the process that does")
        with _lock(files):
            index = _load_index(files, facts)
            if index is None:
                index = _make_index(shards) | {"shards": np.array(facts)}
                if not any(_save_index(file, index) for file in files):
                    logger.warning(f"the index of {root} can be kept neither in {files[0]} nor in {files[1]}")
    return ShardSource(shards, _split_names(index), index["members"], index["labels"])


def _find_shards(root: Path, split: str) -> list[Path]:
    """The shards of a split, sorted: those in its folder, or those with its name as a word of their name."""
    beside = sorted(root.glob("[!.]*.tar"))
    for name in SPLITS[split]:
        shards = sorted((root / name).glob("[!.]*.tar"))
        shards = shards or [shard for shard in beside if name in re.findall("[a-z]+", shard.name.lower())]
        if shards:
            return shards
    names = " or ".join(SPLITS[split])
    raise FileNotFoundError(
        f"{root}: expected *.tar, not compressed, in a folder called {names}, or with {names} as a word of "
        f"the file name, got {some([shard.name for shard in beside])}; set DATA.DATA_PATH to their folder"
    )


def _make_index(shards: list[Path]) -> Index:
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(_read_shard, shards))
    rows = list(itertools.chain.from_iterable(parts))
    if not rows:
        raise ValueError(f"{shards[0]}: expected images ({', '.join(IMAGES)}) in the shards, got none")
    numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    positions = np.array([row[1:3] for row in rows], dtype=np.int64)
    names = "\0".join(row[0] for row in rows).encode("utf-8", "surrogateescape")
    return {
        "names": np.frombuffer(names, np.uint8),
        "members": np.column_stack([numbers, positions]),
        "labels": np.array([row[3] for row in rows], dtype=np.int64),
    }


def _read_shard(path: Path) -> list[Row]:
    """The images of a shard; ValueError, which names the shard and perhaps the member, if it is malformed."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, dict[str, bytes]] = {}
    further: dict[str, str] = {}  # by key, an image with more in its ending, such as .mask.png
    for member, content in _members(path):
        folder, slash, file = member.name.rpartition("/")
        stem, _, kind = file.lower().partition(".")
        key = folder + slash + file[: len(stem)]
        if not stem or (stem[:2] == stem[-2:] == "__"):
            continue  # hidden, or about the whole shard
        if kind in IMAGES and key in images or kind in labels.get(key, ()):
            raise ValueError(
                f"{path}@/{member.name}: expected one image and one label for a key, got a second one for "
                f"{key!r}; write the shard again with a key for each sample"
            )
        if kind in IMAGES:
            images[key] = member
        elif kind in _LABELS:
            labels.setdefault(key, {})[kind] = content
        elif kind.endswith(tuple(f".{ending}" for ending in IMAGES)):
            further[key] = member.name
    if lost := sorted(set(further) - set(images)):
        raise ValueError(
            f"{path}@/{further[lost[0]]}: expected an image named after the key of its sample, which ends at "
            f"the first dot, got {further[lost[0]]!r} for the key {lost[0]!r}; write the shard again without "
            "dots in the keys"
        )
    if alone := sorted(set(labels) - set(images)):
        raise ValueError(
            f"{path}@/{alone[0]}: expected an image ({', '.join(IMAGES)}) beside the label, got none; write "
            "the shard again"
        )
    rows: list[Row] = []
    for key, member in images.items():
        label = _read_label(labels.get(key, {}), f"{path}@/{member.name}")
        rows.append((member.name, member.offset_data, member.size, label))
    return rows


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The files in a tar file, with their content if they can be labels; ValueError if it is not intact."""
    end = 0
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.issparse() or member.islnk() or member.issym():
                    raise tarfile.ReadError(f"{member.name} is a sparse file or a link")
                end = member.offset_data
                if member.isreg():
                    end += -(-member.size // _BLOCK) * _BLOCK
                    is_label = member.name.lower().endswith(_LABELS)
                    yield member, shard.extractfile(member).read() if is_label else b""
            shard.fileobj.seek(end)
            if shard.fileobj.read(_BLOCK) != bytes(_BLOCK):  # tarfile accepts files without their end
                raise tarfile.ReadError(f"no end mark at {end}")
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise ValueError(
            f"{path}: expected a whole tar file without compression, got a truncated, damaged or other one "
            f"({error}); copy it again, or write it again"
        ) from error


def _read_label(files: dict[str, bytes], name: str) -> int:
    """The label in the files of a sample, by their kind; ValueError if there is none."""
    try:
        label: Any = int(files["cls"]) if "cls" in files else json.loads(files["json"])["label"]
    except (KeyError, ValueError, TypeError, RecursionError):
        label = None
    if type(label) is not int or not -(2**31) <= label < 2**31:
        got = {kind: content[:50] for kind, content in files.items()} or "neither file"
        raise ValueError(
            f"{name}: expected its label, a number in the file .cls or as 'label' in .json, got {got}; write "
            "the shard again"
        )
    return label


def _split_names(index: Index) -> list[str]:
    return index["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")


@contextlib.contextmanager
def _lock(files: list[Path]) -> Iterator[None]:
    """Inside, no other process makes the same index, if the folder of one of its files can be locked."""
    with contextlib.ExitStack() as stack:
        for file in files:
            with contextlib.suppress(OSError, NotImplementedError):  # of filelock; its Timeout is an OSError
                file.parent.mkdir(parents=True, exist_ok=True)
                lock = FileLock(file.with_name(f".{file.name}.lock"), _LOCK_TIMEOUT, fallback_to_soft=False)
                stack.enter_context(lock)
                break
        yield


def _load_index(files: list[Path], facts: str) -> Index | None:
    """The index in the first file where it is there, intact and of these shards; else None."""
    for file in files:
        with contextlib.suppress(Exception):  # numpy and zipfile raise many types on damaged files
            with np.load(file) as content:
                index = dict(content)
            if str(index["shards"]) == facts:
                return index
    return None


def _save_index(file: Path, index: Index) -> bool:
    """Write an index, whole or not at all; whether that worked."""
    try:
        with atomic_write(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, **index)
    except OSError:
        return False
    return True
