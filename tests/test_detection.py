"""Detection's commands at work: training, resuming, two processes, evaluation, pictures, the demo."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPO
from PIL import Image

pytest.importorskip("mmdet", reason="needs OpenMMLab's packages: make setup-openmmlab")

from openmmlab_runs import ONE_PROCESS, make_demo, scalars

from detection import predict
from openmmlab import runner
from openmmlab.predict import parse

CONFIG = str(REPO / "detection/configs/demo_mask_rcnn.py")
FEW = {  # over the demo's options: a model of few weights, evaluated after every fourth epoch and the last
    "model.backbone.depths": [1, 1, 1, 1],
    "model.backbone.embed_dim": 16,
    "model.neck.in_channels": [16, 32, 64, 128],
    "model.test_cfg.rcnn.score_thr": 0.0,
    "train_cfg.val_interval": 4,
    "default_hooks.checkpoint.interval": 4,
    "default_hooks.logger.interval": 1,
    "optim_wrapper.optimizer.lr": 3e-3,
    **ONE_PROCESS,
}

pytestmark = pytest.mark.usefixtures("in_mmdet", "in_demo")


def options(epochs: int) -> list[str]:
    return ["--cfg-options", f"train_cfg.max_epochs={epochs}", *(f"{k}={v}" for k, v in FEW.items())]


def evaluated(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The last evaluation: box and mask AP."""
    return [{k: v for k, v in line.items() if "mAP" in k} for line in lines if "coco/bbox_mAP" in line][-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 8 epochs of 2 steps."""
    folder = tmp_path_factory.mktemp("trained")
    assert runner.train([CONFIG, "--work-dir", str(folder), *options(8)]) == 0
    return folder


@pytest.fixture(scope="module")
def tested(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation of that run."""
    folder = tmp_path_factory.mktemp("tested")
    weights = str(trained / "epoch_8.pth")
    assert runner.test([CONFIG, weights, "--work-dir", str(folder), *options(8)]) == 0
    return folder


def report_of(folder: Path) -> dict[str, float]:
    """What the only evaluation in a folder found."""
    return json.loads(next(folder.glob("*/*.json")).read_text())


def test_training_learns_and_evaluation_repeats_what_it_saw(trained: Path, tested: Path) -> None:
    steps = [line["loss"] for line in scalars(trained) if "loss" in line]
    assert len(steps) == 16 and np.mean(steps[-4:]) < 0.9 * np.mean(steps[:4])
    assert len(list(trained.glob("best_coco_bbox_mAP_50_epoch_*.pth"))) == 1
    seen = evaluated(scalars(trained))
    assert {key: report_of(tested)[key] for key in seen} == seen


def test_a_checkpoint_of_another_model_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [CONFIG, str(trained / "epoch_8.pth"), "--work-dir", str(tmp_path)]
    other = ["model.backbone.use_conv_embed=False", "model.neck.num_outs=4"]
    assert runner.test([*command, *options(8), *other]) == 2
    assert "epoch_8.pth does not fit the config's model, or is damaged" in capsys.readouterr().err
    (tmp_path / "junk.pth").write_bytes(b"junk")
    junk = [CONFIG, str(tmp_path / "junk.pth"), "--work-dir", str(tmp_path), *options(8)]
    assert runner.test(junk) == 2
    assert "junk.pth does not fit the config's model, or is damaged" in capsys.readouterr().err


def test_two_processes_train_and_evaluate_all_images(trained: Path, tmp_path: Path) -> None:
    """Through torchrun, which is noticed, on from a checkpoint of one process in another folder.

    One process finds the same AP for what the two have written.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(REPO / "detection/train.py"), CONFIG, "--work-dir", str(tmp_path / "two")]
    done = subprocess.run(
        [*command, "--resume", str(trained / "epoch_8.pth"), *options(10)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [line for line in scalars(tmp_path / "two") if "loss" in line]
    assert [line["epoch"] for line in steps] == [9, 10], "each process has half of the images"
    weights = str(tmp_path / "two/epoch_10.pth")
    assert runner.test([CONFIG, weights, "--work-dir", str(tmp_path / "one"), *options(10)]) == 0
    both = evaluated(scalars(tmp_path / "two"))
    assert {key: report_of(tmp_path / "one")[key] for key in both} == both


# --- Pictures -----------------------------------------------------------------------------------------------


def config_of(trained: Path) -> str:
    """The config that training wrote beside its checkpoints, with the options of its command line."""
    return str(trained / "demo_mask_rcnn.py")


def test_pictures(scenes: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named as the images, enlarged where those are small; with lower thresholds more is drawn."""
    image = str(scenes / "detection/val2017/000000000001.jpg")
    command = [image, "--config", config_of(trained), "--checkpoint", str(trained / "epoch_8.pth")]
    drawn = []
    for threshold in (0.0, 1.0):
        out = tmp_path / str(threshold)
        assert predict.main([*command, "--out", str(out), "--threshold", str(threshold)]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == f"{out}/000000000001.png: {'no' if threshold else 100} objects above {threshold}"
        drawn.append(np.asarray(Image.open(out / "000000000001.png")).astype(int))
    assert drawn[0].shape == drawn[1].shape == (472, 640, 3)
    assert (np.abs(drawn[0] - drawn[1]).sum(axis=2) > 30).mean() > 0.01, "nothing was drawn"
    scene = np.asarray(Image.open(image).resize((640, 472), Image.BICUBIC)).astype(int)
    assert np.abs(drawn[1] - scene).mean() < 4, "the image itself, in its colours"


def test_mistakes_with_pictures(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = ["--config", config_of(trained), "--checkpoint", str(trained / "epoch_8.pth")]
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    assert predict.main([str(text), *weights]) == 2
    assert "text.jpg: not an image" in capsys.readouterr().err
    assert predict.main([str(text), "text.png", *weights]) == 2
    assert "several images would become text.png" in capsys.readouterr().err


# --- The demo -----------------------------------------------------------------------------------------------


def test_the_demo_tells_what_it_reached(scenes: Path, trained: Path, tested: Path) -> None:
    """`make demo-detection` reads its figures from the log of a real evaluation; a low one is an error."""
    done, commands = make_demo("detection", scenes, {"train": trained, "test": tested}, "DETECTION_LEAST=-1")
    assert done.returncode == 0, done.stderr
    names = [f"detection/{name}.py" for name in ("train", "test", "predict")]
    assert [words[0] for words in commands] == ["-m", *names]
    best = f"{scenes}/output/detection/train/{next(trained.glob('best_*.pth')).name}"
    assert f"checkpoint  {best}" in done.stdout
    figures = re.search(r"box AP +(.+), at IoU 0.5 (.+)\nmask AP +(.+), at IoU 0.5 (.+)\n", done.stdout)
    keys = ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50")
    report = report_of(tested)
    assert figures and [float(text) for text in figures.groups()] == [report[f"coco/{key}"] for key in keys]
    runner.parse_train(commands[1][1:])
    assert runner.parse_test(commands[2][1:]).checkpoint == best
    drawn = parse("", commands[3][1:])
    assert (len(drawn.images), drawn.checkpoint) == (3, best)
    done, _ = make_demo("detection", scenes, {"train": trained, "test": tested}, "DETECTION_LEAST=1")
    assert done.returncode == 2 and "expected to pass a box AP of 1 at IoU 0.5" in done.stderr
