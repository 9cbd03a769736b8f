"""Starting from weights: layer-wise rates, frozen stages."""

from pathlib import Path

import pytest
import torch
from conftest import REPO
from test_main import OPTS
from torch import Tensor, nn

from config import load_config
from lr_scheduler import build_scheduler
from models import FocalTransformer, build_model, load_checkpoint
from optimizer import build_optimizer, freeze_stages, parameter_groups

FINE_TUNING = sorted(REPO.glob("configs/*/focal*.yaml"))


def nano(*opts: object) -> FocalTransformer:
    torch.manual_seed(0)
    return build_model(load_config(None, [*OPTS, *opts]))


def save(model: nn.Module, path: Path) -> Path:
    torch.save({"model": model.state_dict()}, path)
    return path


# --- Layer-wise rates ---------------------------------------------------------------------------------------


def test_every_layer_learns_at_its_share_of_the_rate() -> None:
    """Of Focal-T: the stem, twelve blocks and the classifier are fourteen layers."""
    opts = ["MODEL.FOCAL.APE", True]
    with torch.device("meta"):
        model = build_model(load_config(REPO / "configs/focal_tiny_patch4_window7_224.yaml", opts))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.05, layer_decay=0.8)
    share_of = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert share_of.keys() == set(names.values())
    for name, below in {
        **{"patch_embed.proj.weight": 13, "absolute_pos_embed": 13},
        **{"layers.0.blocks.0.norm1.bias": 12, "layers.2.blocks.0.mlp.fc1.weight": 8},
        **{"layers.2.blocks.5.mlp.fc1.weight": 3, "layers.2.downsample.proj.weight": 3},
        **{"norm.weight": 1, "head.weight": 0},
    }.items():
        assert share_of[name] == pytest.approx(0.8**below), name


def test_the_schedule_keeps_the_shares_and_the_log_shows_the_full_rate() -> None:
    config = load_config(None, [*OPTS, "TRAIN.LAYER_DECAY", 0.5, "TRAIN.WARMUP_EPOCHS", 1])
    optimizer = build_optimizer(config, build_model(config))
    scheduler = build_scheduler(config, optimizer, 10)
    for number in (0, 5, 15):
        scheduler.step_update(number)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert {rate / rates[0] for rate in rates} == {0.5**below for below in range(6)}


# --- Frozen stages ------------------------------------------------------------------------------------------


def gradients(model: FocalTransformer) -> dict[str, Tensor]:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model.train()(images).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "count", "recompute"),
    [("focal", -1, False), ("focal", 0, True), ("focalv2", 2, True), ("focalv2", 4, False)],
)
def test_frozen_stages_get_no_gradient_and_leave_the_others_theirs(
    kind: str, count: int, recompute: bool
) -> None:
    opts = ["MODEL.TYPE", kind, "MODEL.FOCAL.APE", True, "TRAIN.USE_CHECKPOINT", recompute]
    whole, model = nano(*opts), nano(*opts)
    frozen = freeze_stages(model, count)
    assert frozen == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    expected, found = gradients(whole), gradients(model)
    stopped = ["patch_embed.", "absolute_pos_embed"] * (count >= 0)
    stopped += [f"layers.{stage}." for stage in range(count)] + ["norm."] * (count == 4)
    assert found.keys() == {name for name in expected if not name.startswith(tuple(stopped))}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_frozen_stages_compute_what_they_do_in_evaluation() -> None:
    model = nano("MODEL.DROP_RATE", 0.5, "MODEL.DROP_PATH_RATE", 0.5)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        wanted = model.eval().forward_intermediates(images, intermediates_only=True)
        freeze_stages(model, 3)
        found = model.train().forward_intermediates(images, intermediates_only=True)
        torch.testing.assert_close(found[:3], wanted[:3])
        assert not torch.allclose(wanted[3], found[3])
        again = model.eval().forward_intermediates(images, intermediates_only=True)
        torch.testing.assert_close(again, wanted)


def test_more_stages_than_there_are_cannot_be_frozen() -> None:
    with pytest.raises(ValueError, match=r"TRAIN.FREEZE_STAGES: expected -1 to 4"):
        freeze_stages(nano(), 5)


# --- Configs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FINE_TUNING, ids=lambda path: path.stem)
def test_configs_take_the_weights_that_they_are_for(path: Path, tmp_path: Path) -> None:
    """With few channels and blocks; the windows and the input size are theirs."""
    config = load_config(path)
    assert path.stem == config.MODEL.NAME
    size = path.stem.split("_")[1]
    small = ["MODEL.FOCAL.EMBED_DIM", 8, "MODEL.FOCAL.DEPTHS", [1] * 4, "MODEL.FOCAL.NUM_HEADS", [1] * 4]
    old = build_model(load_config(REPO / f"configs/focal_{size}_patch4_window7_224.yaml", small))
    new = build_model(load_config(path, small))
    other_classes = config.MODEL.NUM_CLASSES != 1000
    report = load_checkpoint(new, save(old, tmp_path / "a.pth"), other_classes, resize=True)
    assert not report.continued
    assert not report.dropped
    assert bool(report.resized) == (config.DATA.IMG_SIZE == 384)
