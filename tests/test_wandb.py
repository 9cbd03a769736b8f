"""Weights & Biases beside metrics.jsonl, with the real library in its offline mode."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_main import OPTS, command, folder_of

import main
from logger import Metrics, WeightsAndBiases

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()  # a process that this one starts would share its service


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / Metrics.NAME).read_text().splitlines()]


def run_ids(folder: Path) -> list[str]:
    """Of the runs that the library wrote, one entry for each time it was started."""
    folders = sorted((folder / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    return [path.name.split("-")[-1] for path in folders]


def test_a_resumed_run_continues_in_its_run(few_images: Path, tmp_path: Path) -> None:
    opts = [*OPTS, "LOG.WANDB", "tests"]
    folder = folder_of(tmp_path)
    for epochs in (1, 2):
        assert main.main(command(few_images, tmp_path, [*opts, "TRAIN.EPOCHS", epochs])) == 0
    own_id = (folder / WeightsAndBiases.ID_NAME).read_text()
    assert run_ids(folder) == [own_id] * 2
    wandb.teardown()  # which writes everything
    files = b"".join(path.read_bytes() for path in (folder / "wandb").glob("offline-run-*/*.wandb"))
    assert [record["kind"] for record in records(folder)] == ["train", "epoch"] * 2
    for record in records(folder):
        assert f"{record['kind']}/loss".encode() in files and str(record["loss"]).encode() in files


def test_a_failure_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics(tmp_path)
    metrics.start(WeightsAndBiases, False, project="tests")
    monkeypatch.setattr(wandb.run, "log", lambda values: 1 / 0)
    for step in range(2):
        metrics.write("train", step, loss=1.5)
    assert len(records(tmp_path)) == 2
    assert wandb.run is None and "Weights & Biases records no more" in caplog.text


def test_a_run_that_fails_is_marked_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics(tmp_path)
    metrics.start(WeightsAndBiases, False, project="tests")
    ends: list[int] = []
    monkeypatch.setattr(wandb.run, "finish", lambda exit_code: ends.append(exit_code))
    metrics.close(failed=True, preempted=True)
    assert ends == [1]


def test_without_the_library(
    few_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main.main(command(few_images, tmp_path, [*OPTS, "LOG.WANDB", "tests"])) == 2
    assert "LOG.WANDB: expected the library wandb" in (error := capsys.readouterr().err)
    assert "pip install wandb" in error and len(error.splitlines()) == 1
    assert not (folder_of(tmp_path) / "config.yaml").exists()
