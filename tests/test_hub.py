"""Weights and models of other people's tools: torch.hub, safetensors, the Hugging Face Hub, conversion."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_models
import torch
from conftest import REPO
from small_models import SMALL, image
from test_checkpoint import Call

import hubconf
from config import load_config
from models import VARIANTS, FocalTransformer, build_model, load_checkpoint, read_checkpoint
from models.checkpoint import DERIVED_BUFFERS
from models.hub import FocalTransformerOnHub
from models.safetensors_file import write_safetensors
from tools import convert_checkpoint

OFFICIAL = [REPO / f"tests/checkpoints/official_{version}_nano.pth" for version in ("v1", "v2")]
NAMES = {
    "focal_tiny": "focal_tiny_patch4_window7_224",
    "focal_fast_base": "focalv2_base_useconv_patch4_window7_224",
}


def build(variant: str, seed: int = 0) -> FocalTransformer:
    return small_models.build(seed, variant)


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(a.eval()(image(64, 64)), b.eval()(image(64, 64)))


# --- torch.hub ----------------------------------------------------------------------------------------------


def test_torch_hub_loads_a_model_from_another_folder(tmp_path, monkeypatch) -> None:
    short = "focal_fast_base"
    model = build(NAMES[short])
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    monkeypatch.chdir(tmp_path)
    same(torch.hub.load(str(REPO), short, source="local", pretrained="weights.pth", **SMALL), model)


def test_torch_hub_beside_a_package_of_the_same_name(tmp_path) -> None:
    """Whichever is imported first; the model can be saved whole and comes back in such a program. In this
    folder, or where a link leads to it, it is of this very package."""
    (tmp_path / "models.py").write_text("OWN = True\n")
    (tmp_path / "link").symlink_to(REPO)
    load = f"model = torch.hub.load({str(tmp_path / 'link')!r}, 'focal_tiny', source='local', **{SMALL!r})"
    saved = ["torch.save(model, 'm.pth')", "torch.load('m.pth', weights_only=False)"]
    ours = "assert isinstance(model, models.FocalTransformer)"
    for folder, check in ((tmp_path, "assert models.OWN"), (REPO, ours)):
        for lines in (["import models", load], [load, "import models"]):
            program = "\n".join(["import torch", *lines, check, *(saved if folder == tmp_path else [])])
            done = subprocess.run(
                [sys.executable, "-W", "error", "-c", program],
                cwd=folder, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr


def test_every_variant_has_an_entry_point() -> None:
    entries = {name: f for name, f in vars(hubconf).items() if callable(f) and not name.startswith("_")}
    assert {entry.__doc__.split(".")[0] for entry in entries.values()} == set(VARIANTS)
    for name, entry in entries.items():
        short = re.sub("fast_(.*)", r"\1_conv", name)
        start = short.replace("focal", "focalv2" if "fast" in name else "focal").replace("conv", "useconv")
        assert entry.__doc__.startswith(f"{start}_patch4_window7_224.")
        assert entry(**SMALL).head.out_features == SMALL["num_classes"]
    for package in hubconf.dependencies:
        __import__(package)


def test_weights_of_an_entry_point(tmp_path) -> None:
    model = build("focal_tiny_patch4_window7_224")
    write_safetensors(model.state_dict(), tmp_path / "w.safetensors")
    file = str(tmp_path / "w.safetensors")
    same(hubconf.focal_tiny(pretrained=file, **SMALL), model)
    other = {**SMALL, "num_classes": 7}
    with pytest.raises(ValueError, match="reset_head"):
        hubconf.focal_tiny(pretrained=file, **other)
    fresh = hubconf.focal_tiny(pretrained=file, reset_head=True, **other)
    assert torch.equal(fresh.norm.weight, model.norm.weight) and fresh.head.out_features == 7
    resized = hubconf.focal_tiny(pretrained=file, resize=True, **{**SMALL, "window_size": 4, "img_size": 64})
    assert torch.equal(resized.head.weight, model.head.weight)
    with pytest.raises(ValueError, match="none are published for focal_tiny_patch4_window7_224"):
        hubconf.focal_tiny(pretrained=True)


# --- safetensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", NAMES.values())
def test_safetensors_keep_every_bit(variant, tmp_path) -> None:
    """Buffers of whole numbers, half precision and kernels in another memory order as well."""
    model = build(variant).half()
    write_safetensors(model.state_dict(), tmp_path / "w.safetensors")
    found = read_checkpoint(tmp_path / "w.safetensors")
    torch.testing.assert_close(found, dict(model.state_dict()), rtol=0, atol=0)
    twin = build(variant, seed=1)
    report = load_checkpoint(twin, tmp_path / "w.safetensors")
    assert not (report.reset or report.kept)
    same(twin, model.float())


# --- Conversion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", OFFICIAL, ids=lambda path: path.stem)
def test_original_to_safetensors_and_back(source, tmp_path) -> None:
    """Every file on the way gives the same logits; the last one has the original's parameters alone."""
    config = load_config(source.with_suffix(".yaml"))
    expected = build_model(config)
    load_checkpoint(expected, source)
    steps = [source, tmp_path / "a.safetensors", tmp_path / "b.pth"]
    for before, after in zip(steps, steps[1:], strict=False):
        assert convert_checkpoint.main([str(before), str(after)]) == 0
        model = build_model(config)
        load_checkpoint(model, after)
        same(model, expected)
    original = torch.load(source, weights_only=False)["model"]
    written = torch.load(steps[-1], weights_only=True)["model"]
    assert written.keys() == {key for key in original if not DERIVED_BUFFERS.search(key)}
    assert all(torch.equal(value, original[key]) for key, value in written.items())
    assert {*tmp_path.iterdir()} == {*steps[1:]}


def test_averaged_weights_of_a_training_run(tmp_path, capsys) -> None:
    """Buffers, which are not averaged, come from the weights themselves, whatever the prefixes of both."""
    model = build("focalv2_tiny_useconv_patch4_window7_224")
    averaged = {key: value + 1 for key, value in model.named_parameters()}
    saved = {f"module.{key}": value for key, value in averaged.items()}  # as of torchvision's average
    content = {"model": model.state_dict(), "model_ema": saved, "epoch": 3, "optimizer": {}}
    torch.save(content, tmp_path / "run.pth")
    source, target = str(tmp_path / "run.pth"), tmp_path / "out.safetensors"
    assert convert_checkpoint.main([source, str(target), "--weights", "model_ema"]) == 0
    expected = {key: averaged.get(key, value) for key, value in model.state_dict().items()}
    torch.testing.assert_close(read_checkpoint(target), expected, rtol=0, atol=0)
    assert convert_checkpoint.main([source, str(tmp_path / "b.pth"), "--weights", "ema"]) == 2
    assert "expected weights under 'ema', found these groups: model, model_ema" in capsys.readouterr().err


def test_nothing_is_overwritten_or_left_behind(tmp_path, capsys) -> None:
    source, target, text = str(OFFICIAL[0]), tmp_path / "out.safetensors", tmp_path / "text.pth"
    target.write_text("precious")
    torch.save({"text": "no weights"}, text)
    for arguments, message in (
        ((source, target), "replace it with --force"),
        ((tmp_path / "no.pth", target, "--force"), "not there"),
        ((text, target, "--force"), "no tensors"),
        ((source, tmp_path / "out.npz"), "ends in one of .pth, .safetensors"),
    ):
        assert convert_checkpoint.main([*map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
        assert target.read_text() == "precious" and {*tmp_path.iterdir()} == {target, text}
    assert convert_checkpoint.main([source, str(target), "--force"]) == 0
    assert convert_checkpoint.main([str(target), str(target), "--force"]) == 2
    assert "expected another file than the source" in capsys.readouterr().err
    assert "norm.weight" in read_checkpoint(target) and {*tmp_path.iterdir()} == {target, text}


# --- Hugging Face Hub ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [*NAMES.values()])
def test_a_folder_of_the_hubs_layout(variant, tmp_path) -> None:
    """Options, weights and page; other tools read the weights, too."""
    torch.manual_seed(0)
    model = FocalTransformerOnHub(**{**VARIANTS[variant], **SMALL, "use_layerscale": True})
    model.save_pretrained(tmp_path / "model", model_card_kwargs={"model_id": "somebody/focal-digits"})
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["use_layerscale"] and config["depths"] == SMALL["depths"]
    again = FocalTransformerOnHub.from_pretrained(tmp_path / "model")
    assert not any(module.training for module in again.modules())
    same(again, model)
    plain = FocalTransformer(**config)
    load_checkpoint(plain, tmp_path / "model/model.safetensors")
    same(plain, model)
    page = (tmp_path / "model/README.md").read_text()
    assert "license: mit" in page and "pipeline_tag: image-classification" in page
    assert 'from_pretrained("somebody/focal-digits")' in page and "{{" not in page


def test_options_that_json_does_not_know(tmp_path) -> None:
    """Without them another model would be built, and a device need not be there."""
    scalars = {"num_classes": np.int64(7), "qk_scale": np.float32(0.5), "ape": np.True_, "device": "cpu"}
    lists = {"depths": [*np.array([1, 1])], "num_heads": (np.int8(2), 4), "focal_stages": range(2)}
    options = {**VARIANTS[NAMES["focal_fast_base"]], **SMALL, **scalars, **lists, "dtype": torch.float64}
    options |= {key: options[key][:2] for key in ("focal_levels", "focal_windows", "expand_sizes")}
    model = FocalTransformerOnHub(**options).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["device"] is config["dtype"] is None and config["depths"] == [1, 1]
    same(FocalTransformerOnHub.from_pretrained(tmp_path), model.float())


def test_a_folder_that_does_not_fit(tmp_path) -> None:
    model = FocalTransformerOnHub(**{**VARIANTS["focal_tiny_patch4_window7_224"], **SMALL})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="head.weight is"):
        FocalTransformerOnHub.from_pretrained(tmp_path, num_classes=9)
    state = read_checkpoint(tmp_path / "model.safetensors")
    del state["norm.weight"]
    write_safetensors(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: norm\.weight"):
        FocalTransformerOnHub.from_pretrained(tmp_path)


def repository(folder: Path, weights: object) -> dict[str, object]:
    """The cache's layout of a repository with options and pytorch_model.bin alone; arguments that load it."""
    commit = "0" * 40
    root = folder / "models--somebody--digits"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text(commit)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    options = {**VARIANTS["focal_tiny_patch4_window7_224"], **SMALL}
    (snapshot / "config.json").write_text(json.dumps(options))
    torch.save(weights, snapshot / "pytorch_model.bin")
    return {"cache_dir": folder, "local_files_only": True}


def test_a_repository_without_safetensors(tmp_path) -> None:
    """A pickled state dict is read, and no code in it."""
    model = build("focal_tiny_patch4_window7_224")
    state = model.state_dict()
    again = FocalTransformerOnHub.from_pretrained("somebody/digits", **repository(tmp_path / "whole", state))
    assert not any(module.training for module in again.modules())
    same(again, model)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: refused, because reading it would execute"):
        FocalTransformerOnHub.from_pretrained(
            "somebody/digits", **repository(tmp_path / "code", Call(os.getcwd))
        )


@pytest.mark.parametrize("changes", [(7, "avg"), (3, "max"), (0, "")])
@pytest.mark.parametrize("kind", ["focal", "focalv2"])
def test_what_was_changed_is_saved_so(changes: tuple[int, str], kind: str, tmp_path) -> None:
    """Another classifier, another pooling, which no weight shows, and another input size: at 64 pixels the
    last stages were single windows."""
    model = FocalTransformerOnHub(**SMALL | {"img_size": 64, "kind": kind, "ape": True}).eval()
    model.reset_classifier(*changes)
    model.set_input_size((96, 128))
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 96, 128)
    assert torch.equal(FocalTransformerOnHub.from_pretrained(tmp_path)(images), model(images))
