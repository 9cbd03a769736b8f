"""Data sets in zip archives with map files.

A split is described by `train_map.txt` with one `path<TAB>label` line per image. The path is either
`path/in/archive.jpg`, inside `train.zip`, or `some.zip@/path/in/archive.jpg`, inside `some.zip`; both lie
beside the map.

The directory of an archive is parsed once, into arrays; workers then read a member with one seek in a plain
file. The original parses it again in every worker, which costs seconds and memory for each.
"""

import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.images import UndecodableImageError
from data.maps import read_map
from data.source import PackedSource, check_size

_LOCAL_HEADER = struct.Struct("<4s22x2H")  # signature, ..., lengths of the name and of the extra field
_LOCAL_SIGNATURE = b"PK\x03\x04"
_SEPARATOR = ".zip@/"
_ENCRYPTED = 0x1
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
MOST_OPEN = 64  # archives of a process; systems allow a process 256 files or more


class ArchiveSource(PackedSource):
    """Images in zip archives, read by position.

    `members` has the archive's number, offset of the local header, stored size, size, CRC and method. Each
    process opens the files itself, at its first read: forked workers must not move each other's position.
    """

    _files: dict[int, BinaryIO]
    _pid = -1

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_files": {}}

    def read(self, index: int) -> bytes:
        """The content of the image file.

        Raises:
            UndecodableImageError: the archive's bytes do not match their checksum or cannot be unpacked, or
                the file is larger than any image.
        """
        number, offset, stored_size, size, crc, method = self._members[index].tolist()
        check_size(self.name(index), size)
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
            if len(self._files) >= MOST_OPEN:
                self._files.clear()
            self._files[number] = open(self._paths[number], "rb")  # noqa: SIM115 (kept for later reads)
        return self._files[number]

    def _broken(self, index: int, reason: str) -> UndecodableImageError:
        return UndecodableImageError(
            f"{self.name(index)}: expected an intact archive member, got damaged data ({reason}); make the "
            "archive again"
        )


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
    if not map_path.is_file():
        found = f"only {archive_path.name}" if archive_path.is_file() else "neither of them"
        raise FileNotFoundError(
            f"{map_path}: expected {archive_path.name} with its map, got {found}; set DATA.DATA_PATH to the "
            "folder with both"
        )
    written, labels = read_map(map_path)
    numbers: dict[Path, int] = {}
    directories: list[dict[str, zipfile.ZipInfo]] = []
    names, members = [], np.empty((len(written), 6), dtype=np.int64)
    for entry, text in enumerate(written):
        archive_name, separator, name = text.partition(_SEPARATOR)
        path = data_path / f"{archive_name}.zip" if separator else archive_path
        name = name if separator else text.lstrip("/")
        if path not in numbers:
            numbers[path] = len(directories)
            directories.append(_read_directory(path, where=f"{map_path}:{entry + 1}"))
        info = directories[numbers[path]].get(name)
        if info is None:
            raise ValueError(
                f"{map_path}:{entry + 1}: expected an image {name} in {path}, got no such member; correct "
                "the map, or add the image"
            )
        if info.compress_type not in _METHODS or info.flag_bits & _ENCRYPTED:
            raise ValueError(
                f"{path}@/{name}: expected an archive member stored plainly or deflated, got compression "
                f"method {info.compress_type}{' with encryption' if info.flag_bits & _ENCRYPTED else ''}; "
                "make the archive with 'zip -0'"
            )
        names.append(name)
        place = info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type
        members[entry] = numbers[path], *place
    return ArchiveSource(list(numbers), names, members, labels)


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
