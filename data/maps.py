"""Map files: which images a split has, and their labels.

Two formats are read: one `path<TAB>label` line per image, or a JSON list of `[path, label]`.
"""

import json
import reprlib
from pathlib import Path


def read_map(path: Path) -> tuple[list[str], list[int]]:
    """The paths and labels of a map file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the map is no text, or an entry is malformed; the message names its line, or its number in
            a JSON list.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a map file with 'path<TAB>label' lines, got nothing; create it"
        )
    try:
        text = path.read_text(encoding="utf-8-sig").rstrip("\n")
        is_json = text.lstrip().startswith("[")
        entries = json.loads(text) if is_json else [line.rsplit("\t", 1) for line in text.split("\n")]
    except ValueError as error:  # of the encoding, or of JSON
        raise ValueError(
            f"{path}: expected 'path<TAB>label' lines or a JSON list of [path, label], in UTF-8, got: "
            f"{error}; write the map again"
        ) from error
    names, labels = [], []
    for number, entry in enumerate(entries, start=1):
        try:
            name, label = entry[:2]
            labels.append(int(label))
            names.append(name + "")  # an error if it is no text
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}:{number}: expected a path and an integer label ('path<TAB>label', or [path, label] "
                f"in JSON), got {reprlib.repr(entry)}; correct or remove the entry"
            ) from error
    if not names:
        raise ValueError(f"{path}: expected a line or an entry for each image, got none; write the map again")
    return names, labels
