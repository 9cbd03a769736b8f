"""Data sets in zip archives with map files.

A split is described by `train_map.txt` with one `path<TAB>label` line per image. The path is either
`path/in/archive.jpg`, inside `train.zip`, or `some.zip@/path/in/archive.jpg`, inside `some.zip`; both lie
beside the map.

The directory of an archive is parsed once, into arrays; workers then read a member with one seek in a plain
file. The original parses it again in every worker, which costs seconds and memory for each.
"""

import logging
import os
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import numpy as np
import psutil
import torch

from data.images import MAX_BYTES, UndecodableImageError
from data.maps import ImageMap, read_map
from data.source import PackedSource

_LOCAL_HEADER = struct.Struct("<4s22x2H")  # signature, ..., lengths of the name and of the extra field
_LOCAL_SIGNATURE = b"PK\x03\x04"
_SEPARATOR = ".zip@/"
_ENCRYPTED = 0x1
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

logger = logging.getLogger(__name__)


class ArchiveSource(PackedSource):
    """Images in zip archives, read by position.

    `members` has the archive's number, offset of the local header, stored size, size, CRC and method. Each
    process opens the files itself, at its first read: forked workers must not move each other's position.
    """

    _files: dict[int, BinaryIO]
    _pid = -1

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_files": {}}

    def num_bytes(self, index: int) -> int:
        """Size of the image file once unpacked."""
        return int(self._members[index, 3])

    def read(self, index: int) -> bytes:
        """The content of the image file.

        Raises:
            UndecodableImageError: the archive's bytes do not match their checksum or cannot be unpacked.
        """
        number, offset, stored_size, size, crc, method = self._members[index].tolist()
        file = self._file(number)
        file.seek(offset)
        header = file.read(_LOCAL_HEADER.size)
        if len(header) != _LOCAL_HEADER.size or not header.startswith(_LOCAL_SIGNATURE):
            raise self._broken(index, "its header is not where the archive's directory says")
        _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        file.seek(name_length + extra_length, os.SEEK_CUR)
        content = file.read(stored_size)
        if method == zipfile.ZIP_DEFLATED:
            try:  # one byte too many shows that there is more
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
            except zlib.error as error:
                raise self._broken(index, str(error)) from error
        if len(content) != size or zlib.crc32(content) != crc:
            raise self._broken(index, "its size or checksum is wrong")
        return content

    def _file(self, number: int) -> BinaryIO:
        if self._pid != os.getpid():
            self._files, self._pid = {}, os.getpid()
        if number not in self._files:
            self._files[number] = open(self._paths[number], "rb")  # noqa: SIM115 (kept for later reads)
        return self._files[number]

    def _broken(self, index: int, reason: str) -> UndecodableImageError:
        return UndecodableImageError(
            f"{self.name(index)}: expected an intact archive member, got damaged data ({reason}); make the "
            "archive again"
        )


class CachedSource:
    """An archive whose encoded images, all or a shard, are cached in memory; the rest is read on demand.

    The bytes lie in one torch tensor: forked workers share it as it is, spawned workers through shared
    memory.
    """

    def __init__(self, source: ArchiveSource, shard: range) -> None:
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
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of this machine
        memory_size = psutil.virtual_memory().total
        if ends[-1] * processes > memory_size:
            raise ValueError(
                f"DATA.CACHE_MODE: expected images that fit into the {memory_size >> 20} MiB of memory, got "
                f"{ends[-1] >> 20} MiB from {source.name(0)} on in each of {processes} process(es); set it "
                "to 'no' (--cache-mode no)"
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


def open_archive_split(data_path: Path, split: str, num_classes: int) -> ArchiveSource:
    """The images of a split kept in zip archives.

    Args:
        data_path: folder with the archives and maps.
        split: "train" or "val".
        num_classes: labels must lie in [0, num_classes).

    Raises:
        FileNotFoundError: the map or an archive it refers to does not exist.
        ValueError: the map is malformed, names an image its archive does not have, or an archive is damaged
            or of a kind that cannot be read.
    """
    archive_path = data_path / f"{split}.zip"
    map_path = data_path / f"{split}_map.txt"
    if not map_path.is_file():
        found = f"only {archive_path.name}" if archive_path.is_file() else "neither of them"
        raise FileNotFoundError(
            f"{map_path}: expected {archive_path.name} with its map {map_path.name} in {data_path}, got "
            f"{found}; write the map with one 'path/in/archive.jpg<TAB>label' line per image, or set "
            "DATA.DATA_PATH to the folder that holds both"
        )
    image_map = read_map(map_path, num_classes)
    archives: dict[Path, tuple[int, int, dict[str, zipfile.ZipInfo]]] = {}  # number, length, directory
    names: list[str] = []
    members = np.empty((len(image_map.names), 6), dtype=np.int64)
    for entry, written in enumerate(image_map.names):
        archive_name, member_name = _split_name(written, archive_path.name)
        path = data_path / archive_name
        if path not in archives:
            directory = _read_directory(path, image_map, entry)
            archives[path] = len(archives), path.stat().st_size, directory
        number, length, directory = archives[path]
        info = directory.get(member_name)
        if info is None or info.is_dir():
            raise ValueError(
                f"{image_map.where(entry)}: expected an image {member_name} in {path}, got "
                f"{'no such member' if info is None else 'a folder'}; correct the map, or add the image"
            )
        names.append(member_name)
        members[entry] = (number, *_locate(info, f"{path}@/{member_name}", length))
    return ArchiveSource(list(archives), names, members, image_map.labels)


def _split_name(written: str, own_archive: str) -> tuple[str, str]:
    """Archive and member of a path in a map; `own_archive` is the archive of paths that name none."""
    archive, separator, member = written.partition(_SEPARATOR)
    if separator:
        return archive + ".zip", member
    return own_archive, written.lstrip("/")


def _read_directory(archive: Path, image_map: ImageMap, entry: int) -> dict[str, zipfile.ZipInfo]:
    if archive.parent != image_map.path.parent:
        raise ValueError(
            f"{image_map.where(entry)}: expected an archive beside the map, got {archive}; correct the map"
        )
    if not archive.is_file():
        raise FileNotFoundError(
            f"{image_map.where(entry)}: expected the archive {archive} beside the map, got nothing; add the "
            "archive or correct the map"
        )
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
    except Exception as error:  # zipfile raises many types on damaged archives
        raise ValueError(
            f"{archive}: expected a zip archive, got a damaged or other file ({error}); make it again"
        ) from error
    directory = {info.filename: info for info in members}
    if len(directory) < len(members):
        counts = Counter(info.filename for info in members)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(
            f"{archive}: expected every name once, got {twice!r} {counts[twice]} times; make it again"
        )
    return directory


def _locate(info: zipfile.ZipInfo, name: str, archive_length: int) -> tuple[int, int, int, int, int]:
    """Offset, stored size, size, CRC and method of a member; ValueError if it cannot be read."""
    if info.compress_type not in _METHODS or info.flag_bits & _ENCRYPTED:
        raise ValueError(
            f"{name}: expected an archive member stored plainly or deflated, got compression method "
            f"{info.compress_type}{' with encryption' if info.flag_bits & _ENCRYPTED else ''}; make the "
            "archive with 'zip -0'"
        )
    inside = 0 <= info.header_offset <= archive_length - _LOCAL_HEADER.size - info.compress_size
    if not inside or info.file_size > MAX_BYTES:
        raise ValueError(
            f"{name}: expected an archive member inside its archive, of at most {MAX_BYTES >> 20} MiB, got "
            f"{info.file_size} bytes, packed to {info.compress_size} at {info.header_offset}, in an archive "
            f"of {archive_length}; make it again"
        )
    return info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type
