"""Files for other runtimes: what is written gives the model's logits, and nothing else is written."""

import dataclasses
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import small_models
import torch
from conftest import REPO
from torch import Tensor, nn

from classification import export
from classification.export import FORMATS, export_model
from config import load_config
from models import build_model
from utils import UserError

build = partial(
    small_models.build,
    img_size=32,
    depths=[1, 1],
    num_heads=[1, 2],
    window_size=4,
    focal_levels=[2, 2],
    focal_windows=[3, 1],
    expand_sizes=[2, 2],
)
FAMILIES = {
    "focal": {
        "in_chans": 1,
        "use_shift": True,
        "use_layerscale": True,
        "focal_pool": "conv",
        "focal_levels": [3, 1],
    },
    "focal_fast": {
        "kind": "focalv2",
        "use_conv_embed": True,
        "focal_topk": 20,
        "ape": True,
        "num_classes": 0,
    },
}
ODD = (40, 52)  # neither square, nor what the models are built for, nor whole windows
DEMO = ["--cfg", str(REPO / "configs/demo.yaml")]


def images(batch: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(77))


@torch.no_grad()
def assert_same(
    program: export.Program, model: nn.Module, shape: tuple[int, int, int], *batches: int
) -> None:
    for batch in batches:
        x = images(batch, shape)
        torch.testing.assert_close(program(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FORMATS)
def test_files_agree_for_any_length_of_batches(name, family, tmp_path) -> None:
    """And what was exported can still be trained."""
    if name == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    model = build(**FAMILIES[family])
    path, shape = tmp_path / f"new/model{FORMATS[name].suffix}", (model.in_chans, *ODD)
    export_model(model, name, shape, path)
    assert [*path.parent.iterdir()] == [path]
    assert_same(FORMATS[name].load(path), model, shape, 1, 2, 5)
    model(images(1, shape)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.fixture
def linear() -> nn.Module:
    """A model that is quickly written; its logits are 0.5."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 2, 5))
    nn.init.zeros_(model[1].weight)
    nn.init.constant_(model[1].bias, 0.5)
    return model.eval()


# --- Refusals -----------------------------------------------------------------------------------------------


def change(monkeypatch: pytest.MonkeyPatch, name: str, **fields: object) -> None:
    """Let a format be written or loaded otherwise."""
    monkeypatch.setitem(FORMATS, name, dataclasses.replace(FORMATS[name], **fields))


def write_garbage(model: nn.Module, example: Tensor, path: Path) -> None:
    path.write_bytes(b"garbage")


def load_changed(path: Path) -> export.Program:
    """Load a file, and change its logits for batches of three images."""
    program = export.load_program(path)
    return lambda x: program(x) + 1e-3 * (len(x) == 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"load": load_changed}, "for other images, the file differs: .* difference: 0.001"),
        ({"write": write_garbage}, "[^;]"),
    ],
    ids=["three images", "garbage"],
)
def test_a_file_that_disagrees_is_not_kept(fields, message, linear, tmp_path, monkeypatch) -> None:
    """Nor one that cannot be written or read; why is said in one line."""
    kept = tmp_path / "m.pt2"
    kept.write_text("an older file")
    change(monkeypatch, "torch_export", **fields)
    with pytest.raises(UserError, match=rf"\Atorch_export: {message}.*; nothing was written to .*\Z"):
        export_model(linear, "torch_export", (3, 2, 2), kept)
    assert kept.read_text() == "an older file" and [*tmp_path.iterdir()] == [kept]


def test_missing_packages_are_named(linear, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="onnx: .*onnx(runtime|script)"):
        export_model(linear, "onnx", (3, 2, 2), tmp_path / "m.onnx")


# --- Command line -------------------------------------------------------------------------------------------


def test_command_line(tmp_path, capsys) -> None:
    """Weights of a checkpoint, in a file that says what it is; no warnings of exporters."""
    torch.manual_seed(1)
    model = build_model(load_config(DEMO[1])).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    arguments = ["--resume", str(tmp_path / "w.pth"), "--out", str(tmp_path), "--formats", "torchscript"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert export.main([*DEMO, *arguments, "--size", "48", "32"]) == 0
    path = tmp_path / "demo_48x32.torchscript.pt"
    assert capsys.readouterr().out.startswith(f"{path}: ")
    assert_same(torch.jit.load(path), model, (3, 48, 32), 3)


@pytest.fixture
def weights(tmp_path_factory) -> list[str]:
    """Options that name a checkpoint of the demo's model."""
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save({"model": build_model(load_config(DEMO[1])).state_dict()}, path)
    return [*DEMO, "--resume", str(path)]


def test_a_folder_that_cannot_be_written(weights, tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    assert export.main([*weights, "--out", str(tmp_path / "file/out"), "--formats", "torchscript"]) == 2
    assert str(tmp_path / "file/out") in capsys.readouterr().err


def test_after_a_format_that_fails_comes_the_next(weights, tmp_path, monkeypatch, capsys) -> None:
    change(monkeypatch, "torch_export", write=write_garbage)
    arguments = ["--out", str(tmp_path), "--formats", "torch_export", "torchscript"]
    assert export.main([*weights, *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: torch_export: ") and line.endswith(
        "to " + str(tmp_path / "demo_32x32.pt2")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["demo_32x32.torchscript.pt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "16", "16"], "images must be at least 32 x 32 pixels"),
        (["--size", "-5", "64"], "--size: expected rows and columns in pixels, got -5 64"),
        (["--opts", "MODEL.TYPE", "swin"], "MODEL.TYPE"),
    ],
)
def test_command_line_says_what_is_wrong(arguments, message, weights, tmp_path, capsys) -> None:
    assert export.main([*weights, "--out", str(tmp_path / "new"), *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "new").exists()
