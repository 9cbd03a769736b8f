"""Where encoded images come from: what every source offers, files on disk, and a cache in memory.

Every source is read by index, so that shuffling, exact resume and exact evaluation work with any of them.

Sources hold their tables in flat arrays rather than lists of Python objects: a million entries stay small,
forked workers do not copy them page by page as reference counts change, and spawned workers receive them
quickly.
"""

import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil
import torch

from data.images import MAX_BYTES, UndecodableImageError

logger = logging.getLogger(__name__)

SPLITS = {"train": ("train",), "val": ("val", "validation", "test")}
"""What a split may be called in a data set; the first name that is there is used."""


class ImageSource(Protocol):
    """Encoded images with labels, by index.

    Attributes:
        origin: file or folder of the split, for messages.
        labels: int64, one label per image.
        classes: name of each label; None if the labels are bare numbers.
    """

    origin: str
    labels: np.ndarray
    classes: list[str] | None

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Path of the image, for messages."""
        ...

    def read(self, index: int) -> bytes:
        """The content of the image file.

        Raises:
            OSError: it cannot be read.
            UndecodableImageError: it is not an image, or damaged.
        """
        ...


class SizedSource(ImageSource, Protocol):
    """A source that knows the sizes of its images without reading them."""

    def num_bytes(self, index: int) -> int:
        """Length of what `read` returns."""
        ...


def some(names: list[str], most: int = 5) -> str:
    """The first of the names, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"


class StringTable:
    """A read-only list of strings in one block of bytes."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self._blob = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._blob[self._ends[index] : self._ends[index + 1]])


def check_size(name: str, size: int) -> None:
    """Raise UndecodableImageError if an image file of `size` bytes is larger than any image."""
    if size > MAX_BYTES:
        raise UndecodableImageError(
            f"{name}: expected an image file of at most {MAX_BYTES >> 20} MiB, got {size >> 20} MiB; replace "
            "or remove it"
        )


class FileSource:
    """Image files under a folder."""

    def __init__(
        self, root: Path, paths: Iterable[str], labels: Iterable[int], classes: list[str] | None = None
    ) -> None:
        """
        Args:
            root: the folder.
            paths: image paths relative to `root`.
            labels: class index of each image.
            classes: name of each class index.
        """
        self.origin = self._root = str(root)
        self.classes = classes
        self._paths = StringTable(paths)
        self.labels = np.asarray(list(labels), dtype=np.int64)
        assert len(self._paths) == len(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Path of the image file."""
        return os.path.join(self._root, self._paths[index])

    def read(self, index: int) -> bytes:
        """The content of the image file.

        Raises:
            OSError: it cannot be read.
            UndecodableImageError: it is no plain file, or larger than any image.
        """
        path = self.name(index)
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UndecodableImageError(f"{path}: expected an image file, got no plain file; remove it")
        check_size(path, status.st_size)
        with open(path, "rb") as file:
            return file.read()


class CachedSource:
    """A source whose encoded images, all or a shard, are cached in memory; the rest is read on demand.

    The bytes lie in one torch tensor: forked workers share it as it is, spawned workers through shared
    memory.
    """

    def __init__(self, source: SizedSource, shard: range) -> None:
        """Read the images of a shard.

        Args:
            source: where to read from.
            shard: the indices to cache.

        Raises:
            ValueError: they do not fit into memory.
        """
        self._source = source
        self._shard = shard
        self.origin, self.labels, self.classes = source.origin, source.labels, source.classes
        ends = np.cumsum([0, *(source.num_bytes(index) for index in shard)], dtype=np.int64)
        self._ends = torch.from_numpy(ends)
        memory_size = psutil.virtual_memory().total
        if ends[-1] > memory_size:
            raise ValueError(
                f"DATA.CACHE_MODE: expected images that fit into the {memory_size >> 20} MiB of memory, got "
                f"{ends[-1] >> 20} MiB from {source.name(0)} on; set it to 'no' (--cache-mode no)"
            )
        self._blob = torch.empty(int(ends[-1]), dtype=torch.uint8)
        self._damaged: set[int] = set()
        memory = self._blob.numpy()
        for slot, index in enumerate(shard):
            try:
                encoded = source.read(index)
            except UndecodableImageError:
                self._damaged.add(index)
            else:
                memory[ends[slot] : ends[slot + 1]] = np.frombuffer(encoded, dtype=np.uint8)
        logger.info("cached %d of %d images, %.1f MiB", len(shard), len(source), ends[-1] / 2**20)

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        """Path of the image, for messages."""
        return self._source.name(index)

    def read(self, index: int) -> bytes:
        """The content of the image file, from memory if it is in the shard."""
        if index not in self._shard or index in self._damaged:
            return self._source.read(index)
        slot = self._shard.index(index)
        return self._blob[self._ends[slot] : self._ends[slot + 1]].numpy().tobytes()
