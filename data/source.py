"""Where encoded images come from: what every source offers, and files on disk.

Every source is read by index, so that shuffling, exact resume and exact evaluation work with any of them.

Sources hold their tables in NumPy arrays rather than lists of Python objects: a million entries stay small,
forked workers do not copy them page by page as reference counts change, and spawned workers receive them
quickly.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data.images import UndecodableImageError

SPLITS = {"train": ("train",), "val": ("val", "validation", "test")}
"""What a split may be called in a data set; the first name that is there is used."""


class ImageSource:
    """Encoded images with labels, by index.

    Attributes:
        origin: file or folder of the split, for messages.
        labels: int64, one label per image.
        classes: name of each label; None if the labels are bare numbers.
    """

    def __init__(
        self, origin: str, labels: Sequence[int] | np.ndarray, classes: list[str] | None = None
    ) -> None:
        self.origin = origin
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = classes

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Path of the image, for messages."""
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        """The content of the image file; UndecodableImageError if it cannot be read."""
        try:
            return self._read(index)
        except OSError as error:
            raise UndecodableImageError(
                f"{self.name(index)}: expected an image file that can be read, got: {error.strerror}; "
                "replace or remove the file"
            ) from error

    def _read(self, index: int) -> bytes:
        """The content of the image file; OSError or UndecodableImageError if it cannot be read."""
        raise NotImplementedError


class FileSource(ImageSource):
    """Image files under a folder."""

    def __init__(
        self, root: Path | str, paths: Iterable[str], labels: Sequence[int], classes: list[str] | None = None
    ) -> None:
        """`paths` are relative to `root`; `classes` are the names of the labels."""
        super().__init__(str(root), labels, classes)
        self._paths = string_array(paths)

    def name(self, index: int) -> str:
        """Path of the image file."""
        return os.path.join(self.origin, os.fsdecode(self._paths[index]))

    def _read(self, index: int) -> bytes:
        return Path(self.name(index)).read_bytes()


class PackedSource(ImageSource):
    """Images inside of larger files, such as archives; what reads them is the subclasses'."""

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
        super().__init__(str(files[0]), labels)
        self._files = [str(file) for file in files]
        self._names = string_array(names)
        self._members = members

    def name(self, index: int) -> str:
        """`file@/name/in/file.jpg`."""
        return f"{self._files[self._members[index, 0]]}@/{os.fsdecode(self._names[index])}"


def string_array(strings: Iterable[str]) -> np.ndarray:
    """The strings as bytes in an array; `os.fsdecode` makes strings of its elements."""
    return np.array([os.fsencode(string) for string in strings], dtype=np.bytes_)


def some(names: list[str], most: int = 5) -> str:
    """The first of the names, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"
