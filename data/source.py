"""Where encoded images come from: what every source offers, files on disk, and what packed files share.

Every source is read by index, so that shuffling, exact resume and exact evaluation work with any of them.

Sources hold their tables in flat arrays rather than lists of Python objects: a million entries stay small,
forked workers do not copy them page by page as reference counts change, and spawned workers receive them
quickly.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from data.images import MAX_BYTES, UndecodableImageError

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


class PackedSource:
    """Images inside of larger files, such as archives; what reads them is the subclasses'."""

    classes: list[str] | None = None

    def __init__(
        self, files: list[Path], names: Iterable[str], members: np.ndarray, labels: Sequence[int] | np.ndarray
    ) -> None:
        """
        Args:
            files: the larger files.
            names: of each image in its file.
            members: (images, columns) int64: number of the file, and where the image is in it.
            labels: class index of each image.
        """
        self.origin = str(files[0])
        self._paths = [str(file) for file in files]
        self._names = StringTable(names)
        self._members = members
        self.labels = np.asarray(labels, dtype=np.int64)
        assert len(self._names) == len(self.labels) == len(members)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """`file@/name/in/file.jpg`."""
        return f"{self._paths[self._members[index, 0]]}@/{self._names[index]}"


class FileSource:
    """Image files under a folder."""

    def __init__(
        self, root: Path, paths: Iterable[str], labels: Iterable[int], classes: list[str] | None = None
    ) -> None:
        """`paths` are relative to `root`; `classes` are the names of the labels."""
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
            UndecodableImageError: it is larger than any image.
        """
        path = self.name(index)
        check_size(path, os.path.getsize(path))
        with open(path, "rb") as file:
            return file.read()
