"""Checks that data and model fit each other: class names, annotations, label images, heads.

COCO's annotation files are checked while mmdet reads them; of images and label images, a sample is loaded as
the pipeline does it, unless it has steps of the user's own.
"""

import json
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from mmengine.dataset import BaseDataset, Compose
from mmengine.logging import print_log
from mmengine.registry import DATASETS, DefaultScope
from torch import nn

from openmmlab.check_config import nodes
from openmmlab.focal_backbone import FocalBackbone
from utils import UserError, user_input

if TYPE_CHECKING:
    from mmdet.datasets.api_wrappers import COCO
    from mmengine.config import Config
    from mmseg.datasets import BaseSegDataset

SAMPLED_IMAGES = 32  # images of a data set that are loaded
IGNORE_INDEX = 255  # the usual label of pixels that belong to no class
HEADS = {  # names of heads in mmdet and mmseg whose num_classes must be that of the data set
    *("bbox_head", "mask_head", "mask_iou_head", "point_head", "panoptic_head", "panoptic_fusion_head"),
    *("decode_head", "auxiliary_head"),
}
IOU_METRICS = ("IoUMetric", "CityscapesMetric")
SEGMENTING_HEAD = re.compile(r"\.(decode_head|auxiliary_head)(\.\d+)?$")
NECK_READERS = {  # by the key of their channels: modules of mmdet that get the neck's maps as they are
    "in_channels": re.compile(r"(rpn_head|bbox_head|roi_head\.(bbox|mask)_head)(\.\d+)?"),
    "out_channels": re.compile(r"roi_head\.(bbox|mask)_roi_extractor(\.\d+)?"),
}
OTHER_CLASSES = re.compile("rpn_?head|semantic_head|STDCHead", re.I)  # proposals, stuff, boundaries
_warn = partial(print_log, logger="current", level=logging.WARNING)


# --- Classes and files of a config --------------------------------------------------------------------------


def check_data_sets(config: "Config", splits: Sequence[str]) -> tuple[str, ...] | None:
    """Check the data sets of a config before anything large is read.

    Args:
        config: of a detector or segmenter.
        splits: those of train, val, test that are checked.

    Returns:
        The class names; None if no data set has any, or if the model reads them as text with each image.

    Raises:
        UserError: classes differ, files are missing, or label images do not fit.
    """
    found = {
        split: [*_data_sets(config[f"{split}_dataloader"], f"{split}_dataloader", config)]
        for split in splits
        if config.get(f"{split}_dataloader")
    }
    named = [(key, _classes(key, data)) for split in found.values() for key, data in split]
    named = [(key, classes) for key, classes in named if classes is not None]
    for key, classes in named[1:]:
        if classes != named[0][1]:
            raise UserError(
                f"{key} has the classes {_shown(classes)}, but {named[0][0]} has {_shown(named[0][1])}: give "
                "the data sets of all loaders, test_dataloader too, the same metainfo=dict(classes=...)"
            )
    for split, sets in found.items():
        for key, dataset in sets:
            if hasattr(dataset, "reduce_zero_label"):
                _check_label_images(key, dataset, _ignored(config, split, dataset.ignore_index))
        _check_evaluators(config, split, [dataset.ann_file for _, dataset in sets])
    return named[0][1] if named else None


def _ignored(config: "Config", split: str, of_dataset: int) -> set[int]:
    """The labels that all heads ignore in training, and all evaluators in evaluation; without such parts of
    mmseg, the usual one and the data set's."""
    if split == "train":
        parts = [node for key, node in nodes(config.get("model"), "model") if SEGMENTING_HEAD.search(key)]
    else:
        found = nodes(config.get(f"{split}_evaluator"), "evaluator")
        parts = [node for _, node in found if "ignore_index" in node or node.get("type") in IOU_METRICS]
    given = [part.get("ignore_index", IGNORE_INDEX) for part in parts]
    labels = [{label} for label in given if isinstance(label, int)]
    ignored = set.intersection(*labels) if labels else {IGNORE_INDEX}
    return ignored if labels else ignored | {of_dataset}


def _data_sets(options: Any, key: str, config: "Config") -> Iterator[tuple[str, BaseDataset]]:
    """Key and data set of each data set of a loader, also inside wrappers; their files are looked for, but
    not read. Those of mmseg have their pipeline."""
    if "dataset" in options:
        yield from _data_sets(options["dataset"], f"{key}.dataset", config)
    elif "datasets" in options:
        for number, part in enumerate(options["datasets"]):
            yield from _data_sets(part, f"{key}.datasets.{number}", config)
    else:
        scope = DefaultScope.overwrite_default_scope(config.get("default_scope"))
        with scope, DATASETS.switch_scope_and_registry(None) as registry:
            kind = registry.get(options["type"]) if isinstance(options["type"], str) else options["type"]
            if not (isinstance(kind, type) and issubclass(kind, BaseDataset)):
                return
            _check_files(key, options)
            with user_input(key):
                dataset = registry.build({**options, "lazy_init": True, "pipeline": []})
            if hasattr(dataset, "reduce_zero_label"):  # mmseg's `BaseSegDataset`
                dataset.pipeline = Compose(options.get("pipeline") or ())
        yield key, dataset


def _classes(key: str, dataset: BaseDataset) -> tuple[str, ...] | None:
    classes = dataset.metainfo.get("classes")
    if isinstance(classes, str):
        raise UserError(
            f"{key}.metainfo.classes: expected names, or a file of names, got {classes!r}; one class alone "
            f"is written classes=({classes!r},)"
        )
    is_text = getattr(dataset, "return_classes", False)  # each may have its own, as for zero-shot detection
    return None if classes is None or is_text else tuple(classes)


def _shown(names: Sequence[str]) -> str:
    """Names for a message, shortened if there are many."""
    return str(tuple(names)) if len(names) <= 10 else f"{(*names[:4], '...')}, {len(names)} in all"


def _is_local(path: str, backend: Any) -> bool:
    return "://" not in path and not backend


def _check_files(key: str, options: Any) -> None:
    """Refuse missing annotation files and image folders."""
    root, prefixes = options.get("data_root") or "", options.get("data_prefix") or {}
    named = {"ann_file": options.get("ann_file"), **{f"data_prefix.{k}": v for k, v in prefixes.items()}}
    for name, value in named.items():
        path, local = Path(root, value or ""), _is_local(f"{root} {value}", options.get("backend_args"))
        if value and local and not path.exists():
            raise UserError(
                f"{key}.{name}: there is no {path}; paths are relative to data_root={root!r}, and data_root "
                f"to the current folder ({Path.cwd()})"
            )


def _check_evaluators(config: "Config", split: str, files: list[str]) -> None:
    """Refuse evaluators of which none has the annotation file of its loader."""
    evaluators = config.get(f"{split}_evaluator") or []
    evaluators = evaluators if isinstance(evaluators, list | tuple) else [evaluators]
    named = [evaluator["ann_file"] for evaluator in evaluators if evaluator.get("ann_file")]
    if named and any(files) and not _resolved(named) & _resolved(files):
        raise UserError(
            f"{split}_evaluator.ann_file is {named[0]}, but {split}_dataloader reads {', '.join(files)}: "
            "name the same file in both"
        )


def _resolved(files: Iterable[str | None]) -> set[Path]:
    return {Path(file).resolve() for file in files if file}


# --- Images and label images --------------------------------------------------------------------------------


def _check_label_images(key: str, dataset: "BaseSegDataset", ignored: set[int | None]) -> None:
    """Check a sample of label images: their values must be classes or `ignored`, their sizes those of the
    images."""
    steps, reduced = dataset.pipeline.transforms, dataset.reduce_zero_label
    pairs = dataset.load_data_list()
    folder = dataset.data_prefix.get("img_path") or ""
    if not pairs:
        kinds = Counter(path.suffix for path in Path(folder).rglob("*") if path.is_file()).most_common(1)
        others = f", but {kinds[0][1]} files that end in {kinds[0][0]}: set img_suffix" if kinds else ""
        raise UserError(f"{key}: no images end in {dataset.img_suffix!r} below {folder}{others}")
    load_image = _library_step(steps, "LoadImageFromFile")
    load_labels = _library_step(steps, "LoadAnnotations")
    labelled = [pair for pair in pairs if "seg_map_path" in pair]  # test sets may have none
    classes = dataset.metainfo.get("classes") or ()
    readable = load_image and load_labels and _is_local(folder, dataset.backend_args)
    for pair in _sample(labelled) if readable else ():
        path = pair["seg_map_path"]
        labels = _loaded(load_labels, path, pair)["gt_seg_map"]
        if labels.ndim != 2:
            raise UserError(f"{path}: expected one number per pixel, the class, got colours {labels.shape}")
        _check_size(load_image, pair["img_path"], labels.shape, path)
        extra = sorted({*np.unique(labels).tolist()} - {*range(len(classes))} - ignored)
        if extra and classes:
            count = len(dataset.label_map or classes)
            hint = "" if reduced or extra != [count] else "; if 0 is no class and 1 the first, set it to True"
            said, none = (
                [
                    "0 or 255" if reduced and value == IGNORE_INDEX else str(value + reduced)
                    for value in values
                ]
                for values in (extra[:5], sorted(ignored))
            )
            raise UserError(
                f"{path}: expected {int(reduced)} to {count - 1 + reduced} for {count} classes, and "
                f"{' or '.join(none) or 'no number'} for ignored pixels, as ignore_index of all heads or "
                f"evaluators says, got [{', '.join(said)}]; {key} has reduce_zero_label={reduced}{hint}"
            )


def _sample(items: Sequence[Any]) -> list[Any]:
    """At most SAMPLED_IMAGES items, evenly spaced."""
    return [items[i] for i in range(0, len(items), -(-len(items) // SAMPLED_IMAGES) or 1)]


def _library_step(steps: Sequence[Any], name: str) -> Any:
    """The step of a pipeline that loads local files and has this name; None if there is none, or if a step of
    the user's own may load or change what it does."""
    own = [step for step in steps if not type(step).__module__.startswith(("mmcv.", "mmdet.", "mmseg."))]
    found = [
        step for step in steps if type(step).__name__ == name and not getattr(step, "backend_args", None)
    ]
    return found[0] if found and not own else None


def _loaded(step: Any, path: str, results: dict[str, Any]) -> dict[str, Any]:
    """What a step of a pipeline loads from a file."""
    try:
        return step.transform(results) or {}  # None: it leaves out what it cannot read
    except Exception as error:  # each decoder has its own; training would stop at any
        raise UserError(
            f"{path}: expected a file that {type(step).__name__} can load, got {error}; correct the file, or "
            "the data set's data_root, data_prefix, ann_file, suffixes or pipeline"
        ) from error


def _check_size(load: Any, image: str, expected: tuple[int, ...], where: str, slack: int = 0) -> None:
    """Compare an image's height and width as loaded with those that another file states."""
    size = _loaded(load, image, {"img_path": image}).get("ori_shape", expected)
    if any(abs(a - b) > slack for a, b in zip(size, expected, strict=True)):
        raise UserError(
            f"{image} has {size[0]} x {size[1]} pixels, but {where} {expected[0]} x {expected[1]} (rows x "
            "columns); if its EXIF orientation turns it, store it upright"
        )


# --- COCO's annotation files --------------------------------------------------------------------------------


def _are_numbers(values: Any) -> bool:
    """Whether it is a list of numbers, none of them NaN or infinite, which Python's JSON reader accepts."""
    return isinstance(values, list) and all(isinstance(x, int | float) and abs(x) < math.inf for x in values)


VALUE_CHECKS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "a number": lambda value: _are_numbers([value]),
    "a number or text": lambda value: value is None or isinstance(value, str) or _are_numbers([value]),
    "four numbers: x, y, width, height": lambda value: _are_numbers(value) and len(value) == 4,
}
REQUIRED_KEYS = {  # what mmdet reads of each entry of an annotation file: keys, what each is expected to be
    "categories": dict.fromkeys(("id", "name"), "a number or text"),
    "images": {"id": "a number or text", "file_name": "text", "height": "a number", "width": "a number"},
    "annotations": {
        **dict.fromkeys(("id", "image_id", "category_id"), "a number or text"),  # or null, of nothing
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

    evaluators = [config.get(f"{split}_evaluator") for split in ("val", "test")]
    parts = [node for _, node in nodes(evaluators, "") if "segm" in np.atleast_1d(node.get("metric", ""))]
    files = _resolved(part.get("ann_file") for part in parts)
    with patch.object(CocoDataset, "COCOAPI", _coco_reader(files)):
        yield


def _coco_reader(masked: set[Path]) -> Callable[[Any, str], "COCO"]:
    """A function that reads and checks a data set's annotation file.

    Args:
        masked: files with which evaluators compare masks, so that every annotation needs a segmentation.
    """
    from mmdet.datasets.api_wrappers import COCO

    def read(dataset: Any, path: str) -> "COCO":
        with user_input(path), open(path, encoding="utf-8") as file:
            content = json.load(file)
        steps = dataset.pipeline.transforms
        masks = any(getattr(step, "with_mask", False) for step in steps)
        masks = masks or (dataset.test_mode and Path(path).resolve() in masked)
        _check_annotations(content, dataset, path, masks)
        load = _library_step(steps[:2], "LoadImageFromFile")
        local = load and _is_local(path, dataset.backend_args)
        for image in _sample(content["images"]) if local else ():
            name = str(Path(dataset.data_prefix.get("img", "")) / image["file_name"])
            _check_size(load, name, (image["height"], image["width"]), path, slack=0 if masks else 1)
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
    content.setdefault("annotations", [])  # test sets and backgrounds may have none
    for kind, keys in REQUIRED_KEYS.items():
        entries = content.get(kind)
        if not isinstance(entries, list):
            raise UserError(f"{path}: expected annotations in COCO's format, found no list of {kind}")
        needed = keys | {"iscrowd": "a number"} if dataset.test_mode and kind == "annotations" else keys
        for number, entry in enumerate(entries):
            if fault := _fault(entry, needed):
                name = f"id {entry['id']}" if isinstance(entry, dict) and "id" in entry else f"entry {number}"
                raise UserError(f"{path}: {kind}, {name}: {fault}")
        last = {entry["id"]: entry for entry in entries}
        repeats = kind == "images" and all(last[entry["id"]] == entry for entry in entries)
        if len(last) < len(entries) and not repeats:
            raise UserError(f"{path}: {len(entries)} {kind} share {len(last)} ids; each needs its own")
    _check_category_names(content["categories"], tuple(dataset.metainfo["classes"]), path)

    annotations = content["annotations"]
    images, categories = ({entry["id"] for entry in content[kind]} for kind in ("images", "categories"))
    lost = [a for a in annotations if a["image_id"] not in images or a["category_id"] not in categories]
    if lost:
        said = f"{path}: {len(lost)} annotations of images or categories that are not there: {lost[0]!s:.150}"
        if len(lost) == len(annotations):
            raise UserError(said)
        _warn(f"{said}; they are left out")
    if dataset.test_mode and any(a["id"] == 0 for a in annotations):
        _warn(f"{path}: COCO's evaluation counts the annotation with the id 0 as not found: count from 1")
    wanted = {c["id"] for c in content["categories"] if c["name"] in dataset.metainfo["classes"]}
    used = [a for a in annotations if a["image_id"] in images and a["category_id"] in wanted]
    used = [a for a in used if a["area"] > 0 and min(a["bbox"][2:]) >= 1 and not a.get("ignore")]
    single = [a for a in used if not a.get("iscrowd")]
    empty = [entry["id"] for entry in used if not _has_mask(entry)] if masks else []
    if empty:
        raise UserError(
            f"{path}: {len(empty)} annotations have no segmentation, the first has id {empty[0]}: expected "
            "polygons [x, y, x, y, ...] of numbers or an RLE; remove them, or choose a detector without masks"
        )
    filters = dataset.filter_cfg or {}
    least, needed = filters.get("min_size", 0), single or not filters.get("filter_empty_gt")
    large = [image for image in content["images"] if min(image["width"], image["height"]) >= least]
    if not dataset.test_mode and not (needed and large):
        raise UserError(
            f"{path}: nothing to train on: {len(content['images'])} images, {len(large)} of them with sides "
            f"of at least {least} pixels (filter_cfg.min_size), {len(annotations)} annotations, "
            f"{len(single)} of them of the classes {_shown(dataset.metainfo['classes'])}, with an area, no "
            "crowd"
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
        raise UserError(f"{path}: several categories have the same name, of {_shown(ordered)}")
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
    segments = type(model).__name__ in ("EncoderDecoder", "CascadeEncoderDecoder")
    if segments and classes is not None and len(classes) == 1:
        raise UserError(
            f"mmseg learns nothing from one class alone, got {_shown(classes)}: name its surroundings, too"
        )
    if classes is not None:
        _check_heads(model, classes)
    _check_channels(model)
    if segments:
        _check_sliding(model.test_cfg or {})
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, FocalBackbone):
        return
    dims = [backbone.feature_dims[stage] for stage in backbone.out_indices]
    names = ("neck",) if getattr(model, "neck", None) is not None else ("decode_head", "auxiliary_head")
    parts: dict[str, Any] = {}
    for name in names:
        part = getattr(model, name, None)
        several = isinstance(part, nn.ModuleList)  # auxiliary heads, or a cascade
        parts |= {f"{name}.{i}": each for i, each in enumerate(part)} if several else {name: part}
    for name, part in parts.items():
        asked, index = getattr(part, "in_channels", None), getattr(part, "in_index", range(len(dims)))
        if any(not -len(dims) <= i < len(dims) for i in np.atleast_1d(index)):
            raise UserError(
                f"model.{name}.in_index: expected numbers of the backbone's outputs, 0 to {len(dims) - 1}, "
                f"got {index}"
            )
        expected: Any = [dims[i] for i in np.atleast_1d(index)]
        if isinstance(asked, int):  # one map, of which stage a neck decides, or all of them side by side
            expected = sum(expected)
            fits = name == "neck" or asked == expected
        else:
            expected = expected[::-1] if type(part).__name__ == "YOLOV3Neck" else expected
            fits = asked is None or [*asked] == expected
        if not fits:
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
        _warn(f"{', '.join(wrong[False])}: {expected}, unless other classes are meant")


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
    kinds = {name: getattr(m.cls_criterion, "__name__", "") for name, m in losses.items()}
    weighted = [
        name for name, m in losses.items() if m.class_weight is not None and kinds[name] == "cross_entropy"
    ]
    if not weighted:
        return
    count = len(dataset.metainfo["classes"])
    for name in weighted:
        if (given := len(losses[name].class_weight)) != count:
            raise UserError(f"model.{name}.class_weight: expected {count} numbers, a class each, got {given}")
    with _keep_random_state():
        samples = [dataset[i]["data_samples"] for i in _sample(range(len(dataset)))[::4]]
    for sample in samples:
        labels = sample.gt_sem_seg.data
        size = model.data_preprocessor.size or labels.shape[-2:]
        if labels.max() >= count or any(a < b for a, b in zip(labels.shape[-2:], size, strict=True)):
            raise UserError(
                f"model.{weighted[0]}.class_weight: training images have pixels of no class (ignored, or "
                "padding up to data_preprocessor.size), and mmseg's CrossEntropyLoss has no weight for them: "
                "leave class_weight out, or make them a class and all images of that size"
            )


@contextmanager
def _keep_random_state() -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
