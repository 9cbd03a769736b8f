"""tools/benchmarks/learning: Focal and Swin train side by side on the images of Fashion-MNIST's files."""

import struct
from pathlib import Path

import numpy as np
import torch
from conftest import csv_rows
from torchvision.datasets import FashionMNIST

from data import build_loaders
from tools.benchmarks import learning

SIZES = {"train": 40, "t10k": 24}
OPTS = ["--opts", "TRAIN.EPOCHS", "1", "DATA.BATCH_SIZE", "20"]


def make_files(output: Path) -> None:
    """The set's four files, of random images, where torchvision has them after a download."""
    folder = output / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in SIZES.items():
        images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = rng.integers(10, size=count, dtype=np.uint8)
        content = struct.pack(">4i", 0x803, count, 28, 28) + images.tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(content)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, count) + labels.tobytes()
        )


def weights_of_seed_0(folder: Path) -> dict[Path, int]:
    """The last checkpoints of these runs, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/seed0/ckpt_epoch_*.pth")}


def test_all_models_train_and_continue(tmp_path: Path) -> None:
    make_files(tmp_path / "runs")
    words = ["--output", str(tmp_path / "runs"), "--out", str(tmp_path), "--rounds"]
    assert learning.main([*words, "1", *OPTS]) == 0
    first = weights_of_seed_0(tmp_path)
    assert len(first) == len(learning.MODELS) == 3
    assert learning.main([*words, "2", *OPTS]) == 0
    assert weights_of_seed_0(tmp_path) == first  # they were not trained again
    rows = csv_rows(tmp_path, "_learning")
    keys = {(row["model"], row["seed"], row["epoch"]) for row in rows}
    assert keys == {(model, seed, "1") for model in learning.MODELS for seed in "01"}
    assert all(0 <= float(row["accuracy %"]) <= 100 for row in rows)
    assert len([*tmp_path.glob("*_learning.png")]) == len([*tmp_path.glob("*_learning.md")]) == 1


def test_the_models_see_the_images_of_the_files(tmp_path: Path) -> None:
    make_files(tmp_path)
    learning.write_images(tmp_path)
    args = learning.parse(["--output", str(tmp_path)])
    config = learning.configure(args, "Focal", 0)
    config.defrost()
    config.EVAL_MODE, config.DATA.IMG_SIZE = True, 28  # as they are in the files
    images, labels = next(iter(build_loaders(config).val_loader))
    expected = FashionMNIST(tmp_path, train=False)
    pixels = images * config.DATA.STD[0] + config.DATA.MEAN[0]
    torch.testing.assert_close(pixels[:, 0], expected.data / 255)
    assert torch.equal(labels, expected.targets)


def test_the_models_have_one_shape() -> None:
    """As many parameters within 2 %; the recipe's options are the same but for the family."""
    configs = [learning.configure(learning.parse([]), model, 0) for model in learning.MODELS]
    sizes = [learning.size_of(config)[0] for config in configs]
    assert max(sizes) < 1.02 * min(sizes)
    shapes = [{**config.MODEL, "NAME": "", "TYPE": ""} for config in configs]
    assert shapes[0] == shapes[1] == shapes[2]
