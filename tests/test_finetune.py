"""Starting from weights: classes by a map, layer-wise rates, frozen stages."""

from pathlib import Path

import pytest
import torch
from conftest import REPO
from test_main import OPTS, command
from torch import Tensor, nn

import main
from config import load_config
from lr_scheduler import build_scheduler
from models import FocalTransformer, build_model, load_checkpoint
from models.checkpoint import read_class_map
from optimizer import build_optimizer, freeze_stages, parameter_groups

FINE_TUNING = sorted(REPO.glob("configs/*/focal*.yaml"))


def nano(*opts: object) -> FocalTransformer:
    torch.manual_seed(0)
    return build_model(load_config(None, [*OPTS, *opts]))


def save(model: nn.Module, path: Path) -> Path:
    torch.save({"model": model.state_dict()}, path)
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# --- The class map ------------------------------------------------------------------------------------------


def test_mapped_classes_answer_as_before_and_others_start_afresh(tmp_path: Path) -> None:
    """Classes may be reordered, left out, continued twice or new."""
    old, new = nano(), nano("MODEL.NUM_CLASSES", 5)
    nn.init.normal_(old.head.bias)
    fresh = {key: value.clone() for key, value in new.head.state_dict().items()}
    class_map = read_class_map(write(tmp_path / "map", "7\n-\n0\n7\n-1\n"), 5)
    assert class_map == [7, None, 0, 7, None]
    report = load_checkpoint(new, save(old, tmp_path / "old.pth"), class_map=class_map)
    assert report.classes == ["1", "4"]
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(new.eval()(images)[:, [0, 2, 3]], old.eval()(images)[:, [7, 0, 7]])
    for key, value in new.head.state_dict().items():
        assert torch.equal(value[[1, 4]], fresh[key][[1, 4]])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0\n1\n", ["expected 3 lines", "got 2"]),
        ("0\n\n2\n", ["line 2", "- for a class"]),
        ("0\n1\nn01440764\n", ["line 3", "n01440764"]),
        ("0\n-2\n1\n", ["line 2", "-2"]),
    ],
)
def test_a_wrong_class_map_is_explained(text: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        read_class_map(write(tmp_path / "map.txt", text), 3)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_class_map_beyond_the_old_classes_loads_nothing(tmp_path: Path) -> None:
    weights, model = save(nano(), tmp_path / "old.pth"), nano("MODEL.NUM_CLASSES", 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"classes 0 to 9.*2 \(line 3\) -> 10"):
        load_checkpoint(model, weights, class_map=[0, 1, 10])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_class_map_needs_a_classifier_of_the_same_width(tmp_path: Path) -> None:
    weights = save(nano("MODEL.FOCAL.EMBED_DIM", 32), tmp_path / "wide.pth")
    with pytest.raises(ValueError, match="head.weight is"):
        load_checkpoint(nano(), weights, class_map=list(range(10)))
    state = nano().state_dict()
    del state["head.weight"]
    torch.save({"model": state}, weights)
    with pytest.raises(ValueError, match="expected a classifier to take classes from"):
        load_checkpoint(nano(), weights, class_map=[None] * 10)


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
    classes = config.MODEL.NUM_CLASSES
    class_map = None if classes == 1000 else [None] * classes
    report = load_checkpoint(new, save(old, tmp_path / "a.pth"), resize=True, class_map=class_map)
    assert not report.continued
    assert not report.dropped
    assert bool(report.resized) == (config.DATA.IMG_SIZE == 384)


def test_mistakes_with_a_class_map_end_in_one_message(
    few_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = save(nano(), tmp_path / "a.pth")
    class_map = write(tmp_path / "map.txt", "0\n1\n")
    opts = [*OPTS, "MODEL.HEAD_CLASS_MAP", str(class_map)]
    assert main.main(command(few_images, tmp_path, opts, "--pretrained", str(weights))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: MODEL.HEAD_CLASS_MAP: ")
    assert "map.txt: expected 10 lines" in error
