"""tools/benchmarks: what they write, how they compare, and that one model's failure is one row."""

import os
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import NANO, NANO_WORDS, csv_rows
from torch import nn

from config import load_config
from models.focal_transformer import BACKENDS
from tools.benchmarks import attention, common, entries, loader, models

TINY = ["--batch-size", "1", "--rounds", "2", "--device", "cpu"]
CPU = torch.device("cpu")


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    """A configuration file of a model of a few thousand weights."""
    path = tmp_path / "nano_tiny.yaml"
    path.write_text(load_config(None, NANO_WORDS).dump())
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, nano: Path) -> None:
    """Rounds of one step, and models of a few thousand weights."""
    for tool in (models, attention):
        monkeypatch.setitem(tool.ROUND_SECONDS, "cpu", 0.0)
    monkeypatch.setitem(attention.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(attention.MATMUL_SIDE, "cpu", 32)
    monkeypatch.setitem(entries.FAMILIES, "swin", {"tiny": "test_convnext"})
    monkeypatch.setitem(entries.FAMILIES, "focal", {"tiny": str(nano)})
    monkeypatch.setitem(entries.FAMILIES, "deit", {"tiny": "test_vit"})


# --- Models -------------------------------------------------------------------------------------------------


def test_the_table_of_models(quick: None, tmp_path: Path) -> None:
    out = tmp_path / "results"
    words = ["--models", "focal-tiny", "focal-tiny:plain", "swin-tiny", "deit-tiny", "--sizes", "64", "50"]
    assert models.main([*words, *TINY, "--name", "try", "--out", str(out)]) == 0
    assert sorted(path.suffix for path in out.glob("*_try.*")) == [".csv", ".md", ".png"]
    rows = csv_rows(out)
    assert len(rows) == 4 * 2 * 2
    for row in rows:
        if (row["model"], row["resolution"]) == ("deit-tiny", "50"):  # no multiple of its patches
            assert row["note"].startswith("failed: ") and not row["img/s"]
            continue
        assert row["note"] == "" and float(row["img/s"]) > 0
        assert float(row["vs swin"]) > 0 and float(row["params M"]) > 0 and float(row["GMACs"]) > 0
        assert row["attention"] == {"focal-tiny": "cpu", "focal-tiny:plain": "plain"}.get(row["model"], "")
        assert row["model"] != "swin-tiny" or float(row["vs swin"]) == 1
    text = next(out.glob("*.md")).read_text()
    for fact in ("Machine: ", "Versions: ", "Commit: ", "Command: ", "Load: "):
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


def test_the_batch_is_halved_for_all(quick: None) -> None:
    setting = models.Setting("tiny", 32, "infer", "fp32", "eager")
    sources = {"convnext": "test_convnext", "hungry": lambda **options: Hungry()}
    group = [entries.Entry(label, source, "tiny") for label, source in sources.items()]
    rows = models.run_group(setting, group, 8, 3, CPU)
    assert [(row.batch, row.note, len(row.seconds)) for row in rows] == [(2, "", 3)] * 2
    assert all(row.ratio is not None for row in rows)
    rows = models.run_group(setting, group, 128, 2, CPU)
    assert rows[1].note == models.NO_MEMORY and rows[1].rate is None
    assert rows[0].rate is not None


def test_models_by_name() -> None:
    labels = [entry.label for entry in entries.entries(["swin", "focal-base:plain", "swin-tiny"])]
    assert labels == ["swin-tiny", "swin-small", "swin-base", "focal-base:plain"]
    (entry,) = entries.entries(["focalv2_small_useconv_patch4_window7_224"])
    assert entry.size == "small"
    with pytest.raises(ValueError, match="--models: expected a family"):
        entries.entries(["swin-huge"])
    for family, by_size in entries.FAMILIES.items():
        for name in by_size.values():
            assert entries.config_file(name) if family in entries.OURS else timm.is_model(name)


def test_rounds_alternate_and_ratios_pair_them() -> None:
    calls: list[str] = []
    timers = {name: (lambda name=name: calls.append(name) or float(len(calls))) for name in "ab"}
    times = common.alternate(timers, 3)
    assert "".join(calls) == "abbaab"
    assert times == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert common.speed_ratio([1, 1, 1], [2, 2, 20]).median == 2
    assert common.Spread.of([3.0]) == common.Spread(3.0, 3.0, 3.0)


def test_other_processes_fail_alone_and_end_in_time() -> None:
    assert common.in_process(None, os.getppid) == (os.getpid(), "")
    assert common.in_process(None, int, "x") == (
        None,
        "failed: ValueError: invalid literal for int() with base 10: 'x'",
    )
    assert common.in_process(None, os._exit, 3) == (None, common.DIED)
    start = time.monotonic()
    assert common.in_process(0.1, time.sleep, 600) == (None, common.NO_TIME)
    assert common.in_process(0, os._exit, 3) == (None, common.NO_TIME)
    assert time.monotonic() - start < 300


# --- The operator -------------------------------------------------------------------------------------------


def test_other_devices_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common.utils, "pick_device", lambda name: torch.device("mps"))
    assert models.main([]) == 2
    assert "--device: expected cpu or cuda, got mps" in capsys.readouterr().err


def test_backends_are_timed(quick: None, nano: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    words = ["--cfg", str(nano), "--sizes", "64", "--precisions", "fp32", "bf16", "--out", str(out)]
    assert attention.main([*words, *TINY]) == 0
    rows = csv_rows(out)
    assert len(rows) == len(NANO["MODEL.FOCAL.DEPTHS"]) * 2 * 2 * len(BACKENDS)
    for row in rows:
        if row["backend"] in ("plain", "cpu"):
            assert row["note"] == "" and float(row["ms"]) > 0 and float(row["times floor"]) > 0
        else:
            assert row["note"].startswith("cannot run: ") and not row["ms"]


def test_the_cost_of_an_index(quick: None, nano: Path, tmp_path: Path) -> None:
    assert attention.main(["--index", "--cfg", str(nano), "--out", str(tmp_path / "out"), *TINY]) == 0
    rows = csv_rows(tmp_path / "out")
    assert [row["part"] for row in rows] == ["index", "triton", "cpu"]
    assert all(float(row["ms"]) > 0 for row in rows)


# --- The loader ---------------------------------------------------------------------------------------------


def test_the_table_of_decoders_and_sources(tmp_path: Path) -> None:
    words = ["--images", "8", "--batch-size", "4", "--rounds", "2", "--workers", "0", "--size", "64"]
    assert loader.main([*words, "--out", str(tmp_path)]) == 0
    rows = csv_rows(tmp_path)
    assert [row["case"] for row in rows] == ["pil", "opencv", "zip", "wds", "hf"]
    assert float(rows[0]["ratio to pil"]) == 1 and all(float(row["ratio to pil"]) > 0 for row in rows)
    loader.photograph(0).save(tmp_path / "0.jpg", quality=loader.QUALITY)
    assert 60 < os.path.getsize(tmp_path / "0.jpg") / 1000 < 160
