"""Every detector's config: its values, and the whole of it at work with few channels on small real scenes."""

# ruff: noqa: E402
import copy
import json
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO

pytest.importorskip("mmdet", reason="needs OpenMMLab's packages: make setup-openmmlab")

from mmengine.config import Config, ConfigDict
from mmengine.evaluator import Evaluator
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, TASK_UTILS
from mmengine.structures import InstanceData
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
from openmmlab_runs import ONE_PROCESS, evaluated, scalars

from data.demo_scenes import DETECTION_CLASSES
from openmmlab import runner
from openmmlab.check_config import reported_metrics

CONFIGS = REPO / "detection" / "configs"
NAMES = [path.stem for path in sorted(CONFIGS.glob("*_coco.py"))]
SCHEDULES = {"1x": (12, [8, 11]), "2x": (24, [16, 22]), "3x": (36, [27, 33]), "6x": (72, [63, 69])}
METHODS = sorted({name.split("_")[0] for name in NAMES})
FAST = "focalv2_tiny_useconv_patch4_window7_224"

pytestmark = pytest.mark.usefixtures("in_mmdet")


@lru_cache
def read(name: str) -> Config:
    return Config.fromfile(CONFIGS / f"{name}.py")


def name_of(method: str) -> str:
    """The method's config, that of the longest schedule."""
    return next(name for name in reversed(NAMES) if name.startswith(f"{method}_"))


# --- Values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_recipe_and_size(name: str) -> None:
    """Built on the meta device; the release rounds sizes, most often up."""
    config = read(name)
    dyhead = name.startswith("atss-dyhead")
    options = {"window_size": 12} if dyhead else {}
    check_backbone(config, name, drop_path_rate=0.3 if "base" in name else 0.2, **options)
    optimizer = dict(type="AdamW", lr=5e-5 if dyhead else 1e-4, betas=(0.9, 0.999), weight_decay=0.05)
    assert config.optim_wrapper.optimizer == optimizer, "something is left of the base's"
    assert config.optim_wrapper.type == ("AmpOptimWrapper" if "amp" in name else "OptimWrapper")
    assert ("clip_grad" in config.optim_wrapper) == name.startswith("sparse-rcnn")
    epochs, milestones = SCHEDULES[name.split("_")[-2].split("-")[-1]]
    warm_up, steps = config.param_scheduler
    assert config.train_cfg.max_epochs == steps.end == epochs and steps.milestones == milestones
    assert (warm_up.type, warm_up.end) == ("LinearLR", 1000)
    assert config.custom_imports.imports[0] == "openmmlab.mmcv_ops", "first, before mmcv.ops"
    assert config.train_dataloader.batch_size == 2 and config.auto_scale_lr.base_batch_size == 16
    assert ("tta_model" in config) == name.startswith(("retinanet_", "atss-dyhead_", "htc_"))

    with torch.device("meta"):
        millions = sum(p.numel() for p in MODELS.build(config.model).parameters()) / 1e6
    if quoted := quoted_in_zoo(f"detection/configs/{name}.py"):
        assert -0.55 < quoted - millions < (2 if dyhead else 1)


# --- At work ------------------------------------------------------------------------------------------------

NARROW = {  # key -> (how its config says it, how a test does)
    "feedforward_channels": {2048: 32},
    "fc_out_channels": {1024: 32},
    "num_proposals": {300: 30},
    "max_per_img": {1000: 60, 2000: 60, 300: 30},
    "nms_pre": {1000: 60, 2000: 60},
    "num": {512: 32, 256: 10000},  # every anchor, so that every level of the pyramid learns
    "allowed_border": {0: -1},
    "num_convs": {4: 1},
    "stacked_convs": {4: 1, 3: 1},
    "num_shared_convs": {4: 1},
    "num_blocks": {6: 1},
    "num_classes": {80: len(DETECTION_CLASSES)},
    "num_groups": {32: 4},
    "score_thr": {0.05: 0.0, 0.001: 0.0},
}
ONLY_WITH_OBJECTS = "bbox_head.scales."  # ATSS: a level's factor of box sizes, for levels with objects


def narrow(key: str, value: Any) -> Any:
    """256 channels become 32, and counts as in NARROW."""
    if not isinstance(value, int | float):
        return value
    usual = {256: 32, 64: 8} if "channel" in key else {}
    return (usual | NARROW.get(key, {})).get(value, value)


def shrunken(config: Config) -> ConfigDict:
    """The config's detector with the same parts, few channels, few proposals and, if sparse, two stages."""
    model = edit(config.model, narrow)
    model.backbone.update(SMALL)
    pyramid = model.neck[0] if isinstance(model.neck, list) else model.neck
    pyramid.in_channels = [8 * 2**i for i in model.backbone.get("out_indices", (0, 1, 2, 3))]
    for extractor in ("bbox_roi_extractor", "mask_roi_extractor"):
        if extractor in model.get("roi_head", {}):
            model.roi_head[extractor].finest_scale = 8  # instead of 56, images being as much smaller
    if model.type == "ATSS":
        model.bbox_head.norm_cfg = {"type": "GN", "num_groups": 4}  # its 32 groups are a default
    if model.type == "SparseRCNN":
        for part, key in ((model.roi_head, "bbox_head"), (model.roi_head, "stage_loss_weights")):
            part[key] = part[key][:2]
        model.roi_head.num_stages, model.train_cfg.rcnn = 2, model.train_cfg.rcnn[:2]
    return model


def small_scale(key: str, value: Any) -> Any:
    """Scales of a pipeline, to sides of 80 to 128 pixels."""
    return {
        "scale": [(128, 80), (128, 96)] if isinstance(value, list) else (121, 97),
        "scales": [(80, 128), (96, 128)],
        "crop_size": (60, 70),
    }.get(key, value)


def on(scenes: Path) -> dict[str, Any]:
    """Options of a data set that reads the scenes."""
    return {"data_root": f"{scenes}/detection/", "metainfo": {"classes": DETECTION_CLASSES}}


@pytest.mark.parametrize(("method", "variant"), [*((each, None) for each in METHODS), ("mask-rcnn", FAST)])
def test_trains_and_detects(method: str, variant: str | None, scenes: Path) -> None:
    """A step of training reaches every parameter, with its weight decay; then a detection.

    Crops may hold no object, and several processes wait for each other's gradients: all have one then too.
    """
    torch.manual_seed(0)
    np.random.seed(0)
    config = copy.deepcopy(read(name_of(method)))
    config.model.backbone.variant = variant or config.model.backbone.variant
    model = MODELS.build(shrunken(config))
    model.init_weights()
    if config.model.type == "SparseRCNN":  # its proposals begin as whole images: here, of any size
        with torch.no_grad():
            model.rpn_head.init_proposal_bboxes.weight[:, 2:] = torch.linspace(0.05, 1, 30)[:, None]
    wrapper = build_optim_wrapper(model, {**config.optim_wrapper, "type": "OptimWrapper"})
    check_weight_decay(model, wrapper.optimizer.param_groups, 0.05)

    dataset = dataset_of(config.train_dataloader, small_scale, **on(scenes))
    for objects in (False, True):
        data = batch(dataset, (0, 1))
        for sample in () if objects else data["data_samples"]:
            sample.gt_instances = sample.gt_instances[:0]
        check_gradients(model, data, may_be_zero=ONLY_WITH_OBJECTS if objects else "")
    wrapper.step()

    test_set = dataset_of(config.test_dataloader, small_scale, **on(scenes))
    found = model.eval().test_step(batch(test_set, (0,)))[0].pred_instances
    check_detections(found, "segm" in config.val_evaluator.metric, config.model.type != "SparseRCNN")


def check_detections(found: Any, masks: bool, clipped: bool) -> None:
    """Boxes within the original image (where the method clips them), scores, labels of digits, masks of
    its size."""
    assert len(found) > 0
    assert found.bboxes.isfinite().all() and found.scores.isfinite().all()
    if clipped:
        assert found.bboxes.min() >= 0
        assert found.bboxes[:, 2].max() <= 122.01 and found.bboxes[:, 3].max() <= 90.01
    assert found.labels.min() >= 0 and found.labels.max() < len(DETECTION_CLASSES)
    assert found.scores.min() >= 0 and found.scores.max() <= 1
    assert ("masks" in found) == masks
    assert not masks or found.masks.shape == (len(found), 90, 122)


# --- The Runner ---------------------------------------------------------------------------------------------


def small(method: str, scenes: Path) -> Config:
    """A method's config with few channels, for the scenes in small."""
    config = runner.read_config(str(CONFIGS / f"{name_of(method)}.py"))
    config.model = shrunken(config)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset = edit(loader.dataset, small_scale)
        loader.dataset.update(on(scenes))
    for evaluator in (config.val_evaluator, config.test_evaluator):
        evaluator.ann_file = f"{scenes}/detection/annotations/instances_val2017.json"
    config.merge_from_dict(ONE_PROCESS | {"default_hooks.logger.interval": 1, "train_cfg.max_epochs": 1})
    return config


@pytest.mark.parametrize("method", ["sparse-rcnn", "reppointsv2"])
def test_a_method_trains_and_evaluates(method: str, scenes: Path, tmp_path: Path) -> None:
    """Evaluation at the end of training, and that of the checkpoint, find boxes and the same AP.

    The others differ in no option that the Runner reads; test_openmmlab_commands.py has masks.
    """
    config = small(method, scenes)
    config.dump(tmp_path / "small.py")
    command = [str(tmp_path / "small.py"), "--work-dir", str(tmp_path)]
    assert runner.train([*command, "--no-amp"]) == 0
    lines = scalars(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert runner.test([command[0], str(tmp_path / "epoch_1.pth"), *command[1:]]) == 0
    found = evaluated(scalars(tmp_path))
    assert found == evaluated(lines)
    masks = "mask_head" in config.model.get("roi_head", {})
    assert [f"coco/{kind}_mAP" in found for kind in ("bbox", "segm")] == [True, masks]


def test_what_is_true_gets_full_marks(scenes: Path) -> None:
    """The config's evaluator, given what the config's own test set says is there."""
    config = small("mask-rcnn", scenes)
    dataset = DATASETS.build(config.test_dataloader.dataset)
    evaluator = Evaluator(config.test_evaluator)
    evaluator.dataset_meta = dataset.metainfo
    for item in dataset:
        truth = item["data_samples"].gt_instances
        boxes, masks = truth.bboxes.tensor, truth.masks.to_tensor(bool, "cpu")
        scores = boxes.new_ones(len(truth))
        found = InstanceData(bboxes=boxes, labels=truth.labels, scores=scores, masks=masks)
        item["data_samples"].pred_instances = found
        evaluator.process([item["data_samples"]])
    marks = evaluator.evaluate(len(dataset))
    assert marks["coco/bbox_mAP"] == marks["coco/segm_mAP"] == 1
    assert {*marks} == reported_metrics(evaluator.metrics[0])


@pytest.mark.parametrize("method", ["atss-dyhead", "htc"])
def test_detections_of_scales_and_flips_are_merged(method: str, scenes: Path, tmp_path: Path) -> None:
    """The command with `--tta`: at most 100 objects of an image, in its own coordinates."""
    config = small(method, scenes)
    masks = "segm" in config.val_evaluator.metric
    config.test_evaluator.outfile_prefix = str(tmp_path / "found")
    views = config.tta_pipeline[1].transforms
    views[0] = [dict(views[0][0], scale=scale) for scale in ((128, 80), (160, 112))]
    config.dump(tmp_path / "small.py")
    torch.manual_seed(0)
    torch.save(MODELS.build(config.model).state_dict(), tmp_path / "small.pth")
    command = [str(tmp_path / name) for name in ("small.py", "small.pth")]
    lists = []
    for flags in ([], ["--tta"]):
        assert runner.test([*command, *flags, "--work-dir", str(tmp_path / "work")]) == 0
        lists.append(json.loads((tmp_path / f"found.{'segm' if masks else 'bbox'}.json").read_text()))
    assert lists[0] != lists[1]
    per_image = Counter(entry["image_id"] for entry in lists[1])
    assert len(per_image) == 3 and max(per_image.values()) <= 100
    for entry in lists[1]:
        if masks:
            assert entry["segmentation"]["size"] == [90, 122]
        else:
            left, top, width, height = entry["bbox"]
            assert min(left, top) >= 0 and left + width <= 122.01 and top + height <= 90.01


@pytest.mark.parametrize("method", ["htc", "mask-rcnn"])
def test_masks_of_views_are_averaged(method: str, scenes: Path) -> None:
    """One view gives what the detector gives; a scene and its mirror image give mirrored objects."""
    torch.manual_seed(0)
    htc, config = (copy.deepcopy(read(name_of(each))) for each in ("htc", method))
    detector = MODELS.build(shrunken(config)).eval()
    detector.init_weights()
    with torch.no_grad():  # else every pixel of a mask is at about one half
        for head in (m for m in detector.modules() if "MaskHead" in type(m).__name__):
            head.conv_logits.weight.mul_(500)
    keep_all = {"nms": {"type": "nms", "iou_threshold": 1.0}, "max_per_img": 100}
    dataset = dataset_of(config.test_dataloader, small_scale, **on(scenes))
    item = dataset[0]
    alone = detector.test_step(batch(dataset, (0,)))[0].pred_instances
    assert 0.05 < alone.masks.float().mean() < 0.95

    model = MODELS.build(
        {"type": htc.tta_model.type, "module": detector, "tta_cfg": ConfigDict(keep_all)}
    ).eval()

    def detect(*flips: bool, mirrored: bool = False) -> InstanceData:
        """Detections in views of the scene, or of its mirror image."""
        samples = []
        for flip in flips:
            sample = copy.deepcopy(item["data_samples"])
            sample.set_metainfo({"flip": flip, "flip_direction": "horizontal" if flip else None})
            samples.append([sample])
        inputs = [[item["inputs"].flip(-1) if flip != mirrored else item["inputs"]] for flip in flips]
        with torch.no_grad():
            return model.test_step({"inputs": inputs, "data_samples": samples})[0].pred_instances

    same = detect(False)
    order = alone.scores.argsort(descending=True, stable=True)
    torch.testing.assert_close(same.scores, alone.scores[order])
    assert (same.masks != alone.masks[order]).float().mean() < 0.01
    here, there = detect(False, True), detect(False, True, mirrored=True)
    assert len(here) == len(there) > 10
    torch.testing.assert_close(here.scores, there.scores)
    torch.testing.assert_close(here.bboxes[:, 0], 122 - there.bboxes[:, 2], atol=1e-2, rtol=0)
    assert (here.masks != there.masks.flip(-1)).float().mean() < 0.01


def test_matching_survives_half_precision() -> None:
    """Sparse R-CNN's cost of a match is finite, however sure the detector is."""
    logits = torch.tensor([[-30.0, 9.0], [30.0, -18.0]], dtype=torch.float16)
    proposals, objects = InstanceData(scores=logits), InstanceData(labels=torch.tensor([0, 1]))
    for stage in read(name_of("sparse-rcnn")).model.train_cfg.rcnn:
        of_class, *others = stage.assigner.match_costs
        assert of_class.type == "FocalLossCost" and len(others) == 2
        with torch.autocast("cpu", torch.float16):
            assert TASK_UTILS.build(of_class)(proposals, objects).isfinite().all()


@pytest.mark.parametrize(
    ("method", "shorter", "longest", "tested"),
    [
        ("mask-rcnn", (480, 800), 1333, (800, 1084)),
        ("htc", (400, 1400), 1600, (1180, 1600)),
        ("atss-dyhead", (480, 1200), 2000, (1200, 1627)),
    ],
)
def test_pipelines_at_full_scale(
    method: str, shorter: tuple[int, int], longest: int, tested: tuple[int, int], scenes: Path
) -> None:
    """Sizes that come out of the config's own pipelines, and objects that stay within the image."""
    config = read(name_of(method))
    np.random.seed(0)
    dataset = dataset_of(config.train_dataloader, **on(scenes))
    for number in range(4):
        item = dataset[number]
        height, width = item["inputs"].shape[1:]
        assert min(height, width) <= shorter[1] and max(height, width) <= longest + 1
        assert min(height, width) >= shorter[0] or max(height, width) >= longest - 1
        objects = item["data_samples"].gt_instances
        assert len(objects) > 0 and objects.bboxes.tensor.min() >= 0
        assert objects.bboxes.tensor.max() <= max(height, width)
        assert "masks" not in objects or objects.masks.masks.shape == (len(objects), height, width)
    assert dataset_of(config.test_dataloader, **on(scenes))[0]["inputs"].shape[1:] == tested
