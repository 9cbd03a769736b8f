"""Every segmenter's config: its values, and the whole of it at work with few channels on small scenes."""

# ruff: noqa: E402
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO

pytest.importorskip("mmseg", reason="needs OpenMMLab's packages: make setup-openmmlab")

import openmmlab.mmcv_ops  # noqa: I001  (before mmseg.models: makes its operators importable)
import mmseg.models  # noqa: F401
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, DefaultScope
from openmmlab_configs import SMALL, batch, check_backbone, check_weight_decay, edit, variant_of

from data.demo import DemoOptions, write_demo
from data.demo_scenes import SEGMENTATION_CLASSES
from models import VARIANTS, FocalTransformer
from segmentation import flops

CONFIGS = REPO / "segmentation" / "configs"
NAMES = [path.stem for path in sorted(CONFIGS.glob("*_ade20k-*.py"))]
TINY = "upernet_focal-tiny_8xb2-160k_ade20k-512x512"
FAST = "upernet_focal-fast-tiny_8xb2-160k_ade20k-512x512"
LARGE = "upernet_focal-large_8xb2-160k_ade20k-640x640"
REPORTED = {  # single- and multi-scale mIoU, parameters (M), FLOPs (G)
    "tiny": (45.8, 47.0, 62, 998),
    "small": (48.0, 50.0, 85, 1130),
    "base": (49.0, 50.5, 126, 1354),
    "large": (54.0, 55.4, 240, 3376),
}
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
HEIGHT, WIDTH = 90, 122  # of the scenes; no multiple of anything


@pytest.fixture(scope="module", autouse=True)
def in_mmseg() -> Iterator[None]:
    assert openmmlab.mmcv_ops
    with DefaultScope.overwrite_default_scope("mmseg"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmseg's own deprecated calls
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four scenes in ADE20K's layout."""
    options = DemoOptions(train_scenes=4, val_scenes=2, scene_width=WIDTH, scene_height=HEIGHT)
    return write_demo(tmp_path_factory.mktemp("scenes"), ["segmentation"], options)["segmentation"]


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
    size = next(size for size in REPORTED if size in name)
    keys = ("miou", "miou_ms", "params_m", "flops_g")
    plain = not {"fast", "conv"} & {*name.split("_")[1].split("-")}
    assert config.reported == (dict(zip(keys, REPORTED[size], strict=True)) if plain else None)
    with torch.device("meta"):
        millions = sum(p.numel() for p in MODELS.build(config.model).parameters()) / 1e6
    assert millions == pytest.approx(REPORTED[size][2], rel=0.026)


@pytest.mark.parametrize("name", [TINY, LARGE])
def test_pipelines_at_full_scale(name: str, scenes: Path) -> None:
    """Sizes that come out of the config's own pipelines; labels of digits, and 255 where there is nothing."""
    config = read(name)
    crop = config.crop_size[0]
    np.random.seed(0)
    dataset = dataset_of(config.train_dataloader, scenes)
    items = batch(dataset, (0, 1, 2, 3))
    assert all(max(image.shape[1:]) <= crop for image in items["inputs"])
    data = MODELS.build(config.model.data_preprocessor)(items, training=True)
    assert data["inputs"].shape == (4, 3, crop, crop)
    labels = torch.stack([sample.gt_sem_seg.data[0] for sample in data["data_samples"]])
    assert labels.shape == (4, crop, crop)
    assert set(labels.unique().tolist()) <= {*range(11), 255} and (labels == 0).float().mean() > 0.3

    tested = dataset_of(config.test_dataloader, scenes)[0]
    assert tested["inputs"].shape[1:] == (crop, round(WIDTH * crop / HEIGHT))
    several = dataset_of(dict(config.test_dataloader, pipeline=config.tta_pipeline), scenes)[0]
    shorter = [min(image.shape[1:]) for image in several["inputs"]]
    assert sorted(shorter) == sorted(int(crop * ratio) for ratio in RATIOS for _ in range(2))
    for item in (tested["data_samples"], *several["data_samples"]):
        labels = item.gt_sem_seg.data
        assert labels.shape == (1, HEIGHT, WIDTH), "labels keep their size"
        assert torch.equal(labels, tested["data_samples"].gt_sem_seg.data)
    assert sorted(sample.flip for sample in several["data_samples"]) == [False] * 6 + [True] * 6


# --- At work ------------------------------------------------------------------------------------------------

NORM = {"type": "GN", "num_groups": 4}
HEAD = {"num_classes": len(SEGMENTATION_CLASSES), "dropout_ratio": 0.0}


def shrunken(config: Config, **backbone: Any) -> ConfigDict:
    """The config's segmenter with the same parts and few channels."""
    model = edit(config.model, lambda key, value: value)
    model.backbone.update(SMALL | backbone)
    model.decode_head.update(HEAD, in_channels=[8, 16, 32, 64], channels=16)
    model.auxiliary_head.update(HEAD, in_channels=32, channels=16)
    model.data_preprocessor.size = (96, 96)
    return model


def small_scale(key: str, value: Any) -> Any:
    """Scales of a pipeline, to shorter sides of 80 or more pixels."""
    return {"scale": (600, 80), "ratio_range": (1.0, 1.5), "crop_size": (96, 96)}.get(key, value)


def dataset_of(loader: dict[str, Any], root: Path, change: Callable[[str, Any], Any] | None = None) -> Any:
    """The config's own data set on the scenes, with its own pipeline (or the loader's), or a changed one."""
    told = dict(loader["dataset"], type="BaseSegDataset", reduce_zero_label=True, data_root=str(root))
    told["pipeline"] = loader.get("pipeline", told["pipeline"])
    told["pipeline"] = edit(told["pipeline"], change) if change else told["pipeline"]
    return DATASETS.build(told | {"metainfo": {"classes": SEGMENTATION_CLASSES}})


@pytest.mark.parametrize("name", [TINY, FAST])
def test_trains_and_segments(name: str, scenes: Path) -> None:
    """A step of training reaches every parameter, with its weight decay; then an inference at an odd size."""
    torch.manual_seed(0)
    np.random.seed(0)
    config = read(name)
    model = MODELS.build(shrunken(config))
    model.init_weights()
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    check_weight_decay(model, wrapper.optimizer.param_groups, 0.01)
    dataset = dataset_of(config.train_dataloader, scenes, small_scale)
    data = model.data_preprocessor(batch(dataset, (0, 1, 2, 3)), training=True)
    losses = model.train()(**data, mode="loss")
    assert {"decode.loss_ce", "aux.loss_ce"} <= {*losses}
    loss, _ = model.parse_losses(losses)
    loss.backward()
    assert torch.isfinite(loss)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), f"{key}: its gradient is zero"
    wrapper.step()

    data = batch(dataset_of(config.test_dataloader, scenes, small_scale), (0,))
    assert data["inputs"][0].shape[1:] == (80, 108)
    found = model.eval().test_step(data)[0]
    assert found.pred_sem_seg.data.shape == (1, HEIGHT, WIDTH)
    assert found.seg_logits.data.shape == (11, HEIGHT, WIDTH) and found.seg_logits.data.isfinite().all()


def test_a_classifiers_weights(tmp_path: Path) -> None:
    """They come into the backbone and stay out of the heads; what lacks a stage is refused."""
    config = read(TINY)
    weights = tmp_path / "classifier.pth"
    options = {**VARIANTS[variant_of(TINY)], **SMALL, "focal_windows": config.focal.focal_windows}
    classifier = FocalTransformer(num_classes=7, **options)
    torch.save({"model": classifier.state_dict()}, weights)
    told = shrunken(config, init_cfg=dict(type="Pretrained", checkpoint=str(weights)))
    model = MODELS.build(told)
    model.init_weights()
    own = model.backbone.state_dict()
    shared = {key: value for key, value in classifier.state_dict().items() if key in own}
    assert len(shared) == len(own) - 8, "all but four norms"
    assert all(torch.equal(own[key], value) for key, value in shared.items())
    torch.save({k: v for k, v in classifier.state_dict().items() if "layers.3" not in k}, weights)
    with pytest.raises(ValueError, match="missing: layers.3"):
        MODELS.build(told).init_weights()


# --- Counting -----------------------------------------------------------------------------------------------


def test_count_of_a_head_by_hand() -> None:
    """A UPerNet of one channel everywhere: its convolutions counted with a pencil."""
    model = shrunken(read(TINY))
    model.decode_head.channels = 2
    sizes = [(16 >> i) ** 2 for i in range(4)]  # pixels of each stage's map
    pools = sum(s * s for s in (1, 2, 3, 6)) * 64 * 2
    bottleneck = sizes[3] * 9 * (64 + 4 * 2) * 2
    lateral = sum(n * c * 2 for n, c in zip(sizes, (8, 16, 32), strict=False))
    smooth = sum(n * 9 * 2 * 2 for n in sizes[:3])
    fused = sizes[0] * 9 * 8 * 2 + sizes[0] * 2 * 11
    assert flops.count(model, (64, 64)).head_macs == pools + bottleneck + lateral + smooth + fused


def test_count_as_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [flops.image_size(read(name)) for name in (TINY, LARGE)] == [(512, 2048), (640, 2560)]
    small = replace(flops.SEGMENTATION, image_size=lambda config: (64, 96))
    monkeypatch.setattr(flops, "SEGMENTATION", small)
    path = CONFIGS / f"{TINY}.py"
    flops.main([str(path), "--out", str(tmp_path / "table.md")])
    lines = (tmp_path / "table.md").read_text().splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[:4] == [TINY, "64 x 96", "60.6", "62"] and cells[5] == "998" and cells[-1] == "45.8, 47.0"
    assert len(lines[0].split("|")) == len(lines[1].split("|")) == len(lines[2].split("|"))
    assert "torch " in lines[-1] and "mmseg " in lines[-1]
