"""Data sets in tar shards, in the layout of WebDataset.

The files of a sample share a key, which is the path up to the first dot of the file's name: an image
(`key.jpg`, `.jpeg`, `.png` or `.webp`) and its label, as a number in `key.cls` or as `label` in `key.json`.
Other files of a sample, such as `key.txt` or `key.mask.png`, are left out.

The shards are indexed once, and images are read by their position in the file. The index is kept in the
output folder until a shard changes.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from data.images import UndecodableImageError
from data.source import SPLITS, PackedSource, some, string_array
from utils import atomic_write

logger = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp")
_LABELS = ("cls", "json")
_LOCK_TIMEOUT = 3600.0  # seconds to wait for another process that indexes
_THREADS = 8  # shards indexed at a time; on network disks most of it is waiting
Row = tuple[str, int, int, int]
"""Name, offset, size and label of an image."""
Index = dict[str, np.ndarray]
"""names: of the images, as bytes; members: [images, 3] number of the shard, offset, size; labels: [images];
shards: name, size and time of each shard, as JSON."""


class ShardSource(PackedSource):
    """Images in tar files, read by position. Nothing is open between reads, as there are many shards."""

    def _read(self, index: int) -> bytes:
        shard, offset, size = self._members[index].tolist()
        with open(self._files[shard], "rb") as file:
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
        output: folder that keeps the index.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: a shard is damaged or incomplete, or an image lacks a label.
    """
    shards = _find_shards(root, split)
    stats = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    facts, folder = json.dumps(stats), shards[0].parent.resolve()
    file = output / f"{zlib.crc32(os.fsencode(folder)):08x}_index_{split}.npz"
    index = _load_index(file, facts)
    if index is None:
        logger.info(f"indexing {len(shards)} shards of {root}, or waiting for the process that does")
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError, NotImplementedError):  # of file systems without locks
                output.mkdir(parents=True, exist_ok=True)
                lock = FileLock(output / f".{file.name}.lock", _LOCK_TIMEOUT, fallback_to_soft=False)
                stack.enter_context(lock)
            index = _load_index(file, facts)
            if index is None:
                index = _make_index(shards) | {"shards": np.array(facts)}
                _save_index(file, index)
    return ShardSource(shards, map(os.fsdecode, index["names"]), index["members"], index["labels"])


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
    names, offsets, sizes, labels = zip(*rows, strict=True)
    numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return {
        "names": string_array(names),
        "members": np.column_stack([numbers, offsets, sizes]),
        "labels": np.array(labels),
    }


def _read_shard(path: Path) -> list[Row]:
    """The images of a shard; ValueError, which names the shard and the member, if it is malformed."""
    samples: dict[str, list[tuple[str, tarfile.TarInfo, bytes]]] = {}  # by key: ending, member and content
    for member, content in _members(path):
        folder, slash, file = member.name.rpartition("/")
        stem, _, kind = file.partition(".")
        if not stem or (stem[:2] == stem[-2:] == "__"):
            continue  # hidden, or about the whole shard
        if kind.lower().endswith((*IMAGES, *_LABELS)):
            samples.setdefault(f"{folder}{slash}{stem}", []).append((kind.lower(), member, content))
    rows: list[Row] = []
    for key, files in samples.items():
        images = [member for kind, member, _ in files if kind in IMAGES]
        if len(images) != 1:
            found = some([member.name for _, member, _ in files])
            raise ValueError(
                f"{path}@/{files[0][1].name}: expected one image ({', '.join(IMAGES)}) for each key, which "
                f"ends at the first dot of the name, got for {key!r}: {found}; write the shard again"
            )
        labels = {kind: content for kind, _, content in files if kind in _LABELS}
        label = _read_label(labels, f"{path}@/{images[0].name}")
        rows.append((images[0].name, images[0].offset_data, images[0].size, label))
    return rows


def _members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    """The files in a tar file, with their content if they can be labels; ValueError if it is not intact."""
    members = []
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.isreg():
                    is_label = member.name.lower().endswith(_LABELS)
                    members.append((member, shard.extractfile(member).read() if is_label else b""))
            shard.fileobj.seek(shard.offset)
            if shard.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # which tarfile accepts
                raise tarfile.ReadError(f"no end mark at {shard.offset}")
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path}: expected a whole tar file without compression, got a truncated, damaged or other one "
            f"({error}); copy it again"
        ) from error
    return members


def _read_label(files: dict[str, bytes], name: str) -> int:
    """The label in the files of a sample, by their kind; ValueError if there is none."""
    try:
        label: Any = int(files["cls"]) if "cls" in files else json.loads(files["json"])["label"]
    except (KeyError, ValueError, TypeError):
        label = None
    if type(label) is not int:
        got = {kind: content[:50] for kind, content in files.items()} or "neither file"
        raise ValueError(
            f"{name}: expected its label, a number in the file .cls or as 'label' in .json, got {got}; write "
            "the shard again"
        )
    return label


def _load_index(file: Path, facts: str) -> Index | None:
    """The index in a file if it is there, intact and of these shards; else None."""
    with contextlib.suppress(Exception):  # numpy and zipfile raise many types on damaged files
        with np.load(file) as content:
            index = dict(content)
        if str(index["shards"]) == facts:
            return index
    return None


def _save_index(file: Path, index: Index) -> None:
    """Write an index; where that fails, the next start makes it again."""
    with contextlib.suppress(OSError), atomic_write(file) as temporary, temporary.open("wb") as opened:
        np.savez(opened, **index)
