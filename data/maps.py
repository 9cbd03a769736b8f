"""Map files: which images a split has, and their labels.

Two formats are read: one `path<TAB>label` line per image, or a JSON list of `[path, label]`. Paths must stay
inside the data set's folder, without `..` and control characters.
"""

import json
import reprlib
from dataclasses import dataclass
from pathlib import Path

_SHOWN_LETTERS = 120
_LABEL_DIGITS = 9  # at most, in text


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
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:  # the second from deeply nested lists
        raise ValueError(
            f"{path}: expected a JSON list of [path, label], got invalid JSON: {error}; write it again"
        ) from error
    assert isinstance(entries, list)
    return entries


def _parse_entry(fields: object, where: str, num_classes: int) -> tuple[str, int]:
    wanted = "expected a path and an integer label ('path<TAB>label', or [path, label] in JSON)"
    if not isinstance(fields, list) or len(fields) < 2 or not str(fields[0]).strip():
        raise ValueError(f"{where}: {wanted}, got {_quote(fields)}; correct or remove the entry")
    name, label = fields[0], _as_label(fields[1])
    if label is None:
        raise ValueError(f"{where}: {wanted}, got the label {_quote(fields[1])}; correct or remove the entry")
    if not isinstance(name, str) or not name.isprintable() or _leaves_folder(name):
        raise ValueError(
            f"{where}: expected a path inside the data set, without '..' and control characters, got "
            f"{_quote(name)}; correct or remove the entry"
        )
    if not 0 <= label < num_classes:
        raise ValueError(
            f"{where}: expected a label in [0, {num_classes}), got {label}; correct the map or set "
            "MODEL.NUM_CLASSES"
        )
    return name, label


def _leaves_folder(name: str) -> bool:
    return ".." in name and ".." in name.replace("\\", "/").split("/")


def _as_label(value: object) -> int | None:
    """An integer, or its digits; None for anything else."""
    if isinstance(value, str):
        digits = value.strip().removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) <= _LABEL_DIGITS):
            return None
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _quote(value: object) -> str:
    """An entry for a message, shortened; a line of one field as it is."""
    if isinstance(value, list) and len(value) == 1:
        return _quote(value[0])
    shown = value[:_SHOWN_LETTERS] if isinstance(value, str) else value
    return repr(shown) if isinstance(shown, str) else reprlib.repr(shown)
