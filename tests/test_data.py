"""The data pipeline: folders, archives, maps, samplers, determinism, and the messages for bad input."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO
from pictures import encoded
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from config import load_config
from data import EvalSampler, Loaders, TrainSampler, build_loaders
from data.images import decode_rgb
from data.transforms import Recipe, eval_transform, train_transform

CLASSES = ("ant", "bee", "cat")
COUNTS = {"train": 6, "val": 3}  # images per class
IN22K_MAP = "ILSVRC2011fall_whole_map_{}.txt"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_config(root: Path, **overrides: object) -> CfgNode:
    """A configuration for the small data sets here; `DATA__X=1` overrides DATA.X."""
    values: dict[str, object] = {
        "DATA.DATA_PATH": str(root),
        "DATA.IMG_SIZE": 64,
        "DATA.BATCH_SIZE": 4,
        "DATA.NUM_WORKERS": 0,
        "DATA.PIN_MEMORY": False,
        "MODEL.NUM_CLASSES": len(CLASSES),
    }
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(opts=[item for pair in values.items() for item in pair])


def split_images(split: str) -> Iterator[tuple[str, int, Image.Image]]:
    """(relative path, label, image) of a split; every image has its own content."""
    rng = np.random.default_rng(len(split))
    for label, name in enumerate(CLASSES):
        for number in range(COUNTS[split]):
            pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            yield f"{name}/{number}.png", label, Image.fromarray(pixels)


def write_folder(root: Path) -> Path:
    """The images in class folders."""
    for split in COUNTS:
        for path, _, image in split_images(split):
            (root / split / path).parent.mkdir(parents=True, exist_ok=True)
            image.save(root / split / path)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "folder")


def write_zip(folder: Path, root: Path, prefix: str = "", method: int = zipfile.ZIP_STORED) -> Path:
    """The images of a folder data set as archives with maps; `prefix` goes before the paths in the map."""
    root.mkdir()
    for split in COUNTS:
        lines = []
        with zipfile.ZipFile(root / f"{split}.zip", "w", method) as archive:
            for path, label, _ in split_images(split):
                archive.write(folder / split / path, path)
                lines.append(f"{prefix.format(split)}{path}\t{label}\n")
        (root / f"{split}_map.txt").write_text("".join(lines))
    return root


def write_in22k(root: Path, as_json: bool) -> Path:
    """Maps of ImageNet-22K beside the folders of a folder data set."""
    for split in COUNTS:
        entries = [[f"{split}/{path}", label] for path, label, _ in split_images(split)]
        lines = "\n".join(f"{path}\t{label}" for path, label in entries)
        (root / IN22K_MAP.format(split)).write_text(json.dumps(entries) if as_json else lines)
    return root


def zip_config(root: Path, **overrides: object) -> CfgNode:
    return make_config(root, **{"DATA__ZIP_MODE": True} | overrides)


def in22k_config(root: Path, **overrides: object) -> CfgNode:
    return make_config(root, DATA__DATASET="imagenet22k", **overrides)


def draw_epoch(loaders: Loaders, epoch: int = 0, samples_seen: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The remaining images and labels of a training epoch, in order."""
    loaders.resume_at(epoch, samples_seen)
    batches = list(loaders.train_loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def val_set(loaders: Loaders) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loaders.val_loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def break_image(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


# --- Formats ------------------------------------------------------------


def test_eval_mode_needs_no_training_split(folder: Path) -> None:
    (folder / "train").rename(folder / "elsewhere")
    loaders = build_loaders(make_config(folder, EVAL_MODE=True, MODEL__RESUME="weights.pth"))
    assert loaders.train_dataset is loaders.train_loader is loaders.mixup_fn is None
    assert len(val_set(loaders)[0]) == 9


def test_eval_mode_warns_of_other_class_folders(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(folder, EVAL_MODE=True, MODEL__RESUME="weights.pth")
    build_loaders(config)
    assert not caplog.text
    first, *_ = sorted((folder / "val").iterdir())
    first.rename(folder / "val/zebra")
    build_loaders(config)
    assert f"only there {first.name}, only here zebra" in caplog.text


def test_nonsquare_and_gray(folder: Path) -> None:
    config = make_config(
        folder, DATA__IMG_SIZE=[96, 64], MODEL__FOCAL__IN_CHANS=1, DATA__MEAN=[0.5], DATA__STD=[0.25]
    )
    loaders = build_loaders(config)
    assert draw_epoch(loaders)[0].shape == (16, 1, 96, 64)
    assert val_set(loaders)[0].shape == (9, 1, 96, 64)


# --- Transforms and decoding ------------------------------------------------------------


@pytest.mark.parametrize(("shape", "size"), [((300, 200), 224), ((33, 47), 384)])
def test_eval_crop_equals_timms(shape: tuple[int, int], size: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    expected = create_transform(size, interpolation="bicubic", mean=MEAN, std=STD, crop_pct=224 / 256)
    ours = eval_transform((size, size), 3, MEAN, STD, "bicubic", crop=True)
    torch.testing.assert_close(ours(image), expected(image), rtol=0, atol=0)


def test_eval_without_crop_keeps_the_whole_image() -> None:
    pixels = np.zeros((50, 100, 3), dtype=np.uint8)
    pixels[:, :2] = pixels[:, -2:] = 255
    whole = eval_transform((64, 96), 3, (0, 0, 0), (1, 1, 1), "bilinear", crop=False)(Image.fromarray(pixels))
    assert whole.shape == (3, 64, 96)
    assert whole[:, :, 0].min() > 0.9 and whole[:, :, -1].min() > 0.9


def test_small_images_are_padded_and_cropped() -> None:
    plain = Recipe(color_jitter=0, auto_augment="none", reprob=0, hflip=0)
    image = Image.fromarray(np.full((32, 32, 3), 255, dtype=np.uint8))
    transform = train_transform((32, 32), 3, (0, 0, 0), (1, 1, 1), "bicubic", plain)
    crops = torch.stack([transform(image) for _ in range(20)])
    assert set(crops.unique().tolist()) == {0.0, 1.0}
    assert crops.mean() > 0.7


def test_colours_survive_other_modes() -> None:
    cmyk = Image.new("CMYK", (20, 16), (0, 255, 255, 0))
    red = np.asarray(decode_rgb(encoded(cmyk), "cmyk"))[0, 0]
    assert red[0] > 200 and red[1:].max() < 60
    palette = Image.new("RGB", (20, 16), (10, 200, 30)).convert("P")
    for transparency in (0, bytes(range(256))):
        content = encoded(palette, "PNG", transparency=transparency)
        assert np.asarray(decode_rgb(content, "palette"))[0, 0, 1] > 150


# --- Determinism ------------------------------------------------------------


def test_samples_do_not_depend_on_workers(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does what is replaced; the main process logs it. Nor do they change what the model draws."""
    break_image(folder / "train" / "bee" / "2.png")
    root = write_zip(folder, tmp_path / "zip", "{}.zip@/")
    alone, helped = (build_loaders(zip_config(root, SEED=3, DATA__NUM_WORKERS=count)) for count in (0, 2))
    helped.train_dataset[(5, 0)]  # opens the archive here before any worker starts
    for epoch in (0, 1):
        torch.testing.assert_close(draw_epoch(helped, epoch), draw_epoch(alone, epoch), rtol=0, atol=0)
    before = random.getstate(), torch.get_rng_state()
    np.random.seed(0), alone.train_dataset[(0, 1)]
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert np.random.rand() == np.random.RandomState(0).rand()
    assert alone.train_dataset.undecodable == helped.train_dataset.undecodable > 0
    assert caplog.text.count("bee/2.png") == 2 * alone.train_dataset.undecodable


def test_a_killed_worker_is_no_mistake_of_the_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An OSError would end the run as one, though another start may go on. Real kills raise this, or
    PyTorch's own RuntimeError, by chance."""

    def lost(loader: DataLoader) -> Iterator[Any]:
        yield from ()
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    monkeypatch.setattr(DataLoader, "__iter__", lost)
    with pytest.raises(RuntimeError, match="a loader worker was killed"):
        next(iter(build_loaders(make_config(folder)).train_loader))


SIGNALLED = """
import os, signal, subprocess, sys, threading, time
import psutil, torch
from data.datasets import ImageLoader, Sample
from data.workers import leave_signals_to_parent

class Blank:
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return Sample(torch.zeros(1, 2, 2), index)

def signal_all(name):  # from outside the job, as a launcher does
    subprocess.run(["kill", "-s", name, "--", f"-{os.getpgrp()}"], start_new_session=True, check=True)

if __name__ == "__main__":
    received = []
    signal.signal(signal.Signals[sys.argv[2]], lambda *_: received.append(1))
    options = {"num_workers": 1, "multiprocessing_context": sys.argv[1]}
    loader = ImageLoader(Blank(), batch_size=1, worker_init_fn=leave_signals_to_parent, **options)
    threading.Timer(0.5, signal_all, (sys.argv[2],)).start()  # while workers start
    batches = iter(loader)
    next(batches)
    signal_all(sys.argv[2])
    children = psutil.Process().children(recursive=True)
    time.sleep(0.5)
    alive = [child.status() != psutil.STATUS_ZOMBIE for child in children if child.is_running()]
    print(len(received), len(alive) == len(children) >= 2 and all(alive), sum(1 for _ in batches))
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system cannot tell who sends a signal")
@pytest.mark.parametrize(("method", "number"), [("forkserver", "SIGUSR1"), ("spawn", "SIGTERM")])
def test_a_signal_to_the_whole_job_ends_no_worker(method: str, number: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SIGNALLED)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", method, number],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["2", "True", "39"] and not done.stderr, done.stderr


def test_augmentation_changes_with_epoch_and_seed_only(folder: Path) -> None:
    datasets = [build_loaders(make_config(folder, SEED=seed)).train_dataset for seed in (0, 0, 1)]
    first, same, other_seed = (dataset[(4, 7)].image for dataset in datasets)
    torch.testing.assert_close(first, same, rtol=0, atol=0)
    assert not torch.equal(first, other_seed)
    assert not torch.equal(first, datasets[0][(5, 7)].image)


# --- Mixup ------------------------------------------------------------


def test_mixup_switches(folder: Path) -> None:
    off = {"AUG__MIXUP": 0.0, "AUG__CUTMIX": 0.0}
    assert build_loaders(make_config(folder, **off)).mixup_fn is None
    assert build_loaders(make_config(folder, **off, AUG__CUTMIX_MINMAX=[0.2, 0.8])).mixup_fn is not None
    assert build_loaders(make_config(folder, **off, DATA__BATCH_SIZE=3)).steps_per_epoch == 6


# --- Samplers ------------------------------------------------------------


def indices(sampler: TrainSampler, epoch: int, samples_seen: int = 0) -> list[int]:
    sampler.resume_at(epoch, samples_seen)
    keys = list(sampler)
    assert {key_epoch for key_epoch, _ in keys} <= {epoch} and len(keys) == len(sampler)
    return [index for _, index in keys]


@pytest.mark.parametrize(("images", "batch", "world"), [(24, 2, 1), (37, 5, 2), (101, 1, 3), (101, 5, 4)])
def test_processes_together_see_what_one_sees(images: int, batch: int, world: int) -> None:
    whole = TrainSampler(images, batch * world, 0, 1, seed=5)
    parts = [TrainSampler(images, batch, rank, world, seed=5) for rank in range(world)]
    orders = set()
    for epoch in (0, 3):
        expected = torch.tensor(indices(whole, epoch)).view(whole.steps_per_epoch, world, batch)
        assert expected.numel() == len(expected.unique()) == images // (batch * world) * batch * world
        orders.add(tuple(expected.flatten().tolist()))
        for rank, part in enumerate(parts):
            mine = indices(part, epoch)
            assert mine == expected[:, rank].flatten().tolist()
            assert indices(part, epoch, 2 * batch * world) == mine[2 * batch :]
            assert part.start_step == 2
    assert len(orders) == 2
    assert indices(TrainSampler(images, batch * world, 0, 1, seed=6), 0) != indices(whole, 0)


def test_another_number_of_processes_continues_with_the_unseen_images() -> None:
    """2 processes, then 3, then 1 with another batch size: no image twice, few left out."""
    seen: list[int] = []
    for world, batch, steps in ((2, 5, 3), (3, 4, 2), (1, 6, 7)):
        parts = [
            indices(TrainSampler(101, batch, rank, world, seed=3), 7, len(seen)) for rank in range(world)
        ]
        seen += [index for part in parts for index in part[: steps * batch]]
    assert len(seen) == len(set(seen)) == 96


@pytest.mark.parametrize(("images", "world"), [(1, 3), (7, 2), (11, 3), (10, 4), (9, 8), (24, 1)])
def test_evaluation_counts_every_image_once(images: int, world: int) -> None:
    """The ranks' images in turn are all of them, in order."""
    samplers = [EvalSampler(images, rank, world) for rank in range(world)]
    turns = [index for turn in zip_longest(*samplers) for index in turn if index is not None]
    assert turns == list(range(images))
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)


# --- Bad input ------------------------------------------------------------


def raises(error: type[Exception], *parts: object):
    """Expect an error whose message has these parts, in order."""
    return pytest.raises(error, match="(?s:.*)".join(re.escape(str(part)) for part in parts))


def test_missing_places(folder: Path, tmp_path: Path) -> None:
    with raises(FileNotFoundError, "DATA.DATA_PATH: expected an existing folder, got", tmp_path / "no"):
        build_loaders(make_config(tmp_path / "no"))
    (folder / "val").rename(folder / "evaluation")
    with raises(FileNotFoundError, folder / "val", "expected a folder", "got nothing", "set DATA.DATA_PATH"):
        build_loaders(make_config(folder))
    (tmp_path / "train").mkdir()
    with raises(ValueError, tmp_path / "train", "expected one sub-folder per class, got none", "arrange"):
        build_loaders(make_config(tmp_path))


def test_class_folders(folder: Path) -> None:
    with raises(ValueError, folder / "train", "expected 5 classes (MODEL.NUM_CLASSES), got 3", "set"):
        build_loaders(make_config(folder, MODEL__NUM_CLASSES=5))
    (folder / "train" / "dog").mkdir()
    with raises(ValueError, folder / "train", "got none in dog", "add images"):
        build_loaders(make_config(folder))
    (folder / "train" / "dog").rmdir()
    (folder / "val" / "cat").rename(folder / "val" / "cow")
    with raises(ValueError, "only in the first: cat, only in the second: cow"):
        build_loaders(make_config(folder))


@pytest.fixture
def zips(folder: Path, tmp_path: Path) -> Path:
    return write_zip(folder, tmp_path / "zips")


def test_missing_half_of_a_zip_split(zips: Path, tmp_path: Path) -> None:
    (zips / "val.zip").unlink()
    with raises(FileNotFoundError, "val_map.txt:1: expected the archive", "val.zip", "got nothing"):
        build_loaders(zip_config(zips))
    (zips / "train_map.txt").unlink()
    with raises(FileNotFoundError, "train_map.txt: expected train.zip with its map", "got only train.zip"):
        build_loaders(zip_config(zips))
    with raises(FileNotFoundError, "train_map.txt", "got neither of them", "set DATA.DATA_PATH"):
        build_loaders(zip_config(tmp_path))


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("ant/0.png 0", ("expected a path and an integer label", "ant/0.png 0")),
        ("ant/9.png\t0", ("expected an image ant/9.png", "train.zip")),
        ("other.zip@/ant/0.png\t0", ("expected the archive", "other.zip")),
    ],
)
def test_bad_map_line_is_named(zips: Path, line: str, parts: tuple[str, ...]) -> None:
    lines = (zips / "train_map.txt").read_text().split("\n")
    lines[4] = line
    (zips / "train_map.txt").write_text("\n".join(lines))
    with raises((ValueError, FileNotFoundError), f"{zips / 'train_map.txt'}:5: ", *parts):
        build_loaders(zip_config(zips))


def test_bad_imagenet22k(folder: Path) -> None:
    with raises(FileNotFoundError, folder / IN22K_MAP.format("train"), "expected a map file"):
        build_loaders(in22k_config(folder))
    write_in22k(folder, as_json=True)
    (folder / "val" / "bee" / "1.png").unlink()
    with raises(FileNotFoundError, IN22K_MAP.format("val"), ":5: expected an image at"):
        build_loaders(in22k_config(folder))


def test_hidden_folders_are_skipped(folder: Path) -> None:
    shutil.copytree(folder / "val" / "ant", folder / "val" / "ant" / ".thumbnails")
    assert len(build_loaders(make_config(folder)).val_dataset) == 9


def test_links_in_a_circle_list_images_once(folder: Path) -> None:
    (folder / "val" / "ant" / "loop").symlink_to(folder / "val" / "ant")
    assert len(build_loaders(make_config(folder)).val_dataset) == 9


def test_a_folder_that_cannot_be_entered_is_named(folder: Path, close_folder: Callable[[Path], None]) -> None:
    """Its images would be missing."""
    close_folder(folder / "train" / "bee" / "closed")
    with pytest.raises(PermissionError, match="closed"):
        build_loaders(make_config(folder))


def test_too_few_training_images(folder: Path) -> None:
    with raises(ValueError, "24 training images (DATA.BATCH_SIZE 8 x 3 processes), got 18; reduce"):
        build_loaders(make_config(folder, DATA__BATCH_SIZE=8), rank=0, world_size=3)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"DATA__DATA_PATH": ""}, ("DATA.DATA_PATH: expected", "got ''")),
        ({"DATA__ZIP_MODE": True, "DATA__DATASET": "imagenet22k"}, ("DATA.ZIP_MODE: expected False",)),
        ({"DATA__BATCH_SIZE": 3}, ("DATA.BATCH_SIZE: expected an even number", "got 3")),
        ({"DATA__MEAN": [0.5, 0.5]}, ("DATA.MEAN: expected 3 values, got",)),
        ({"MODEL__FOCAL__IN_CHANS": 4}, ("IN_CHANS: expected 3", "got 4")),
        ({"AUG__SCALE": [1.0, 0.5]}, ("AUG.SCALE: expected [smaller, larger]", "swap")),
        ({"AUG__AUTO_AUGMENT": "random"}, ("AUG.AUTO_AUGMENT: expected", "rand-m9", "got 'random'")),
        ({"AUG__AUTO_AUGMENT": "rand-x9"}, ("AUG.AUTO_AUGMENT: expected", "rand-m9", "got 'rand-x9'")),
        ({"AUG__AUTO_AUGMENT": "original-x1"}, ("AUG.AUTO_AUGMENT: expected", "got 'original-x1'")),
        ({"AUG__CUTMIX_MINMAX": [0.2, 0.202]}, ("AUG.CUTMIX_MINMAX: expected", "got [0.2, 0.202]")),
        ({"AUG__SCALE": [0.5, 1.0], "DATA__IMG_SIZE": 32}, ("AUG.SCALE", "remove them or enlarge")),
    ],
)
def test_options_that_contradict_each_other(folder: Path, overrides: dict, parts: tuple[str, ...]) -> None:
    with raises(ValueError, *parts):
        build_loaders(make_config(folder, **overrides))


# --- Damaged images ------------------------------------------------------------


def test_mostly_damaged_data_set_stops(folder: Path) -> None:
    for path in (folder / "train").glob("*/*.png"):
        break_image(path)
    with raises(ValueError, "in a row that do not", "copy it again"):
        draw_epoch(build_loaders(make_config(folder)))
