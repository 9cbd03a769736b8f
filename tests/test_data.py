"""The data pipeline: folders, archives, maps, samplers, determinism, and the messages for bad input."""

import json
import logging
import random
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from yacs.config import CfgNode

from config import load_config
from data import EvalSampler, Loaders, ShardSampler, TrainSampler, build_loaders, seeding, source
from data.images import UndecodableImageError, decode_rgb
from data.mixing import build_mixup
from data.seeding import seeded_rngs
from data.source import FileSource
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


def in22k_config(root: Path, **overrides: object) -> CfgNode:
    config = make_config(root, **overrides)
    config.defrost()
    config.DATA.DATASET = "imagenet22k"
    return config


def draw_epoch(loaders: Loaders, epoch: int = 0, start_step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels of a training epoch, in order."""
    loaders.set_epoch(epoch, start_step)
    batches = list(loaders.train_loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def val_set(loaders: Loaders) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loaders.val_loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def break_image(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


# --- Formats ------------------------------------------------------------


def test_folder_classes_follow_the_sorted_names(folder: Path) -> None:
    loaders = build_loaders(make_config(folder))
    images, labels = val_set(loaders)
    assert images.shape == (9, 3, 64, 64)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(loaders.train_dataset) == 18
    assert loaders.steps_per_epoch == len(loaders.train_loader) == 4


@pytest.mark.parametrize("dataset", ["imagewoof", "folder"])
def test_other_folder_names(folder: Path, dataset: str) -> None:
    assert len(build_loaders(make_config(folder, DATA__DATASET=dataset)).val_dataset) == 9


@pytest.mark.parametrize("cache", ["no", "full"])
@pytest.mark.parametrize("prefix", ["", "{}.zip@/"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_equals_folder(folder: Path, tmp_path: Path, cache: str, prefix: str, method: int) -> None:
    root = write_zip(folder, tmp_path / "zip", prefix, method)
    packed = build_loaders(make_config(root, DATA__ZIP_MODE=True, DATA__CACHE_MODE=cache))
    plain = build_loaders(make_config(folder))
    for draw in (draw_epoch, val_set):
        for ours, theirs in zip(draw(packed), draw(plain), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_zip_part_cache_gives_each_rank_its_shard(folder: Path, tmp_path: Path) -> None:
    root = write_zip(folder, tmp_path / "zip")
    config = make_config(root, DATA__ZIP_MODE=True, DATA__CACHE_MODE="part")
    for rank in (0, 1):
        loaders = build_loaders(config, rank=rank, world_size=2)
        orders = []
        for epoch in (0, 1):
            loaders.set_epoch(epoch)
            orders.append([index for _, index in loaders.train_sampler])
            assert set(orders[-1]) <= set(range(rank, 18, 2))
            assert len(orders[-1]) == len(set(orders[-1])) == 8
        assert orders[0] != orders[1]
        content = (root / "train.zip").read_bytes()
        (root / "train.zip").write_bytes(b"")
        draw_epoch(loaders)
        assert loaders.train_dataset.undecodable == 0, "the shard should come from memory"
        (root / "train.zip").write_bytes(content)
    images = torch.cat([val_set(build_loaders(config, rank, 2))[0] for rank in (0, 1)])
    assert len(images) == 9


@pytest.mark.parametrize("as_json", [True, False])
def test_imagenet22k(folder: Path, as_json: bool) -> None:
    loaders = build_loaders(
        in22k_config(write_in22k(folder, as_json), MODEL__NUM_CLASSES=21841, AUG__MIXUP=0.0)
    )
    plain = build_loaders(make_config(folder))
    for ours, theirs in zip(draw_epoch(loaders), draw_epoch(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert val_set(loaders)[1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_eval_mode_needs_no_training_split(folder: Path) -> None:
    (folder / "train").rename(folder / "elsewhere")
    loaders = build_loaders(make_config(folder, EVAL_MODE=True, MODEL__RESUME="weights.pth"))
    assert loaders.train_dataset is loaders.train_loader is loaders.mixup_fn is None
    assert len(val_set(loaders)[0]) == 9


def test_nonsquare_and_gray(folder: Path) -> None:
    config = make_config(
        folder, DATA__IMG_SIZE=[96, 64], MODEL__FOCAL__IN_CHANS=1, DATA__MEAN=[0.5], DATA__STD=[0.25]
    )
    loaders = build_loaders(config)
    assert draw_epoch(loaders)[0].shape == (16, 1, 96, 64)
    assert val_set(loaders)[0].shape == (9, 1, 96, 64)


# --- Transforms and decoding ------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 200), (224, 500), (33, 47), (224, 224)])
@pytest.mark.parametrize("size", [224, 192, 384])
def test_eval_crop_equals_torchvision(shape: tuple[int, int], size: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    expected = transforms.Compose(
        [
            transforms.Resize(int(256 / 224 * size), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
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
    with pytest.raises(ValueError, match=r"AUG.SCALE.*remove them or enlarge"):
        train_transform((32, 32), 3, MEAN, STD, "bicubic", Recipe(scale=(0.5, 1.0)))


@pytest.mark.parametrize(
    "policy", ["rand-m10-mstd0-inc1-n2", "rand-m9-mstd0.5-inc1", "original", "v0", "3a", "augmix-m3"]
)
def test_every_draw_of_a_policy_works(policy: str) -> None:
    transform = train_transform((40, 40), 3, MEAN, STD, "bicubic", Recipe(auto_augment=policy))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    for seed in range(60):
        with seeded_rngs(seed):
            assert transform(image).isfinite().all()


def test_seeded_generators_are_given_back() -> None:
    """Each of the three draws what its seed says, then goes on as if nobody had drawn."""

    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [draw() for _ in range(3)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    numpy_generator = np.random.get_bit_generator()
    first = draw()
    with seeded_rngs(2**40 + 5):
        outer = [draw()]
        with seeded_rngs(7):
            inner = draw()
        outer.append(draw())
    second = draw()
    with pytest.raises(KeyError), seeded_rngs(7):
        assert draw() == inner
        raise KeyError
    with pytest.raises(ValueError), seeded_rngs(-1):
        pass
    assert [first, second, draw()] == expected
    assert np.random.get_bit_generator() is numpy_generator
    spare = [id(generator) for generator in seeding._SPARE]
    assert len(set(spare)) == len(spare) and id(numpy_generator) not in spare
    np.random.seed([5, 2**8])  # of the low and the high half of the number
    assert [values[1] for values in outer] == np.random.rand(2).tolist()


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="only Linux has such files at hand")
def test_files_that_do_not_tell_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read whole, up to the limit."""
    version = FileSource(Path("/proc"), ["version"], [0])
    content = Path("/proc/version").read_bytes()
    for most in (len(content), len(content) + 1, 2**20):
        monkeypatch.setattr(source, "MAX_BYTES", most)
        assert version.read(0) == content
    monkeypatch.setattr(source, "MAX_BYTES", len(content) - 1)
    with pytest.raises(UndecodableImageError, match="at most"):
        version.read(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 4}, "IN_CHANS: expected 3 .* got 4"),
        ({"interpolation": "cubic"}, "INTERPOLATION: expected one of bicubic, bilinear, random, got 'cubic'"),
        ({"mean": (0.5, 0.5)}, "DATA.MEAN: expected 3 or 3 values, got"),
        ({"std": (0.5, 0.5, 0)}, "DATA.STD: expected positive"),
        ({"recipe": Recipe(remode="noise")}, "REMODE: expected one of const, rand, pixel, got 'noise'"),
        ({"recipe": Recipe(auto_augment="random")}, "AUTO_AUGMENT: expected .* got 'random'"),
        ({"recipe": Recipe(scale=(1.0, 0.5))}, "AUG.SCALE: expected .* got"),
    ],
)
def test_transform_arguments_are_checked(arguments: dict, message: str) -> None:
    good = {
        "size": (64, 64),
        "channels": 3,
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "recipe": Recipe(),
    }
    with pytest.raises(ValueError, match=message):
        train_transform(**(good | arguments))


def encoded(image: Image.Image, path: Path, **options: object) -> bytes:
    image.save(path, **options)
    return path.read_bytes()


def test_unusual_images_become_rgb(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 16 * 20).reshape(16, 20).astype(np.uint16)
    gray16 = decode_rgb(encoded(Image.fromarray(ramp), tmp_path / "gray16.png"), "gray16")
    np.testing.assert_array_equal(np.asarray(gray16)[..., 0], ramp >> 8)
    cmyk = Image.new("CMYK", (20, 16), (0, 255, 255, 0))
    red = np.asarray(decode_rgb(encoded(cmyk, tmp_path / "cmyk.jpg"), "cmyk"))[0, 0]
    assert red[0] > 200 and red[1:].max() < 60
    palette = Image.new("RGB", (20, 16), (10, 200, 30)).convert("P")
    for transparency in (0, bytes(range(256))):
        content = encoded(palette, tmp_path / "palette.png", transparency=transparency)
        assert np.asarray(decode_rgb(content, "palette"))[0, 0, 1] > 150
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_rgb(encoded(Image.new("RGB", (20, 16)), tmp_path / "exif.jpg", exif=exif), "exif")
    for image in (gray16, turned):
        assert (image.mode, image.size) == ("RGB", (20, 16))
    for mode in ("1", "L", "LA", "RGBA"):
        assert decode_rgb(encoded(Image.new(mode, (20, 16)), tmp_path / "any.png"), mode).mode == "RGB"


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"\xff\xd8\xff\xe0"]
)
def test_undecodable_bytes_name_the_image(content: bytes) -> None:
    with pytest.raises(
        UndecodableImageError, match=f"some/path.png: expected an image.*got {len(content)} bytes"
    ):
        decode_rgb(content, "some/path.png")


# --- Determinism ------------------------------------------------------------


@pytest.mark.parametrize(("method", "cache"), [("fork", "no"), ("spawn", "full")])
def test_samples_do_not_depend_on_workers(folder: Path, tmp_path: Path, method: str, cache: str) -> None:
    break_image(folder / "train" / "bee" / "2.png")
    root = write_zip(folder, tmp_path / "zip", "{}.zip@/")
    options = {"DATA__ZIP_MODE": True, "DATA__CACHE_MODE": cache, "DATA__BATCH_SIZE": 6, "SEED": 3}
    alone = build_loaders(make_config(root, **options))
    workers = {"DATA__NUM_WORKERS": 2, "DATA__WORKER_START_METHOD": method}
    helped = build_loaders(make_config(root, **options, **workers))
    helped.train_dataset[(5, 0)]  # opens the archive here before any worker starts
    for epoch in (0, 1, 0):
        torch.testing.assert_close(draw_epoch(helped, epoch), draw_epoch(alone, epoch), rtol=0, atol=0)
    assert alone.train_dataset.undecodable == helped.train_dataset.undecodable == 3


def test_two_processes_draw_what_one_draws(folder: Path) -> None:
    whole = build_loaders(make_config(folder, DATA__BATCH_SIZE=8))
    halves = [build_loaders(make_config(folder), rank, 2) for rank in (0, 1)]
    for loaders in (whole, *halves):
        loaders.set_epoch(2)
    for batch, *parts in zip(whole.train_loader, *[half.train_loader for half in halves], strict=True):
        torch.testing.assert_close(batch[0], torch.cat([images for images, _ in parts]), rtol=0, atol=0)


def test_augmentation_changes_with_epoch_and_seed_only(folder: Path) -> None:
    datasets = [build_loaders(make_config(folder, SEED=seed)).train_dataset for seed in (0, 0, 1)]
    first, same, other_seed = (dataset[(4, 7)][0] for dataset in datasets)
    torch.testing.assert_close(first, same, rtol=0, atol=0)
    assert not torch.equal(first, other_seed)
    assert not torch.equal(first, datasets[0][(5, 7)][0])


def test_loading_leaves_the_global_generators_alone(folder: Path) -> None:
    loaders = build_loaders(make_config(folder))
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    dataset_sample = loaders.train_dataset[(0, 0)]
    loaders.mixup_fn(dataset_sample[0].repeat(2, 1, 1, 1), torch.tensor([0, 1]))
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_resumed_epoch_continues_where_it_stopped(folder: Path) -> None:
    loaders = build_loaders(make_config(folder))
    images, labels = draw_epoch(loaders, 3)
    rest_images, rest_labels = draw_epoch(loaders, 3, start_step=2)
    torch.testing.assert_close(rest_images, images[8:], rtol=0, atol=0)
    assert rest_labels.tolist() == labels[8:].tolist()
    assert loaders.steps_per_epoch == 4


# --- Mixup ------------------------------------------------------------


def make_mixup(seed: int = 0, rank: int = 0, mode: str = "batch"):
    return build_mixup(0.8, 1.0, None, 1.0, 0.5, mode, 0.1, 5, batch_size=4, seed=seed, rank=rank)


def mixed(mixup, epoch: int, step: int) -> torch.Tensor:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16).clone()
    mixup.set_position(epoch, step)
    images, targets = mixup(images, torch.tensor([0, 1, 2, 3]))
    assert targets.shape == (4, 5)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    return torch.cat([images.flatten(), targets.flatten()])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixup_depends_on_its_position_alone(mode: str) -> None:
    first = mixed(make_mixup(mode=mode), 2, 7)
    np.random.seed(123)
    torch.testing.assert_close(first, mixed(make_mixup(mode=mode), 2, 7), rtol=0, atol=0)
    for other, position in (
        (make_mixup(seed=1, mode=mode), (2, 7)),
        (make_mixup(rank=1, mode=mode), (2, 7)),
        (make_mixup(mode=mode), (3, 7)),
        (make_mixup(mode=mode), (2, 8)),
    ):
        assert not torch.equal(first, mixed(other, *position))


def test_mixup_moves_on_by_itself() -> None:
    mixup = make_mixup()
    images, targets = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    mixup.set_position(1, 0)
    mixup(images.clone(), targets)
    second = mixup(images.clone(), targets)
    mixup.set_position(1, 1)
    torch.testing.assert_close(mixup(images.clone(), targets), second, rtol=0, atol=0)


def test_mixup_switches(folder: Path) -> None:
    off = {"AUG__MIXUP": 0.0, "AUG__CUTMIX": 0.0}
    assert build_loaders(make_config(folder, **off)).mixup_fn is None
    assert build_loaders(make_config(folder, **off, AUG__CUTMIX_MINMAX=[0.2, 0.8])).mixup_fn is not None
    assert build_loaders(make_config(folder)).mixup_fn is not None
    with pytest.raises(ValueError, match="DATA.BATCH_SIZE: expected an even number .* got 3"):
        build_loaders(make_config(folder, DATA__BATCH_SIZE=3))
    assert build_loaders(make_config(folder, **off, DATA__BATCH_SIZE=3)).steps_per_epoch == 6


# --- Samplers ------------------------------------------------------------

SIZES = [(num, batch, world) for num in (24, 37, 101) for batch in (1, 2, 5) for world in (1, 2, 3, 4)]


@pytest.mark.parametrize(("num_images", "batch", "world"), SIZES)
def test_training_samplers(num_images: int, batch: int, world: int) -> None:
    whole = TrainSampler(num_images, batch * world, 0, 1, seed=5)
    for epoch in (0, 3):
        whole.set_epoch(epoch)
        expected = torch.tensor([index for _, index in whole]).view(whole.steps_per_epoch, world, batch)
        assert whole.steps_per_epoch == num_images // (batch * world)
        assert len(set(expected.flatten().tolist())) == expected.numel()
        for rank in range(world):
            part = TrainSampler(num_images, batch, rank, world, seed=5)
            part.set_epoch(epoch)
            keys = list(part)
            assert {key_epoch for key_epoch, _ in keys} == {epoch}
            assert [index for _, index in keys] == expected[:, rank].flatten().tolist()
            assert len(part) == len(keys)
            start = part.steps_per_epoch // 2
            part.set_epoch(epoch, start)
            assert list(part) == keys[start * batch :]
            assert len(part) == len(keys) - start * batch


@pytest.mark.parametrize(("num_images", "batch", "world"), SIZES)
def test_shard_samplers_are_disjoint_and_equally_long(num_images: int, batch: int, world: int) -> None:
    samplers = [ShardSampler(num_images, batch, rank, world, seed=5) for rank in range(world)]
    seen = [[index for _, index in sampler] for sampler in samplers]
    for rank, indices in enumerate(seen):
        assert len(indices) == len(samplers[rank]) == num_images // (batch * world) * batch
        assert all(index % world == rank for index in indices)
        assert len(set(indices)) == len(indices)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("num_images", [1, 7, 9, 24])
def test_evaluation_counts_every_image_once(num_images: int, world: int) -> None:
    samplers = [EvalSampler(num_images, rank, world) for rank in range(world)]
    assert sorted(index for sampler in samplers for index in sampler) == list(range(num_images))
    for sampler in samplers:
        assert list(sampler) == sorted(sampler)
        assert len(list(sampler)) == len(sampler)


def test_epochs_and_seeds_shuffle_differently() -> None:
    orders = set()
    for seed in (0, 1):
        sampler = TrainSampler(50, 5, 0, 1, seed)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            orders.add(tuple(index for _, index in sampler))
    assert len(orders) == 6


def test_sampler_limits() -> None:
    with pytest.raises(ValueError, match=r"64 training images .*32 x 2.* got 30; reduce DATA.BATCH_SIZE"):
        TrainSampler(30, 32, 0, 2, seed=0)
    with pytest.raises(ValueError, match="start_step: expected 0 to 5, .* got 6"):
        TrainSampler(10, 2, 0, 1, seed=0, start_step=6)
    assert list(TrainSampler(10, 2, 0, 1, seed=0, start_step=5)) == []


# --- Bad input ------------------------------------------------------------


def raises(error: type[Exception], *parts: object):
    """Expect an error whose message has these parts, in order."""
    return pytest.raises(error, match=".*".join(re.escape(str(part)) for part in parts))


def test_missing_places(folder: Path, tmp_path: Path) -> None:
    with raises(
        FileNotFoundError, "DATA.DATA_PATH: expected an existing folder, got", tmp_path / "no", "set it"
    ):
        build_loaders(make_config(tmp_path / "no"))
    with raises(ValueError, "DATA.DATA_PATH: expected", "got ''"):
        build_loaders(load_config())
    (folder / "val").rename(folder / "test")
    with raises(FileNotFoundError, folder / "val", "expected a folder", "got nothing", "set DATA.DATA_PATH"):
        build_loaders(make_config(folder))


def test_class_folders(folder: Path) -> None:
    with raises(ValueError, folder / "train", "expected 5 class folders (MODEL.NUM_CLASSES), got 3", "set"):
        build_loaders(make_config(folder, MODEL__NUM_CLASSES=5))
    (folder / "train" / "dog").mkdir()
    with raises(ValueError, folder / "train", "got none in dog", "add images"):
        build_loaders(make_config(folder))
    (folder / "train" / "dog").rmdir()
    (folder / "val" / "cat").rename(folder / "val" / "cow")
    with raises(ValueError, "only in the first: cat, only in the second: cow"):
        build_loaders(make_config(folder))


def test_no_classes(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with raises(ValueError, tmp_path / "train", "expected one sub-folder per class, got none", "arrange"):
        build_loaders(make_config(tmp_path))


def zip_config(root: Path, **overrides: object) -> CfgNode:
    return make_config(root, DATA__ZIP_MODE=True, DATA__CACHE_MODE="no", **overrides)


@pytest.fixture
def zips(folder: Path, tmp_path: Path) -> Path:
    return write_zip(folder, tmp_path / "zips")


@pytest.mark.parametrize(
    ("missing", "parts"),
    [
        (
            "train_map.txt",
            ("train_map.txt: expected train.zip with its map", "got only train.zip", "write the map"),
        ),
        ("val.zip", ("val_map.txt:1: expected the archive", "val.zip", "got nothing", "add the archive")),
    ],
)
def test_missing_half_of_a_zip_split(zips: Path, missing: str, parts: tuple[str, ...]) -> None:
    (zips / missing).unlink()
    with raises(FileNotFoundError, *parts):
        build_loaders(zip_config(zips))


def test_zip_split_missing_altogether(tmp_path: Path) -> None:
    with raises(FileNotFoundError, "train_map.txt", "got neither of them", "set DATA.DATA_PATH"):
        build_loaders(zip_config(tmp_path))


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("ant/0.png 0", ("expected a path and an integer label", "got 'ant/0.png 0'", "correct")),
        ("", ("expected a path and an integer label", "got ''", "correct")),
        ("\t0", ("expected a path and an integer label", "correct")),
        ("ant/0.png\tant", ("expected a path and an integer label", "got the label 'ant'", "correct")),
        ("ant/0.png\t3", ("expected a label in [0, 3), got 3", "MODEL.NUM_CLASSES")),
        ("ant/0.png\t-1", ("expected a label in [0, 3), got -1", "MODEL.NUM_CLASSES")),
        ("ant/9.png\t0", ("expected an image ant/9.png", "train.zip, got no such member", "correct the map")),
        ("other.zip@/ant/0.png\t0", ("expected the archive", "other.zip", "got nothing")),
    ],
)
def test_bad_map_line_is_named(zips: Path, line: str, parts: tuple[str, ...]) -> None:
    lines = (zips / "train_map.txt").read_text().split("\n")
    lines[4] = line
    (zips / "train_map.txt").write_text("\n".join(lines))
    with raises((ValueError, FileNotFoundError), f"{zips / 'train_map.txt'}:5: ", *parts):
        build_loaders(zip_config(zips))


def test_empty_map_and_damaged_archives(zips: Path) -> None:
    (zips / "val_map.txt").write_text("\n")
    with raises(ValueError, zips / "val_map.txt", "got an empty map"):
        build_loaders(zip_config(zips))
    (zips / "train.zip").write_bytes(b"no archive")
    with raises(ValueError, zips / "train.zip", "expected a zip archive, got a damaged"):
        build_loaders(zip_config(zips))
    with zipfile.ZipFile(zips / "train.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("ant/0.png", b"content")
    (zips / "train_map.txt").write_text("ant/0.png\t0\n")
    with raises(ValueError, "train.zip@/ant/0.png", "stored plainly or deflated, got compression method 12"):
        build_loaders(zip_config(zips))


def test_bad_imagenet22k(folder: Path) -> None:
    with raises(FileNotFoundError, folder / IN22K_MAP.format("train"), "expected a map file", "got nothing"):
        build_loaders(in22k_config(folder))
    write_in22k(folder, as_json=True)
    (folder / "val" / "bee" / "1.png").unlink()
    with raises(FileNotFoundError, IN22K_MAP.format("val"), "entry 4: expected an image at", "got nothing"):
        build_loaders(in22k_config(folder))
    for content, message in (('["a.png"', "got invalid JSON"), ('[["a.png"]]', "entry 0: expected a path")):
        (folder / IN22K_MAP.format("train")).write_text(content)
        with raises(ValueError, IN22K_MAP.format("train"), message):
            build_loaders(in22k_config(folder))
    with raises(ValueError, "DATA.ZIP_MODE: expected False"):
        build_loaders(in22k_config(folder, DATA__ZIP_MODE=True))


def test_too_few_training_images(folder: Path) -> None:
    with raises(ValueError, "24 training images (DATA.BATCH_SIZE 8 x 3 processes), got 18; reduce"):
        build_loaders(make_config(folder, DATA__BATCH_SIZE=8), rank=0, world_size=3)


# --- Damaged images ------------------------------------------------------------


def test_damaged_training_image_is_replaced_and_counted(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = folder / "train" / "bee" / "2.png"  # index 8
    break_image(broken)
    config = make_config(folder, DATA__BATCH_SIZE=18, AUG__MIXUP=0.0, AUG__CUTMIX=0.0)
    alone = build_loaders(config)
    with caplog.at_level(logging.WARNING):
        images, labels = draw_epoch(alone)
    assert str(broken) in caplog.text
    assert alone.train_dataset.undecodable == 1
    workers = build_loaders(
        make_config(folder, DATA__BATCH_SIZE=18, DATA__NUM_WORKERS=2, DATA__WORKER_START_METHOD="fork")
    )
    torch.testing.assert_close(draw_epoch(workers), (images, labels), rtol=0, atol=0)
    assert workers.train_dataset.undecodable == 1
    draw_epoch(workers, 1)
    assert workers.train_dataset.undecodable == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_validation_image_is_an_error(folder: Path, workers: int) -> None:
    broken = folder / "val" / "bee" / "2.png"
    break_image(broken)
    loaders = build_loaders(make_config(folder, DATA__NUM_WORKERS=workers))
    with pytest.raises(UndecodableImageError) as caught:
        val_set(loaders)
    message = str(caught.value)
    assert message.startswith(f"{broken}: expected an image file that decodes")
    assert "\n" not in message


@pytest.mark.parametrize("workers", [0, 1])
def test_messages_name_the_image_and_no_buffer(folder: Path, workers: int) -> None:
    broken = folder / "val" / "bee" / "2.png"
    broken.write_bytes(b"no image")
    with pytest.raises(UndecodableImageError) as caught:
        val_set(build_loaders(make_config(folder, DATA__NUM_WORKERS=workers)))
    assert str(caught.value).startswith(f"{broken}: ")
    assert "BytesIO" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanished_is_named_in_one_line(folder: Path, workers: int) -> None:
    gone = folder / "val" / "bee" / "2.png"
    loaders = build_loaders(make_config(folder, DATA__NUM_WORKERS=workers))
    gone.unlink()
    with pytest.raises(UndecodableImageError) as caught:
        val_set(loaders)
    assert str(gone) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_main_process_tells_what_spawned_workers_replaced(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = folder / "train" / "bee" / "2.png"
    break_image(broken)
    workers = {"DATA__NUM_WORKERS": 1, "DATA__WORKER_START_METHOD": "spawn"}
    loaders = build_loaders(make_config(folder, DATA__BATCH_SIZE=18, **workers))
    draw_epoch(loaders)
    assert caplog.text.count(str(broken)) == 1
    assert loaders.train_dataset.undecodable == 1


@pytest.mark.parametrize("cache", ["no", "full"])
def test_damaged_archive_member_is_replaced(zips: Path, cache: str, caplog: pytest.LogCaptureFixture) -> None:
    with zipfile.ZipFile(zips / "train.zip") as archive:
        middle = archive.getinfo("bee/2.png").header_offset + 500
    content = bytearray((zips / "train.zip").read_bytes())
    content[middle] ^= 0xFF
    (zips / "train.zip").write_bytes(content)
    options = {"DATA__ZIP_MODE": True, "DATA__CACHE_MODE": cache, "DATA__BATCH_SIZE": 18}
    loaders = build_loaders(make_config(zips, **options))
    draw_epoch(loaders)
    assert loaders.train_dataset.undecodable == 1
    assert "train.zip@/bee/2.png" in caplog.text


def test_mostly_damaged_data_set_stops(folder: Path) -> None:
    for path in (folder / "train").glob("*/*.png"):
        break_image(path)
    with raises(ValueError, "in a row that do not", "copy it anew"):
        draw_epoch(build_loaders(make_config(folder)))
