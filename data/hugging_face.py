"""Data sets in the formats of Hugging Face's library `datasets`, which is needed for this source only."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from data.images import UndecodableImageError
from data.source import SPLITS, check_size, some


class RowSource:
    """Images in a column of a table. A row has the content of a file, or the path of one."""

    def __init__(self, rows: Any, image: str, label: str, origin: str) -> None:
        """
        Args:
            rows: a `datasets.Dataset`.
            image: column of the images.
            label: column of the labels; ValueError if one is no whole number.
            origin: name of the split, for messages.
        """
        import datasets

        self.origin = origin
        self.classes = getattr(rows.features[label], "names", None)
        self.labels = np.asarray(rows[label][:])
        if self.labels.dtype.kind not in "iu":
            missing = next((i for i, value in enumerate(self.labels) if value is None), 0)
            raise ValueError(
                f"{self.name(missing)}: expected a whole number in the column {label!r}, got "
                f"{self.labels[missing : missing + 1].tolist()}; correct the row"
            )
        self.labels = self.labels.astype(np.int64)
        self._column = image
        try:
            self._rows = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        except (TypeError, NotImplementedError, ValueError) as error:
            raise ValueError(
                f"{origin}: expected images in the column {image!r}, got {rows.features[image]}; name the "
                "right one in DATA.HF.IMAGE_COLUMN"
            ) from error

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """`data set, split, row N`."""
        return f"{self.origin}, row {index}"

    def read(self, index: int) -> bytes:
        """The content of the image file.

        Raises:
            OSError: a file that the row names cannot be read.
            UndecodableImageError: there is no image, or it is larger than any image.
        """
        image = self._rows[index][self._column] or {}
        content, path = image.get("bytes"), image.get("path")
        if content is None and path is not None and os.path.isfile(path):
            check_size(self.name(index), os.path.getsize(path))
            content = Path(path).read_bytes()
        if content is None:
            raise UndecodableImageError(
                f"{self.name(index)}: expected an image in the column {self._column!r}, got "
                f"{'none' if path is None else f'the path {path} without a file'}; correct or remove the row"
            )
        check_size(self.name(index), len(content))
        return content


def open_rows(
    splits: dict[str, Any], source: str, split: str, split_name: str, image: str, label: str
) -> RowSource:
    """The images of a split of a data set for the library `datasets`.

    Args:
        splits: of `load_splits`.
        source: what it was loaded from, for messages.
        split: "train" or "val".
        split_name: what it is called there; '' for "train", or the first of "val", "validation" and "test".
        image: column of the images; '' finds it.
        label: column of the labels; '' finds it.

    Raises:
        ValueError: there is no such split or column, or a label is no whole number.
    """
    import datasets

    names = [split_name] if split_name else list(SPLITS[split])
    found = next((name for name in names if name in splits), None)
    if found is None:
        raise ValueError(
            f"{source}: expected a split called {' or '.join(names)}, got {some(list(splits))}; name one in "
            f"DATA.HF.{split.upper()}_SPLIT"
        )
    rows, origin = splits[found], f"{source}, {found}"
    image = _column(rows, image, datasets.Image, ("image", "img"), "IMAGE_COLUMN", origin)
    label = _column(rows, label, datasets.ClassLabel, ("label", "labels"), "LABEL_COLUMN", origin)
    return RowSource(rows, image, label, origin)


def load_splits(source: str) -> dict[str, Any]:
    """The splits of a data set, by name.

    Args:
        source: a folder of `save_to_disk`, a parquet file, a folder of parquet files, or a name on the hub.

    Raises:
        ImportError: the library is not installed.
        ValueError: there is no such data set, or it cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"DATA.DATASET hf: expected the library datasets, got: {error}; pip install 'datasets>=4'"
        ) from error
    path = Path(source)
    saved = {state.parent.name: state.parent for state in path.glob("*/state.json")}  # of save_to_disk
    try:
        if saved:
            return {name: datasets.load_from_disk(str(folder)) for name, folder in saved.items()}
        if (path / "state.json").is_file():
            rows = datasets.load_from_disk(source)
            return {str(rows.split or "train"): rows}
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=source)
        return datasets.load_dataset(source)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"{source}: expected a data set that the library datasets reads (a folder of save_to_disk, "
            f"parquet files, or a name on the hub), got: {' '.join(str(reason).split())}; correct "
            "DATA.DATA_PATH"
        ) from error


def _column(rows: Any, wanted: str, kind: type, usual: tuple[str, str], option: str, origin: str) -> str:
    """The wanted column; else one with a usual name, or the only one of a kind.

    Args:
        rows: a `datasets.Dataset`.
        wanted: its name; '' to find it.
        kind: of its feature. If no column is of the kind, all can have a usual name.
        usual: names.
        option: under DATA.HF, for the message.
        origin: name of the split, for the message.

    Raises:
        ValueError: there is none, or it is not clear which.
    """
    declared = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    found = [name for name in usual if name in (declared or rows.column_names)] or declared
    if wanted in rows.features:
        return wanted
    if not wanted and len(found) == 1:
        return found[0]
    expected = f"a column {wanted!r}" if wanted else "one column that can be it"
    got = rows.column_names if wanted or not found else found
    raise ValueError(f"{origin}: expected {expected} as DATA.HF.{option}, got {some(got)}; name the column")
