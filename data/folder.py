"""Data sets of plain image files.

Either a split has one folder per class (`train/<class>/*`), or a map file names the images (ImageNet-22K).
"""

import os
from pathlib import Path

import numpy as np

from data.maps import read_map
from data.source import FileSource

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_MAX_NAMED = 5
_MAX_PROBES = 1000


def scan_class_folders(split_dir: Path) -> tuple[list[str], FileSource]:
    """Find the images of a split that has one folder per class.

    Class indices follow the sorted folder names. Sub-folders of a class belong to it; names starting with a
    dot are skipped.

    Args:
        split_dir: for instance DATA_PATH/train.

    Returns:
        The class names, and the images in sorted order.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: there is no class folder, or a class folder has no images.
    """
    if not split_dir.is_dir():
        raise FileNotFoundError(
            f"{split_dir}: expected a folder with one sub-folder per class, got "
            f"{'a file' if split_dir.exists() else 'nothing'}; set DATA.DATA_PATH to the folder that holds "
            "train/ and val/"
        )
    with os.scandir(split_dir) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(
            f"{split_dir}: expected one sub-folder per class, got none; arrange the images as "
            f"{split_dir}/<class>/<image>"
        )
    paths: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        found = _list_images(split_dir, name)
        paths += found
        labels += [label] * len(found)
        if not found:
            empty.append(name)
    if empty:
        raise ValueError(
            f"{split_dir}: expected at least one image in every class folder, got none in {_some(empty)}; "
            f"add images ({' '.join(IMAGE_EXTENSIONS)}) or remove the folder"
        )
    return classes, FileSource(split_dir, paths, labels)


def _list_images(split_dir: Path, class_name: str) -> list[str]:
    """The images below a class folder; a folder that several links lead to is listed once."""
    found = []
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(split_dir / class_name, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        relative = os.path.relpath(folder, split_dir)
        found += [
            os.path.join(relative, file)
            for file in files
            if file.lower().endswith(IMAGE_EXTENSIONS) and not file.startswith(".")
        ]
    return sorted(found)


def check_class_count(split_dir: Path, classes: list[str], num_classes: int) -> None:
    """Raise ValueError unless a split has as many class folders as the model has classes."""
    if len(classes) != num_classes:
        raise ValueError(
            f"{split_dir}: expected {num_classes} class folders (MODEL.NUM_CLASSES), got {len(classes)}; set "
            f"MODEL.NUM_CLASSES to {len(classes)}, or DATA.DATA_PATH to the right data set"
        )


def check_same_classes(train_dir: Path, train: list[str], val_dir: Path, val: list[str]) -> None:
    """Raise ValueError, naming the differences, unless both splits have the same class folders."""
    only_train = sorted(set(train) - set(val))
    only_val = sorted(set(val) - set(train))
    if only_train or only_val:
        raise ValueError(
            f"expected the same class folders in {train_dir} and {val_dir}, got only in the first: "
            f"{_some(only_train)}, only in the second: {_some(only_val)}; add the missing folders or remove "
            "the extra ones"
        )


def read_map_of_files(root: Path, map_name: str, num_classes: int) -> FileSource:
    """The images that a map file names by paths relative to a folder.

    A sample of the files, spread evenly over the map, is checked to exist; all of ImageNet-22K's would take
    too long.

    Args:
        root: folder with the map and the images.
        map_name: file name of the map.
        num_classes: labels must lie in [0, num_classes).

    Raises:
        FileNotFoundError: the map or an image does not exist.
        ValueError: the map is malformed, or a path is absolute.
    """
    image_map = read_map(root / map_name, num_classes)
    for entry, name in enumerate(image_map.names):
        if os.path.isabs(name):
            raise ValueError(
                f"{image_map.where(entry)}: expected a path relative to {root}, got {name}; correct the map"
            )
    probes = np.linspace(0, len(image_map.names) - 1, min(_MAX_PROBES, len(image_map.names)))
    for entry in probes.astype(int).tolist():
        if not os.path.isfile(root / image_map.names[entry]):
            raise FileNotFoundError(
                f"{image_map.where(entry)}: expected an image at {root / image_map.names[entry]}, got "
                "nothing; paths in the map are relative to DATA.DATA_PATH: correct the map or the path"
            )
    return FileSource(root, image_map.names, image_map.labels)


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
