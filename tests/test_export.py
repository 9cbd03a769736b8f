"""Files for other runtimes: what is written gives the model's logits, and nothing else is written."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import REPO
from torch import nn

from classification import export
from classification.export import FORMATS, ExportError, export_model
from config import load_config
from models import FocalTransformer, build_model

NANO = {
    "img_size": 32,
    "num_classes": 5,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,
    "focal_pool": "fc",
    "focal_levels": [2, 2],
    "focal_windows": [3, 1],
    "expand_sizes": [2, 2],
}
MODELS = {
    "focal": {"kind": "focal"},
    "focal_fast": {"kind": "focalv2", "use_conv_embed": True, "focal_topk": 20},
}
ODD = (40, 52)  # neither square, nor what the models are built for, nor whole windows
DEMO = ["--cfg", str(REPO / "configs/demo.yaml")]


def build(**options) -> FocalTransformer:
    torch.manual_seed(0)
    return FocalTransformer(**{**NANO, **options}).eval()


def images(batch: int, size: tuple[int, int], channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(77))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", FORMATS)
def test_files_agree_for_any_length_of_batches(name, kind, tmp_path) -> None:
    for package in FORMATS[name].packages:
        pytest.importorskip(package)
    model = build(**MODELS[kind])
    path = tmp_path / f"new/model{FORMATS[name].suffix}"
    written = export_model(model, name, ODD, 3, path)
    assert [*path.parent.iterdir()] == [path] and written.path == path
    assert written.difference < 1e-5 and written.milliseconds > 0 and written.eager_milliseconds > 0
    program = FORMATS[name].load(path)
    with torch.no_grad():
        for batch in (1, 2, 5):
            torch.testing.assert_close(
                program(images(batch, ODD)), model(images(batch, ODD)), rtol=0, atol=1e-5
            )
    assert "differs by at most" in str(written) and str(path) in str(written)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "focal", "use_shift": True, "use_layerscale": True, "in_chans": 1},
        {"kind": "focal", "ape": True, "focal_pool": "max", "use_pre_norm": True, "use_conv_embed": True},
        {"kind": "focal", "focal_pool": "conv", "focal_levels": [3, 1]},
        {"kind": "focalv2", "focal_pool": "mean", "num_classes": 0},
    ],
    ids=str,
)
def test_every_option_can_be_traced(options, tmp_path) -> None:
    """The model that is given stays as it was."""
    model = build(**options)
    before = repr(model)
    written = export_model(model, "torchscript", ODD, model.in_chans, tmp_path / "m.torchscript.pt")
    assert written.difference < 1e-5
    assert repr(model) == before and all(p.requires_grad for p in model.parameters())


def test_a_fixed_length_of_batches(tmp_path) -> None:
    model = build()
    export_model(model, "torch_export", (32, 32), 3, tmp_path / "m.pt2", batch=4)
    program = FORMATS["torch_export"].load(tmp_path / "m.pt2")
    with torch.no_grad():
        torch.testing.assert_close(program(images(4, (32, 32))), model(images(4, (32, 32))))
        with pytest.raises(Exception, match="(?i)shape|size|guard"):
            program(images(3, (32, 32)))


# --- Refusals -----------------------------------------------------------------------------------------------


def off_by(change: float):
    """A reader of files whose programs answer a little wrong."""

    def load(path: Path) -> export.Program:
        program = torch.jit.load(path)
        return lambda x: program(x) + change

    return load


@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_a_file_that_disagrees_is_not_kept(change, tmp_path, monkeypatch) -> None:
    kept = tmp_path / "m.torchscript.pt"
    kept.write_text("an older file")
    wrong = dataclasses.replace(FORMATS["torchscript"], load=off_by(change))
    monkeypatch.setitem(FORMATS, "torchscript", wrong)
    with pytest.raises(ExportError, match="torchscript: differs from the model by .* nothing was written"):
        export_model(build(), "torchscript", (32, 32), 3, kept)
    assert kept.read_text() == "an older file" and [*tmp_path.iterdir()] == [kept]


def test_an_exporter_that_fails_says_why(tmp_path) -> None:
    """A model that looks at its values, which no exporter can follow."""

    class Undecided(FocalTransformer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = super().forward(x)
            return logits if logits.sum() > 0 else -logits

    with pytest.raises(ExportError, match=r"torch_export: the exporter cannot do this model: \w"):
        export_model(Undecided(**NANO).eval(), "torch_export", (32, 32), 3, tmp_path / "m.pt2")
    assert [*tmp_path.iterdir()] == []


def of_one_length(model: nn.Module, example: torch.Tensor, any_batch: bool, path: Path) -> None:
    """An ONNX file that refuses batches of another length than the example's, when it runs."""
    export.write_onnx(model, example, False, path)


def cut(model: nn.Module, example: torch.Tensor, any_batch: bool, path: Path) -> None:
    """An ONNX file without its second half."""
    export.write_onnx(model, example, any_batch, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("write", [of_one_length, cut])
def test_a_file_that_does_not_run_is_not_kept(write, tmp_path, monkeypatch, capsys) -> None:
    """Whatever ONNX Runtime raises is one sentence, and the next format's turn comes."""
    for package in FORMATS["onnx"].packages:
        pytest.importorskip(package)
    monkeypatch.setitem(FORMATS, "onnx", dataclasses.replace(FORMATS["onnx"], write=write))
    arguments = ["--random", "--out", str(tmp_path), "--size", "32", "--formats", "onnx", "torchscript"]
    assert export.main([*DEMO, *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: onnx: ") and "demo_32x32.onnx does not load and run: " in line
    assert [path.name for path in tmp_path.iterdir()] == ["demo_32x32.torchscript.pt"]


def test_missing_packages_are_named(tmp_path, monkeypatch) -> None:
    needy = dataclasses.replace(FORMATS["onnx"], packages=("torch", "no_such_package"))
    monkeypatch.setitem(FORMATS, "onnx", needy)
    with pytest.raises(ExportError, match="onnx: needs no_such_package: pip install no_such_package"):
        export_model(build(), "onnx", (32, 32), 3, tmp_path / "m.onnx")


# --- Command line -------------------------------------------------------------------------------------------


def test_command_line(tmp_path, capsys) -> None:
    """Weights of a checkpoint, in a file that says what it is."""
    torch.manual_seed(1)
    model = build_model(load_config(DEMO[1])).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    arguments = [
        *DEMO,
        "--resume",
        str(tmp_path / "w.pth"),
        "--formats",
        "torchscript",
        "--out",
        str(tmp_path),
    ]
    assert export.main([*arguments, "--size", "48", "32"]) == 0
    path = tmp_path / "demo_48x32.torchscript.pt"
    assert capsys.readouterr().out.startswith(f"{path}: ")
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(path)(images(3, (48, 32))), model(images(3, (48, 32))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "any"], "A size that stays open cannot be exported, in any format"),
        (["--size", "1", "2", "3"], "expected one or two numbers of pixels, got 3"),
        (["--size", "16"], "images must be at least 32 x 32 pixels"),
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--opts", "MODEL.TYPE", "swin"], "MODEL.TYPE"),
    ],
)
def test_command_line_says_what_is_wrong(arguments, message, tmp_path, capsys) -> None:
    assert export.main([*DEMO, "--random", "--out", str(tmp_path / "new"), *arguments]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_weights_are_never_random_unasked(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        export.main([*DEMO, "--out", str(tmp_path)])
    assert "--resume --random is required" in capsys.readouterr().err
