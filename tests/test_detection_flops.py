"""The counting of detectors' parameters and multiply-adds."""

from pathlib import Path

import pytest
import torch
from conftest import REPO
from torchvision.ops import deform_conv2d

pytest.importorskip("mmdet", reason="needs OpenMMLab's packages: make setup-openmmlab")

from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS

from config import load_config
from detection.flops import DETECTION, count, counter, main
from models.build import count_params_and_macs

RETINANET = DETECTION.configs / "retinanet_focal-tiny_fpn_1x_coco.py"

pytestmark = [pytest.mark.usefixtures("in_mmdet"), pytest.mark.filterwarnings("ignore")]


def test_count_agrees_with_mmengine_where_that_can_count() -> None:
    """A detector of convolutions: mmengine also counts norms, which are a few in a hundred."""
    config = Config.fromstring("_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'", ".py")
    config.model.backbone.init_cfg = None
    cost = count(config.model, (96, 128))
    model = MODELS.build(config.model).eval()
    known = get_model_complexity_info(model, inputs=(torch.zeros(1, 3, 96, 128),), show_table=False)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert 0.95 < (cost.backbone_macs + cost.head_macs) / known["flops"] <= 1.0


def test_count_of_a_backbone_is_that_of_the_classifier() -> None:
    """At 224 pixels, with its windows, and without its head."""
    config = Config.fromfile(RETINANET)
    model = config.model.to_dict()
    model["backbone"].update(out_indices=(0, 1, 2, 3), focal_windows=[7, 5, 3, 1])
    model["neck"].update(in_channels=[96, 192, 384, 768], num_outs=6, start_level=1)
    cost = count(ConfigDict(model), (224, 224))
    _, macs = count_params_and_macs(load_config(str(REPO / "configs/focal_tiny_patch4_window7_224.yaml")))
    assert cost.backbone_macs == macs - 768 * 1000


def test_deformable_convolutions_count_like_convolutions() -> None:
    image, weight = torch.randn(2, 4, 5, 6), torch.randn(8, 4, 3, 3)
    with counter() as seen:
        torch.nn.functional.conv2d(image, weight, padding=1)
    with counter() as deformed:
        deform_conv2d(image, torch.zeros(2, 18, 5, 6), weight, padding=1)
    assert seen.get_total_flops() == deformed.get_total_flops() > 0


def test_count_as_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detection.flops.SIZE", (64, 96))
    paths = [RETINANET, RETINANET.with_name("retinanet_focal-tiny_fpn_amp-ms-crop-3x_coco.py")]
    main([*map(str, paths), "--out", str(tmp_path / "table.md")])
    lines = (tmp_path / "table.md").read_text().splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| retinanet")]
    assert [row[0].strip() for row in rows] == [path.stem for path in paths]
    assert all([cell.strip() for cell in row[1:4]] == ["64 x 96", "39.1", "39"] for row in rows)
    assert [row[-1].strip() for row in rows] == ["43.7", "45.5"] and len({row[4] for row in rows}) == 1
