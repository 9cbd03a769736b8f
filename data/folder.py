"""Data sets of plain image files.

Either a split has one folder per class (`train/<class>/*`), or a file names the label of each image: Kaggle's
solution for the validation images of ImageNet, or a map (ImageNet-22K).
"""

import logging
import os
from pathlib import Path

import numpy as np

from data.images import is_image_name, log_left_out
from data.maps import read_map
from data.source import SPLITS, FileSource, some

logger = logging.getLogger(__name__)

SOLUTION = "LOC_val_solution.csv"
_KAGGLE = ("CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")  # where Kaggle's ImageNet has its splits
_MAX_PROBES = 1000


def open_folder_split(root: Path, split: str) -> FileSource:
    """The images of a split with one folder per class, or of Kaggle's ImageNet as it is unpacked.

    In the latter, the validation images lie in one folder, and `LOC_val_solution.csv` there or in a folder
    above has their classes.

    Args:
        root: folder with the splits, or a folder of Kaggle's ImageNet above them.
        split: "train" or "val", which may also be called "validation" or "test".

    Raises:
        FileNotFoundError: the split does not exist.
        ValueError: an image has no class, or a class no image.
    """
    choices = [home(root) / name for name in SPLITS[split]]
    split_dir = next((folder for folder in choices if folder.is_dir()), choices[0])
    if not split_dir.is_dir():
        raise FileNotFoundError(
            f"{split_dir}: expected a folder with one sub-folder per class, got "
            f"{'a file' if split_dir.exists() else 'nothing'}; set DATA.DATA_PATH to the folder that has "
            f"train/ and {'/ or '.join(SPLITS['val'])}/"
        )
    classes = class_folders(split_dir)
    if not classes and split == "val" and (solution := _find_solution(split_dir)):
        return read_solution(solution, split_dir)
    if not classes:
        hint = f", or put Kaggle's {SOLUTION} beside the folder" if split == "val" else ""
        raise ValueError(
            f"{split_dir}: expected one sub-folder per class, got none; arrange the images as "
            f"{split_dir}/<class>/<image>{hint}"
        )
    return scan_class_folders(split_dir, classes)


def home(root: Path) -> Path:
    """The folder of the splits: `root`, or one of Kaggle's ImageNet in it."""
    names = ("train", *SPLITS["val"])
    inner = (root, *(root / folder for folder in _KAGGLE))
    return next((folder for folder in inner if any((folder / name).is_dir() for name in names)), root)


def warn_of_other_classes(root: Path, classes: list[str] | None) -> None:
    """Warn if the training split, where it is there, has other class folders than the one that is evaluated:
    labels are numbers of classes."""
    train = home(root) / "train"
    try:
        trained = class_folders(train) if train.is_dir() else []
    except OSError:  # evaluation does not need it
        return
    if classes is not None and trained and trained != classes:
        only = [some(sorted({*a} - {*b})) for a, b in ((trained, classes), (classes, trained))]
        logger.warning(
            f"{train} has other classes than the images to evaluate: only there {only[0]}, only here "
            f"{only[1]}; labels are numbers of classes, so the accuracy holds for models of the latter alone"
        )


def class_folders(split_dir: Path) -> list[str]:
    """The sorted names of a split's folders, one per class."""
    with os.scandir(split_dir) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def scan_class_folders(split_dir: Path, classes: list[str]) -> FileSource:
    """The images of a split that has one folder per class, in sorted order.

    Sub-folders of a class belong to it; names starting with a dot are skipped.

    Args:
        split_dir: for instance DATA_PATH/train.
        classes: the sorted names of its folders.

    Raises:
        ValueError: a class folder has no images.
    """
    paths: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    left_out: list[str] = []
    for label, name in enumerate(classes):
        found = list_images(split_dir / name, left_out)
        paths += [os.path.join(name, image) for image in found]
        labels += [label] * len(found)
        if not found:
            empty.append(name)
    log_left_out(split_dir, left_out)
    if empty:
        raise ValueError(
            f"{split_dir}: expected at least one image in every class folder, got none in {some(empty)}; "
            "add images, or remove the folder"
        )
    return FileSource(split_dir, paths, labels, classes)


def list_images(root: Path, left_out: list[str]) -> list[str]:
    """The images in and below a folder, relative to it; a folder that several links lead to is listed once.

    Folders whose names start with a dot are skipped. The names of other files are added to `left_out`.

    Raises:
        OSError: a folder cannot be read.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(root, onerror=_raise, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = os.path.relpath(folder, root)
        inside = "" if relative == "." else relative
        found += [os.path.join(inside, file) for file in files if is_image_name(file)]
        left_out += [file for file in files if not is_image_name(file)]
    return sorted(found)


def _raise(error: OSError) -> None:
    """Raise an error that os.walk would ignore."""
    raise error


def _find_solution(split_dir: Path) -> Path | None:
    """Kaggle's solution in a folder of validation images, or in one of the four folders above it."""
    for start in (split_dir.absolute(), split_dir.resolve()):  # either may lie in Kaggle's folder
        for folder in (start, *start.parents[:4]):
            if (folder / SOLUTION).is_file():
                return folder / SOLUTION
    return None


def read_solution(path: Path, image_dir: Path) -> FileSource:
    """The validation images of Kaggle's ImageNet, sorted by class, then by name.

    Args:
        path: file with a line per image, `<image name without .JPEG>,<class> <x> <y> <x> <y> ...`, below a
            line of titles.
        image_dir: folder of the images.

    Raises:
        ValueError: a line is malformed, or lines and images do not belong together one by one.
    """
    files = {Path(name).stem: name for name in os.listdir(image_dir) if is_image_name(name)}
    found: dict[str, str] = {}
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines[1:], start=2):
        image, _, boxes = line.partition(",")
        if not image or not boxes.split():
            raise ValueError(
                f"{path}:{number}: expected '<image>,<class> <box>', got {line[:100]!r}; copy the file again"
            )
        found[image] = boxes.split()[0]
    if different := sorted(found.keys() ^ files.keys()):
        raise ValueError(
            f"{path}: expected a line for every image in {image_dir}, and no other, got a difference in "
            f"{some(different)}; copy the file or the images again"
        )
    classes = sorted(set(found.values()))
    label_of = {name: label for label, name in enumerate(classes)}
    images = sorted((label_of[name], files[image]) for image, name in found.items())
    return FileSource(image_dir, [file for _, file in images], [label for label, _ in images], classes)


def read_map_of_files(root: Path, map_name: str) -> FileSource:
    """The images that a map file names by paths relative to a folder.

    A sample of the files, spread evenly over the map, is checked to exist; all of ImageNet-22K's would take
    too long.

    Args:
        root: folder with the map and the images.
        map_name: file name of the map.

    Raises:
        FileNotFoundError: the map or an image does not exist.
        ValueError: the map is malformed.
    """
    names, labels = read_map(root / map_name)
    probes = np.linspace(0, len(names) - 1, min(_MAX_PROBES, len(names)))
    for entry in probes.astype(int).tolist():
        if not os.path.isfile(root / names[entry]):
            raise FileNotFoundError(
                f"{root / map_name}:{entry + 1}: expected an image at {root / names[entry]}, got nothing; "
                "paths in the map are relative to DATA.DATA_PATH: correct the map or the path"
            )
    return FileSource(root, names, labels)
