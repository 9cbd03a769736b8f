"""How mmengine writes local files, checkpoints above all: never in place.

mmengine writes over the old file, so that a full disk, or a machine that goes down, can leave half of one.
"""

from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from utils import atomic_write


class AtomicBackend(LocalBackend):
    """Local files that are at any moment absent, old or complete."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes to a file; missing folders are made.

        Raises:
            OSError: the file cannot be written; what was there before stays.
        """
        with atomic_write(Path(filepath)) as temporary:
            temporary.write_bytes(obj)


def install() -> None:
    """Let mmengine write all local files this way."""
    register_backend("local", AtomicBackend, force=True, prefixes="")
