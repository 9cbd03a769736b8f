"""Data sets in the formats of Hugging Face's library `datasets`, which is needed for this source only."""

from pathlib import Path
from typing import Any

from data.images import UndecodableImageError
from data.source import SPLITS, ImageSource, some


class RowSource(ImageSource):
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

        labels = rows[label][:]
        wrong = next((row for row, value in enumerate(labels) if type(value) is not int), None)
        if wrong is not None:
            raise ValueError(
                f"{origin}, row {wrong}: expected a whole number in the column {label!r}, got "
                f"{labels[wrong]!r}; correct the row, or name the right column in DATA.HF.LABEL_COLUMN"
            )
        super().__init__(origin, labels, getattr(rows.features[label], "names", None))
        self._column = image
        try:
            self._rows = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        except (TypeError, NotImplementedError, ValueError) as error:
            raise ValueError(
                f"{origin}: expected images in the column {image!r}, got {rows.features[image]}; name the "
                "right one in DATA.HF.IMAGE_COLUMN"
            ) from error

    def name(self, index: int) -> str:
        """`data set, split, row N`."""
        return f"{self.origin}, row {index}"

    def _read(self, index: int) -> bytes:
        image = self._rows[index][self._column] or {}
        content, path = image.get("bytes"), image.get("path")
        if content is None and path is None:
            raise UndecodableImageError(
                f"{self.name(index)}: expected an image in the column {self._column!r}, got none; correct or "
                "remove the row"
            )
        return Path(path).read_bytes() if content is None else content


def open_rows(
    splits: dict[str, Any], source: str, split: str, split_name: str, image: str, label: str
) -> RowSource:
    """The images of a split of a data set for the library `datasets`.

    Args:
        splits: of `load_splits`.
        source: what it was loaded from, for messages.
        split: "train" or "val".
        split_name: what it is called there; '' for "train", or the first of "val", "validation" and "test".
        image: column of the images; '' for "image" or "img".
        label: column of the labels; '' for "label" or "labels".

    Raises:
        ValueError: there is no such split or column, or a label is no whole number.
    """
    names = [split_name] if split_name else list(SPLITS[split])
    found = next((name for name in names if name in splits), None)
    if found is None:
        raise ValueError(
            f"{source}: expected a split called {' or '.join(names)}, got {some(list(splits))}; name one in "
            f"DATA.HF.{split.upper()}_SPLIT"
        )
    rows, origin = splits[found], f"{source}, {found}"
    image = _column(rows, [image] if image else ["image", "img"], "IMAGE_COLUMN", origin)
    label = _column(rows, [label] if label else ["label", "labels"], "LABEL_COLUMN", origin)
    return RowSource(rows, image, label, origin)


def _column(rows: Any, names: list[str], option: str, origin: str) -> str:
    """The first of the names that is a column of the rows, a `datasets.Dataset`; ValueError if none is."""
    for name in names:
        if name in rows.column_names:
            return name
    raise ValueError(
        f"{origin}: expected a column called {' or '.join(names)}, got {some(rows.column_names)}; name one "
        f"in DATA.HF.{option}"
    )


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
