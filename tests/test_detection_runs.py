"""Detection's commands on configs for COCO: a step of training and evaluations.

The demo scenes have COCO's 80 classes and file names; channels and images are small.
"""

import json
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs OpenMMLab's packages: make setup-openmmlab")

from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS
from mmengine.structures import InstanceData
from openmmlab_configs import edit
from openmmlab_runs import ONE_PROCESS, scalars
from test_detection import evaluated
from test_detection_configs import CONFIGS, name_of, shrunken, small_scale

from data.demo import DemoOptions, write_demo
from openmmlab import runner

ONE_STEP = ONE_PROCESS | {"train_cfg.max_epochs": 1, "default_hooks.logger.interval": 1}
FEW = ["--cfg-options", *(f"{key}={value}" for key, value in ONE_STEP.items())]
SCENES = DemoOptions(train_scenes=2, val_scenes=1, scene_width=122, scene_height=90)

pytestmark = pytest.mark.usefixtures("in_mmdet")


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/coco: a digit's class is that of eight times its number, ids have gaps as COCO's."""
    runner.import_mmengine()  # with the operators that mmdet imports
    from mmdet.datasets import CocoDataset

    root = tmp_path_factory.mktemp("coco")
    scenes = write_demo(root, ["detection"], SCENES)["detection"]
    for file in scenes.glob("annotations/*.json"):
        content = json.loads(file.read_text())
        names = CocoDataset.METAINFO["classes"]
        content["categories"] = [{"id": 3 * n + 1, "name": name} for n, name in enumerate(names)]
        for entry in content["annotations"]:
            entry["category_id"] = 3 * 8 * (entry["category_id"] - 1) + 1
        file.write_text(json.dumps(content))
    (root / "data").mkdir()
    (root / "data/coco").symlink_to(scenes)
    return root


def small(method: str) -> Config:
    """A method's config for small images and with few channels."""
    config = runner.read_config(str(CONFIGS / f"{name_of(method)}.py"))
    config.model = edit(shrunken(config), lambda key, value: 80 if key == "num_classes" else value)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset = edit(loader.dataset, small_scale)
    return config


@pytest.mark.parametrize("method", ["cascade-mask-rcnn", "sparse-rcnn", "reppointsv2"])
def test_a_method_trains_and_evaluates(
    method: str, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation at the end of training, and that of the checkpoint, find boxes, masks, and the same AP.

    The others differ in no option that the Runner reads.
    """
    monkeypatch.chdir(coco)
    config = small(method)
    masks = "mask_head" in config.model.get("roi_head", {})
    config.dump(tmp_path / "small.py")
    command = [str(tmp_path / "small.py"), "--work-dir", str(tmp_path)]
    assert runner.train([*command, "--no-amp", *FEW]) == 0
    lines = scalars(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1]
    assert runner.test([command[0], str(tmp_path / "epoch_1.pth"), *command[1:], *FEW]) == 0
    found = evaluated(scalars(tmp_path))
    assert found == evaluated(lines)
    assert [f"coco/{kind}_mAP" in found for kind in ("bbox", "segm")] == [True, masks]


@pytest.mark.parametrize("method", ["mask-rcnn", "retinanet"])
def test_what_is_true_gets_full_marks(method: str, coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config's evaluator, given what the config's own test set says is there."""
    monkeypatch.chdir(coco)
    config = small(method)
    dataset = DATASETS.build(config.test_dataloader.dataset)
    sample = dataset[0]["data_samples"]
    truth = sample.gt_instances
    sample.pred_instances = InstanceData(
        bboxes=truth.bboxes.tensor, labels=truth.labels, scores=truth.bboxes.tensor.new_ones(len(truth))
    )
    if "masks" in truth:
        sample.pred_instances.masks = truth.masks.to_tensor(bool, "cpu")
    evaluator = Evaluator(config.test_evaluator)
    evaluator.dataset_meta = dataset.metainfo
    evaluator.process([sample])
    found = evaluator.evaluate(1)
    assert len(truth) > 3 and {*truth.labels.tolist()} <= {8 * digit for digit in range(10)}
    assert all(found[f"coco/{kind}_mAP"] == 1 for kind in ("bbox", *(["segm"] if "masks" in truth else [])))
    assert ("coco/segm_mAP" in found) == ("masks" in truth)
