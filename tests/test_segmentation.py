"""Segmentation's commands at work: training, resuming, two processes, evaluation, pictures, the demo."""

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

pytest.importorskip("mmseg", reason="needs OpenMMLab's packages: make setup-openmmlab")

from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from openmmlab_configs import check_weight_decay
from openmmlab_runs import ONE_PROCESS, in_scope, run_make, scalars

from data.demo import DemoOptions, write_demo
from openmmlab import runner
from segmentation import predict

CONFIG = str(REPO / "segmentation/configs/demo_upernet.py")
FEW = {  # over the demo's options: a model of few weights, evaluated after every second epoch
    "model.backbone.depths": [1, 1, 1, 1],
    "model.backbone.embed_dim": 16,
    "model.decode_head.in_channels": [16, 32, 64, 128],
    "model.decode_head.channels": 32,
    "model.auxiliary_head.in_channels": 64,
    "param_scheduler.0.end": 2,
    "optim_wrapper.optimizer.lr": 3e-3,
    "train_cfg.val_interval": 2,
    "train_dataloader.batch_size": 2,
    "default_hooks.checkpoint.interval": 2,
    "default_hooks.logger.interval": 1,
    **ONE_PROCESS,
}
SCENES = DemoOptions(train_scenes=4, val_scenes=3, scene_width=122, scene_height=90)


TESTS = ("test", "test-multi-scale")  # folders of the demo's evaluations
FEW_OF_THE_DEMO = """
_base_ = {config!r}
train_dataloader = dict(dataset=dict(indices=4), num_workers=0, persistent_workers=False)
val_dataloader = dict(dataset=dict(indices=2), num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(checkpoint=dict(interval=1))
"""


@pytest.fixture(scope="module", autouse=True)
def in_mmseg() -> Iterator[None]:
    with in_scope("mmseg"):
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder with few small scenes, of no round size."""
    root = tmp_path_factory.mktemp("demo")
    write_demo(root, ["segmentation"], SCENES)
    return root


def options(epochs: int) -> list[str]:
    return ["--cfg-options", f"train_cfg.max_epochs={epochs}", *(f"{k}={v}" for k, v in FEW.items())]


def evaluated(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The last evaluation."""
    last = [line for line in lines if "mIoU" in line][-1]
    return {key: last[key] for key in ("aAcc", "mIoU", "mAcc")}


def found_in(work_dir: Path) -> dict[str, float]:
    """What the only evaluation in a folder found."""
    return evaluated([json.loads(next(work_dir.glob("*/*.json")).read_text())])


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
    assert len(steps) == 16 and np.mean(steps[-4:]) < 0.8 * np.mean(steps[:4])
    assert [path.name for path in sorted(trained.glob("epoch_*.pth"))] == ["epoch_6.pth", "epoch_8.pth"]
    assert len(list(trained.glob("best_mIoU_epoch_*.pth"))) == 1


def test_processes_without_gpus_normalise_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """BatchNorm over all processes, which the released configs have, exists on GPUs only."""
    config = str(REPO / "segmentation/configs/upernet_focal-tiny_8xb2-160k_ade20k-512x512.py")
    for launcher, gpu, kind in (
        ("pytorch", True, "SyncBN"),
        ("pytorch", False, "BN"),
        ("none", False, "SyncBN"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        model = runner.training_config(runner.parse_train([config, "--launcher", launcher])).model
        assert {head.norm_cfg.type for head in (model.decode_head, model.auxiliary_head)} == {kind}


def test_no_decay_for_norms() -> None:
    """Not even those of the heads, which learn three times as fast as the backbone."""
    config = runner.read_config(CONFIG)
    model = MODELS.build(config.model)
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    check_weight_decay(model, groups, 0.05)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for key, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(1e-3 if key.startswith("backbone.") else 3e-3), key


def test_resuming_goes_on(trained: Path, tmp_path: Path) -> None:
    """From a named file in another folder, and from the newest of its own."""
    command = [CONFIG, "--work-dir", str(tmp_path)]
    assert runner.train([*command, "--resume", str(trained / "epoch_8.pth"), *options(10)]) == 0
    assert [line["epoch"] for line in scalars(tmp_path) if "loss" in line] == [9, 9, 10, 10]
    assert runner.train([*command, "--resume", *options(12)]) == 0
    assert [line["epoch"] for line in scalars(tmp_path) if "loss" in line] == [11, 11, 12, 12]


def of_two_minds(checkpoint: Path, target: Path, scenes: Path) -> str:
    """A copy whose head says background or not at random features' bidding, each for half of an image's
    pixels, so that a scale changes much."""
    from mmseg.apis import inference_model  # needs the operators that `runner` stands in for

    content = torch.load(checkpoint, weights_only=False)
    weight, bias = (content["state_dict"][f"decode_head.conv_seg.{name}"] for name in ("weight", "bias"))
    bias.fill_(-100.0)[:2] = 0.0
    weight.zero_()[0] = torch.randn(weight.shape[1:], generator=torch.Generator().manual_seed(0))
    config = runner.read_config(CONFIG)
    config.merge_from_dict(FEW)
    model = MODELS.build(config.model).eval()
    model.load_state_dict(content["state_dict"])
    model.cfg = config
    image = min((scenes / "segmentation/images/validation").iterdir())
    bias[1] = inference_model(model, str(image)).seg_logits.data[0].median()
    torch.save(content, target)
    return str(target)


def test_evaluation_repeats_what_training_saw(scenes: Path, trained: Path, tmp_path: Path) -> None:
    """Epoch by epoch, of a model that finds something else after each."""
    start = of_two_minds(trained / "epoch_8.pth", tmp_path / "two_minds.pth", scenes)
    each = ["train_cfg.val_interval=1", "default_hooks.checkpoint.interval=1"]
    folder = str(tmp_path / "run")
    assert runner.train([CONFIG, "--work-dir", folder, "--resume", start, *options(10), *each]) == 0
    seen = [line for line in scalars(tmp_path / "run") if "mIoU" in line]
    assert len(seen) == 2 and evaluated(seen[:1])["mIoU"] != evaluated(seen)["mIoU"]
    for number, line in enumerate(seen, start=9):
        command = [CONFIG, f"{folder}/epoch_{number}.pth", "--work-dir", str(tmp_path / str(number))]
        assert runner.test([*command, *options(10)]) == 0
        assert found_in(tmp_path / str(number)) == evaluated([line]) and 10 < line["aAcc"] < 90


def test_multi_scale_evaluation(scenes: Path, trained: Path, tmp_path: Path) -> None:
    """At the test scale alone it is the plain evaluation; at the config's scales it is another."""
    checkpoint = of_two_minds(trained / "epoch_8.pth", tmp_path / "two_minds.pth", scenes)
    once = tmp_path / "once.py"
    once.write_text(
        f"_base_ = {CONFIG!r}\n"
        "steps = [[step] for step in _base_.test_pipeline[1:]]\n"
        "tta_pipeline = [_base_.load[0], dict(type='TestTimeAug', transforms=steps)]\n"
    )
    runs = {"plain": [CONFIG], "once": [str(once), "--multi-scale"], "several": [CONFIG, "--multi-scale"]}
    for name, (config, *flag) in runs.items():
        command = [config, checkpoint, *flag, "--work-dir", str(tmp_path / name)]
        assert runner.test([*command, *options(8)]) == 0
    plain, at_once, at_several = (found_in(tmp_path / name) for name in runs)
    assert at_once == plain and 10 < plain["aAcc"] < 90
    assert at_several["aAcc"] != plain["aAcc"]


def test_a_checkpoint_of_another_model_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [CONFIG, str(trained / "epoch_8.pth"), "--work-dir", str(tmp_path)]
    assert runner.test([*command, *options(8), "model.backbone.use_conv_embed=False"]) == 2
    assert "epoch_8.pth does not fit the config's model" in capsys.readouterr().err


def test_two_processes_train_and_evaluate_all_images(scenes: Path, trained: Path, tmp_path: Path) -> None:
    """Through torchrun, which is noticed. One process finds the same mIoU for what the two have written."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(REPO / "segmentation/train.py"), CONFIG, "--work-dir", str(tmp_path / "two")]
    start = of_two_minds(trained / "epoch_8.pth", tmp_path / "two_minds.pth", scenes)
    done = subprocess.run(
        [*command, "--resume", start, *options(10)],
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
    assert found_in(tmp_path / "one") == evaluated(scalars(tmp_path / "two"))
    assert 10 < found_in(tmp_path / "one")["aAcc"] < 90, "it finds more than one class"


def test_the_scripts_run_without_an_installation(tmp_path: Path) -> None:
    """From any folder: they find this repository by themselves, as train.py above."""
    for name in ("test", "predict"):
        done = subprocess.run(
            [sys.executable, str(REPO / f"segmentation/{name}.py"), "--help"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
        assert done.returncode == 0 and "--" in done.stdout, done.stderr[-2000:]


def test_the_demo_runs_and_judges(tmp_path: Path) -> None:
    """`make demo-segmentation` with few scenes for one epoch: what it prints, and that a low mIoU fails."""
    few = tmp_path / "few.py"
    few.write_text(FEW_OF_THE_DEMO.format(config=CONFIG))
    done = run_make("demo-segmentation", tmp_path, f"SEGMENTATION_CONFIG={few}", "SEGMENTATION_LEAST=100")
    assert done.returncode == 2
    assert "error: the demo is expected to pass a mIoU of 100 %" in done.stderr, done.stderr[-2000:]
    run_dir = tmp_path / "output/segmentation"
    assert f"checkpoint  {run_dir}/train/best_mIoU_epoch_1.pth" in done.stdout
    figures = re.search(r"mIoU +([\d.]+) %, at several scales ([\d.]+) %\n", done.stdout)
    reports = [json.loads(next((run_dir / name).glob("*/*.json")).read_text()) for name in TESTS]
    assert figures and [float(text) for text in figures.groups()] == [
        round(report["mIoU"], 2) for report in reports
    ]
    assert len(list((run_dir / "pictures").glob("*.png"))) == 4


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


def test_overlay_mixes_colours() -> None:
    image = np.full((2, 2, 3), 100, dtype=np.uint8)
    labels, where = np.array([[0, 1], [1, 0]]), np.array([[True, True], [False, True]])
    picture = predict.overlay(image, labels, where, np.array([[0, 0, 0], [200, 100, 0]], dtype=np.uint8))
    assert picture.tolist() == [[[45] * 3, [155, 100, 45]], [[100] * 3, [45] * 3]]


@pytest.mark.parametrize("height", [30, 200, 480])
@pytest.mark.parametrize("count", [1, 12, 150])
def test_legends_show_every_class(height: int, count: int) -> None:
    """Each colour once, at full size, with dark letters beside it, and white at every edge."""
    colours = np.array([[i % 16 * 10 + 20, i // 16 * 20 + 20, 90] for i in range(count)], dtype=np.uint8)
    names = [f"traffic light {i}  {i}.5%" for i in range(count)]
    canvas = predict.legend(names, colours, height)
    assert len(canvas) == max(height, predict.LINE + predict.MARGIN)
    codes, wanted = canvas @ [1, 256, 65536], colours @ [1, 256, 65536]
    for code in wanted:
        rows, columns = np.nonzero(codes == code)
        assert len(rows) == (predict.SWATCH - 1) ** 2
        beside = canvas[rows.min() : rows.max(), columns.max() + 4 : columns.max() + 60]
        assert beside.min() < 50
    for edge in (canvas[0], canvas[-1], canvas[:, 0], canvas[:, -1]):
        assert (edge == 255).all()


def test_pictures_of_different_heights_stand_side_by_side() -> None:
    joined = predict.beside(np.zeros((3, 2, 3), np.uint8), np.full((5, 1, 3), 7, np.uint8))
    assert joined.shape == (5, 3, 3) and (joined[3:, :2] == 255).all() and (joined[:, 2] == 7).all()
