"""Detection's commands at work: training, resuming, two processes, evaluation, pictures, the demo."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image

pytest.importorskip("mmdet", reason="needs OpenMMLab's packages: make setup-openmmlab")

from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS
from openmmlab_configs import batch, check_weight_decay, edit
from openmmlab_runs import ONE_PROCESS, in_scope, run_make, scalars
from test_detection_configs import check_detections, one_step

from data.demo import DemoOptions, write_demo
from detection import demo, predict
from openmmlab import runner
from openmmlab.predict import picture_paths

CONFIG = str(REPO / "detection/configs/demo_mask_rcnn.py")
FEW = {  # over the demo's options: a model of few weights, evaluated after every second epoch
    "model.backbone.depths": [1, 1, 1, 1],
    "model.backbone.embed_dim": 16,
    "model.neck.in_channels": [16, 32, 64, 128],
    "model.test_cfg.rcnn.score_thr": 0.0,
    "train_cfg.val_interval": 2,
    "default_hooks.checkpoint.interval": 2,
    "default_hooks.logger.interval": 1,
    "optim_wrapper.optimizer.lr": 3e-3,
    "randomness.seed": 1,
    **ONE_PROCESS,
}
SCENES = DemoOptions(train_scenes=4, val_scenes=3, scene_width=122, scene_height=90)


FEW_OF_THE_DEMO = """
_base_ = {config!r}
train_dataloader = dict(dataset=dict(indices=2), num_workers=0, persistent_workers=False)
val_dataloader = dict(dataset=dict(indices=2), num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(checkpoint=dict(interval=1))
model = dict(test_cfg=dict(rcnn=dict(score_thr=0.0)))
"""


@pytest.fixture(scope="module", autouse=True)
def in_mmdet() -> Iterator[None]:
    with in_scope("mmdet"):
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder with few small scenes, of no round size."""
    root = tmp_path_factory.mktemp("demo")
    write_demo(root, ["detection"], SCENES)
    return root


def options(epochs: int) -> list[str]:
    return ["--cfg-options", f"train_cfg.max_epochs={epochs}", *(f"{k}={v}" for k, v in FEW.items())]


def evaluated(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The last evaluation: box and mask AP."""
    return [{k: v for k, v in line.items() if "mAP" in k} for line in lines if "coco/bbox_mAP" in line][-1]


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 8 epochs of 2 steps."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEMO", str(scenes))
        assert runner.train([CONFIG, "--work-dir", str(folder), *options(8)]) == 0
    return folder


@pytest.fixture(autouse=True)
def in_demo(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMO", str(scenes))


def test_training_learns_and_keeps_checkpoints(trained: Path) -> None:
    steps = [line["loss"] for line in scalars(trained) if "loss" in line]
    assert len(steps) == 16 and np.mean(steps[-4:]) < 0.9 * np.mean(steps[:4])
    assert [path.name for path in sorted(trained.glob("epoch_*.pth"))] == ["epoch_6.pth", "epoch_8.pth"]
    assert len(list(trained.glob("best_coco_bbox_mAP_50_epoch_*.pth"))) == 1


def test_resuming_goes_on(trained: Path, tmp_path: Path) -> None:
    """From a named file in another folder, and from the newest of its own."""
    command = [CONFIG, "--work-dir", str(tmp_path)]
    assert runner.train([*command, "--resume", str(trained / "epoch_8.pth"), *options(10)]) == 0
    assert [line["epoch"] for line in scalars(tmp_path) if "loss" in line] == [9, 9, 10, 10]
    assert runner.train([*command, "--resume", *options(12)]) == 0
    assert [line["epoch"] for line in scalars(tmp_path) if "loss" in line] == [11, 11, 12, 12]


def test_evaluation_repeats_what_training_saw(trained: Path, tmp_path: Path) -> None:
    command = [CONFIG, str(trained / "epoch_8.pth"), "--work-dir", str(tmp_path), *options(8)]
    assert runner.test(command) == 0
    report = json.loads(next(tmp_path.glob("*/*.json")).read_text())
    assert {key: report[key] for key in evaluated(scalars(trained))} == evaluated(scalars(trained))


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


def test_two_processes_train_and_evaluate_all_images(scenes: Path, trained: Path, tmp_path: Path) -> None:
    """Through torchrun, which is noticed. One process finds the same AP for what the two have written."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(REPO / "detection/train.py"), CONFIG, "--work-dir", str(tmp_path / "two")]
    done = subprocess.run(
        [*command, "--resume", str(trained / "epoch_8.pth"), *options(10)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DEMO": str(scenes)},
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
    alone = json.loads(next((tmp_path / "one").glob("*/*.json")).read_text())
    both = evaluated(scalars(tmp_path / "two"))
    assert {key: alone[key] for key in both} == both


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
    cases = {
        "gone.jpg: expected a file with the image": ["gone.jpg", *weights],
        "text.jpg: not an image": [str(text), *weights],
        "gone.pth: expected a file with the checkpoint": [
            str(text),
            *weights[:2],
            "--checkpoint",
            "gone.pth",
        ],
        "several images would become text.png": [str(text), "text.png", *weights],
    }
    for message, command in cases.items():
        assert predict.main([*command, "--out", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    assert picture_paths(["a/b.jpg"], "c") == [Path("c/b.png")]


# --- The methods, made small --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", demo.METHODS)
def test_small_methods_keep_their_parts(method: str) -> None:
    """The classes, losses and thresholds of the full config; other numbers of channels and proposals."""
    config, full = demo.demo_config(method), runner.read_config(f"{demo.CONFIGS}/{demo.METHODS[method]}.py")

    def kinds(node: Any) -> list[str]:
        if isinstance(node, dict):
            return [str(node.get("type")), *(kind for value in node.values() for kind in kinds(value))]
        return [kind for item in node for kind in kinds(item)] if isinstance(node, list | tuple) else []

    assert sorted(kinds(config.model)) == sorted(kinds(full.model))
    text = str(config.model.to_dict())
    assert "'num_classes': 10" in text and "'num_classes': 80" not in text
    assert not re.search(r"'(in|out|feat|conv_out)_channels': 256", text)
    assert config.model.backbone.embed_dim == 32
    assert config.train_dataloader.dataset.data_root.endswith("detection/")


@pytest.mark.parametrize("method", demo.METHODS)
def test_small_methods_train_and_detect(method: str) -> None:
    """A step reaches almost every parameter, with its weight decay; then a detection."""
    torch.manual_seed(0)
    config = demo.demo_config(method)
    model = MODELS.build(edit(config.model, lambda key, value: 0.0 if key == "score_thr" else value))
    model.init_weights()
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    check_weight_decay(model, wrapper.optimizer.param_groups, 0.05)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert torch.isfinite(one_step(model.train(), DATASETS.build(config.train_dataloader.dataset)))
    wrapper.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    changed = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert changed > 0.95 * len(before)
    test_set = DATASETS.build(config.test_dataloader.dataset)
    found = model.eval().test_step(batch(test_set, (0,)))[0].pred_instances
    check_detections(found, "segm" in config.test_evaluator.metric, method != "sparse_rcnn")


@pytest.mark.parametrize(("least", "logged"), [(0.0, 1), (1.0, 0)])
def test_the_table_of_methods(
    least: float, logged: int, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last evaluation's figures; zeros if no score was high enough and so no figure was logged."""
    monkeypatch.setitem(demo.SMALLER, "score_thr", {0.05: least})
    row = demo.train("atss", scenes / "detection", tmp_path, epochs=1)
    lines = [line for line in scalars(tmp_path / "atss") if "coco/bbox_mAP" in line]
    assert len(lines) == logged
    last = (lines or [{"coco/bbox_mAP": 0.0, "coco/bbox_mAP_50": 0.0}])[-1]
    assert (row["box AP"], row["AP50"]) == (last["coco/bbox_mAP"], last["coco/bbox_mAP_50"])
    assert row["method"] == "atss" and 0 <= row["box AP"] <= row["AP50"] <= 1 and row["mask AP"] is None
    lines = demo.table([row]).splitlines()
    assert lines[0].startswith("| method | params (M) | AP50 at first | box AP | AP50 | mask AP |")
    assert len(lines) == 3 and lines[2].startswith("| atss | 2.02 |")


# --- The demo -----------------------------------------------------------------------------------------------


def test_the_demo_tells_what_it_reached(tmp_path: Path) -> None:
    """`make demo-detection` with few of its scenes for one epoch: what it prints is what it found."""
    few = tmp_path / "few.py"
    few.write_text(FEW_OF_THE_DEMO.format(config=CONFIG))
    done = run_make("demo-detection", tmp_path, f"DETECTION_CONFIG={few}", "DETECTION_LEAST=-1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run_dir = tmp_path / "output/detection"
    assert f"checkpoint  {run_dir}/train/best_coco_bbox_mAP_50_epoch_1.pth" in done.stdout
    figures = re.search(
        r"box AP +([\d.]+), at IoU 0.5 ([\d.]+)\nmask AP +([\d.]+), at IoU 0.5 ([\d.]+)\n", done.stdout
    )
    report = json.loads(next(run_dir.glob("test/*/*.json")).read_text())
    names = ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50")
    assert figures and [float(text) for text in figures.groups()] == [
        report[f"coco/{name}"] for name in names
    ]
    assert len(list((run_dir / "pictures").glob("*.png"))) == 4
