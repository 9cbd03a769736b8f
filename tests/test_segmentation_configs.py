"""Every segmenter's config: its values, and the whole of it at work with few channels on small scenes."""

# ruff: noqa: E402
import copy
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO

pytest.importorskip("mmseg", reason="needs OpenMMLab's packages: make setup-openmmlab")

import openmmlab.mmcv_ops  # noqa: F401, I001  (before mmseg.models: makes its operators importable)
import mmseg.models  # noqa: F401
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import Evaluator
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS
from mmengine.structures import PixelData
from openmmlab_configs import (
    SMALL,
    batch,
    check_backbone,
    check_gradients,
    check_weight_decay,
    dataset_of,
    edit,
    quoted_in_zoo,
)
from openmmlab_runs import ONE_PROCESS, evaluated, report_of, scalars
from PIL import Image
from test_docs import blocks

from models import VARIANTS, FocalTransformer
from openmmlab import flops, runner
from openmmlab.check_config import reported_metrics

CONFIGS = REPO / "segmentation" / "configs"
PAGE = REPO / "segmentation" / "get_started.md"
NAMES = [path.stem for path in sorted(CONFIGS.glob("*_ade20k-*.py"))]
TINY = "upernet_focal-tiny_8xb2-160k_ade20k-512x512"
FAST = "focalv2_tiny_useconv_patch4_window7_224"
LARGE = "upernet_focal-large_8xb2-160k_ade20k-640x640"
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
HEIGHT, WIDTH = 90, 122  # of the scenes; no multiple of anything

pytestmark = [pytest.mark.usefixtures("in_mmseg"), pytest.mark.filterwarnings("ignore")]


@lru_cache
def read(name: str) -> Config:
    return Config.fromfile(CONFIGS / f"{name}.py")


# --- Values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_recipe_and_size(name: str) -> None:
    """Built on the meta device, auxiliary head included."""
    config, crop = read(name), (640, 640) if name == LARGE else (512, 512)
    check_backbone(config, name, drop_path_rate=0.3)
    assert config.model.data_preprocessor.size == crop == config.crop_size
    assert config.model.auxiliary_head.loss_decode.loss_weight == 0.4
    heads = (config.model.decode_head, config.model.auxiliary_head)
    assert [head.num_classes for head in heads] == [150, 150]
    optimizer = dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01)
    assert config.optim_wrapper.optimizer == optimizer
    warm_up, poly = config.param_scheduler
    assert (warm_up.type, warm_up.end, poly.begin) == ("LinearLR", 1500, 1500)
    assert (poly.type, poly.power, poly.end) == ("PolyLR", 1.0, config.train_cfg.max_iters)
    assert config.train_cfg.max_iters == 160000
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 16
    assert config.custom_imports.imports[0] == "openmmlab.mmcv_ops", "first, before mmcv.ops"
    with torch.device("meta"):
        millions = sum(p.numel() for p in MODELS.build(config.model).parameters()) / 1e6
    assert millions == pytest.approx(quoted_in_zoo(f"segmentation/configs/{name}.py"), rel=0.026)


@pytest.mark.parametrize("name", [TINY, LARGE])
def test_pipelines_at_full_scale(name: str, scenes: Path) -> None:
    """Sizes that come out of the config's own pipelines; labels of digits, and 255 where there is nothing."""
    config = read(name)
    crop = config.crop_size[0]
    np.random.seed(0)
    dataset = dataset_of(config.train_dataloader, **on(scenes))
    items = batch(dataset, (0, 1, 2, 3))
    assert all(max(image.shape[1:]) <= crop for image in items["inputs"])
    data = MODELS.build(config.model.data_preprocessor)(items, training=True)
    assert data["inputs"].shape == (4, 3, crop, crop)
    labels = torch.stack([sample.gt_sem_seg.data[0] for sample in data["data_samples"]])
    assert labels.shape == (4, crop, crop)
    assert set(labels.unique().tolist()) <= {*range(11), 255} and (labels == 0).float().mean() > 0.3

    tested = dataset_of(config.test_dataloader, **on(scenes))[0]
    assert tested["inputs"].shape[1:] == (crop, round(WIDTH * crop / HEIGHT))
    labels = tested["data_samples"].gt_sem_seg.data
    assert labels.shape == (1, HEIGHT, WIDTH), "labels keep their size"
    several = dataset_of(config.test_dataloader, **on(scenes), pipeline=config.tta_pipeline)[0]
    shorter = [min(image.shape[1:]) for image in several["inputs"]]
    assert sorted(shorter) == sorted(int(crop * ratio) for ratio in RATIOS for _ in range(2))
    assert [sample.flip for sample in several["data_samples"]].count(True) == len(RATIOS)


# --- At work ------------------------------------------------------------------------------------------------

NORM = {"type": "GN", "num_groups": 4}
CLASSES = ("background", *"0123456789")
HEAD = {"num_classes": len(CLASSES), "dropout_ratio": 0.0}


def shrunken(config: Config) -> ConfigDict:
    """The config's segmenter with the same parts and few channels."""
    model = edit(config.model, lambda key, value: value)
    model.backbone.update(SMALL)
    model.decode_head.update(HEAD, in_channels=[8, 16, 32, 64], channels=16)
    model.auxiliary_head.update(HEAD, in_channels=32, channels=16)
    model.data_preprocessor.size = (96, 96)
    return model


def small_scale(key: str, value: Any) -> Any:
    """Scales of a pipeline, to shorter sides of 80 or more pixels."""
    return {"scale": (600, 80), "ratio_range": (1.0, 1.5), "crop_size": (96, 96)}.get(key, value)


def on(scenes: Path) -> dict[str, Any]:
    """Options of a data set that reads the scenes."""
    own = {"data_root": f"{scenes}/segmentation", "metainfo": {"classes": CLASSES}}
    return {"type": "BaseSegDataset", "reduce_zero_label": True, **own}


@pytest.mark.parametrize("variant", ["focal_tiny_patch4_window7_224", FAST])
def test_trains_and_segments(variant: str, scenes: Path) -> None:
    """A step of training reaches every parameter, with its weight decay; then an inference at an odd size."""
    torch.manual_seed(0)
    np.random.seed(0)
    config = copy.deepcopy(read(TINY))
    config.model.backbone.variant = variant
    model = MODELS.build(shrunken(config))
    model.init_weights()
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    check_weight_decay(model, wrapper.optimizer.param_groups, 0.01)
    dataset = dataset_of(config.train_dataloader, small_scale, **on(scenes))
    losses = check_gradients(model, batch(dataset, (0, 1, 2, 3)))
    assert {"decode.loss_ce", "aux.loss_ce"} <= {*losses}
    wrapper.step()

    data = batch(dataset_of(config.test_dataloader, small_scale, **on(scenes)), (0,))
    assert data["inputs"][0].shape[1:] == (80, 108)
    found = model.eval().test_step(data)[0]
    assert found.pred_sem_seg.data.shape == (1, HEIGHT, WIDTH)
    assert found.seg_logits.data.shape == (11, HEIGHT, WIDTH) and found.seg_logits.data.isfinite().all()


# --- The Runner ---------------------------------------------------------------------------------------------


def shrink(config: Config) -> None:
    """Make a config one for few channels, small images, and an evaluation after each step of training."""
    classes = config.model.decode_head.num_classes
    config.model = shrunken(config)
    for head in (config.model.decode_head, config.model.auxiliary_head):
        head.num_classes = classes
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset = edit(loader.dataset, small_scale)
    config.tta_pipeline[1].transforms[0] = [dict(type="Resize", scale=(600, size)) for size in (60, 120)]
    intervals = (
        "train_cfg.val_interval",
        "default_hooks.logger.interval",
        "default_hooks.checkpoint.interval",
    )
    config.merge_from_dict(ONE_PROCESS | dict.fromkeys(intervals, 1))


def in_small(scenes: Path) -> Config:
    """The smallest model's config, shrunken, which takes the scenes for ADE20K: they have its file names."""
    config = runner.read_config(str(CONFIGS / f"{TINY}.py"))
    shrink(config)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.data_root = f"{scenes}/segmentation"
    return config


def test_a_config_trains_continues_and_evaluates(scenes: Path, tmp_path: Path) -> None:
    """From a classifier's weights; then an evaluation at several scales."""
    config, work_dir = in_small(scenes), tmp_path / "out"
    config.dump(tmp_path / "small.py")
    classifier = FocalTransformer(**{**VARIANTS[config.model.backbone.variant], **SMALL}, num_classes=3)
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    command = [str(tmp_path / "small.py"), "--work-dir", str(work_dir)]
    starts = (["--pretrained", str(tmp_path / "classifier.pth")], ["--resume"])
    for step, start in enumerate(starts, start=1):
        assert runner.train([*command, *start, "--cfg-options", f"train_cfg.max_iters={step}"]) == 0
        lines = scalars(work_dir)
        assert [line["step"] for line in lines if "loss" in line] == [step]
        seen = evaluated(lines)
    first, second = (path.read_text() for path in sorted(work_dir.glob("*/*.log")))
    assert "classifier.pth: loaded" in first and "iter_1.pth" in second
    command[-1] = str(tmp_path / "test")
    assert runner.test([command[0], str(work_dir / "iter_2.pth"), *command[1:], "--multi-scale"]) == 0
    assert seen.keys() <= report_of(tmp_path / "test").keys()


def test_what_is_true_gets_full_marks(scenes: Path) -> None:
    """The config's evaluator, given what the config's own test set says is there; and given another class."""
    config = in_small(scenes)
    dataset = DATASETS.build(config.test_dataloader.dataset)
    sample = dataset[0]["data_samples"]
    truth = sample.gt_sem_seg.data
    for labels, least, most in ((truth, 100, 100), (torch.where(truth == 0, 149, truth), 30, 95)):
        sample.pred_sem_seg = PixelData(data=labels)
        evaluator = Evaluator(config.test_evaluator)
        evaluator.dataset_meta = dataset.metainfo
        evaluator.process([sample])
        marks = evaluator.evaluate(1)
        assert least <= marks["mIoU"] <= most
        assert {*marks} == reported_metrics(evaluator.metrics[0])
    assert len(truth.unique()) > 3 and truth.max() < 11


@pytest.mark.parametrize("zero_is_nothing", [False, True])
def test_the_pages_own_data_set(
    zero_is_nothing: bool, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config of get_started.md for one's own data has the labels of the files, and trains.

    The scenes with three classes: background, low digits, high ones; some pixels are nothing.
    """
    monkeypatch.chdir(tmp_path)
    shutil.copytree(scenes / "segmentation/images", "streets/images")
    for file in scenes.glob("segmentation/annotations/*/*.png"):
        old = np.asarray(Image.open(file))
        given = np.select([old == 1, old < 7], [0, 1], 2).astype(np.uint8)
        given[:5] = 255
        target = Path("streets", file.relative_to(scenes / "segmentation"))
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(given + np.uint8(zero_is_nothing)).save(target)  # 255 becomes 0
    (own,) = (block for block in blocks(PAGE, "python") if "reduce_zero_label" in block.text)
    names: dict[str, str] = {}
    exec(own.text, names)
    said = names["config"].replace("reduce_zero_label=False", f"reduce_zero_label={zero_is_nothing}")
    Path("own.py").write_text(said.replace('"upernet', f'"{CONFIGS}/upernet'))
    config = runner.read_config("own.py")
    labels = DATASETS.build(config.test_dataloader.dataset)[0]["data_samples"].gt_sem_seg.data[0].numpy()
    file = np.asarray(Image.open("streets/annotations/validation/00000001.png"))
    assert np.array_equal(labels, file - np.uint8(zero_is_nothing))
    assert {*np.unique(labels)} == {0, 1, 2, 255}
    shrink(config)
    config.dump("small.py")
    if not zero_is_nothing:  # as the page has it; the demo's config trains with True
        assert runner.train(["small.py", "--work-dir", "out", "--cfg-options", "train_cfg.max_iters=1"]) == 0
        assert evaluated(scalars(Path("out")))


def test_image_that_is_counted() -> None:
    """Height before width."""
    assert flops.image_size(read(LARGE)) == (640, 2560)
