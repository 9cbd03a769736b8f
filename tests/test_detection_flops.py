"""The counting of detectors' parameters and multiply-adds."""

from pathlib import Path

import pytest
import torch
from conftest import REPO
from torchvision.ops import deform_conv2d

pytest.importorskip("mmdet", reason="needs OpenMMLab's packages: make setup-openmmlab")

from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.registry import MODELS

import openmmlab.mmcv_ops  # noqa: F401  (before mmdet: makes its operators importable)
from config import load_config
from models.build import count_params_and_macs
from openmmlab.flops import count, counter, main

RETINANET = REPO / "detection/configs/retinanet_focal-tiny_fpn_1x_coco.py"

pytestmark = [pytest.mark.usefixtures("in_mmdet"), pytest.mark.filterwarnings("ignore")]


def test_count_agrees_with_mmengine_where_that_can_count() -> None:
    """A detector of convolutions: mmengine also counts norms, which are a few in a hundred."""
    config = Config.fromstring("_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'", ".py")
    config.model.backbone.init_cfg = None
    cost = count(config, (96, 128))
    model = MODELS.build(config.model).eval()
    known = get_model_complexity_info(model, inputs=(torch.zeros(1, 3, 96, 128),), show_table=False)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert 0.95 < cost.macs / known["flops"] <= 1.0


def test_count_of_a_backbone_is_that_of_the_classifier() -> None:
    """At 224 pixels, with its windows, and without its head."""
    config = Config.fromfile(RETINANET)
    config.model.backbone.update(out_indices=(0, 1, 2, 3), focal_windows=[7, 5, 3, 1])
    config.model.neck.update(in_channels=[96, 192, 384, 768], num_outs=6, start_level=1)
    cost = count(config, (224, 224))
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
    monkeypatch.setattr("openmmlab.flops.DETECTORS_IMAGE", (64, 96))
    assert main([str(RETINANET), "--out", str(tmp_path / "table.md")]) == 0
    *_, row = (tmp_path / "table.md").read_text().splitlines()
    assert [cell.strip() for cell in row.split("|")[1:4]] == [RETINANET.stem, "64 x 96", "39.1"]
