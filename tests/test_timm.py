"""What timm expects of a model, stated over all variants of this repository.

The properties are those of timm's own test suite. Models here have the options of their variant, but few
channels and blocks.
"""

import copy
import inspect

import pytest
import timm
import torch
from conftest import REPO
from small_models import SMALL, image
from timm.models import FeatureInfo

from config import load_config
from models import VARIANTS, FocalTransformer, build, build_model
from models.registry import checkpoint_filter_fn

FAMILIES = (
    "focal_tiny_patch4_window7_224",
    "focal_small_useconv_patch4_window7_224",
    "focalv2_base_useconv_patch4_window7_224",
)
every_name = pytest.mark.parametrize("name", VARIANTS)
every_family = pytest.mark.parametrize("name", FAMILIES)


def create(name: str, seed: int = 0, **options) -> FocalTransformer:
    torch.manual_seed(seed)
    return timm.create_model(name, **{**SMALL, **options})


# --- Names and options --------------------------------------------------------------------------------------


def test_names_are_listed() -> None:
    assert set(timm.list_models("focal*_window7_224")) == set(VARIANTS)
    assert {path.stem for path in REPO.glob("configs/focal*.yaml")} == set(VARIANTS)
    assert all(timm.is_model(name) for name in VARIANTS)


@every_name
def test_a_variant_is_what_its_config_says(name, monkeypatch) -> None:
    """Every option of the network."""
    given = {}
    monkeypatch.setattr(build, "FocalTransformer", given.update)
    build_model(load_config(REPO / f"configs/{name}.yaml"))
    parameters = inspect.signature(FocalTransformer).parameters
    expected = {key: parameter.default for key, parameter in parameters.items() if key in given}
    assert VARIANTS[name].keys() <= given.keys()
    given["qk_scale"] = given["qk_scale"] or None  # the original's configs say False
    given, expected = (
        {key: [*value] if isinstance(value, list | tuple) else value for key, value in options.items()}
        for options in (given, expected | VARIANTS[name])
    )
    assert given == expected


@every_name
def test_default_cfg_is_true_and_unknown_arguments_are_errors(name) -> None:
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16).eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert {(t.is_meta, t.dtype) for t in model.parameters()} == {(True, torch.bfloat16)}
    assert all(t.is_meta for t in state.values())
    maps = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta", dtype=torch.bfloat16))
    assert cfg["architecture"] == name and cfg["num_classes"] == 1000 and not cfg["fixed_input_size"]
    assert model.in_chans == cfg["input_size"][0]
    assert f"{cfg['classifier']}.weight" in state and f"{cfg['first_conv']}.weight" in state
    assert maps.shape == (1, *cfg["pool_size"], model.num_features) and model.output_fmt == "NHWC"
    data = timm.data.resolve_data_config({}, model=model)
    config = load_config(REPO / f"configs/{name}.yaml").DATA
    assert (list(data["mean"]), list(data["std"])) == (config.MEAN, config.STD)
    assert data["interpolation"] == config.INTERPOLATION and data["crop_pct"] == 224 / 256
    with pytest.raises(TypeError):
        timm.create_model(name, not_an_option=1)


# --- Classifier ---------------------------------------------------------------------------------------------


@every_name
def test_classifier_can_be_replaced_and_removed(name) -> None:
    model, x = create(name).eval(), image(64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        torch.testing.assert_close(model.get_classifier()(pooled), model(x))
        model.reset_classifier(7)
        assert model.num_classes == 7 and model(x).shape == (2, 7)
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), pooled)
        model.reset_classifier(0, "")
        torch.testing.assert_close(model(x), features)
        assert create(name, num_classes=0).eval()(x).shape == pooled.shape
        assert create(name, num_classes=0, global_pool="").eval()(x).shape == features.shape
    assert inspect.signature(model.reset_classifier).parameters["global_pool"].default is None


def test_pooling_that_widens_the_features() -> None:
    model = create(FAMILIES[0], global_pool="catavgmax").eval()
    assert model.head_hidden_size == 128 == model.get_classifier().in_features
    with torch.no_grad():
        features = model.forward_features(image(64, 64))
        expected = torch.cat([features.mean(dim=(1, 2)), features.amax(dim=(1, 2))], dim=1)
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)


def test_new_classifier_is_where_the_model_is() -> None:
    model = create(FAMILIES[2], device="meta").to(torch.float64).eval()
    model.reset_classifier(3)
    assert {(p.device.type, p.dtype) for p in model.head.parameters()} == {("meta", torch.float64)}
    assert not any(module.training for module in model.modules())
    model.requires_grad_(False)
    model.set_input_size(128)
    assert not any(p.requires_grad for p in model.parameters())


# --- Maps ---------------------------------------------------------------------------------------------------


@every_name
def test_features_only(name) -> None:
    backbone = create(name, features_only=True, out_indices=(1, -1)).eval()
    assert backbone.feature_info.channels() == [16, 64]
    assert backbone.feature_info.reduction() == [8, 32]
    plain = FocalTransformer(**{**VARIANTS[name], **SMALL, "num_classes": 0}).eval()
    plain.load_state_dict(
        {k.removeprefix("model."): v for k, v in backbone.state_dict().items()}, strict=False
    )
    with torch.no_grad():
        maps = backbone(image(64, 96))
        expected = plain.forward_intermediates(image(64, 96), [1, 3], intermediates_only=True)
    assert [list(m.shape) for m in maps] == [[2, 16, 8, 12], [2, 64, 2, 3]]
    torch.testing.assert_close(maps, expected)
    assert not any(key.startswith(("model.norm.", "model.head.")) for key in backbone.state_dict())
    stages = ("depths", "num_heads", "focal_levels", "focal_windows", "expand_sizes")
    three = create(name, features_only=True, **{key: (1, 1, 1) for key in stages})
    assert three.feature_info.channels() == [8, 16, 32]


@every_name
def test_forward_intermediates_is_timms(name) -> None:
    model, x = create(name).eval(), image(96, 96)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        torch.testing.assert_close(last, model.forward_features(x))
        assert [m.shape[1] for m in maps] == info.channels()
        assert [96 // m.shape[2] for m in maps] == info.reduction()
        two = model.forward_intermediates(x, indices=2, intermediates_only=True)
        torch.testing.assert_close(two, maps[2:])
        rows = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        torch.testing.assert_close([m.permute(0, 3, 1, 2) for m in rows], maps)
        normed = model.forward_intermediates(x, [0, 3], norm=True, intermediates_only=True, output_fmt="NHWC")
        torch.testing.assert_close(normed, [rows[0], last])
        early, one = model.forward_intermediates(x, [1], stop_early=True)
        torch.testing.assert_close(one[0], maps[1])
        torch.testing.assert_close(early, rows[1])


def test_forward_intermediates_says_what_is_wrong() -> None:
    model = create(FAMILIES[0]).eval()
    for indices in ([4], [-5], 5, []):
        with pytest.raises(ValueError, match="stages 0 to 3"):
            model.forward_intermediates(image(64, 64), indices)
    with pytest.raises(ValueError, match="NCHW or NHWC, got 'NLC'"):
        model.forward_intermediates(image(64, 64), output_fmt="NLC")


@every_family
def test_pruned_models(name) -> None:
    """The maps stay, forward_features ends at the last one, and nothing is left that has no gradient."""
    model, x = create(name, drop_path_rate=0.0).eval(), image(64, 64)
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
    for stage in range(4):
        pruned = copy.deepcopy(model).train()
        assert pruned.prune_intermediate_layers([stage], prune_norm=True) == [stage]
        (chosen,) = pruned.forward_intermediates(x, [stage], intermediates_only=True)
        torch.testing.assert_close(chosen, maps[stage])
        torch.testing.assert_close(pruned(x).permute(0, 3, 1, 2), maps[stage])
        chosen.square().sum().backward()
        assert [key for key, p in pruned.named_parameters() if p.grad is None] == []


# --- Size ---------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("size", [(96, 96), (64, 96)], ids=str)
def test_set_input_size(name, size) -> None:
    """As created at that size; any size runs before and after."""
    options = {"window_size": 2, "expand_sizes": (1, 1, 1, 1), "ape": True}
    model = create(name, **options, img_size=128).eval()
    before = model(image(*size))
    model.set_input_size(img_size=size)
    torch.testing.assert_close(model(image(*size)), before)
    with pytest.raises(ValueError, match="at least 32 pixels"):
        model.set_input_size(16)
    assert model(image(64, 128)).isfinite().all()
    made = create(name, **options, img_size=size)
    torch.testing.assert_close(dict(made.named_buffers()), dict(model.named_buffers()))
    assert made.absolute_pos_embed.shape == model.absolute_pos_embed.shape


# --- Weights, and scripts -----------------------------------------------------------------------------------


def test_torchscript_is_refused_clearly() -> None:
    with pytest.raises(NotImplementedError, match=r"cannot be scripted.*torch\.jit\.trace"):
        torch.jit.script(create(FAMILIES[0]).eval())


@every_family
def test_weights_of_a_file(name, tmp_path) -> None:
    """Another number of channels and classes: timm adapts the first convolution, and the head stays fresh."""
    source = create(name, num_classes=1000, in_chans=3)
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth")}
    options = {"seed": 1, "pretrained": True, "pretrained_cfg_overlay": overlay}
    same = create(name, num_classes=1000, **options).eval()
    torch.testing.assert_close(same(image(64, 64)), source.eval()(image(64, 64)))
    other = create(name, in_chans=1, **options).eval()
    stem = source.patch_embed.proj.weight
    torch.testing.assert_close(other.patch_embed.proj.weight, stem.sum(dim=1, keepdim=True))
    given = source.state_dict()
    kept = {"patch_embed.proj.weight", "head.weight", "head.bias"}
    assert all(torch.equal(v, given[k]) for k, v in other.state_dict().items() if k not in kept)
    assert other(image(64, 64, channels=1)).shape == (2, 5)
    backbone = create(name, features_only=True, **options).eval()
    with torch.no_grad():
        expected = source.forward_intermediates(image(64, 64), intermediates_only=True)
        torch.testing.assert_close(backbone(image(64, 64)), expected)


@every_family
@pytest.mark.parametrize("way", ["pretrained", "checkpoint_path"])
def test_the_average_of_a_training_run(name, way, tmp_path) -> None:
    """timm prefers it to the weights themselves; it holds what has decimals, so no choice of nearest keys."""
    source = create(name)
    average = {key: value + 0.01 for key, value in source.state_dict().items() if value.is_floating_point()}
    torch.save({"model": source.state_dict(), "model_ema": average}, tmp_path / "run.pth")
    file = str(tmp_path / "run.pth")
    options = {
        "pretrained": {"pretrained": True, "pretrained_cfg_overlay": {"file": file, "num_classes": 5}},
        "checkpoint_path": {"checkpoint_path": file},
    }
    state = create(name, seed=1, **options[way]).state_dict()
    expected = source.state_dict() | average
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())
    del average["norm.weight"]
    torch.save(average, file)
    with pytest.raises((ValueError, RuntimeError), match=r"norm\.weight"):
        create(name, seed=1, **options[way])


@every_family
def test_weights_made_for_another_setting_are_resized(name) -> None:
    source = create(name, img_size=128, ape=True)
    target = create(name, seed=1, img_size=64, window_size=4, expand_sizes=(2, 2, 2, 2), ape=True).eval()
    state = {f"backbone.{key}": value for key, value in source.state_dict().items()}
    target.load_state_dict(checkpoint_filter_fn(state | {"neck.weight": torch.zeros(1)}, target))
    assert target(image(64, 64)).isfinite().all()
    qkv = "layers.0.blocks.0.attn.qkv.weight"
    assert torch.equal(target.state_dict()[qkv], source.state_dict()[qkv])
