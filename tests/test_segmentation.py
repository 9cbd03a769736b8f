"""Segmentation's commands at work: training, evaluation, pictures, the demo."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image

pytest.importorskip("mmseg", reason="needs OpenMMLab's packages: make setup-openmmlab")

from openmmlab_runs import ONE_PROCESS, make_demo, scalars

from openmmlab import runner
from segmentation import predict

CONFIG = str(REPO / "segmentation/configs/demo_upernet.py")
FEW = {  # over the demo's options: a model of few weights, evaluated after the last epoch
    "model.backbone.depths": [1, 1, 1, 1],
    "model.backbone.embed_dim": 16,
    "model.decode_head.in_channels": [16, 32, 64, 128],
    "model.decode_head.channels": 32,
    "model.auxiliary_head.in_channels": 64,
    "param_scheduler.0.end": 2,
    "optim_wrapper.optimizer.lr": 3e-3,
    "train_cfg.val_interval": 8,
    "train_dataloader.batch_size": 2,
    "default_hooks.checkpoint.interval": 8,
    "default_hooks.logger.interval": 1,
    **ONE_PROCESS,
}

pytestmark = pytest.mark.usefixtures("in_mmseg", "in_demo")


def options(epochs: int) -> list[str]:
    return ["--cfg-options", f"train_cfg.max_epochs={epochs}", *(f"{k}={v}" for k, v in FEW.items())]


def report_of(folder: Path) -> dict[str, float]:
    """What the only evaluation in a folder found."""
    return json.loads(next(folder.glob("*/*.json")).read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 8 epochs of 2 steps."""
    folder = tmp_path_factory.mktemp("trained")
    assert runner.train([CONFIG, "--work-dir", str(folder), *options(8)]) == 0
    return folder


def test_training_learns(trained: Path) -> None:
    steps = [line["loss"] for line in scalars(trained) if "loss" in line]
    assert len(steps) == 16 and np.mean(steps[-4:]) < 0.8 * np.mean(steps[:4])
    assert len(list(trained.glob("best_mIoU_epoch_*.pth"))) == 1


@pytest.fixture(scope="module")
def runs(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An epoch of training and evaluations of its checkpoint: as it is, at several scales.

    The head is a random one, which finds all classes in an image, while one trained so briefly finds one.
    """
    root = tmp_path_factory.mktemp("runs")
    content = torch.load(trained / "epoch_8.pth", weights_only=False)
    weight = content["state_dict"]["decode_head.conv_seg.weight"]
    weight.normal_(generator=torch.Generator().manual_seed(0))
    torch.save(content, root / "random.pth")
    folders = {name: root / name for name in ("train", "test", "test-multi-scale")}
    train = [CONFIG, "--work-dir", str(folders["train"]), *options(1), f"load_from={root}/random.pth"]
    assert runner.train(train) == 0
    for name, flags in (("test", []), ("test-multi-scale", ["--multi-scale"])):
        weights = str(folders["train"] / "epoch_1.pth")
        assert runner.test([CONFIG, weights, *flags, "--work-dir", str(folders[name]), *options(1)]) == 0
    return folders


def test_the_demo_judges(scenes: Path, runs: dict[str, Path]) -> None:
    """`make demo-segmentation` reads its figures from the logs of real evaluations; a low one is an error."""
    done, commands = make_demo("segmentation", scenes, runs, "SEGMENTATION_LEAST=100")
    assert done.returncode == 2
    assert "error: the demo is expected to pass a mIoU of 100 %" in done.stderr
    names = [f"segmentation/{name}.py" for name in ("train", "test", "test", "predict")]
    assert [words[0] for words in commands] == ["-m", *names]
    best = f"{scenes}/output/segmentation/train/{next(runs['train'].glob('best_*.pth')).name}"
    assert f"checkpoint  {best}" in done.stdout
    figures = re.search(r"mIoU +([\d.]+) %, at several scales ([\d.]+) %\n", done.stdout)
    expected = [round(report_of(runs[name])["mIoU"], 2) for name in ("test", "test-multi-scale")]
    assert figures and [float(text) for text in figures.groups()] == expected and len({*expected}) == 2
    runner.parse_train(commands[1][1:])
    assert [runner.parse_test(words[1:]).tta for words in commands[2:4]] == [False, True]
    drawn = predict.parse(commands[4][1:])
    assert (len(drawn.images), drawn.checkpoint) == (3, best)


# --- Pictures -----------------------------------------------------------------------------------------------


def test_pictures(scenes: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The image, coloured where a class is sure enough, and a legend at its right."""
    image = str(scenes / "segmentation/images/validation/00000001.jpg")
    config = str(trained / "demo_upernet.py")
    command = [image, "--config", config, "--checkpoint", str(trained / "epoch_8.pth")]
    drawn = []
    for threshold in ("0", "1.1"):
        out = tmp_path / threshold
        assert predict.main([*command, "--out", str(out), "--threshold", threshold]) == 0
        assert f"{out}/00000001.png: " in capsys.readouterr().out
        drawn.append(np.asarray(Image.open(out / "00000001.png")).astype(int))
    assert all(len(picture) == 472 and picture.shape[1] > 640 for picture in drawn)
    full, bare = (picture[:, :640] for picture in drawn)
    scene = np.asarray(Image.open(image).resize((640, 472), Image.BICUBIC)).astype(int)
    assert np.abs(bare - scene).mean() < 4, "the image itself, in its colours"
    grey = (1 - predict.OPACITY) * bare + predict.OPACITY * 40
    assert (np.abs(full - grey).max(axis=2) <= 1).mean() > 0.5, "most of it is background, in its own colour"
    assert (drawn[0][:, 640:] == 40).all(axis=2).sum() > 200 and (drawn[1][:, 640:] == 255).all()
