"""Data sets in zip archives with map files.

A split is described by `train_map.txt` with one `path<TAB>label` line per image. The path is either
`path/in/archive.jpg`, inside `train.zip`, or `some.zip@/path/in/archive.jpg`, inside `some.zip`; both lie
beside the map.

The directory of an archive is parsed once, into an array; workers then read a member with one seek in a plain
file. The original parses it again in every worker, which costs seconds and memory for each.
"""

import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.images import UndecodableImageError
from data.maps import read_map
from data.source import PackedSource

_LOCAL_HEADER = struct.Struct("<26x2H")  # ..., lengths of the name and of the extra field
_SEPARATOR = ".zip@/"
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class ArchiveSource(PackedSource):
    """Images in zip archives, read by position.

    `members` has the archive's number, offset of the local header, stored size, CRC and method. Archives stay
    open, since opening a file is what is slow on a cluster's file system; each process opens them itself, at
    its first read, because forked workers must not move each other's position.
    """

    _opened: dict[int, BinaryIO]
    _pid = -1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}

    def _read(self, index: int) -> bytes:
        number, offset, stored_size, crc, method = self._members[index].tolist()
        if self._pid != os.getpid():
            self._opened, self._pid = {}, os.getpid()
        if number not in self._opened:
            self._opened[number] = open(self._files[number], "rb")  # noqa: SIM115 (kept for later reads)
        file = self._opened[number]
        file.seek(offset)
        try:
            name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            file.seek(name_length + extra_length, os.SEEK_CUR)
            content = file.read(stored_size)
            if method == zipfile.ZIP_DEFLATED:
                content = zlib.decompress(content, -zlib.MAX_WBITS)
        except (struct.error, zlib.error):
            content = b""
        if zlib.crc32(content) != crc:
            raise UndecodableImageError(
                f"{self.name(index)}: expected an intact archive member, got one with a wrong checksum; make "
                "the archive again"
            )
        return content


def open_archive_split(data_path: Path, split: str) -> ArchiveSource:
    """The images of a split kept in zip archives.

    Args:
        data_path: folder with the archives and maps.
        split: "train" or "val".

    Raises:
        FileNotFoundError: the map or an archive it refers to does not exist.
        ValueError: the map is malformed, names an image its archive does not have, or an archive is damaged
            or of a kind that cannot be read.
    """
    archive_path = data_path / f"{split}.zip"
    map_path = data_path / f"{split}_map.txt"
    written, labels = read_map(map_path)
    directories: dict[Path, dict[str, zipfile.ZipInfo]] = {}
    numbers: dict[Path, int] = {}
    names, members = [], np.empty((len(written), 5), dtype=np.int64)
    for entry, text in enumerate(written):
        archive_name, separator, name = text.partition(_SEPARATOR)
        path = data_path / f"{archive_name}.zip" if separator else archive_path
        name = name if separator else text.lstrip("/")
        if path not in directories:
            numbers[path] = len(directories)
            directories[path] = _read_directory(path, where=f"{map_path}:{entry + 1}")
        info = directories[path].get(name)
        if info is None:
            raise ValueError(
                f"{map_path}:{entry + 1}: expected an image {name} in {path}, got no such member; correct "
                "the map, or add the image"
            )
        if info.compress_type not in _METHODS:
            raise ValueError(
                f"{path}@/{name}: expected an archive member stored plainly or deflated, got compression "
                f"method {info.compress_type}; make the archive with 'zip -0'"
            )
        names.append(name)
        place = info.header_offset, info.compress_size, info.CRC, info.compress_type
        members[entry] = numbers[path], *place
    return ArchiveSource(list(directories), names, members, labels)


def _read_directory(archive: Path, where: str) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive by name; `where` is the entry of the map that names the archive."""
    if not archive.is_file():
        raise FileNotFoundError(
            f"{where}: expected the archive {archive} beside the map, got nothing; add the archive or "
            "correct the map"
        )
    try:
        with zipfile.ZipFile(archive) as opened:
            return opened.NameToInfo
    except Exception as error:  # zipfile raises many types on damaged archives
        raise ValueError(
            f"{archive}: expected a zip archive, got a damaged or other file ({error}); make it again"
        ) from error
