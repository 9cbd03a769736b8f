"""Detection's and segmentation's commands at work: training, resuming, evaluation, pictures, the demos."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from PIL import Image

pytest.importorskip("mmdet", reason="needs OpenMMLab's packages: make setup-openmmlab")

from openmmlab_runs import ONE_PROCESS, evaluated, in_scope, make_demo, report_of, scalars

import detection.predict
import segmentation.predict
from openmmlab import runner
from openmmlab.predict import parse

PACKAGES = {"detection": "mmdet", "segmentation": "mmseg"}
CONFIGS = {
    "detection": str(REPO / "detection/configs/demo_mask_rcnn.py"),
    "segmentation": str(REPO / "segmentation/configs/demo_upernet.py"),
}
WIDTHS = [16, 32, 64, 128]
FEW = {  # over the demos' options: a model of few weights, 8 epochs of 2 steps
    "model.backbone.depths": [1, 1, 1, 1],
    "model.backbone.embed_dim": WIDTHS[0],
    "train_cfg.max_epochs": 8,
    "train_cfg.val_interval": 4,
    "train_dataloader.batch_size": 2,
    "default_hooks.checkpoint.interval": 4,
    "default_hooks.logger.interval": 1,
    "optim_wrapper.optimizer.lr": 3e-3,
    **ONE_PROCESS,
}
OWN = {  # the same, of a task
    "detection": {"model.neck.in_channels": WIDTHS, "model.test_cfg.rcnn.score_thr": 0.0},
    "segmentation": {
        "model.decode_head.in_channels": WIDTHS,
        "model.decode_head.channels": 32,
        "model.auxiliary_head.in_channels": WIDTHS[2],
        "param_scheduler.0.end": 2,
    },
}
TESTS = {  # by the name of their work dir in the demo: flags
    "detection": {"test": []},
    "segmentation": {"test": [], "test-multi-scale": ["--multi-scale"]},
}

pytestmark = pytest.mark.usefixtures("in_demo")
of_detection, of_segmentation = (pytest.mark.parametrize("task", [name], indirect=True) for name in PACKAGES)


@pytest.fixture(scope="module", params=PACKAGES)
def task(request: pytest.FixtureRequest) -> Iterator[str]:
    with in_scope(PACKAGES[request.param]):
        yield request.param


def options(task: str, work_dir: Path, *more: str) -> list[str]:
    few = [f"{key}={value}" for key, value in (FEW | OWN[task]).items()]
    return ["--work-dir", str(work_dir), "--cfg-options", *few, *more]


@pytest.fixture(scope="module")
def trained(task: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("trained")
    assert runner.train([CONFIGS[task], *options(task, folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def tested(task: str, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the evaluations of that run; that at several scales differs: it has one image."""
    folders = {}
    for name, flags in TESTS[task].items():
        folders[name] = tmp_path_factory.mktemp(name)
        words = options(task, folders[name], *(["test_dataloader.dataset.indices=1"] if flags else []))
        assert runner.test([CONFIGS[task], str(trained / "epoch_8.pth"), *flags, *words]) == 0
    return folders


def test_training_learns_and_evaluation_repeats_what_it_saw(trained: Path, tested: dict[str, Path]) -> None:
    lines = scalars(trained)
    steps = [line["loss"] for line in lines if "loss" in line]
    assert len(steps) == 16 and np.mean(steps[-4:]) < 0.9 * np.mean(steps[:4])
    assert len(list(trained.glob("best_*_epoch_*.pth"))) == 1
    seen = evaluated(lines)
    assert seen and {key: report_of(tested["test"])[key] for key in seen} == seen


@of_detection
def test_a_checkpoint_of_another_model_is_refused(
    task: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["model.backbone.use_conv_embed=False", "model.neck.num_outs=4"]
    file = trained / "epoch_8.pth"
    assert runner.test([CONFIGS[task], str(file), *options(task, tmp_path, *other)]) == 2
    assert "epoch_8.pth does not fit the config's model, or is damaged" in capsys.readouterr().err


AVERAGED = """
_base_ = {!r}
custom_hooks = [dict(type="EMAHook", momentum=0.5, priority=49)]
optim_wrapper = dict(_delete_=True, optimizer=dict(type="AdamW", lr=3e-3))
"""


@of_segmentation
def test_averaged_weights_are_evaluated(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in training. A checkpoint that was cut off is told when it is resumed."""
    config, few = str(tmp_path / "own.py"), ["train_cfg.max_epochs=2", "train_cfg.val_interval=2"]
    Path(config).write_text(AVERAGED.format(CONFIGS[task]))
    few = [word for word in options(task, tmp_path / "run", *few) if "optim_wrapper" not in word]
    assert runner.train([config, *few, "default_hooks.checkpoint.interval=2"]) == 0
    seen, last = evaluated(scalars(tmp_path / "run")), tmp_path / "run/epoch_2.pth"
    assert runner.test([config, str(last), *options(task, tmp_path / "test")]) == 0
    assert seen and {key: report_of(tmp_path / "test")[key] for key in seen} == seen
    last.write_bytes(last.read_bytes()[:-999])
    assert runner.train([config, "--resume", *few]) == 2
    assert "epoch_2.pth does not fit the config's model, or is damaged" in capsys.readouterr().err


@of_detection
def test_two_processes_train_and_evaluate_all_images(task: str, trained: Path, tmp_path: Path) -> None:
    """Through torchrun, which is noticed, on from a checkpoint of one process in another folder.

    One process finds the same AP for what the two have written.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    resume = ["--resume", str(trained / "epoch_8.pth")]
    words = options(task, tmp_path / "two", "train_cfg.max_epochs=10")
    done = subprocess.run(
        [*launcher, str(REPO / "detection/train.py"), CONFIGS[task], *resume, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = scalars(tmp_path / "two")
    epochs = [line["epoch"] for line in lines if "loss" in line]
    assert epochs == [9, 10], "each process has half of the images"
    weights = str(tmp_path / "two/epoch_10.pth")
    assert runner.test([CONFIGS[task], weights, *options(task, tmp_path / "one")]) == 0
    both = evaluated(lines)
    assert {key: report_of(tmp_path / "one")[key] for key in both} == both


# --- Pictures -----------------------------------------------------------------------------------------------


def weights_of(trained: Path) -> list[str]:
    """The checkpoint, and the config that training wrote beside it, with the options of its command line."""
    (config,) = trained.glob("demo_*.py")
    return ["--config", str(config), "--checkpoint", str(trained / "epoch_8.pth")]


def test_pictures(
    task: str, scenes: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named as the images, enlarged where those are small; with lower thresholds more is drawn."""
    folder = {"detection": "detection/val2017", "segmentation": "segmentation/images/validation"}[task]
    image = min((scenes / folder).iterdir())
    tool = {"detection": detection.predict, "segmentation": segmentation.predict}[task]
    pictures, said = [], []
    (option, config, *weights), own = weights_of(trained), tmp_path / "own.py"
    own.write_text(f"_base_ = {config!r}\ntest_pipeline = []  # a variable: the loader's counts\n")
    for threshold in ("0.0", "1.1"):
        out = ["--out", str(tmp_path / threshold), "--threshold", threshold]
        assert tool.main([str(image), option, str(own), *weights, *out]) == 0
        path, text = capsys.readouterr().out.splitlines()[-1].split(": ")
        assert path == f"{tmp_path}/{threshold}/{image.stem}.png"
        pictures.append(np.asarray(Image.open(path)).astype(int))
        said.append(text)
    full, bare = (picture[:, :640] for picture in pictures)
    assert full.shape == bare.shape == (472, 640, 3)
    assert (np.abs(full - bare).sum(axis=2) > 30).mean() > 0.01, "nothing was drawn"
    scene = np.asarray(Image.open(image).resize((640, 472), Image.BICUBIC)).astype(int)
    assert np.abs(bare - scene).mean() < 4, "the image itself, in its colours"
    if task == "detection":
        assert said == ["100 objects above 0.0", "no objects above 1.1"]
        return
    grey = (1 - tool.OPACITY) * bare + tool.OPACITY * 40
    assert (np.abs(full - grey).max(axis=2) <= 1).mean() > 0.5, "most of it is background, in its own colour"
    with_classes, empty = (picture[:, 640:] for picture in pictures)  # the legends
    assert (with_classes == 40).all(axis=2).sum() > 200 and empty.size and (empty == 255).all()


@of_detection
def test_mistakes_with_pictures(
    task: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    assert detection.predict.main([str(text), *weights_of(trained)]) == 2
    assert "text.jpg: not an image" in capsys.readouterr().err
    (tmp_path / "empty.jpg").touch()
    assert detection.predict.main([str(tmp_path / "empty.jpg"), *weights_of(trained)]) == 2
    assert "empty.jpg: not an image" in capsys.readouterr().err
    assert detection.predict.main([str(text), *weights_of(trained), "--device", "cuda:99"]) == 2
    assert "(--device): expected a " in capsys.readouterr().err
    assert detection.predict.main([str(text), "text.png", *weights_of(trained)]) == 2
    assert "several images would become text.png" in capsys.readouterr().err
    image = text.rename(tmp_path / "own.png")
    out = ["--out", str(tmp_path)]
    assert detection.predict.main([str(image), *weights_of(trained), *out]) == 2
    assert "own.png would be replaced" in capsys.readouterr().err and image.read_text() == "no image"


# --- The demos ----------------------------------------------------------------------------------------------


def test_the_demo_tells_what_it_reached(
    task: str, scenes: Path, trained: Path, tested: dict[str, Path]
) -> None:
    """`make demo-...` reads its figures from the logs of real evaluations; a low one is an error."""
    runs, least = {"train": trained, **tested}, f"{task.upper()}_LEAST"
    done, commands = make_demo(task, scenes, runs, f"{least}=-1")
    assert done.returncode == 0, done.stderr
    names = [f"{task}/{name}.py" for name in ("train", *["test"] * len(tested), "predict")]
    assert [words[0] for words in commands] == ["-m", *names]
    best = f"{scenes}/output/{task}/train/{next(trained.glob('best_*.pth')).name}"
    assert f"checkpoint  {best}" in done.stdout
    reports = [report_of(folder) for folder in tested.values()]
    if task == "detection":
        pattern = r"box AP +(.+), at IoU 0.5 (.+)\nmask AP +(.+), at IoU 0.5 (.+)\n"
        keys = ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50")
        expected = [reports[0][f"coco/{key}"] for key in keys]
    else:
        pattern = r"mIoU +([\d.]+) %, at several scales ([\d.]+) %\n"
        expected = [round(report["mIoU"], 2) for report in reports]
        assert len({*expected}) == 2
    figures = re.search(pattern, done.stdout)
    assert figures and [float(text) for text in figures.groups()] == expected
    runner.parse_train(commands[1][1:])
    asked = [runner.parse_test(words[1:]) for words in commands[2:-1]]
    assert [(args.checkpoint, args.tta) for args in asked] == [
        (best, bool(flags)) for flags in TESTS[task].values()
    ]
    drawn = parse("", commands[-1][1:])
    assert (len(drawn.images), drawn.checkpoint) == (3, best)
    done, _ = make_demo(task, scenes, runs, f"{least}=100")
    assert done.returncode == 2 and re.search("error: the demo is expected to pass a .* of 100", done.stderr)
