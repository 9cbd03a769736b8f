"""Map files: which images a split has, and their labels.

Two formats are read: one `path<TAB>label` line per image, or a JSON list of `[path, label]`. Paths must stay
inside the data set's folder, without `..` and control characters.
"""

import json
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path

_SHORT = reprlib.Repr()
_SHORT.maxstring = 120


@dataclass(frozen=True)
class ImageMap:
    """The content of a map file."""

    path: Path
    names: list[str]
    labels: list[int]
    is_json: bool

    def where(self, entry: int) -> str:
        """Place of an entry, for messages: file:line, or the file and the entry's number in a JSON list."""
        return f"{self.path}, entry {entry}" if self.is_json else f"{self.path}:{entry + 1}"


def read_map(path: Path, num_classes: int) -> ImageMap:
    """Read a map file and check every entry.

    Args:
        path: the map file.
        num_classes: labels must lie in [0, num_classes).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the map is no text, empty, an entry is malformed or a label is out of range; the message
            names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a map file with 'path<TAB>label' lines, got nothing; create it"
        )
    try:
        text = path.read_text(encoding="utf-8-sig").rstrip("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected text in UTF-8, got byte {error.object[error.start]:#04x} at {error.start}; "
            "write the map again"
        ) from error
    is_json = text.lstrip().startswith("[")
    image_map = ImageMap(path, [], [], is_json)
    for entry, fields in enumerate(_json_entries(path, text) if is_json else _line_entries(text)):
        name, label = _parse_entry(fields, image_map.where(entry), num_classes)
        image_map.names.append(name)
        image_map.labels.append(label)
    if not image_map.names:
        raise ValueError(
            f"{path}: expected at least one 'path<TAB>label' line, got an empty map; write it again"
        )
    return image_map


def _line_entries(text: str) -> list[list[str]]:
    return [line.rsplit("\t", maxsplit=1) for line in text.split("\n")] if text.strip() else []


def _json_entries(path: Path, text: str) -> list[object]:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the second from deeply nested lists
        raise ValueError(
            f"{path}: expected a JSON list of [path, label], got invalid JSON: {error}; write it again"
        ) from error


def _parse_entry(fields: object, where: str, num_classes: int) -> tuple[str, int]:
    name, label = fields[:2] if isinstance(fields, list) and len(fields) >= 2 else (fields, None)
    if isinstance(label, str) and re.fullmatch(r"-?[0-9]{1,9}", label.strip()):
        label = int(label)
    if not isinstance(name, str) or not name.strip() or type(label) is not int:
        raise ValueError(
            f"{where}: expected a path and an integer label ('path<TAB>label', or [path, label] in JSON), "
            f"got {_SHORT.repr(fields)}; correct or remove the entry"
        )
    if not name.isprintable() or (".." in name and ".." in name.replace("\\", "/").split("/")):
        raise ValueError(
            f"{where}: expected a path inside the data set, without '..' and control characters, got "
            f"{_SHORT.repr(name)}; correct or remove the entry"
        )
    if not 0 <= label < num_classes:
        raise ValueError(
            f"{where}: expected a label in [0, {num_classes}), got {label}; correct the map or set "
            "MODEL.NUM_CLASSES"
        )
    return name, label
