"""From the configuration to data loaders; the only file of the package that knows configuration keys."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data import folder
from data.archive import open_archive_split
from data.datasets import EvalImages, ImageLoader, TrainImages
from data.images import without_opencv_threads
from data.mixing import SeededMixup, build_mixup
from data.samplers import EvalSampler, ShardSampler, TrainSampler, shard_of
from data.source import CachedSource, ImageSource
from data.transforms import Decode, Recipe, Size, Transform, eval_transform, train_transform, with_decoder
from data.workers import leave_signals_to_parent, leave_signals_to_parent_without_opencv_threads
from utils import get_rank, get_world_size

logger = logging.getLogger(__name__)

_CACHE_MODES = ("no", "full", "part")
_START_METHODS = ("", "fork", "spawn", "forkserver")


@dataclass
class Loaders:
    """What training and evaluation draw from; without training split in EVAL_MODE."""

    train_dataset: TrainImages | None
    val_dataset: EvalImages
    train_loader: DataLoader | None
    val_loader: DataLoader
    train_sampler: TrainSampler | None
    mixup_fn: SeededMixup | None

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Place the training data before a batch; call it before iterating `train_loader`.

        Args:
            epoch: from 0.
            start_step: batch to begin with; not 0 to go on in the middle of an epoch.

        Raises:
            ValueError: `start_step` is not in the epoch.
        """
        assert self.train_sampler is not None, "EVAL_MODE has no training split"
        self.train_sampler.set_epoch(epoch, start_step)
        self._place_mixup()

    def go_on(self, epoch: int, dealt: Sequence[Sequence[int]]) -> int:
        """Place the training data after images that were given out, by any numbers of processes.

        Args:
            epoch: from 0.
            dealt: (number of processes, images given out to all of them), in this order.

        Returns:
            The step of the epoch that comes next; earlier ones are not decoded.
        """
        assert self.train_sampler is not None, "EVAL_MODE has no training split"
        self.train_sampler.go_on(epoch, dealt)
        self._place_mixup()
        return self.train_sampler.start_step

    def _place_mixup(self) -> None:
        assert self.train_sampler is not None
        if self.mixup_fn is not None:
            self.mixup_fn.set_position(self.train_sampler.epoch, self.train_sampler.start_step)

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
    _check(config)
    splits = ("val",) if config.EVAL_MODE else ("train", "val")
    sources = {
        split: _cached(source, config, rank, world_size) for split, source in _open(config, splits).items()
    }
    val_dataset = EvalImages(sources["val"], _eval_transform(config))
    val_sampler = EvalSampler(len(val_dataset), rank, world_size)
    val_loader = _loader(config, val_dataset, val_sampler, drop_last=False)
    if config.EVAL_MODE:
        return Loaders(None, val_dataset, None, val_loader, None, None)
    decode, transform = _train_steps(config)
    if config.DATA.DECODER == "opencv" and config.DATA.NUM_WORKERS == 0:
        without_opencv_threads()
    train_dataset = TrainImages(sources["train"], transform, config.SEED, decode)
    sampler_class = ShardSampler if _cache_mode(config) == "part" else TrainSampler
    train_sampler = sampler_class(len(train_dataset), config.DATA.BATCH_SIZE, rank, world_size, config.SEED)
    train_loader = _loader(
        config, train_dataset, train_sampler, drop_last=True, init=_WORKER_INIT[config.DATA.DECODER]
    )
    return Loaders(train_dataset, val_dataset, train_loader, val_loader, train_sampler, _mixup(config, rank))


def _check(config: CfgNode) -> None:
    """Raise ValueError or FileNotFoundError for a DATA key that cannot be used."""
    data = config.DATA
    _check_choice("DATA.DATASET", data.DATASET.lower(), _SOURCES)
    _check_choice("DATA.CACHE_MODE", data.CACHE_MODE, _CACHE_MODES)
    _check_choice("DATA.WORKER_START_METHOD", data.WORKER_START_METHOD, _START_METHODS)
    for key, value, least in (
        ("DATA.BATCH_SIZE", data.BATCH_SIZE, 1),
        ("DATA.NUM_WORKERS", data.NUM_WORKERS, 0),
        ("MODEL.NUM_CLASSES", config.MODEL.NUM_CLASSES, 1),
        ("SEED", config.SEED, 0),
    ):
        if value < least:
            raise ValueError(f"{key}: expected an integer of at least {least}, got {value}; raise it")
    if not data.DATA_PATH:
        raise ValueError(
            "DATA.DATA_PATH: expected the folder of the data set, got ''; set it or give --data-path"
        )
    if not Path(data.DATA_PATH).is_dir():
        raise FileNotFoundError(
            f"DATA.DATA_PATH: expected an existing folder, got {data.DATA_PATH}; set it to the folder of the "
            "data set"
        )
    if data.ZIP_MODE and data.DATASET.lower() == "imagenet22k":
        raise ValueError(
            "DATA.ZIP_MODE: expected False with DATA.DATASET imagenet22k, whose maps name image files, got "
            "True; set it to False"
        )


def _check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{key}: expected one of {', '.join(map(repr, choices))}, got {value!r}; choose one")


def _open(config: CfgNode, splits: tuple[str, ...]) -> dict[str, ImageSource]:
    """The sources of the splits, by name."""
    root = Path(config.DATA.DATA_PATH)
    by_name = _SOURCES[config.DATA.DATASET.lower()]
    open_splits = _open_archives if config.DATA.ZIP_MODE else by_name
    return open_splits(root, splits, config.MODEL.NUM_CLASSES)


def _open_folders(root: Path, splits: tuple[str, ...], num_classes: int) -> dict[str, ImageSource]:
    scanned = {split: folder.scan_class_folders(root / split) for split in splits}
    if "train" in scanned:
        folder.check_same_classes(root / "train", scanned["train"][0], root / "val", scanned["val"][0])
    for split, (classes, _) in scanned.items():
        folder.check_class_count(root / split, classes, num_classes)
    return {split: source for split, (_, source) in scanned.items()}


def _open_archives(root: Path, splits: tuple[str, ...], num_classes: int) -> dict[str, ImageSource]:
    sources: dict[str, ImageSource] = {
        split: open_archive_split(root, split, num_classes) for split in splits
    }
    _warn_of_unused_classes(sources, num_classes)
    return sources


def _open_imagenet22k(root: Path, splits: tuple[str, ...], num_classes: int) -> dict[str, ImageSource]:
    sources: dict[str, ImageSource] = {
        split: folder.read_map_of_files(root, f"ILSVRC2011fall_whole_map_{split}.txt", num_classes)
        for split in splits
    }
    _warn_of_unused_classes(sources, num_classes)
    return sources


def _warn_of_unused_classes(sources: dict[str, ImageSource], num_classes: int) -> None:
    largest = max(int(source.labels.max()) for source in sources.values())
    if largest + 1 < num_classes:
        logger.warning("the maps have labels up to %d only, MODEL.NUM_CLASSES is %d", largest, num_classes)


_SOURCES: dict[str, Callable[[Path, tuple[str, ...], int], dict[str, ImageSource]]] = {
    "imagenet": _open_folders,
    "imagewoof": _open_folders,
    "folder": _open_folders,
    "imagenet22k": _open_imagenet22k,
}


def _cache_mode(config: CfgNode) -> str:
    """As in the original, only archives are cached; the system's page cache serves plain files well."""
    return config.DATA.CACHE_MODE if config.DATA.ZIP_MODE else "no"


def _cached(source: ImageSource, config: CfgNode, rank: int, world_size: int) -> ImageSource:
    shards = {
        "no": range(0),
        "full": range(len(source)),
        "part": shard_of(len(source), rank, world_size),
    }
    shard = shards[_cache_mode(config)]
    return CachedSource(source, shard) if shard else source


def _image_size(config: CfgNode) -> Size:
    size = config.DATA.IMG_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _train_steps(config: CfgNode) -> tuple[Decode, Transform]:
    aug = config.AUG
    recipe = Recipe(
        color_jitter=aug.COLOR_JITTER,
        auto_augment=aug.AUTO_AUGMENT,
        reprob=aug.REPROB,
        remode=aug.REMODE,
        recount=aug.RECOUNT,
        hflip=aug.HFLIP,
        scale=aug.SCALE,
        ratio=aug.RATIO,
    )
    transform = train_transform(
        _image_size(config),
        config.MODEL.FOCAL.IN_CHANS,
        config.DATA.MEAN,
        config.DATA.STD,
        config.DATA.INTERPOLATION,
        recipe,
    )
    return with_decoder(config.DATA.DECODER, transform)


def _eval_transform(config: CfgNode) -> Transform:
    return eval_transform(
        _image_size(config),
        config.MODEL.FOCAL.IN_CHANS,
        config.DATA.MEAN,
        config.DATA.STD,
        config.DATA.INTERPOLATION,
        crop=config.TEST.CROP,
    )


def _mixup(config: CfgNode, rank: int) -> SeededMixup | None:
    aug = config.AUG
    return build_mixup(
        mixup=aug.MIXUP,
        cutmix=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=config.MODEL.NUM_CLASSES,
        batch_size=config.DATA.BATCH_SIZE,
        seed=config.SEED,
        rank=rank,
    )


_WORKER_INIT: dict[str, Callable[[int], None]] = {
    "pil": leave_signals_to_parent,
    "opencv": leave_signals_to_parent_without_opencv_threads,
}


def _loader(
    config: CfgNode,
    images: TrainImages | EvalImages,
    sampler: Any,
    drop_last: bool,
    init: Callable[[int], None] = leave_signals_to_parent,
) -> DataLoader:
    workers = config.DATA.NUM_WORKERS
    return ImageLoader(
        images,
        batch_size=config.DATA.BATCH_SIZE,
        sampler=sampler,
        num_workers=workers,
        pin_memory=config.DATA.PIN_MEMORY and torch.cuda.is_available(),
        drop_last=drop_last,
        worker_init_fn=init,
        persistent_workers=workers > 0,
        multiprocessing_context=(config.DATA.WORKER_START_METHOD or None) if workers else None,
    )
