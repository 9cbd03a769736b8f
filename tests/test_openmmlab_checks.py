"""Mistakes in configs, data and checkpoints of detection and segmentation, told before training."""

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image

pytest.importorskip("mmdet", reason="needs OpenMMLab's packages: make setup-openmmlab")

from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmseg.evaluation import IoUMetric
from openmmlab_runs import ONE_PROCESS, in_scope

import detection.bifpn  # noqa: F401  (registers the neck)
from openmmlab import check_config, check_data, runner
from openmmlab.start_checks import StartChecks
from utils import UserError

DETECTION, SEGMENTATION = (
    str(REPO / task / f"configs/demo_{name}.py")
    for task, name in (("detection", "mask_rcnn"), ("segmentation", "upernet"))
)
DIGITS = tuple("0123456789")
SMALL = {
    "model.backbone.depths": [1, 1, 1, 1],
    "train_cfg.max_epochs": 1,
    "train_cfg.val_interval": 1,
    **ONE_PROCESS,
}

pytestmark = pytest.mark.usefixtures("in_demo")


@pytest.fixture(autouse=True)
def in_package(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    monkeypatch.delenv("FOCAL_TRACEBACK", raising=False)
    with in_scope("mmseg" if "segment" in request.function.__name__ else "mmdet"):
        yield


_read_config = lru_cache(runner.read_config)


def read(path: str) -> Any:
    """A config, read once."""
    return copy.deepcopy(_read_config(path))


def command(config: str, work_dir: Path, *options: str) -> list[str]:
    small = [f"{key}={value}" for key, value in SMALL.items()]
    return [config, "--work-dir", str(work_dir), "--cfg-options", *small, *options]


# --- Options ------------------------------------------------------------------------------------------------


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train_cfg.max_epochs", "expected KEY=VALUE"),
        ("trian_cfg.max_epochs=1", "no trian_cfg; did you mean train_cfg"),
        ("classes=3", "only the config file itself reads classes"),
        ("data_preprocessor.mean=[1,2,3]", "nothing reads it beside model.data_preprocessor; set that"),
        ("test_pipeline.1.scale=3", "reads test_pipeline; set the keys where it is used, such as train"),
        ("train_dataloader.dataset.pipeline.9.scale=1", "pipeline is a list of 4, got 9"),
        ("model.neck.in_channels=[1,(2]", "expected a number, text, or list of these as in KEY=[1,2], got "),
        ("train_cfg.max_epochs=", "train_cfg.max_epochs: expected a number, as in the config, got ''"),
        ("model.bakbone.depths=1", "there is no bakbone; did you mean backbone"),
        ("randomness.seedd=1", "nothing reads seedd; did you mean seed?"),
        ("default_hooks.checkpoint.saving=2", "CheckpointHook takes no saving"),
        (
            "default_hooks.checkpoint.save_best=bbox_mAP",
            "coco/segm_mAP_s, as val_evaluator reports, got bbox",
        ),
        ("model.test_cfg.rcnn.nms.type=nmms", "rcnn.nms.type: expected one of nms, soft_nms, "),
        ("train_dataloader.workers=1", "train_dataloader: DataLoader.__init__() got an unexpected keyword "),
        ("model.backbones_2.depths=1", "model (MaskRCNN): MaskRCNN.__init__() got an unexpected keyword "),
        ("model.neck.norm_cfg.type=GM", "model.neck.norm_cfg (GM): there is no GM; did you mean "),
        ("model.neck.type=FPM", "model.neck (FPM): there is no FPM; did you mean "),
        ("model.neck.num_outs=1", "model.neck (FPN): assert num_outs >= "),
        ("val_evaluator.metric=bboxx", "val_evaluator (CocoMetric): metric should be one of 'bbox', "),
        (
            "optim_wrapper.optimizer.type=Adamw",
            "optim_wrapper.optimizer (Adamw): there is no Adamw; did you mean ",
        ),
        ("model.neck.in_channels=[1,2]", "model.neck.in_channels: expected [32, 64, 128, 256]"),
        ("model.neck.out_channels=128", "model.rpn_head.in_channels: expected 128, as model.neck makes, got"),
        ("model.roi_head.mask_head.in_channels=8", "roi_head.mask_head.in_channels: expected 64, as model."),
        (
            "optim_wrapper.constructor=LearningRateDecayOptimizerConstructor "
            "optim_wrapper.paramwise_cfg.num_layers=6 optim_wrapper.paramwise_cfg.decay_rate=0.8 "
            "optim_wrapper.paramwise_cfg.decay_type=layer_wise",
            "LearningRateDecayOptimizerConstructor does not support this model",
        ),
    ],
)
def test_mistakes_in_options(
    option: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.train(command(DETECTION, tmp_path, *option.split())) == 2
    assert message in last_error(capsys)


def test_options_that_something_reads() -> None:
    """New keys of what is there, new parts and entries of lists."""
    keys = ["model.backbone.init_cfg.type", "optim_wrapper.clip_grad.norm_type", "load_from", "sync_bn"]
    keys += ["train_dataloader.dataset.indices", "train_dataloader.dataset.pipeline.2.scale", "custom_hooks"]
    keys += ["optim_wrapper.paramwise_cfg.custom_keys.norms", "train_dataloader.num_batch_per_epoch"]
    keys += ["train_dataloader.dataset.data_prefix.img2", "model.roi_head.bbox_head.reg_class_agnostic"]
    check_config.check_overrides(read(DETECTION), dict.fromkeys(keys, 1))
    config = read(DETECTION)
    config.custom_hooks = [{"type": "EMAHook", "priority": 49}]
    check_config.check_overrides(config, {"custom_hooks.0.priority": "LOW"})


def test_the_best_metric_of_a_run_without_validation(tmp_path: Path) -> None:
    config = read(DETECTION)
    assert config.default_hooks.checkpoint.save_best
    config.update(dict.fromkeys(("val_cfg", "val_dataloader", "val_evaluator")))
    config.update(work_dir=str(tmp_path), launcher="none")
    check_config.check_saving(runner.build_runner(config))


def test_one_checkpoint_is_too_few(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = read(DETECTION)
    config.update(work_dir=str(tmp_path), launcher="none")
    config.default_hooks.checkpoint.max_keep_ckpts = 1
    built = runner.build_runner(config)
    built.logger.addHandler(caplog.handler)  # it does not propagate
    check_config.check_saving(built)
    assert "keep 2" in caplog.text


def test_metrics_of_segmenters() -> None:
    assert "mIoU" in check_config.reported_metrics(IoUMetric(iou_metrics="mIoU"))
    with pytest.raises(UserError, match="expected iou_metrics of mIoU, mDice, mFscore, got 'mIou'"):
        check_config.reported_metrics(IoUMetric(iou_metrics=["mIou"]))


def broken(**_: Any) -> Any:
    """A part of the user's that has a bug."""
    return [].sort_by


def fails_in_a_library(**_: Any) -> Any:
    """One that hands a wrong value on."""
    return MODELS.build({"type": "Conv2d", "in_channels": 1, "out_channels": None, "kernel_size": 1})


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        ({"neck": {"_delete_": True, "type": broken}}, AttributeError, "sort_by"),
        ({"neck": {"_delete_": True, "type": fails_in_a_library}}, TypeError, "NoneType"),
        (
            {"neck": {"type": "BiFPN", "num_outs": 2}},
            UserError,
            "model.neck (BiFPN): BiFPN: num_outs must be",
        ),
        ({"neck": {"type": 5}}, UserError, "model.neck: type must be a str or valid type"),
        (
            {"data_preprocessor": {"mean": np.zeros(2)}},
            UserError,
            "(DetDataPreprocessor): `mean` should have",
        ),
    ],
    ids=["bug", "bug that a library finds", "mistake", "wrong type", "mistake in an array"],
)
def test_bugs_keep_their_tracebacks(
    part: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    """Those of the user's own parts; values that a library refuses are mistakes."""
    config = read(DETECTION)
    config.merge_from_dict({"model": part})
    config.update(launcher="none", work_dir=str(tmp_path))
    with pytest.raises(error, match=re.escape(message)):
        runner._train(config)


def test_a_missing_file_is_no_mistake_of_the_config() -> None:
    config = read(DETECTION)
    config.model.neck.type = "FPM"
    with pytest.raises(FileNotFoundError), check_config.explained_by_config(config):
        Path("gone.json").read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"bbox_roi_extractor": {"type": "GenericRoIExtractor", "aggregation": "concat", "out_channels": 256}},
        {"bbox_head": {"type": "OwnHead", "in_channels": 32}},
    ],
)
def test_channels_of_parts_that_count_in_another_way(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not refused."""
    from mmdet.models import Shared2FCBBoxHead

    monkeypatch.setitem(MODELS.module_dict, "OwnHead", type("OwnHead", (Shared2FCBBoxHead,), {}))
    config = read(DETECTION)
    config.merge_from_dict({"model": {"roi_head": change}})
    model = MODELS.build(config.model)
    model.neck.in_channels = 256  # of one map, as CenterNet's neck takes
    check_data.check_model(model, None)


# --- Annotation files ---------------------------------------------------------------------------------------


def renamed(*names: str) -> Callable[[dict[str, Any]], None]:
    """Give the categories of an annotation file these names; others keep theirs."""

    def change(content: dict[str, Any]) -> None:
        for category, name in zip(content["categories"], names, strict=False):
            category["name"] = name

    return change


def every(kind: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    """Set values in all entries of a kind; None takes the key out."""

    def change(content: dict[str, Any]) -> None:
        for entry in content[kind]:
            for key, value in values.items():
                entry[key] = value
                if value is None:
                    del entry[key]

    return change


@lru_cache
def detection_options() -> dict[str, Any]:
    return read(DETECTION).train_dataloader.dataset.to_dict()


def detection_set(**options: Any) -> Any:
    """A demo data set that has not read its file."""
    return DATASETS.build(copy.deepcopy(detection_options()) | {"lazy_init": True} | options)


def read_annotations(dataset: Any, content: Any, path: Path, masked: bool = False) -> Any:
    """The content of a file as `CocoDataset` reads it; `masked`: an evaluator of masks reads it too."""
    path.write_text(json.dumps(content))
    return check_data._coco_reader({path} if masked else set())(dataset, str(path))


BOXES = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True}]
RANGE = {"metainfo": {"classes": (*range(10),)}}
TEST = {"test_mode": True, "pipeline": BOXES[:1]}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (renamed("1", "0"), {}, r"write in the config: classes = \('1', '0', '2'"),
        (renamed("zero"), {}, r"no category is called \('0',\); there are \('zero', '1'"),
        (renamed("1"), {"metainfo": {"classes": DIGITS[1:]}}, "several categories have the same name"),
        (lambda c: c.pop("categories"), {}, "no list of categories"),
        (every("categories", name=[]), {}, r"categories, id 1: name is \[\], expected a number or text"),
        (every("images", height="90"), {}, 'images, id 1: height is "90", expected a number'),
        (every("images", file_name="gone.jpg"), {}, "gone.jpg: expected a file that LoadImageFromFile can"),
        (every("images", width=123), {}, r"has 90 x 122 pixels, but .* 90 x 123 \(rows x columns"),
        (every("images", width=124), {"pipeline": BOXES}, "has 90 x 122 pixels, but .* 90 x 124"),
        (every("annotations", area=None), {}, "annotations, id 1: has no area"),
        (every("annotations", iscrowd=None), {"test_mode": True}, "annotations, id 1: has no iscrowd"),
        (every("annotations", bbox=[]), {}, r"annotations, id 1: bbox is \[\], expected four numbers"),
        (every("annotations", bbox=[1, float("nan"), 9, 9]), {}, "id 1: bbox is .*NaN"),
        (every("annotations", segmentation=[]), {}, "annotations have no segmentation"),
        (every("annotations", segmentation=[1, 1, 5, 1, 5, 5]), {}, "annotations have no segmentation"),
        (every("annotations", segmentation={"counts": [1]}), {}, "annotations have no segmentation"),
        (every("annotations", id=7), {}, "annotations share 1 ids"),
        (every("annotations", image_id=77), {}, "annotations of images or categories that are not there"),
        (
            lambda c: [a.update(category_id=None) for a in c["annotations"]],
            TEST,
            "images or categories that are not there: .*None",
        ),
        (lambda c: c["images"].append(c["images"][0] | {"file_name": "x"}), {}, "images share .* ids"),
        (lambda c: c.pop("annotations"), {}, "nothing to train on.* 0 annotations"),
        (every("annotations", area=0), {}, "nothing to train on.* 0 of them of the classes"),
        (every("annotations", iscrowd=1), {}, "nothing to train on.* 0 of them of the classes"),
        (lambda c: None, {"filter_cfg": {"min_size": 5000}}, "0 of them with sides of at least 5000"),
    ],
)
def test_annotations_that_do_not_fit(
    change: Callable[[Any], None], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    dataset = detection_set(**options)
    content = json.loads(Path(dataset.ann_file).read_text())
    change(content)
    with pytest.raises(UserError, match=message):
        read_annotations(dataset, content, tmp_path / "own.json")
    (tmp_path / "own.json").write_text("{")
    with pytest.raises(UserError, match=r"own\.json: Expecting"):
        check_data._coco_reader(set())(dataset, str(tmp_path / "own.json"))


def test_annotations_that_fit(tmp_path: Path) -> None:
    """Some of the classes in the file's order, and no masks where none are used."""
    names = DIGITS[2:5]
    dataset = detection_set(metainfo={"classes": names}, pipeline=BOXES)
    content = json.loads(Path(dataset.ann_file).read_text())
    every("annotations", segmentation=None)(content)
    every("images", width=123)(content)
    read = read_annotations(dataset, content, tmp_path / "own.json")
    assert [read.loadCats([i])[0]["name"] for i in read.get_cat_ids(cat_names=names)] == [*names]
    assert read.img_ann_map and read.cat_img_map
    read_annotations(detection_set(**TEST), content, tmp_path / "own.json")
    with pytest.raises(UserError, match="have no segmentation"):
        read_annotations(detection_set(**TEST), content, tmp_path / "own.json", masked=True)


@pytest.mark.parametrize(
    ("change", "options", "warning"),
    [
        (lambda c: c.pop("annotations"), TEST, ""),
        (lambda c: c.pop("annotations"), {"filter_cfg": None}, ""),
        (every("annotations", area=0), {"filter_cfg": {"filter_empty_gt": False}}, ""),
        (lambda c: c["images"].append(c["images"][0]), {}, ""),
        (lambda c: [k.update(name=int(k["name"])) for k in c["categories"]], RANGE, ""),
        (lambda c: c["images"].pop(), {}, "annotations of images or categories that are not there"),
        (lambda c: c["categories"].pop(), {"metainfo": {"classes": DIGITS[:9]}}, "they are left out"),
        (lambda c: c["annotations"][0].update(category_id=None), {}, "1 annotations of images or cat"),
        (lambda c: c["annotations"][0].update(id=0), TEST, "counts the annotation with the id 0"),
    ],
)
def test_annotations_that_mmdet_reads(
    change: Callable[[Any], None],
    options: dict[str, Any],
    warning: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Backgrounds, entries that it skips, names that are numbers."""
    said: list[str] = []
    monkeypatch.setattr(check_data, "_warn", said.append)
    dataset = detection_set(**options)
    content = json.loads(Path(dataset.ann_file).read_text())
    change(content)
    read_annotations(dataset, content, tmp_path / "own.json")
    assert warning in "".join(said) and bool(said) == bool(warning)


def test_masks_that_evaluators_compare() -> None:
    """Their files, whatever else is called segm."""
    from mmdet.datasets import CocoDataset

    config = read(DETECTION)
    config.val_evaluator = [{"metric": "bbox", "ann_file": "segm.json"}, {"metric": "segm"}]
    config.test_evaluator = {"metrics": [{"metric": ["bbox", "segm"], "ann_file": "own.json"}]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_data, "_coco_reader", lambda files: files)
        with check_data.checked_annotations(config):
            assert {Path("own.json").resolve()} == CocoDataset.COCOAPI


def test_mistakes_in_annotations_are_told_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaders = "".join(
        f"{split}_dataloader = dict(dataset=dict(metainfo=dict(classes=tuple('9876543210'))))\n"
        for split in ("train", "val", "test")
    )
    (tmp_path / "own.py").write_text(f"_base_ = {DETECTION!r}\n{loaders}")
    assert runner.train(command(str(tmp_path / "own.py"), tmp_path)) == 2
    assert "another order than metainfo.classes" in last_error(capsys)


# --- Data sets of a config ----------------------------------------------------------------------------------


def wrapped(dataset: Any) -> dict[str, Any]:
    """A data set inside of three wrappers."""
    parts = [dict(type="RepeatDataset", times=2, dataset=dataset), copy.deepcopy(dataset)]
    return dict(
        type="ClassBalancedDataset", oversample_thr=0.1, dataset=dict(type="ConcatDataset", datasets=parts)
    )


VAL, PART = "val_dataloader.dataset", "train_dataloader.dataset.dataset.datasets.1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({f"{VAL}.metainfo.classes": ("a", "b")}, rf"{VAL} has the classes \('a', 'b'\)"),
        ({f"{PART}.metainfo.classes": ("a",)}, rf"{PART} has .*\('a',\), but {PART[:-1]}0.dataset has"),
        ({f"{VAL}.metainfo.classes": "cat"}, r"one class alone is written classes=\('cat',\)"),
        ({f"{VAL}.data_root": "gone"}, rf"{VAL}.ann_file: there is no gone/anno"),
        ({f"{VAL}.data_prefix.img": "x/"}, "data_prefix.img: there is no .*x; paths are relative to"),
        ({"val_evaluator.ann_file": "x.json"}, "val_evaluator.ann_file is x.json, but val_dataloader reads"),
    ],
)
def test_data_sets_that_do_not_agree(options: dict[str, Any], message: str) -> None:
    config = read(DETECTION)
    config.train_dataloader.dataset = wrapped(config.train_dataloader.dataset)
    assert check_data.check_data_sets(config, ("train", "val")) == DIGITS
    config.merge_from_dict(options)
    with pytest.raises(UserError, match=message):
        check_data.check_data_sets(config, ("train", "val"))


@pytest.mark.parametrize(
    "options",
    [
        {"test_dataloader.dataset.metainfo.classes": ("a",)},
        {f"{VAL}.data_prefix.img": "s3://images"},
        {f"{VAL}.metainfo.classes": ("a",), f"{VAL}.return_classes": True},
        {"val_evaluator": [{"ann_file": "panoptic.json"}, {"type": "CocoMetric"}]},
    ],
)
def test_data_sets_that_may_differ(options: dict[str, Any]) -> None:
    """A split that is not used, files elsewhere, classes as text, an evaluator's file of another kind."""
    config = read(DETECTION)
    config.merge_from_dict(options)
    if isinstance(config.val_evaluator, list):
        config.val_evaluator[1].ann_file = read(DETECTION).val_evaluator.ann_file
    assert check_data.check_data_sets(config, ("train", "val")) == DIGITS


def test_the_pages_keys_of_another_folder(scenes: Path) -> None:
    """Those of get_started.md reach every file that is read."""
    page = (REPO / "detection/get_started.md").read_text()
    words = re.search(r"--cfg-options \\\n((?: +\S+=/data/coco/.*\n)+)", page)[1].replace("\\", "").split()
    config = read(DETECTION)
    config.merge_from_dict(
        {f"{split}_dataloader.dataset.data_root": "gone" for split in ("train", "val", "test")}
    )
    pairs = [word.replace("/data/coco", f"{scenes}/detection").split("=") for word in words]
    config.merge_from_dict(dict(pairs))
    assert check_data.check_data_sets(config, ("train", "val", "test")) == DIGITS
    assert len(pairs) == 5


@pytest.mark.parametrize(
    ("path", "classes", "wrong"),
    [
        ("mmdet::rpn/rpn_r50_fpn_1x_coco.py", 80, 0),
        ("mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py", 133, 3),
        ("mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024.py", 19, 3),
        (str(REPO / "detection/configs/cascade-mask-rcnn_focal-tiny_fpn_amp-ms-crop-3x_coco.py"), 80, 6),
    ],
)
def test_every_head_that_counts_classes_is_looked_at(
    path: str, classes: int, wrong: int, tmp_path: Path
) -> None:
    """Not proposals, nor things of a panoptic data set, nor boundaries; three stages of boxes and masks."""
    (tmp_path / "own.py").write_text(f"_base_ = {path!r}\n")
    config = runner.read_config(str(tmp_path / "own.py"))
    config.model.backbone.get("backbone_cfg", {}).pop("init_cfg", None)
    config.model.backbone.init_cfg = None
    with torch.device("meta"), DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
    check_data.check_model(model, [str(n) for n in range(classes)])
    if wrong:
        with pytest.raises(UserError) as caught:
            check_data.check_model(model, DIGITS)
        assert str(caught.value).count("num_classes=") == wrong


def test_an_unknown_head_gives_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(check_data, "_warn", said.append)
    model = torch.nn.Module()
    model.bbox_head = torch.nn.Identity()
    model.bbox_head.num_classes = 3
    check_data.check_model(model, DIGITS)
    assert "model.bbox_head.num_classes=3: expected 10" in said[0]


# --- Label images -------------------------------------------------------------------------------------------


def turned(path: Path) -> None:
    """Store an image on its side, with an EXIF entry that says so."""
    image = Image.open(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


LOAD = {"type": "LoadImageFromFile"}
LABELS = [{"type": "LoadAnnotations"}]


class OwnStep:
    """A step of the user's own, which may map labels."""

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        return results


def with_own_labels() -> type:
    """A kind of data set whose labels are tens."""
    from mmseg.datasets import BaseSegDataset

    tens = classmethod(lambda cls, classes=None: {10 * number: number for number in range(11)})
    return type("OwnLabels", (BaseSegDataset,), {"METAINFO": {"classes": DIGITS}, "get_label_map": tens})


def labels(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    Image.fromarray(change(np.asarray(Image.open(path)).copy()).astype(np.uint8)).save(path)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda i, s: labels(s, lambda x: x * 0 + 12), {}, r"expected 1 to 11 for 11 classes, .*got \[12\]"),
        (
            lambda i, s: labels(s, lambda x: x * 0 + 11),
            {"reduce_zero_label": False},
            r"\[11\].*set it to True",
        ),
        (lambda i, s: labels(s, lambda x: x * 0 + 101), {"ignore_index": 100}, r"got \[101\]"),  # nobody's
        (lambda i, s: labels(s, lambda x: x[:-1]), {}, "has 90 x 122 pixels, but .* 89 x 122"),
        (lambda i, s: labels(s, lambda x: np.stack([x] * 3, -1)), {}, "expected one number per pixel"),
        (lambda i, s: turned(i), {}, "has 122 x 90 pixels, .*if its EXIF orientation turns it"),
        (lambda i, s: s.unlink(), {}, "00000001.png: expected a file that LoadAnnotations can load, got"),
        (lambda i, s: None, {"img_suffix": ".jpeg"}, "no images end in '.jpeg' .*3 files that end in .jpg"),
        (
            lambda i, s: None,
            {"pipeline": [LOAD, {"type": "LoadAnnotations", "reduce_zero_label": False}]},
            "dataset with `reduce_zero_label` as True",
        ),
    ],
)
def test_segments_that_do_not_fit(
    change: Callable[[Path, Path], None],
    options: dict[str, Any],
    message: str,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(scenes / "segmentation", tmp_path / "segmentation")
    monkeypatch.setenv("DEMO", str(tmp_path))
    config = runner.read_config(SEGMENTATION)
    assert len(check_data.check_data_sets(config, ("val",))) == 11
    folder = tmp_path / "segmentation"
    change(folder / "images/validation/00000001.jpg", folder / "annotations/validation/00000001.png")
    config.val_dataloader.dataset.update(options)
    with pytest.raises(UserError, match=message):
        check_data.check_data_sets(config, ("val",))


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda i, s: labels(s, lambda x: x * 0 + 102), {}),
        (lambda i, s: labels(s, lambda x: x * 0 + 101), {"type": with_own_labels}),
        (lambda i, s: labels(s, lambda x: x * 0 + 99), {"pipeline": [LOAD, *LABELS, OwnStep()]}),
        (lambda i, s: turned(i), {"pipeline": [LOAD | {"color_type": "unchanged"}, *LABELS]}),
        (lambda i, s: None, {"pipeline": [LOAD, LABELS[0] | {"imdecode_backend": "cv2"}]}),
    ],
    ids=["evaluator's", "label map", "own step", "not turned", "large"],
)
def test_segments_that_mmseg_loads(
    change: Callable[[Path, Path], None],
    options: dict[str, Any],
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(scenes / "segmentation", tmp_path / "segmentation")
    monkeypatch.setenv("DEMO", str(tmp_path))
    if "imdecode_backend" in str(options):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)
    config = runner.read_config(SEGMENTATION)
    config.val_evaluator.ignore_index = 101
    folder = tmp_path / "segmentation"
    change(folder / "images/validation/00000001.jpg", folder / "annotations/validation/00000001.png")
    config.val_dataloader.dataset.update(options)
    if options.get("type"):
        config.val_dataloader.dataset.type = with_own_labels()
    assert check_data.check_data_sets(config, ("val",))


def test_labels_that_one_head_of_a_segmenter_ignores(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one would fail on them, or learn them."""
    shutil.copytree(scenes / "segmentation", tmp_path / "segmentation")
    monkeypatch.setenv("DEMO", str(tmp_path))
    config = runner.read_config(SEGMENTATION)
    config.model.decode_head.ignore_index = 101
    for path in (tmp_path / "segmentation/annotations/training").iterdir():
        labels(path, lambda x: x * 0 + 102)
    with pytest.raises(UserError, match=r"no number for ignored pixels, .*got \[102\]"):
        check_data.check_data_sets(config, ("train",))
    config.model.auxiliary_head.ignore_index = 101
    assert check_data.check_data_sets(config, ("train",))


def test_one_class_alone_of_a_segmenter() -> None:
    config = runner.read_config(SEGMENTATION)
    for head in (config.model.decode_head, config.model.auxiliary_head):
        head.update(num_classes=1, out_channels=1)
    with pytest.raises(UserError, match=r"one class alone, got \('field',\)"):
        check_data.check_model(MODELS.build(config.model), ("field",))


def test_a_folder_that_segmentation_sets_look_for() -> None:
    """At once, and without saying what is missing."""
    config = runner.read_config(SEGMENTATION)
    gone = {"type": "PascalVOCDataset", "data_root": "gone", "ann_file": "train.txt", "_delete_": True}
    config.merge_from_dict({"val_dataloader": {"dataset": gone}})
    with pytest.raises(UserError, match=r"val_dataloader.dataset.ann_file: there is no gone/train.txt"):
        check_data.check_data_sets(config, ("val",))


@pytest.mark.parametrize("index", [4, [0, 1, 2, -5]])
def test_outputs_that_the_backbone_of_segmenters_lacks(index: int | list[int]) -> None:
    model = MODELS.build(runner.read_config(SEGMENTATION).model)
    model.auxiliary_head.in_index = -2  # the last but one, as its in_channels say
    check_data.check_model(model, None)
    model.decode_head.in_index = index
    with pytest.raises(UserError, match=r"decode_head.in_index: expected .* 0 to 3, got"):
        check_data.check_model(model, None)


def test_several_auxiliary_heads() -> None:
    model = runner.read_config(SEGMENTATION).model
    model.auxiliary_head = [model.auxiliary_head, model.auxiliary_head | {"in_channels": 99}]
    with pytest.raises(UserError, match=r"auxiliary_head.1.in_channels: expected"):
        check_data.check_model(MODELS.build(model), None)


def test_heads_of_segmenters_that_join_all_maps() -> None:
    """They keep the sum of their channels."""
    model = runner.read_config(SEGMENTATION).model
    dims = [*MODELS.build(model).backbone.feature_dims]
    joined = {"type": "FCNHead", "input_transform": "resize_concat", "in_index": [0, 1, 2, 3], "channels": 8}
    model.decode_head = joined | {"num_classes": 11, "in_channels": dims}
    check_data.check_model(MODELS.build(model), None)
    model.decode_head["in_channels"] = [*dims[:3], 1]
    with pytest.raises(UserError, match=r"decode_head.in_channels: expected"):
        check_data.check_model(MODELS.build(model), None)


def test_a_neck_that_begins_with_the_last_map() -> None:
    model = MODELS.build(read(DETECTION).model)
    model.backbone.out_indices = (1, 2, 3)
    channels = {"in_channels": [256, 128, 64], "out_channels": [32, 16, 8]}
    model.neck = MODELS.build({"type": "YOLOV3Neck", "num_scales": 3, **channels})
    check_data.check_model(model, None)
    model.neck.in_channels = [64, 128, 256]
    with pytest.raises(UserError, match=r"neck.in_channels: expected \[256, 128, 64\]"):
        check_data.check_model(model, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "slid"}, r"test_cfg\.mode: expected whole or slide, got 'slid'"),
        ({"mode": "slide", "crop_size": (64, 64)}, r"test_cfg\.stride: mode slide needs \(rows, columns\)"),
        ({"mode": "slide", "crop_size": 64, "stride": (42, 42)}, r"test_cfg\.crop_size: .* got 64"),
        ({"mode": "slide", "crop_size": (64, 64), "stride": (0, 0)}, r"test_cfg\.stride: .* got \(0, 0\)"),
    ],
)
def test_ways_to_test_segmenters(options: dict[str, Any], message: str) -> None:
    model = MODELS.build(runner.read_config(SEGMENTATION).model)
    check_data.check_model(model, None)
    model.test_cfg = options
    with pytest.raises(UserError, match=message):
        check_data.check_model(model, None)
    model.test_cfg = options | {"mode": "whole"}
    check_data.check_model(model, None)


def test_class_weights_of_segmenters() -> None:
    """Refused with pixels of no class."""
    config = runner.read_config(SEGMENTATION)
    model = MODELS.build(config.model)
    dataset = DATASETS.build(config.train_dataloader.dataset)
    loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset))
    run = SimpleNamespace(cfg=config, model=model, train_loop=loop, val_loop=None, hooks=[])
    StartChecks().before_run(run)
    model.data_preprocessor.size = (160, 160)
    with pytest.raises(UserError, match="loss_decode.class_weight: training images have pixels of no class"):
        StartChecks().before_run(run)
    model.auxiliary_head.loss_decode.class_weight = [1.0]
    with pytest.raises(UserError, match="class_weight: expected 11 numbers, a class each, got 1"):
        StartChecks().before_run(run)


# --- Weights ------------------------------------------------------------------------------------------------


def test_checkpoints_that_would_leave_weights_random() -> None:
    """The backbone's are needed; a head may be missing, but not to resume."""
    detector = MODELS.build(read(DETECTION).model)
    weights = detector.state_dict()
    other_head = {key: value for key, value in weights.items() if "mask_head" not in key}
    no_norm = {key: value for key, value in weights.items() if not key.startswith("backbone.norm3")}
    no_stage = {key: value for key, value in weights.items() if "layers.3.blocks.0.norm1" not in key}
    own = {"meta": {}, "optimizer": {}}

    def load(checkpoint: dict[str, Any], resume: bool = False) -> None:
        run = SimpleNamespace(cfg={"resume": resume, "load_from": "some.pth"}, model=detector)
        StartChecks().after_load_checkpoint(run, checkpoint)

    load({"state_dict": other_head})
    load({"state_dict": no_norm})
    load({"state_dict": {f"module.{key}": value for key, value in weights.items()}})
    load({"state_dict": weights} | own, resume=True)
    with pytest.raises(UserError, match="2 of .*backbone.layers.3"):
        load({"state_dict": no_stage})
    with pytest.raises(UserError, match="2 of .*backbone.norm3"):
        load({"state_dict": no_norm} | own, resume=True)
    with pytest.raises(UserError, match="missing .*such as roi_head.mask_head"):
        load({"state_dict": other_head} | own, resume=True)
    with pytest.raises(UserError, match="cannot be resumed: expected one that training wrote"):
        load({"state_dict": weights}, resume=True)


def test_checkpoints_of_other_classes() -> None:
    content = {"meta": {"dataset_meta": {"classes": ["cat", "dog"]}}}
    check_data.check_trained_classes("a.pth", content, ("cat", "dog"))
    with pytest.raises(
        UserError, match=r"a.pth was trained for the classes \('cat', 'dog'\), the config has"
    ):
        check_data.check_trained_classes("a.pth", content, ("dog", "cat"))


def test_bugs_while_a_checkpoint_is_loaded() -> None:
    """They are not said to be of the file."""
    with pytest.raises(AttributeError), runner.checkpoint_errors_as_user_errors("a.pth"):
        broken()


def test_own_checkpoints_are_read_safely(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner.import_mmengine()
    from mmengine.logging import HistoryBuffer
    from mmengine.runner.checkpoint import CheckpointLoader

    for kind in (np.float32, np.float64, np.int32, np.bool_):
        buffer = HistoryBuffer()
        buffer.update(1.0)
        torch.save({"logged": buffer, "value": kind(1), "values": np.ones(2, kind)}, tmp_path / "own.pth")
        assert CheckpointLoader.load_checkpoint(str(tmp_path / "own.pth"))["value"] == 1
    captured = capsys.readouterr()
    assert "WeightsUnpickler" not in captured.out + captured.err
