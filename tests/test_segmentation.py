"""Segmentation's commands at work: training, evaluation, pictures, the demo."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image

pytest.importorskip("mmseg", reason="needs OpenMMLab's packages: make setup-openmmlab")

from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from openmmlab_configs import check_weight_decay
from openmmlab_runs import ONE_PROCESS, in_scope, make_demo, scalars

from data.demo import DemoOptions, write_demo
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
SCENES = DemoOptions(train_scenes=4, val_scenes=3, scene_width=122, scene_height=90)


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


def found_in(line: dict[str, float]) -> dict[str, float]:
    """The figures of an evaluation."""
    return {key: line[key] for key in ("aAcc", "mIoU", "mAcc")}


def report_of(folder: Path) -> dict[str, float]:
    """What the only evaluation in a folder found."""
    return found_in(json.loads(next(folder.glob("*/*.json")).read_text()))


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


def test_training_learns(trained: Path) -> None:
    steps = [line["loss"] for line in scalars(trained) if "loss" in line]
    assert len(steps) == 16 and np.mean(steps[-4:]) < 0.8 * np.mean(steps[:4])
    assert len(list(trained.glob("best_mIoU_epoch_*.pth"))) == 1


def test_no_decay_for_norms() -> None:
    """Not even those of the heads, which learn three times as fast as the backbone."""
    config = runner.read_config(CONFIG)
    model = MODELS.build(config.model)
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    check_weight_decay(model, groups, 0.05)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for key, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(1e-3 if key.startswith("backbone.") else 3e-3), key


@pytest.fixture(scope="module")
def runs(scenes: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An epoch of training and evaluations of its checkpoint: as it is, at one scale, at several.

    The head is a random one, which finds all classes in an image, while one trained so briefly finds one.
    """
    root = tmp_path_factory.mktemp("runs")
    content = torch.load(trained / "epoch_8.pth", weights_only=False)
    weight = content["state_dict"]["decode_head.conv_seg.weight"]
    weight.normal_(generator=torch.Generator().manual_seed(0))
    torch.save(content, root / "random.pth")
    (root / "once.py").write_text(
        f"_base_ = {CONFIG!r}\n"
        "steps = [[step] for step in _base_.test_pipeline[1:]]\n"
        "tta_pipeline = [_base_.load[0], dict(type='TestTimeAug', transforms=steps)]\n"
    )
    checkpoint = str(root / "train/epoch_1.pth")
    evaluations = {
        "test": [CONFIG, checkpoint],
        "test-once": [str(root / "once.py"), checkpoint, "--multi-scale"],
        "test-multi-scale": [CONFIG, checkpoint, "--multi-scale"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEMO", str(scenes))
        train = [CONFIG, "--work-dir", str(root / "train"), *options(1)]
        assert runner.train([*train, f"load_from={root}/random.pth"]) == 0
        for name, command in evaluations.items():
            assert runner.test([*command, "--work-dir", str(root / name), *options(1)]) == 0
    return {name: root / name for name in ("train", *evaluations)}


def test_evaluation_repeats_what_training_saw(runs: dict[str, Path]) -> None:
    """So does multi-scale evaluation at the test scale alone; at several it finds something else."""
    (seen,) = (line for line in scalars(runs["train"]) if "mIoU" in line)
    assert report_of(runs["test"]) == report_of(runs["test-once"]) == found_in(seen)
    assert report_of(runs["test-multi-scale"]) != found_in(seen) and seen["aAcc"] > 0


def test_the_demo_judges(scenes: Path, runs: dict[str, Path]) -> None:
    """`make demo-segmentation` reads its figures from the logs of real evaluations; a low one is an error."""
    done, commands = make_demo("segmentation", scenes, runs, "SEGMENTATION_LEAST=100")
    assert done.returncode == 2
    assert "error: the demo is expected to pass a mIoU of 100 %" in done.stderr
    assert commands[0] == ["-m", "data.demo", str(scenes), "--kinds", "segmentation"]
    scripts = [f"segmentation/{name}.py" for name in ("train", "test", "test", "predict")]
    assert [words[0] for words in commands[1:]] == scripts
    best = f"{scenes}/output/segmentation/train/{next(runs['train'].glob('best_*.pth')).name}"
    assert f"checkpoint  {best}" in done.stdout
    figures = re.search(r"mIoU +([\d.]+) %, at several scales ([\d.]+) %\n", done.stdout)
    expected = [round(report_of(runs[name])["mIoU"], 2) for name in ("test", "test-multi-scale")]
    assert figures and [float(text) for text in figures.groups()] == expected
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


def test_overlay_mixes_colours() -> None:
    image = np.full((2, 2, 3), 100, dtype=np.uint8)
    labels, where = np.array([[0, 1], [1, 0]]), np.array([[True, True], [False, True]])
    picture = predict.overlay(image, labels, where, np.array([[0, 0, 0], [200, 100, 0]], dtype=np.uint8))
    assert picture.tolist() == [[[45] * 3, [155, 100, 45]], [[100] * 3, [45] * 3]]


@pytest.mark.parametrize(("count", "height"), [(1, 30), (12, 480), (150, 200)])
def test_legends_show_every_class(count: int, height: int) -> None:
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
