"""How mmengine writes checkpoints: beside the old file, then renamed.

mmengine writes over the old one, so that a full disk, or a machine that goes down, can leave half of it.
"""

from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from utils import atomic_write


class AtomicBackend(LocalBackend):
    """Files of bytes, such as checkpoints, that are at any moment absent, old or complete."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes to a file; missing folders are made.

        Raises:
            OSError: the file cannot be written; what was there before stays.
        """
        with atomic_write(Path(filepath).resolve()) as temporary:
            temporary.write_bytes(obj)


def install() -> None:
    """Let mmengine write this way."""
    register_backend("local", AtomicBackend, force=True, prefixes="")
