"""Draws scenes of several digits and writes them in the layouts of COCO 2017 and ADE20K, for `data.demo`.

Letters of shapes: H, W canvas; S side of a digit's square; P points of a polygon.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

DETECTION_CLASSES = tuple(str(digit) for digit in range(10))

_MIN_SIDE, _MAX_SIDE = 28, 44
_MIN_DIGITS, _MAX_DIGITS = 6, 12
_PLACING_ATTEMPTS = 60
_INK_THRESHOLD = 0.4
_MIN_CONTRAST = 60
_MIN_PIXELS = 30
_POLYGON_ZOOM = 4
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class DigitInstance:
    """A digit in a scene: its label and the pixels it covers, (H, W) bool."""

    label: int
    mask: np.ndarray


@dataclass(frozen=True)
class Scene:
    """An image (H, W, 3) uint8 in BGR and the digits in it, which do not cover each other."""

    image: np.ndarray
    digits: list[DigitInstance]


def encode(extension: str, image: np.ndarray) -> bytes:
    """The content of an image file.

    Args:
        extension: ".png" or ".jpg".
        image: (H, W) or (H, W, 3) in BGR, uint8.
    """
    options = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY] if extension == ".jpg" else []
    done, content = cv2.imencode(extension, image, options)
    assert done
    return content.tobytes()


def draw_scene(
    images: np.ndarray, labels: np.ndarray, canvas: tuple[int, int], rng: np.random.Generator
) -> Scene:
    """Draw six to twelve digits of different sizes and light colours on a dark, mildly textured background.

    Many, and light on dark, so that a small network learns them within minutes. Their squares do not overlap;
    a digit for which no place is found is left out.

    Args:
        images: (N, 8, 8) uint8 scans to choose from.
        labels: (N,) their digits.
        canvas: (height, width) in pixels.
        rng: source of all randomness.
    """
    image = _background(canvas, rng)
    digits: list[DigitInstance] = []
    taken: list[tuple[int, int, int]] = []
    for _ in range(rng.integers(_MIN_DIGITS, _MAX_DIGITS + 1)):
        choice = int(rng.integers(len(images)))
        place = _find_place(canvas, taken, rng)
        if place is None:
            continue
        taken.append(place)
        mask = _draw_digit(image, images[choice], place, rng)
        digits.append(DigitInstance(int(labels[choice]), mask))
    return Scene(np.rint(image).astype(np.uint8), digits)


def _background(canvas: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A plain colour with soft clouds and fine noise, (H, W, 3) float32."""
    height, width = canvas
    colour = rng.uniform(20, 100, size=3)
    clouds = rng.normal(0, 10, size=(5, 6, 3)).astype(np.float32)
    image = colour + cv2.resize(clouds, (width, height), interpolation=cv2.INTER_CUBIC)
    image += rng.normal(0, 3, size=image.shape)
    return image.clip(0, 255).astype(np.float32)


def _find_place(
    canvas: tuple[int, int], taken: list[tuple[int, int, int]], rng: np.random.Generator
) -> tuple[int, int, int] | None:
    """(top, left, S) of a square that overlaps none of the taken ones, or None after some attempts."""
    height, width = canvas
    for _ in range(_PLACING_ATTEMPTS):
        side = int(rng.integers(_MIN_SIDE, _MAX_SIDE + 1))
        top = int(rng.integers(0, height - side + 1))
        left = int(rng.integers(0, width - side + 1))
        if not any(
            top < other_top + other
            and other_top < top + side
            and left < other_left + other
            and other_left < left + side
            for other_top, other_left, other in taken
        ):
            return top, left, side
    return None


def _draw_digit(
    image: np.ndarray, scan: np.ndarray, place: tuple[int, int, int], rng: np.random.Generator
) -> np.ndarray:
    """Blend a digit into the image, in place, and return the pixels it covers, (H, W) bool."""
    top, left, side = place
    window = np.s_[top : top + side, left : left + side]
    ink = cv2.resize(scan.astype(np.float32) / 255, (side, side), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    image[window] += ink[..., None] * (_contrasting_colour(image[window], rng) - image[window])
    mask = np.zeros(image.shape[:2], dtype=bool)
    mask[window] = _without_specks(ink >= _INK_THRESHOLD)
    return mask


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """A bool mask without its components of a few pixels; the largest one stays."""
    _, components, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    sizes = stats[:, cv2.CC_STAT_AREA].copy()
    sizes[0] = 0
    keep = sizes >= min(_MIN_PIXELS, sizes.max())
    return keep[components]


def _contrasting_colour(around: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random colour (3,) that stands out against the mean of the surroundings."""
    mean = around.mean(axis=(0, 1))
    colours = rng.uniform(120, 255, size=(16, 3))
    contrasts = np.abs(colours - mean).mean(axis=1)
    return colours[int(np.argmax(contrasts > _MIN_CONTRAST))].astype(np.float32)


def write_coco(root: Path, split: str, scenes: Iterator[Scene]) -> None:
    """Write scenes as `<split>2017/*.jpg` and `annotations/instances_<split>2017.json`.

    `split` is "train" or "val".
    """
    image_folder = root / f"{split}2017"
    image_folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for image_id, scene in enumerate(scenes, start=1):
        file_name = f"{image_id:012d}.jpg"
        (image_folder / file_name).write_bytes(encode(".jpg", scene.image))
        height, width = scene.image.shape[:2]
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for digit in scene.digits:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **_coco_annotation(digit)})
    content = {
        "info": {"description": f"scenes of handwritten digits, {split}"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name, "supercategory": "digit"}
            for number, name in enumerate(DETECTION_CLASSES, start=1)
        ],
    }
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content), encoding="utf-8")


def _coco_annotation(digit: DigitInstance) -> dict[str, object]:
    """Category, polygons, area, box (left, top, width, height) of a digit; its holes count as part of it."""
    filled, polygons = _outline(digit.mask)
    rows = np.flatnonzero(filled.any(axis=1))
    columns = np.flatnonzero(filled.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "category_id": digit.label + 1,
        "segmentation": polygons,
        "area": float(filled.sum()),
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "iscrowd": 0,
    }


def _outline(mask: np.ndarray) -> tuple[np.ndarray, list[list[float]]]:
    """The mask with its holes filled, and its outer outlines as polygons [x0, y0, x1, y1, ...].

    Outlines run through the centres of pixels; taking them from an enlarged mask puts them close to the
    pixels' outer edges.
    """
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros(mask.shape, np.uint8), outlines, -1, 1, thickness=cv2.FILLED)
    enlarged = filled.repeat(_POLYGON_ZOOM, axis=0).repeat(_POLYGON_ZOOM, axis=1)
    outlines, _ = cv2.findContours(enlarged, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = [((outline + 0.5) / _POLYGON_ZOOM).round(3) for outline in outlines]  # each (P, 1, 2)
    return filled.astype(bool), [polygon.ravel().tolist() for polygon in polygons]


def write_ade(root: Path, split_folder: str, scenes: Iterator[Scene]) -> None:
    """Write scenes as `images/<split>/*.jpg` and label images `annotations/<split>/*.png`.

    As in ADE20K, 0 stands for unlabelled pixels, of which there are none here; 1 is the background and 2 to
    11 are the digits.

    `split_folder` is "training" or "validation".
    """
    image_folder = root / "images" / split_folder
    label_folder = root / "annotations" / split_folder
    image_folder.mkdir(parents=True)
    label_folder.mkdir(parents=True)
    for number, scene in enumerate(scenes, start=1):
        labels = np.ones(scene.image.shape[:2], dtype=np.uint8)
        for digit in scene.digits:
            labels[digit.mask] = digit.label + 2
        (image_folder / f"{number:08d}.jpg").write_bytes(encode(".jpg", scene.image))
        (label_folder / f"{number:08d}.png").write_bytes(encode(".png", labels))
