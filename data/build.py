"""From the configuration to data loaders; the only file of the package that knows configuration keys."""

import logging
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.layers import to_2tuple
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data import folder
from data.archive import open_archive_split
from data.datasets import EvalImages, ImageLoader, TrainImages
from data.hugging_face import load_splits, open_rows
from data.images import decode_rgb
from data.samplers import EvalSampler, TrainSampler
from data.shards import open_shards
from data.source import ImageSource, some
from data.transforms import (
    DEFAULT_RATIO,
    DEFAULT_SCALE,
    SMALL_SIZE,
    Recipe,
    Transform,
    channel_stats,
    eval_transform,
    train_transform,
    with_decoder,
)
from data.workers import leave_signals_to_parent, limit_workers
from utils import UserError, all_gather, can_pin_memory, get_rank, get_world_size

logger = logging.getLogger(__name__)

FOLDERS = ("imagenet", "imagewoof", "folder")  # DATA.DATASET of class folders
_POLICY = re.compile(r"(|none|(original|originalr|v0|v0r|3a)(-.+)?|(rand|augmix)-.+)")  # of timm


@dataclass
class Loaders:
    """What training and evaluation read; without training split in EVAL_MODE."""

    train_dataset: TrainImages | None
    val_dataset: EvalImages
    train_loader: DataLoader | None
    val_loader: DataLoader
    train_sampler: TrainSampler | None
    mixup_fn: Mixup | None

    def resume_at(self, epoch: int, samples_seen: int) -> int:
        """Set the position of the training data; call it before iterating `train_loader`.

        Args:
            epoch: from 0.
            samples_seen: images of the epoch that all processes together have seen.

        Returns:
            The step of the epoch that comes next; earlier ones are not decoded.
        """
        assert self.train_sampler is not None, "EVAL_MODE has no training split"
        self.train_sampler.resume_at(epoch, samples_seen)
        return self.train_sampler.start_step

    @property
    def steps_per_epoch(self) -> int:
        """Batches per process in a whole epoch, whatever step it was resumed at; 0 in EVAL_MODE."""
        return 0 if self.train_sampler is None else self.train_sampler.steps_per_epoch


def build_loaders(config: CfgNode, rank: int | None = None, world_size: int | None = None) -> Loaders:
    """Build data sets, loaders and Mixup.

    All input but the images themselves is checked here, before training starts. In EVAL_MODE the training
    split is neither needed nor read.

    Args:
        config: the whole configuration; batch size is per process.
        rank: of this process; by default from the process group, 0 without one.
        world_size: number of processes; by default from the process group, 1 without one.

    Raises:
        FileNotFoundError: a folder, archive or map is missing.
        ValueError: the data and the configuration do not fit together, or are malformed.
    """
    rank = get_rank() if rank is None else rank
    world_size = get_world_size() if world_size is None else world_size
    check_data_options(config)
    data = config.DATA
    splits = ("val",) if config.EVAL_MODE else ("train", "val")
    sources = _open(config, splits)
    workers = limit_workers(data.NUM_WORKERS)
    val_dataset = EvalImages(
        sources["val"], evaluation_transform(config), partial(decode_rgb, upright=data.EXIF_ORIENTATION)
    )
    val_loader = _loader(config, val_dataset, EvalSampler(len(val_dataset), rank, world_size), workers)
    if config.EVAL_MODE:
        return Loaders(None, val_dataset, None, val_loader, None, None)
    decode, transform = with_decoder(data.DECODER, _train_transform(config), data.EXIF_ORIENTATION)
    train_dataset = TrainImages(sources["train"], transform, config.SEED, decode)
    train_sampler = TrainSampler(len(train_dataset), data.BATCH_SIZE, rank, world_size, config.SEED)
    train_loader = _loader(config, train_dataset, train_sampler, workers)
    return Loaders(train_dataset, val_dataset, train_loader, val_loader, train_sampler, _mixup(config))


def check_same_data(loaders: Loaders) -> None:
    """Check that all processes found the same data, as where each machine has its own copy. Collective.

    Raises:
        UserError: on all ranks; some have other numbers of images, or other labels.
    """
    facts = []
    for data_set in (loaders.train_dataset, loaders.val_dataset):
        labels = np.empty(0) if data_set is None else data_set.source.labels
        facts += [len(labels), zlib.crc32(labels.tobytes())]
    ranks = all_gather(torch.tensor(facts))
    different = (ranks != ranks[0]).any(dim=1).nonzero().flatten().tolist()
    if different:
        counts = [f"{ranks[n][0]} and {ranks[n][2]} in process {n}" for n in (0, different[0])]
        raise UserError(
            "DATA.DATA_PATH: expected the same images and labels in all processes, got for training and "
            f"validation {', but '.join(counts)}; copy the data to all machines again"
        )


def check_data_options(config: CfgNode) -> None:
    """Raise one error for all options that contradict each other, or the folder of the data.

    Raises:
        FileNotFoundError: DATA.DATA_PATH is no folder.
        ValueError: any other problem.
    """
    data, problems = config.DATA, []
    if data.ZIP_MODE and data.DATASET not in FOLDERS:
        problems.append(
            f"DATA.ZIP_MODE: expected False with DATA.DATASET {data.DATASET}, got True; drop --zip"
        )
    try:
        channel_stats(config.MODEL.FOCAL.IN_CHANS, data.MEAN, data.STD)
    except ValueError as error:
        problems.append(str(error))
    if not config.EVAL_MODE:
        problems += _training_problems(config)
    if not data.DATA_PATH:
        problems.append("DATA.DATA_PATH: expected the folder of the data set, got ''; give --data-path")
    if problems:
        raise ValueError("\n".join(problems))
    if data.DATASET != "hf" and not Path(data.DATA_PATH).is_dir():
        raise FileNotFoundError(
            f"DATA.DATA_PATH: expected an existing folder, got {data.DATA_PATH}; set it to the folder of the "
            "data set"
        )


def _training_problems(config: CfgNode) -> list[str]:
    """Contradictions among the options of training images."""
    data, aug, size = config.DATA, config.AUG, to_2tuple(config.DATA.IMG_SIZE)
    problems = []
    for key in ("SCALE", "RATIO", "CUTMIX_MINMAX"):
        low, high = aug[key] or (0, 0)
        if low > high:
            problems.append(f"AUG.{key}: expected [smaller, larger], got {list(aug[key])}; swap them")
    low, high = aug.CUTMIX_MINMAX or (0, 1)
    if low <= high and any(int(side * low) == int(side * high) for side in size):
        problems.append(
            "AUG.CUTMIX_MINMAX: expected shares that differ by a pixel at least of DATA.IMG_SIZE, got "
            f"{[low, high]}; widen the range"
        )
    if not _POLICY.fullmatch(aug.AUTO_AUGMENT):
        problems.append(
            "AUG.AUTO_AUGMENT: expected none, or a policy of timm such as rand-m9-mstd0.5-inc1, got "
            f"{aug.AUTO_AUGMENT!r}; correct the value"
        )
    if max(size) <= SMALL_SIZE and (tuple(aug.SCALE), tuple(aug.RATIO)) != (DEFAULT_SCALE, DEFAULT_RATIO):
        problems.append(
            f"AUG.SCALE and AUG.RATIO: expected their defaults with images up to {SMALL_SIZE} pixels, which "
            f"are padded and cropped without them, got {aug.SCALE} and {aug.RATIO} with size {size}; remove "
            "them or enlarge DATA.IMG_SIZE"
        )
    if _mixes(config) and data.BATCH_SIZE % 2:
        problems.append(
            "DATA.BATCH_SIZE: expected an even number with Mixup or CutMix, which mix pairs, got "
            f"{data.BATCH_SIZE}; change it by one or set AUG.MIXUP and AUG.CUTMIX to 0"
        )
    if data.DECODER == "opencv" and not _has_opencv():
        problems.append(
            "DATA.DECODER: expected OpenCV 4.11 or newer for 'opencv', got an older one or none; pip install "
            "'opencv-python-headless>=4.11', or set it to 'pil'"
        )
    return problems


def _has_opencv() -> bool:
    try:
        import cv2
    except ImportError:
        return False
    return hasattr(cv2, "IMREAD_COLOR_RGB")  # of 4.11


def _open(config: CfgNode, splits: tuple[str, ...]) -> dict[str, ImageSource]:
    """The sources of the splits, by name."""
    data, root, num_classes = config.DATA, Path(config.DATA.DATA_PATH), config.MODEL.NUM_CLASSES
    hf, maps = data.HF, "ILSVRC2011fall_whole_map_{}.txt"
    load = cache(load_splits)  # once for both splits
    openers: dict[str, Callable[[str], ImageSource]] = {
        "zip": lambda split: open_archive_split(root, split),
        "imagenet22k": lambda split: folder.read_map_of_files(root, maps.format(split)),
        "wds": lambda split: open_shards(root, split, Path(config.OUTPUT or "output")),
        "hf": lambda split: open_rows(
            load(data.DATA_PATH),
            data.DATA_PATH,
            split,
            hf[f"{split.upper()}_SPLIT"],
            hf.IMAGE_COLUMN,
            hf.LABEL_COLUMN,
        ),
        **dict.fromkeys(FOLDERS, lambda split: folder.open_folder_split(root, split)),
    }
    sources = {split: openers["zip" if data.ZIP_MODE else data.DATASET](split) for split in splits}
    _check_classes(list(sources.values()), num_classes)
    if config.EVAL_MODE and data.DATASET in FOLDERS and not data.ZIP_MODE:
        folder.warn_of_other_classes(root, sources["val"].classes)
    return sources


def _check_classes(sources: list[ImageSource], num_classes: int) -> None:
    """Raise ValueError unless the splits have the same classes, as many as the model, and labels of them."""
    first, last = sources[0], sources[-1]
    if first.classes != last.classes:
        ours, theirs = first.classes or [], last.classes or []
        only = [some(sorted(set(a) - set(b))) for a, b in ((ours, theirs), (theirs, ours))]
        raise ValueError(
            f"expected the same classes, in one order, in {first.origin} and {last.origin}, got only in the "
            f"first: {only[0]}, only in the second: {only[1]}; add what is missing or remove what is extra"
        )
    for source in sources:
        if source.classes is not None and len(source.classes) != num_classes:
            count = len(source.classes)
            raise ValueError(
                f"{source.origin}: expected {num_classes} classes (MODEL.NUM_CLASSES), got {count}; set "
                f"MODEL.NUM_CLASSES to {count}, or DATA.DATA_PATH to the right data set"
            )
        if not len(source):
            raise ValueError(
                f"{source.origin}: expected at least one image, got none; correct DATA.DATA_PATH"
            )
        wrong = np.flatnonzero((source.labels < 0) | (source.labels >= num_classes))
        if len(wrong):
            raise ValueError(
                f"{source.name(int(wrong[0]))}: expected a label in [0, {num_classes}), got "
                f"{source.labels[wrong[0]]}; correct it, set MODEL.NUM_CLASSES, or choose another split"
            )
    largest = max(int(source.labels.max()) for source in sources)
    if largest + 1 < num_classes:
        logger.warning("the labels go up to %d only, MODEL.NUM_CLASSES is %d", largest, num_classes)


def _train_transform(config: CfgNode) -> Any:
    aug, data, channels = config.AUG, config.DATA, config.MODEL.FOCAL.IN_CHANS
    recipe = Recipe(**{field.name: aug[field.name.upper()] for field in fields(Recipe)})
    size = to_2tuple(config.DATA.IMG_SIZE)
    try:
        return train_transform(size, channels, data.MEAN, data.STD, data.INTERPOLATION, recipe)
    except AssertionError as error:  # of timm, in a policy's parts
        raise ValueError(
            "AUG.AUTO_AUGMENT: expected a policy of timm such as rand-m9-mstd0.5-inc1, got "
            f"{aug.AUTO_AUGMENT!r}, with a part that timm does not know; correct the value"
        ) from error


def evaluation_transform(config: CfgNode) -> Transform:
    """From a PIL image to the input that evaluation gives the model."""
    data, channels = config.DATA, config.MODEL.FOCAL.IN_CHANS
    size, crop = to_2tuple(config.DATA.IMG_SIZE), config.TEST.CROP
    return eval_transform(size, channels, data.MEAN, data.STD, data.INTERPOLATION, crop)


def _mixes(config: CfgNode) -> bool:
    """Whether Mixup or CutMix is on."""
    return config.AUG.MIXUP > 0 or config.AUG.CUTMIX > 0 or bool(config.AUG.CUTMIX_MINMAX)


def _mixup(config: CfgNode) -> Mixup | None:
    aug = config.AUG
    if not _mixes(config):
        return None
    return Mixup(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=config.MODEL.NUM_CLASSES,
    )


def _loader(config: CfgNode, images: TrainImages | EvalImages, sampler: Any, workers: int) -> DataLoader:
    data, is_training = config.DATA, isinstance(images, TrainImages)
    return ImageLoader(
        images,
        batch_size=data.BATCH_SIZE,
        sampler=sampler,
        num_workers=workers,
        pin_memory=data.PIN_MEMORY and config.DEVICE != "cpu" and can_pin_memory(),
        drop_last=is_training,
        worker_init_fn=leave_signals_to_parent,
        persistent_workers=workers > 0,
    )
