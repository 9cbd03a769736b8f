"""Checks that data and model fit each other: class names, annotations, label images, heads.

COCO's annotation files are checked while mmdet reads them; of images and label images, a sample is opened.
"""

import json
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image
from torch import nn

from openmmlab.focal_backbone import FocalBackbone
from utils import UserError, user_input

if TYPE_CHECKING:
    from mmdet.datasets.api_wrappers import COCO
    from mmengine.config import Config
    from mmseg.datasets import BaseSegDataset

SAMPLED_IMAGES = 32  # images of a data set that are opened
IGNORE_INDEX = 255  # the label of pixels that belong to no class
TRANSPOSED = range(5, 9)  # EXIF orientations that exchange height and width
HEADS = {  # names of heads in mmdet and mmseg whose num_classes must be that of the data set
    *("bbox_head", "mask_head", "mask_iou_head", "point_head", "panoptic_head", "panoptic_fusion_head"),
    *("decode_head", "auxiliary_head"),
}
NECK_READERS = {  # by the key of their channels: modules of mmdet that get the neck's maps as they are
    "in_channels": re.compile(r"(rpn_head|bbox_head|roi_head\.(bbox|mask)_head)(\.\d+)?"),
    "out_channels": re.compile(r"roi_head\.(bbox|mask)_roi_extractor(\.\d+)?"),
}
OTHER_CLASSES = re.compile("rpn_?head|semantic_head|STDCHead", re.I)  # proposals, stuff, boundaries


# --- Classes and files of a config --------------------------------------------------------------------------


def check_data_sets(config: "Config", splits: Sequence[str]) -> tuple[str, ...] | None:
    """Check the data sets of a config before anything large is read.

    Args:
        config: of a detector or segmenter.
        splits: those of train, val, test whose files are checked; classes are compared in all three.

    Returns:
        The class names; None if no data set has any.

    Raises:
        UserError: classes differ, files are missing, or label images do not fit.
    """
    found = {
        split: [*_data_sets(config[f"{split}_dataloader"], f"{split}_dataloader", config)]
        for split in ("train", "val", "test")
        if config.get(f"{split}_dataloader")
    }
    named = [(key, _classes(key, data)) for split in found.values() for key, _, data in split]
    named = [(key, classes) for key, classes in named if classes is not None]
    for key, classes in named[1:]:
        if classes != named[0][1]:
            raise UserError(
                f"{key} has the classes {_shown(classes)}, but {named[0][0]} has {_shown(named[0][1])}: give "
                "the data sets of all loaders, test_dataloader too, the same metainfo=dict(classes=...)"
            )
    for split in found.keys() & {*splits}:
        for key, options, dataset in found[split]:
            _check_files(key, dataset)
            if hasattr(dataset, "reduce_zero_label"):  # mmseg's `BaseSegDataset`
                _check_label_images(key, options, dataset)
        _check_evaluators(config, split, [dataset.ann_file for _, _, dataset in found[split]])
    return named[0][1] if named else None


def _data_sets(options: Any, key: str, config: "Config") -> Iterator[tuple[str, Any, BaseDataset]]:
    """Key, options and data set of each data set of a loader, also inside wrappers; no files are read."""
    if "dataset" in options:
        yield from _data_sets(options["dataset"], f"{key}.dataset", config)
    elif "datasets" in options:
        for number, part in enumerate(options["datasets"]):
            yield from _data_sets(part, f"{key}.datasets.{number}", config)
    else:
        scope = DefaultScope.overwrite_default_scope(config.get("default_scope"))
        with scope, DATASETS.switch_scope_and_registry(None) as registry, user_input(key):
            kind = registry.get(options["type"]) if isinstance(options["type"], str) else options["type"]
            ours = isinstance(kind, type) and issubclass(kind, BaseDataset)
            dataset = registry.build({**options, "lazy_init": True, "pipeline": []}) if ours else None
        if dataset is not None:
            yield key, options, dataset


def _classes(key: str, dataset: BaseDataset) -> tuple[str, ...] | None:
    classes = dataset.metainfo.get("classes")
    if isinstance(classes, str):
        raise UserError(
            f"{key}.metainfo.classes: expected names, or a file of names, got {classes!r}; one class alone "
            f"is written classes=({classes!r},)"
        )
    return None if classes is None else tuple(classes)


def _shown(names: Sequence[str]) -> str:
    """Names for a message, shortened if there are many."""
    return str(tuple(names)) if len(names) <= 10 else f"({', '.join(names[:4])}, ... {len(names)} in all)"


def _is_local(path: str, dataset: BaseDataset) -> bool:
    return "://" not in path and not getattr(dataset, "backend_args", None)


def _check_files(key: str, dataset: BaseDataset) -> None:
    """Refuse missing annotation files and image folders."""
    named = {"ann_file": dataset.ann_file, **{f"data_prefix.{k}": v for k, v in dataset.data_prefix.items()}}
    for name, path in named.items():
        if path and _is_local(path, dataset) and not Path(path).exists():
            raise UserError(
                f"{key}.{name}: there is no {path}; paths are relative to data_root={dataset.data_root!r}, "
                f"and data_root to the current folder ({Path.cwd()})"
            )


def _check_evaluators(config: "Config", split: str, files: list[str]) -> None:
    """Refuse evaluators whose annotation file is not that of their loader."""
    evaluators = config.get(f"{split}_evaluator") or []
    for evaluator in evaluators if isinstance(evaluators, list | tuple) else [evaluators]:
        own = evaluator.get("ann_file")
        if own and any(files) and Path(own).resolve() not in [Path(file).resolve() for file in files if file]:
            raise UserError(
                f"{split}_evaluator.ann_file is {own}, but {split}_dataloader reads {', '.join(files)}: name "
                "the same file in both"
            )


# --- Label images -------------------------------------------------------------------------------------------


def _check_label_images(key: str, options: Mapping[str, Any], dataset: "BaseSegDataset") -> None:
    """Check a sample of label images: their values must be classes, and their sizes those of the images."""
    for step in options.get("pipeline", ()):
        said = step.get("reduce_zero_label") if str(step["type"]).endswith("LoadAnnotations") else None
        if said not in (None, dataset.reduce_zero_label):
            raise UserError(
                f"{key}: LoadAnnotations of its pipeline has reduce_zero_label={said}, the data set itself "
                f"{dataset.reduce_zero_label}: leave it out of the pipeline"
            )
    pairs = dataset.load_data_list()
    folder = dataset.data_prefix.get("img_path") or ""
    if not pairs:
        kinds = Counter(path.suffix for path in Path(folder).rglob("*") if path.is_file()).most_common(1)
        others = f", but {kinds[0][1]} files that end in {kinds[0][0]}: set img_suffix" if kinds else ""
        raise UserError(f"{key}: no images end in {dataset.img_suffix!r} below {folder}{others}")
    reduced, classes = dataset.reduce_zero_label, dataset.metainfo.get("classes") or ()
    count = len(dataset.label_map or classes)
    labelled = [pair for pair in pairs if "seg_map_path" in pair]  # test sets may have none
    for pair in _sample(labelled) if _is_local(folder, dataset) else ():
        labels = _labels(key, pair["img_path"], pair["seg_map_path"])
        extra = sorted({*np.unique(labels).tolist()} - {*range(count + reduced), IGNORE_INDEX})
        if extra and count:
            hint = "" if reduced or extra != [count] else "; if 0 is no class and 1 the first, set it to True"
            raise UserError(
                f"{pair['seg_map_path']}: expected {int(reduced)} to {count - 1 + reduced} for {count} "
                f"classes, and {'0 or 255' if reduced else 255} for ignored pixels, got {extra[:5]}; {key} "
                f"has reduce_zero_label={reduced}{hint}"
            )


def _sample(items: Sequence[Any]) -> list[Any]:
    """At most SAMPLED_IMAGES items, evenly spaced."""
    return [items[i] for i in range(0, len(items), -(-len(items) // SAMPLED_IMAGES) or 1)]


def _labels(key: str, image: str, path: str) -> np.ndarray:
    """The values [H, W] of a label image; it must have the size of its image."""
    for file in (image, path):
        if not Path(file).is_file():
            raise UserError(f"{key}: there is no {file}; each image needs a label image of the same name")
    with user_input(path):
        labels = np.asarray(Image.open(path)).squeeze()
    if labels.ndim != 2:
        raise UserError(f"{path}: expected one number per pixel, the class, got colours {labels.shape}")
    _check_size(image, labels.shape, path)
    return labels


def _check_size(image: str, expected: tuple[int, ...], where: str) -> None:
    """Compare an image's height and width after loading with those that another file states."""
    with user_input(image), Image.open(image) as opened:
        turned = opened.getexif().get(0x0112) in TRANSPOSED
        size = opened.size if turned else opened.size[::-1]
    if size != tuple(expected):
        reason = " after rotation by its EXIF orientation; store the image upright" if turned else ""
        raise UserError(
            f"{image} has {size[0]} x {size[1]} pixels{reason}, but {where} {expected[0]} x {expected[1]} "
            "(rows x columns)"
        )


# --- COCO's annotation files --------------------------------------------------------------------------------


def _are_numbers(values: Any) -> bool:
    """Whether it is a list of numbers, none of them NaN or infinite, which Python's JSON reader accepts."""
    return isinstance(values, list) and all(isinstance(x, int | float) and abs(x) < math.inf for x in values)


VALUE_CHECKS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "a number": lambda value: _are_numbers([value]),
    "a number or text": lambda value: isinstance(value, str) or _are_numbers([value]),
    "four numbers: x, y, width, height": lambda value: _are_numbers(value) and len(value) == 4,
}
REQUIRED_KEYS = {  # what mmdet reads of each entry of an annotation file: keys, what each is expected to be
    "categories": {"id": "a number or text", "name": "text"},
    "images": {"id": "a number or text", "file_name": "text", "height": "a number", "width": "a number"},
    "annotations": {
        **dict.fromkeys(("id", "image_id", "category_id"), "a number or text"),
        "bbox": "four numbers: x, y, width, height",
        "area": "a number",
    },
}


@contextmanager
def checked_annotations(config: "Config") -> Iterator[None]:
    """Context manager: mmdet's `CocoDataset` checks annotation files while it reads them.

    Args:
        config: of a detector; with that of a segmenter nothing is done.
    """
    if config.get("default_scope") != "mmdet":
        yield
        return
    from mmdet.datasets import CocoDataset

    loaders = [config.get(f"{split}_dataloader") for split in ("train", "val", "test")]
    evaluators = [config.get(f"{split}_evaluator") for split in ("val", "test")]
    masks = "'with_mask': True" in str(loaders) or "segm" in str(evaluators)
    with patch.object(CocoDataset, "COCOAPI", _coco_reader(masks)):
        yield


def _coco_reader(masks: bool) -> Callable[[Any, str], "COCO"]:
    """A function that reads and checks a data set's annotation file.

    Args:
        masks: whether every annotation needs a segmentation.
    """
    from mmdet.datasets.api_wrappers import COCO

    def read(dataset: Any, path: str) -> "COCO":
        with user_input(path), open(path, encoding="utf-8") as file:
            content = json.load(file)
        _check_annotations(content, dataset, path, masks)
        for image in _sample(content["images"]) if _is_local(path, dataset) else ():
            name = Path(dataset.data_prefix.get("img", "")) / image["file_name"]
            if not name.is_file():
                raise UserError(f"{path}: there is no {name}; see data_root and data_prefix of the data set")
            _check_size(str(name), (image["height"], image["width"]), path)
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
        coco.img_ann_map, coco.cat_img_map = coco.imgToAnns, coco.catToImgs
        return coco

    return read


def _check_annotations(content: Any, dataset: Any, path: str, masks: bool) -> None:
    """Refuse annotations that mmdet cannot read or would misread."""
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected annotations in COCO's format, an object, got {content!s:.50}")
    if dataset.test_mode:
        content.setdefault("annotations", [])  # test sets may have none
    for kind, keys in REQUIRED_KEYS.items():
        entries = content.get(kind)
        if not isinstance(entries, list):
            raise UserError(f"{path}: expected annotations in COCO's format, found no list of {kind}")
        needed = keys | {"iscrowd": "a number"} if dataset.test_mode and kind == "annotations" else keys
        for number, entry in enumerate(entries):
            if fault := _fault(entry, needed):
                name = f"id {entry['id']}" if isinstance(entry, dict) and "id" in entry else f"entry {number}"
                raise UserError(f"{path}: {kind}, {name}: {fault}")
        ids = {entry["id"] for entry in entries}
        if len(ids) < len(entries):
            raise UserError(f"{path}: {len(entries)} {kind} share {len(ids)} ids; each needs its own")
    _check_category_names(content["categories"], _classes(path, dataset) or (), path)

    ids = {kind: {entry["id"] for entry in content[kind]} for kind in ("images", "categories")}
    for entry in content["annotations"]:
        if entry["image_id"] not in ids["images"] or entry["category_id"] not in ids["categories"]:
            raise UserError(
                f"{path}: an annotation of an image or category that is not there: {str(entry)[:150]}"
            )
    wanted = {c["id"] for c in content["categories"] if c["name"] in dataset.metainfo["classes"]}
    used = [
        a
        for a in content["annotations"]
        if a["category_id"] in wanted and a["area"] > 0 and min(a["bbox"][2:]) >= 1 and not a.get("ignore")
    ]
    empty = [entry["id"] for entry in used if not _has_mask(entry)] if masks else []
    if empty:
        raise UserError(
            f"{path}: {len(empty)} annotations have no segmentation, the first has id {empty[0]}: expected "
            "polygons [x, y, x, y, ...] of numbers or an RLE; remove them, or choose a detector without masks"
        )
    least = (dataset.filter_cfg or {}).get("min_size", 0)
    large = [image for image in content["images"] if min(image["width"], image["height"]) >= least]
    if not dataset.test_mode and not (used and large):
        raise UserError(
            f"{path}: nothing to train on: {len(content['images'])} images, {len(large)} of them with sides "
            f"of at least {least} pixels (filter_cfg.min_size), {len(content['annotations'])} annotations, "
            f"{len(used)} of them of the classes {_shown(dataset.metainfo['classes'])}, with an area"
        )


def _fault(entry: Any, needed: Mapping[str, str]) -> str | None:
    """What is wrong with an entry of an annotation file that needs these keys, see REQUIRED_KEYS."""
    if not isinstance(entry, dict):
        return f"expected an object with {', '.join(needed)}"
    for key, expected in needed.items():
        if key not in entry:
            return f"has no {key}"
        if not VALUE_CHECKS[expected](entry[key]):
            return f"{key} is {json.dumps(entry[key])[:50]}, expected {expected}"
    return None


def _has_mask(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation has polygons or an RLE, as mmdet reads them."""
    mask = annotation.get("segmentation")
    if isinstance(mask, dict):
        counts = mask.get("counts")
        return _are_numbers(mask.get("size")) and (isinstance(counts, str) or _are_numbers(counts))
    return isinstance(mask, list) and mask != [] and all(map(_are_numbers, mask))


def _check_category_names(categories: list[dict[str, Any]], classes: tuple[str, ...], path: str) -> None:
    """Refuse classes in another order than the file's, which is the order in which mmdet numbers them."""
    names = [category["name"] for category in categories]
    unknown = [name for name in classes if name not in names]
    if unknown:
        raise UserError(f"{path}: no category is called {_shown(unknown)}; there are {_shown(names)}")
    ordered = tuple(name for name in names if name in classes)
    if len({*ordered}) < len(ordered):
        raise UserError(f"{path}: several categories have the same name, of {_shown(sorted(ordered))}")
    if ordered != classes:
        raise UserError(
            f"{path} has its categories in another order than metainfo.classes, so that objects would get "
            f"wrong names; write in the config: classes = {ordered}"
        )


# --- The model ----------------------------------------------------------------------------------------------


def check_model(model: nn.Module, classes: Sequence[str] | None) -> None:
    """Refuse heads for another number of classes, necks and heads for other channels than they get, and ways
    of testing that mmseg would refuse after the first training.

    Raises:
        UserError: they do not fit; the message names their keys.
    """
    if classes is not None:
        _check_heads(model, classes)
    _check_channels(model)
    if type(model).__name__ in ("EncoderDecoder", "CascadeEncoderDecoder"):
        _check_sliding(model.test_cfg or {})
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, FocalBackbone):
        return
    dims = [backbone.feature_dims[stage] for stage in backbone.out_indices]
    parts = ("neck",) if getattr(model, "neck", None) is not None else ("decode_head", "auxiliary_head")
    for name in parts:
        part = getattr(model, name, None)
        asked, index = getattr(part, "in_channels", None), getattr(part, "in_index", range(len(dims)))
        if any(not -len(dims) <= i < len(dims) for i in np.atleast_1d(index)):
            raise UserError(
                f"model.{name}.in_index: expected numbers of the backbone's outputs, 0 to {len(dims) - 1}, "
                f"got {index}"
            )
        expected = [dims[i] for i in index] if not isinstance(index, int) else dims[index]
        if asked is not None and asked != expected and [*np.atleast_1d(asked)] != [*np.atleast_1d(expected)]:
            raise UserError(
                f"model.{name}.in_channels: expected {expected}, as the backbone has, got {asked}"
            )


def _check_channels(model: nn.Module) -> None:
    """Refuse parts of mmdet that read the maps of its neck with another number of channels than they have."""
    neck = getattr(model, "neck", None)
    neck = neck[-1] if isinstance(neck, nn.Sequential) else neck
    channels, modules = getattr(neck, "out_channels", None), dict(model.named_modules())
    is_extractor = NECK_READERS["out_channels"].fullmatch
    extractors = {type(module).__name__ for name, module in modules.items() if is_extractor(name)}
    is_plain = extractors <= {"SingleRoIExtractor", "ModuleList"} and "roi_head.shared_head" not in modules
    if not isinstance(channels, int) or not is_plain or not type(neck).__module__.startswith("mmdet."):
        return
    for name, module in modules.items():
        for key, readers in NECK_READERS.items():
            asked = getattr(module, key, None) if readers.fullmatch(name) else None
            ours = isinstance(asked, int) and type(module).__module__.startswith("mmdet.")
            if ours and asked != channels:
                raise UserError(f"model.{name}.{key}: expected {channels}, as model.neck makes, got {asked}")


def _check_sliding(options: Mapping[str, Any]) -> None:
    """Refuse options of testing that mmseg reads when it tests for the first time."""
    mode = options.get("mode", "whole")
    if mode not in ("whole", "slide"):
        raise UserError(f"model.test_cfg.mode: expected whole or slide, got {mode!r}")
    for key in ("crop_size", "stride") if mode == "slide" else ():
        value = options.get(key)
        pair = value if isinstance(value, list | tuple) and len(value) == 2 else (0, 0)
        if not all(isinstance(n, int) and n > 0 for n in pair):
            raise UserError(f"model.test_cfg.{key}: mode slide needs (rows, columns) in pixels, got {value}")


def _check_heads(model: nn.Module, classes: Sequence[str]) -> None:
    """Refuse heads for another number of classes; of modules that may count something else, warn."""
    fusion = getattr(model, "panoptic_fusion_head", None)
    fits = {len(classes)}
    if fusion is not None and fusion.num_classes == len(classes):
        fits.add(fusion.num_things_classes)  # boxes and masks are of things only
    wrong: dict[bool, list[str]] = {True: [], False: []}
    for name, module in model.named_modules():
        kinds = type(module).__mro__
        count = getattr(module, "num_classes", None)
        others = OTHER_CLASSES.search(" ".join([name, *(kind.__name__ for kind in kinds)]))
        counts = name and not name.startswith("backbone") and not getattr(module, "class_agnostic", False)
        if counts and not others and isinstance(count, int) and count not in fits:
            role = re.sub(r"\.\d+$", "", name).rpartition(".")[2]
            known = role in HEADS and any(kind.__module__.startswith(("mmdet.", "mmseg.")) for kind in kinds)
            wrong[known].append(f"model.{name}.num_classes={count}")
    expected = f"expected {len(classes)}, for the classes {_shown(classes)}"
    if wrong[True]:
        raise UserError(f"{', '.join(wrong[True])}: {expected}")
    if wrong[False]:
        unsure = f"{', '.join(wrong[False])}: {expected}, unless other classes are meant"
        print_log(unsure, "current", logging.WARNING)


def check_trained_classes(checkpoint: str, content: Mapping[str, Any], classes: Sequence[str] | None) -> None:
    """Refuse a checkpoint that was trained for other classes than those of the config.

    Raises:
        UserError: the classes differ.
    """
    trained = content.get("meta", {}).get("dataset_meta", {}).get("classes")
    if trained is not None and classes is not None and tuple(trained) != tuple(classes):
        raise UserError(
            f"{checkpoint} was trained for the classes {_shown(trained)}, the config has {_shown(classes)}: "
            "use the config of that training"
        )


def check_class_weights(model: nn.Module, dataset: Any) -> None:
    """Refuse class weights if training images have pixels of no class, which mmseg's loss cannot weight.

    Raises:
        UserError: there are such pixels in a sample (by labels or padding), or too many or few weights.
    """
    from mmseg.models.losses import CrossEntropyLoss

    losses = {name: m for name, m in model.named_modules() if isinstance(m, CrossEntropyLoss)}
    weighted = [
        name for name, m in losses.items() if m.class_weight and m.cls_criterion.__name__ == "cross_entropy"
    ]
    for name in weighted:
        weights, count = losses[name].class_weight, len(dataset.metainfo["classes"])
        if len(weights) != count:
            raise UserError(
                f"model.{name}.class_weight: expected {count} numbers, a class each, got {len(weights)}"
            )
    with _keep_random_state():
        for index in _sample(range(len(dataset)))[::4] if weighted else ():
            labels = dataset[index]["data_samples"].gt_sem_seg.data
            size = model.data_preprocessor.size or labels.shape[-2:]
            if IGNORE_INDEX in labels or any(a < b for a, b in zip(labels.shape[-2:], size, strict=True)):
                raise UserError(
                    f"model.{weighted[0]}.class_weight: training images have pixels of no class (label 255, "
                    "or padding up to data_preprocessor.size), and mmseg's CrossEntropyLoss has no weight "
                    "for them: leave class_weight out, or make them a class and all images of that size"
                )


@contextmanager
def _keep_random_state() -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
