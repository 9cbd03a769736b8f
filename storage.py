"""Checkpoint files: each one whole or absent, verified by size and checksum, the newest one found.

A file is written under a temporary name in its folder, flushed to the disk, and renamed. What verifies it
lies in the file itself, so that no crash can part the two: the comment at the end of the zip archive that
``torch.save`` writes holds, as JSON, the position in training, the size of what stands before it, and the
SHA-256 of that and of the position. ``torch.load`` and unzip skip the comment. Files without it (of older
versions) are checked by the checksums of the archive.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

BEST_NAME = "best.pth"
CHECKPOINT_NAME = re.compile(r"ckpt_epoch_(\d+)(?:_step_(\d+))?\.pth")
TEMPORARY_NAME = re.compile(r"\.(best|ckpt_epoch_\d+(_step_\d+)?)\.pth\.tmp")
KEPT_INSIDE = 2  # checkpoints inside an epoch that are kept where all of whole epochs are

_END = b"PK\x05\x06"  # begins the last record of a zip archive, which ends with its comment's length
_END_LENGTH = 22
_LONGEST = 1024  # of our comments
_BLOCK = 1 << 20
_DAMAGES = (  # what the standard library raises on an archive that is none, or no longer whole
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError),
    *(KeyError, RuntimeError, NotImplementedError, OverflowError),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Stamp:
    """Where in training a checkpoint was taken; a later one is greater.

    Attributes:
        run: counts the runs that began in this folder.
        epoch: epochs finished.
        images: images seen of the epoch after those.
        evaluated: whether the last evaluation is counted in it.
        step: batches finished of that epoch; their size may have changed on the way, so images come first.
    """

    run: int = 0
    epoch: int = 0
    images: int = 0
    evaluated: bool = False
    step: int = 0


def file_name(epoch: int, step: int) -> str:
    """The name of a checkpoint after ``epoch`` epochs and ``step`` batches of the next one."""
    return f"ckpt_epoch_{epoch}_step_{step}.pth" if step else f"ckpt_epoch_{epoch - 1}.pth"


class _Hashing:
    """A file for ``torch.save`` that is hashed while it is written.

    An error of the disk is kept until ``finish``: the C++ writer of ``torch.save`` would not pass it on
    whole, and goes on writing while it is being destroyed.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0
        self.held = b""  # the last two bytes: the length of the archive's comment, to be replaced
        self.error: OSError | None = None

    def write(self, block: bytes) -> int:
        content = self.held + bytes(block)
        self.held = content[-2:]
        self._put(content[:-2])
        return len(block)

    def flush(self) -> None:
        """``torch.save`` asks for it; ``finish`` does it."""

    def _put(self, content: bytes) -> None:
        self.digest.update(content)
        self.size += len(content)
        if self.error is None:
            try:
                self.file.write(content)
            except OSError as error:
                self.error = error

    def finish(self, stamp: Stamp) -> None:
        """Write the comment, and all of it to the disk.

        Raises:
            OSError: some of it could not be written.
        """
        position = asdict(stamp)
        self.digest.update(json.dumps(position).encode())
        trailer = {"position": position, "size": self.size, "sha256": self.digest.hexdigest()}
        comment = json.dumps(trailer).encode()
        if self.error is None:
            try:
                self.file.write(len(comment).to_bytes(2, "little") + comment)
                self.file.flush()
                os.fsync(self.file.fileno())
            except OSError as error:
                self.error = error
        if self.error is not None:
            raise self.error


def write(content: dict[str, Any], path: Path, stamp: Stamp) -> None:
    """Write plain data so that ``path`` is either absent, old or complete.

    Raises:
        OSError: it could not be written; nothing but what was there before remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            hashing = _Hashing(file)
            torch.save(content, hashing)
            hashing.finish(stamp)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def explain(path: Path, error: Exception) -> str:
    """Why ``path`` could not be written, with the space that is left."""
    reason = getattr(error, "strerror", None) or str(error)
    try:
        free = f"{shutil.disk_usage(path.parent).free:,} bytes free"
    except OSError:
        free = "its folder cannot be read"
    return f"{path}: expected to write a checkpoint, got: {reason} ({free})"


def read_trailer(path: Path) -> dict[str, Any] | None:
    """The comment that ``write`` appends; None in a file without one, {} where one is damaged."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LONGEST))
        tail = file.read()
    start = tail.rfind(_END)
    comment = tail[start + _END_LENGTH :]
    length = int.from_bytes(tail[start + _END_LENGTH - 2 : start + _END_LENGTH], "little")
    if start >= 0 and not length and not comment:
        return None
    try:
        trailer = json.loads(comment)
        Stamp(**trailer["position"])
        return trailer if trailer["size"] + 2 + length == size and length == len(comment) else {}
    except (ValueError, TypeError, KeyError):
        return {}


def is_of_older_version(path: Path) -> bool:
    """Whether a file ends like one of a version that appended no comment; the rest of it is not read."""
    try:
        return read_trailer(path) is None
    except OSError:
        return False


def stamp_of(path: Path) -> Stamp | None:
    """The position of a checkpoint, without verifying it; of the name where the file does not tell it.

    None for ``best.pth`` without one.

    Raises:
        FileNotFoundError: it has been removed meanwhile.
        OSError: it cannot be read; the message says what to do.
    """
    with _telling(path):
        trailer = read_trailer(path)
    if trailer:
        return Stamp(**trailer["position"])
    match = CHECKPOINT_NAME.fullmatch(path.name)
    if match is None:
        return None
    epoch, step = int(match[1]), int(match[2] or 0)
    return Stamp(epoch=epoch, step=step) if match[2] else Stamp(epoch=epoch + 1)


def is_complete(path: Path) -> bool:
    """Whether size and checksum of the whole file hold; a file that is not there is not complete.

    Raises:
        OSError: it cannot be read, whole or not; the message says what to do.
    """
    try:
        with _telling(path):
            trailer = read_trailer(path)
            if trailer is None:
                return _is_whole_archive(path)
            return bool(trailer) and _digest(path, trailer) == trailer.get("sha256")
    except (FileNotFoundError, IsADirectoryError):
        return False


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Say of a disk or a network that fails inside that it is no damage to the file, and what to do."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError):
        raise
    except OSError as error:
        raise OSError(
            f"{path}: expected to read the checkpoint, got: {error.strerror or error}; nothing was changed: "
            "start the same command again when the disk answers, or move the file away to do without it"
        ) from error


def _is_whole_archive(path: Path) -> bool:
    """Whether the checksums of a zip archive hold."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except _DAMAGES:
        return False
    except OSError as error:
        if error.errno == errno.EINVAL:  # a damaged archive points to before its beginning
            return False
        raise


def _digest(path: Path, trailer: dict[str, Any]) -> str:
    """SHA-256 of what stands before the comment's length, and of the position."""
    digest = hashlib.sha256()
    left = trailer["size"]
    with path.open("rb", buffering=0) as file:
        while left > 0 and (block := file.read(min(_BLOCK, left))):
            digest.update(block)
            left -= len(block)
    digest.update(json.dumps(trailer["position"]).encode())
    return digest.hexdigest()


def checkpoints_in(folder: Path) -> Iterator[Path]:
    """All checkpoints of a folder, whole or not, but for ``best.pth``.

    Raises:
        OSError: the folder cannot be read; ``glob`` would find it empty.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:  # nothing was written yet
        return
    paths = (folder / name for name in names if CHECKPOINT_NAME.fullmatch(name))
    yield from (path for path in paths if not path.is_dir())


def _all_in(folder: Path) -> Iterator[Path]:
    """All checkpoints of a folder, and where the best one is, if there is one."""
    yield from checkpoints_in(folder)
    if not (folder / BEST_NAME).is_dir():
        yield folder / BEST_NAME


def find_newest(folder: Path) -> Path | None:
    """The complete checkpoint that is furthest in the run that began last; damaged ones are skipped.

    Files of older versions, which do not know their run, are ordered by when they were written.

    Raises:
        OSError: one that may be the newest cannot be read.
    """
    found: list[tuple[Any, Path]] = []
    for path in _all_in(folder):
        with contextlib.suppress(FileNotFoundError):  # no best one, or removed meanwhile by a save
            stamp, written = stamp_of(path) or Stamp(), path.stat().st_mtime_ns
            is_old = stamp.run == 0
            found.append(((stamp.run, written if is_old else 0, stamp, written), path))
    newest = None
    for order, path in sorted(found, reverse=True):
        if newest is not None and (order[0] > 0 or is_of_older_version(path)):
            continue  # whole or not, it is older; one that has lost its trailer may have been the newest
        if not is_complete(path):
            logger.warning(f"{path} is damaged or incomplete and was skipped")
        elif newest is None:
            newest = path
    return newest


def next_run(folder: Path) -> int:
    """The number of a run that begins in ``folder``: greater than that of any checkpoint there.

    Raises:
        OSError: one of them cannot be read.
    """
    last = 0
    for path in _all_in(folder):
        with contextlib.suppress(FileNotFoundError):
            last = max(last, (stamp_of(path) or Stamp()).run)
    return 1 + last


def _stamped(path: Path) -> list[tuple[Stamp, Path]]:
    """A checkpoint with its stamp; nothing for one without, or that cannot be read, which is told."""
    try:
        stamp = stamp_of(path)
    except OSError as error:
        logger.warning(f"superfluous or not, this one stays: {error}")
        return []
    return [] if stamp is None else [(stamp, path)]


def prune(folder: Path, newest: Stamp, keep: int) -> None:
    """Remove what the checkpoint of ``newest`` makes superfluous; ``best.pth`` always stays.

    Only checkpoints of the same run up to ``newest`` are looked at. Those inside an epoch go once a whole
    epoch was saved after them, and all but the last two otherwise, so that a damaged one has a predecessor.

    Args:
        folder: of the checkpoints.
        newest: the last one written.
        keep: how many stay at most; 0 for all those of whole epochs.
    """
    known: list[tuple[Stamp, Path]] = []
    try:
        for path in checkpoints_in(folder):
            known += _stamped(path)
    except OSError as error:
        logger.warning(f"superfluous checkpoints stay until the next save: {error}")
    ours = sorted((stamp, path) for stamp, path in known if stamp.run == newest.run and stamp <= newest)
    last_whole = max((stamp.epoch for stamp, _ in ours if not stamp.images), default=0)
    inside = [path for stamp, path in ours if stamp.images]
    fresh = [path for stamp, path in ours if stamp.images and stamp.epoch >= last_whole][-KEPT_INSIDE:]
    stale = {path for path in inside if path not in fresh}
    left = [path for _, path in ours if path not in stale]
    if keep:
        stale |= set(left[:-keep])
    for path in stale:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning(f"{path} is superfluous and could not be removed: {error.strerror}")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed; call it while nobody writes."""
    with contextlib.suppress(OSError):
        for path in folder.glob(".*.tmp"):
            if TEMPORARY_NAME.fullmatch(path.name):
                path.unlink()
                logger.info(f"removed {path}, left by a save that was killed")


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, where the platform can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
