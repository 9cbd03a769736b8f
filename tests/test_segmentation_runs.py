"""Segmentation's commands on configs for ADE20K: those of get_started.md, and its example of a data set.

The demo scenes have ADE20K's file names. Channels and images are small and runs take a step or two.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg", reason="needs OpenMMLab's packages: make setup-openmmlab")

from conftest import REPO
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS
from mmengine.structures import PixelData
from openmmlab_configs import SMALL
from openmmlab_runs import ONE_PROCESS, scalars
from PIL import Image
from test_docs import blocks, command_of

from data.demo import DemoOptions, write_demo
from models import VARIANTS, FocalTransformer
from openmmlab import runner
from segmentation import predict

PAGE = REPO / "segmentation/get_started.md"
CONFIGS = "segmentation/configs"
LAST = "iter_160000.pth"  # the checkpoint that the page evaluates
SMALLER = {  # over a config for ADE20K
    **{f"model.backbone.{key}": value for key, value in SMALL.items()},
    "model.decode_head.in_channels": [8, 16, 32, 64],
    "model.decode_head.channels": 16,
    "model.auxiliary_head.in_channels": 32,
    "model.auxiliary_head.channels": 16,
    "model.data_preprocessor.size": (96, 96),
    "train_dataloader.dataset.pipeline.2.scale": (600, 80),
    "train_dataloader.dataset.pipeline.3.crop_size": (96, 96),
    **{f"{split}_dataloader.dataset.pipeline.1.scale": (600, 80) for split in ("val", "test")},
    "test_pipeline.1.scale": (600, 80),
    **{f"tta_pipeline.1.transforms.0.{n}.scale": (600, 40 + 20 * n) for n in range(6)},
    **ONE_PROCESS,
    "default_hooks.logger.interval": 1,
    "train_cfg.val_interval": 1,
    "default_hooks.checkpoint.interval": 1,
}
WITHOUT = {"--amp": ["--no-amp"], "--launcher": [], "slurm": []}  # what a command cannot do on this machine
SCENES = DemoOptions(train_scenes=2, val_scenes=1, scene_width=122, scene_height=90)

pytestmark = pytest.mark.usefixtures("in_mmseg")


@pytest.fixture(scope="module")
def ade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the page describes it: the configs, data/ade, and the weights of a classifier."""
    root = tmp_path_factory.mktemp("ade")
    for name in ("segmentation", "openmmlab"):
        (root / name).symlink_to(REPO / name)
    scenes = write_demo(root / "demo", ["segmentation"], SCENES)["segmentation"]
    (root / "data/ade").mkdir(parents=True)
    (root / "data/ade/ADEChallengeData2016").symlink_to(scenes)
    options = {**VARIANTS["focal_tiny_patch4_window7_224"], **SMALL}
    classifier = FocalTransformer(**options, num_classes=3)
    torch.save({"model": classifier.state_dict()}, root / "focal_tiny.pth")
    return root


@pytest.fixture(autouse=True)
def in_folder(ade: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ade)


def run(command: str, arguments: list[str], steps: int) -> int:
    """A command's status, for a small model and small images; training ends after so many steps."""
    words = [part for word in arguments for part in WITHOUT.get(word, [word])]
    options = SMALLER | {"train_cfg.max_iters": steps}
    start = len(words) if "--cfg-options" not in words else words.index("--cfg-options") + 1
    words[start:start] = [
        *(["--cfg-options"] if start == len(words) else []),
        *(f"{key}={value}" for key, value in options.items()),
    ]
    return getattr(runner, command)(words)


def check_run(work_dir: Path, step: int) -> None:
    """It trained this one step, evaluated after it, and kept it."""
    lines = scalars(work_dir)
    assert [line["step"] for line in lines if "loss" in line] == [step]
    assert [(line["step"], 0 <= line["mIoU"] <= 100) for line in lines if "mIoU" in line] == [(step, True)]
    assert (work_dir / f"iter_{step}.pth").is_file()


# --- The page's commands ------------------------------------------------------------------------------------


def commands(section: str) -> list[tuple[str, list[str]]]:
    """Name and arguments of segmentation's commands in the sh blocks below a title of the page."""
    text = PAGE.read_text().splitlines()
    first = text.index(f"## {section}")
    last = next((n for n, line in enumerate(text) if n > first and line.startswith("## ")), len(text))
    inside = [block for block in blocks(PAGE, "sh") if first < block.line < last]
    found = [command_of(words) for block in inside for words in block.commands()]
    return [(name.partition(".")[2], words) for name, words in found if name.startswith("segmentation.")]


def test_the_pages_training_and_evaluation_run() -> None:
    """In the page's order, as its reader would, but for processes, mixed precision and sizes."""
    ran: dict[Path, int] = {}
    for name, arguments in commands("Train"):
        work_dir = Path("work_dirs") / Path(arguments[0]).stem
        ran[work_dir] = ran[work_dir] + 1 if "--resume" in arguments else 1
        assert (name, run(name, arguments, ran[work_dir])) == ("train", 0), arguments
        check_run(work_dir, ran[work_dir])
        log = max(work_dir.glob("*/*.log"), key=lambda path: path.stat().st_mtime_ns).read_text()
        random = not {"--pretrained", "--resume"} & {*arguments}
        assert ("the backbone starts from random weights" in log) == random
        shutil.copy(work_dir / f"iter_{ran[work_dir]}.pth", work_dir / LAST)
    assert len(ran) == 3

    found = []
    for name, arguments in commands("Evaluate"):
        assert (name, run(name, arguments, 1)) == ("test", 0), arguments
        newest = max(Path(arguments[1]).parent.glob("*/*.json"), key=lambda path: path.stat().st_mtime_ns)
        found.append(json.loads(newest.read_text()))
    assert len(found) == 3 and all(0 <= line["mIoU"] <= 100 for line in found)


def test_what_is_true_gets_full_marks() -> None:
    """The config's evaluator, given what the config's own test set says is there; and given another class."""
    config = runner.read_config(f"{CONFIGS}/upernet_focal-small_8xb2-160k_ade20k-512x512.py")
    dataset = DATASETS.build(config.test_dataloader.dataset)
    sample = dataset[0]["data_samples"]
    truth = sample.gt_sem_seg.data
    for labels, least, most in ((truth, 100, 100), (torch.where(truth == 0, 149, truth), 30, 95)):
        sample.pred_sem_seg = PixelData(data=labels)
        evaluator = Evaluator(config.test_evaluator)
        evaluator.dataset_meta = dataset.metainfo
        evaluator.process([sample])
        assert least <= evaluator.evaluate(1)["mIoU"] <= most
    assert len(truth.unique()) > 3 and truth.max() < 11


# --- One's own data -----------------------------------------------------------------------------------------


def write_streets(scenes: Path, root: Path, zero_is_nothing: bool) -> None:
    """The scenes with three classes: background, low digits, high ones; some pixels are nothing."""
    shutil.copytree(scenes / "images", root / "images")
    for file in scenes.glob("annotations/*/*.png"):
        old = np.asarray(Image.open(file))
        labels = np.select([old == 1, old < 7], [0, 1], 2).astype(np.uint8)
        labels[:5] = 255
        target = root / file.relative_to(scenes)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels + np.uint8(zero_is_nothing)).save(target)  # 255 becomes 0


@pytest.mark.parametrize("zero_is_nothing", [False, True])
def test_the_pages_own_data_set(
    zero_is_nothing: bool, ade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The printed config's labels are those of the files; it trains, evaluates, augments and predicts."""
    scenes = ade / "data/ade/ADEChallengeData2016"
    monkeypatch.chdir(tmp_path)
    write_streets(scenes, Path("streets"), zero_is_nothing)
    shutil.copytree(REPO / CONFIGS, CONFIGS)
    Path("openmmlab").symlink_to(REPO / "openmmlab")
    (own,) = (b for b in blocks(PAGE, "python") if "reduce_zero_label" in b.text)
    names: dict[str, str] = {}
    exec(own.text, names)
    said = names["config"].replace("reduce_zero_label=False", f"reduce_zero_label={zero_is_nothing}")
    Path(CONFIGS, "streets.py").write_text(said)
    config = runner.read_config(f"{CONFIGS}/streets.py")
    labels = DATASETS.build(config.test_dataloader.dataset)[0]["data_samples"].gt_sem_seg.data[0].numpy()
    file = np.asarray(Image.open("streets/annotations/validation/00000001.png"))
    assert np.array_equal(labels, file - np.uint8(zero_is_nothing))
    assert {*np.unique(labels)} == {0, 1, 2, 255}
    if zero_is_nothing:
        return

    command = [f"{CONFIGS}/streets.py", "--work-dir", "out"]
    assert run("train", command, 1) == 0
    check_run(Path("out"), 1)
    assert run("test", [command[0], "out/iter_1.pth", "--work-dir", "out", "--multi-scale"], 1) == 0
    image = "streets/images/validation/00000001.jpg"
    assert predict.main([image, "--config", "out/streets.py", "--checkpoint", "out/iter_1.pth"]) == 0
    assert Path("predictions/00000001.png").is_file()
