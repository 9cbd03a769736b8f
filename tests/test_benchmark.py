"""The measuring tools: what they write, how they compare, and that one model's failure is one row."""

import argparse
import csv
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import NANO, REPO
from torch import nn

from models.focal_transformer import BACKENDS

sys.path.insert(0, str(REPO / "tools"))
import benchmark
import benchmark_common as common
import benchmark_loader
import benchmark_models
import profile_attention

TINY = ["--batch-size", "1", "--repeats", "2", "--device", "cpu"]


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    """A configuration file of a model of a few thousand weights."""
    values: dict = {}
    for key, value in NANO.items():
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    path = tmp_path / "nano_tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, nano: Path) -> None:
    """Turns of one step, and models of a few thousand weights in the place of swin."""
    for tool in (benchmark, profile_attention):
        monkeypatch.setitem(tool.ROUND_SECONDS, "cpu", 0.0)
    monkeypatch.setitem(profile_attention.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(profile_attention.MATMUL_SIDE, "cpu", 32)
    monkeypatch.setitem(benchmark_models.FAMILIES, "swin", {"tiny": "test_convnext"})
    monkeypatch.setitem(benchmark_models.FAMILIES, "focal", {"tiny": str(nano)})
    monkeypatch.setitem(benchmark_models.FAMILIES, "deit", {"tiny": "test_vit"})


def table(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("*.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_benchmark_writes_the_table(quick: None, tmp_path: Path) -> None:
    out = tmp_path / "results"
    words = ["--models", "focal-tiny", "swin-tiny", "deit-tiny", "--sizes", "64", "50", "--out", str(out)]
    assert (
        benchmark.main([*words, *TINY, "--processes", "0", "--modes", "infer", "train", "--name", "try"]) == 0
    )
    assert sorted(path.suffix for path in out.iterdir()) == [".csv", ".md", ".png"]
    assert all(path.stem.endswith("_try") for path in out.iterdir())
    rows = table(out)
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        if (row["model"], row["resolution"]) == ("deit-tiny", "50"):  # no multiple of its patches
            assert row["note"].startswith("failed: ") and not row["img/s"]
            continue
        assert row["note"] == "" and float(row["img/s"]) > 0
        assert float(row["ratio lower"]) <= float(row["vs swin"]) <= float(row["ratio upper"])
        assert float(row["params M"]) > 0 and float(row["GMACs"]) > 0
        assert (row["attention"] != "") == (row["model"] == "focal-tiny")
        if row["model"] == "swin-tiny":
            assert float(row["vs swin"]) == 1
    text = next(out.glob("*.md")).read_text()
    for fact in ("Machine: ", "Versions: ", "Commit: ", "Command: ", "Load: ", "## train, fp32, eager"):
        assert fact in text


class Hungry(nn.Module):
    """Runs out of memory with more than two images."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 1000)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.head(images.mean((2, 3)))


def group_of(monkeypatch: pytest.MonkeyPatch, builders: dict, batch: int) -> benchmark.Group:
    monkeypatch.setattr(benchmark_models, "build", lambda entry, resolution: builders[entry.name]())
    monkeypatch.setattr(benchmark_models, "costs", lambda entry, resolution: (1, 1))
    setting = benchmark.Setting("tiny", 32, "infer", "fp32", "eager")
    entries = [benchmark_models.Entry(name, name, "tiny") for name in builders]
    return benchmark.Group(setting, entries, argparse.Namespace(device=torch.device("cpu"), batch_size=batch))


def test_batch_is_halved_for_all(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    small = lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))  # noqa: E731
    rows = group_of(monkeypatch, {"test_convnext": small, "hungry": Hungry}, 8).run(3)
    benchmark.compare(rows)
    assert [(row.batch, row.note, len(row.seconds)) for row in rows] == [(2, "", 3)] * 2
    assert all(row.ratio is not None for row in rows)
    rows = group_of(monkeypatch, {"test_convnext": small, "hungry": Hungry}, 128).run(2)
    assert rows[1].note.startswith("failed: OutOfMemoryError") and rows[1].rate is None
    assert rows[0].rate is not None


def test_a_group_stops_in_time(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round is finished; models that are not ready by then are left out."""
    seconds = iter(range(100))  # each time that the group looks: three times a model before the first round
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: next(seconds))
    builders = {"test_convnext": nn.Identity, "more": nn.Identity}
    rows = group_of(monkeypatch, builders, 1).run(3, deadline=5.5)
    assert [(row.note, len(row.seconds)) for row in rows] == [("", 1)] * 2
    rows = group_of(monkeypatch, builders, 1).run(3, deadline=0)
    assert [(row.note, len(row.seconds)) for row in rows] == [(benchmark.NO_TIME, 0)] * 2


def test_a_model_that_breaks_later_leaves_the_others(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(nn.Module):
        calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls > 4:
                raise ValueError("worn out\nand more")
            return images

    def unbuildable() -> nn.Module:
        raise RuntimeError("cannot be built")

    rows = group_of(
        monkeypatch, {"breaks": Breaks, "none": unbuildable, "test_convnext": nn.Identity}, 1
    ).run(5)
    assert [row.note for row in rows] == [
        "failed: ValueError: worn out",
        "failed: RuntimeError: cannot be built",
        "",
    ]
    assert [len(row.seconds) for row in rows] == [0, 0, 5]


def test_groups_have_processes_of_their_own(nano: Path, tmp_path: Path) -> None:
    """Rounds of all of them make a row; a process that dies is a note."""
    words = ["--models", str(nano), "test_convnext", "--sizes", "64", "--modes", "infer"]
    assert benchmark.main([*words, *TINY, "--processes", "2", "--out", str(tmp_path)]) == 0
    assert [(row["note"], float(row["img/s"]) > 0) for row in table(tmp_path)] == [("", True)] * 2
    assert "4 rounds in turns (2 processes)" in next(tmp_path.glob("*.md")).read_text()

    args = benchmark.parse([*words, *TINY, "--processes", "2"])
    args.device = torch.device("cpu")
    entries, setting = (
        benchmark_models.entries(args.models),
        benchmark.Setting("", 64, "infer", "fp32", "eager"),
    )
    assert [len(row.seconds) for row in benchmark.run_apart(setting, entries, args, 3)] == [6, 6]
    args.device = Dies()
    (note,) = {row.note for row in benchmark.run_apart(setting, entries, args, 3)}
    assert note == "failed: its process ended, for want of memory or as said above"
    args.device, args.threads = torch.device("cpu"), -1
    (note,) = {row.note for row in benchmark.run_apart(setting, entries, args, 3)}
    assert note.startswith("failed: RuntimeError: ") and "threads" in note


class Dies:
    """Ends the process that receives it."""

    def __reduce__(self) -> tuple:
        return os._exit, (1,)


def test_models_by_name() -> None:
    labels = [entry.label for entry in benchmark_models.entries(["swin", "focal-base", "swin-tiny"])]
    assert labels == ["swin-tiny", "swin-small", "swin-base", "focal-base"]
    (entry,) = benchmark_models.entries(["focalv2_small_useconv_patch4_window7_224"])
    assert (entry.size, benchmark_models.why_missing(entry)) == ("small", None)
    with pytest.raises(ValueError, match="--models: expected a family"):
        benchmark_models.entries(["swin-huge"])
    assert benchmark.main(["--models", "nothing"]) == 2


def test_every_model_of_the_families_exists() -> None:
    import timm

    for family, by_size in benchmark_models.FAMILIES.items():
        for name in by_size.values():
            is_config = (REPO / "configs" / f"{name}.yaml").is_file()
            assert is_config == (family in benchmark_models.OURS)
            assert is_config or timm.is_model(name) or name in benchmark_models.TRANSFORMERS


def test_transformers_missing_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_models.importlib.util, "find_spec", lambda name: None)
    (entry,) = benchmark_models.entries(["cvt-tiny"])
    assert benchmark_models.why_missing(entry) == "skipped: transformers is not installed"


def test_presets() -> None:
    args = benchmark.parse(["--preset", "gpu", "--sizes", "224"])
    assert (args.sizes, args.batch_size, args.precisions, args.name) == ([224], 128, ["bf16"], "gpu")
    assert len(benchmark_models.entries(args.models)) == sum(map(len, benchmark_models.FAMILIES.values()))
    assert benchmark.parse(["--preset", "cpu"]).batch_size == 8


def test_rounds_change_direction_and_ratios_pair_them() -> None:
    calls: list[str] = []
    timers = {name: (lambda name=name: calls.append(name) or float(len(calls))) for name in "ab"}
    times = common.alternate(timers, 3)
    assert "".join(calls) == "abbaab"
    assert times == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert common.speed_ratio([1, 1, 1], [2, 2, 20]).median == 2
    assert common.Spread.of([3.0]) == common.Spread(3.0, 3.0, 3.0)


def test_profile_checks_and_times(quick: None, nano: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    words = ["--cfg", str(nano), "--sizes", "64", "--precisions", "fp32", "bf16", "--out", str(out)]
    assert profile_attention.main([*words, *TINY]) == 0
    rows = table(out)
    stages = len(NANO["MODEL.FOCAL.DEPTHS"])
    assert len(rows) == stages * 2 * 2 * len(BACKENDS)
    for row in rows:
        if row["backend"] in ("plain", "cpu"):
            assert row["check"] == "ok" and float(row["ms"]) > 0 and float(row["times floor"]) > 0
        else:
            assert row["check"].startswith("cannot run: ") and not row["ms"]


def test_profile_finds_a_wrong_backend(
    quick: None, nano: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    honest = profile_attention.Contender.results

    def lying(self: profile_attention.Contender) -> list[torch.Tensor]:
        out, d_qkv, d_bias = honest(self)
        return [out, d_qkv * (1.01 if self.name == "cpu" else 1), d_bias]

    monkeypatch.setattr(profile_attention.Contender, "results", lying)
    words = ["--cfg", str(nano), "--sizes", "32", "--backends", "plain", "cpu"]
    assert profile_attention.main([*words, *TINY]) == 1
    off = profile_attention.verdict([0.0, float("nan"), 0.0], [0.0] * 3, torch.float32)
    assert off == "WRONG: d_qkv"


def test_loader_benchmark(tmp_path: Path) -> None:
    out = tmp_path / "results" / "loader.md"
    words = ["--images", "8", "--batch-size", "4", "--rounds", "2", "--workers", "0", "--size", "64"]
    assert benchmark_loader.main([*words, "--data", str(tmp_path / "set"), "--out", str(out)]) == 0
    rows = table(out.parent)
    assert [row["decoder"] for row in rows] == ["pil", "opencv"]
    assert float(rows[0]["ratio to pil"]) == 1 and float(rows[1]["ratio to pil"]) > 0
    first = next((tmp_path / "set" / "train").rglob("*.jpg"))
    assert 60 < first.stat().st_size / 1000 < 160
    assert "500x375" in out.read_text()
