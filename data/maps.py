"""Map files: which images a split has, and their labels.

Two formats are read: one `path<TAB>label` line per image, or a JSON list of `[path, label]`.
"""

import json
from dataclasses import dataclass
from pathlib import Path


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
        ValueError: the map is empty, an entry is malformed or a label is out of range; the message names the
            line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a map file with 'path<TAB>label' lines, got nothing; create it"
        )
    text = path.read_text(encoding="utf-8-sig").rstrip("\n")
    is_json = text.lstrip().startswith("[")
    image_map = ImageMap(path, [], [], is_json)
    for entry, fields in enumerate(_json_entries(path, text) if is_json else _line_entries(text)):
        name, label = _parse_entry(fields, image_map.where(entry), num_classes)
        image_map.names.append(name)
        image_map.labels.append(label)
    if not image_map.names:
        raise ValueError(
            f"{path}: expected at least one 'path<TAB>label' line, got an empty map; write the map anew"
        )
    return image_map


def _line_entries(text: str) -> list[list[str]]:
    return [line.rsplit("\t", maxsplit=1) for line in text.split("\n")] if text.strip() else []


def _json_entries(path: Path, text: str) -> list[object]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: expected a JSON list of [path, label], got invalid JSON: {error}"
        ) from error
    assert isinstance(entries, list)
    return entries


def _parse_entry(fields: object, where: str, num_classes: int) -> tuple[str, int]:
    wanted = "expected a path and an integer label ('path<TAB>label', or [path, label] in JSON)"
    if not isinstance(fields, list) or len(fields) < 2 or not str(fields[0]).strip():
        raise ValueError(f"{where}: {wanted}, got {_quote(fields)}; correct or remove the entry")
    try:
        label = int(fields[1])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: {wanted}, got the label {fields[1]!r}; correct or remove the entry"
        ) from error
    if not 0 <= label < num_classes:
        raise ValueError(
            f"{where}: expected a label in [0, {num_classes}), got {label}; correct the map or set "
            "MODEL.NUM_CLASSES"
        )
    return str(fields[0]), label


def _quote(fields: object) -> str:
    if isinstance(fields, list) and len(fields) == 1:
        return repr(fields[0])
    return repr(fields)
