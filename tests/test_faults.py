"""Faults of tools/faults on real runs: each must end as the undisturbed run, to the last bit."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from tools.faults import __main__ as faults
from tools.faults.run import FaultError, TrainingRun, compare, metrics


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> faults.Lab:
    """Keeps the undisturbed runs."""
    return faults.Lab(tmp_path_factory.mktemp("faults"), epochs=2)


def test_one_process_survives(lab: faults.Lab) -> None:
    """One run and one fault after another: all that may hit a run of one process."""
    sequence = ["save", "truncate", "disk"]  # the second one kills the run outside a save
    if os.geteuid():
        sequence.remove("disk")  # only root may mount one
    _, _, happened, launches, result = lab.survive(sequence, 1)
    assert all(words in happened for words in ("the save after", "cut off"))
    assert launches == 3
    assert "equal to the last bit" in result


def test_two_processes_survive(lab: faults.Lab) -> None:
    """One rank killed, which torchrun brings back, then one that hangs: each step is recorded once."""
    run = TrainingRun(lab.data, lab.root / "two", 2, epochs=1, restarts=1, **faults.OPTIONS["hang"])
    run.launch()
    try:
        faults.kill_rank(run, 6, lab.rng)
        faults.hang(run, 8, lab.rng)
        run.launch().finish()
    finally:
        if run.is_running:
            run.kill()
    reference = TrainingRun(lab.data, lab.root / "reference_two", 2, epochs=1)
    reference.launch().finish()
    assert "equal to the last bit" in compare(run, reference)
    steps = [record["step"] for record in metrics(run) if record["kind"] == "train"]
    assert steps == list(range(run.steps_per_epoch)) and len(steps) == 10


# --- The comparison -----------------------------------------------------------------------------------------


def test_a_changed_bit_and_what_is_lost_are_found(lab: faults.Lab, tmp_path: Path) -> None:
    shutil.copytree(lab.reference(1).output, tmp_path / "run")
    copied = TrainingRun(lab.data, tmp_path / "run", 1, 2)
    compare(copied, lab.reference(1))
    path = copied.folder / "ckpt_epoch_1.pth"
    content = torch.load(path, weights_only=True)
    weight = content["model_ema"][sorted(content["model_ema"])[-1]].view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
    torch.save(content, path)
    lines = (copied.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied.folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(FaultError, match="2 differences: ckpt_epoch_1.pth/model_ema.*; metrics.jsonl:42"):
        compare(copied, lab.reference(1))
    (copied.folder / "best.pth").unlink()
    with pytest.raises(FaultError, match="no .*best.pth"):
        compare(copied, lab.reference(1))


def test_a_run_that_loses_something_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lose(*_: object) -> None:
        raise FaultError("2 differences")

    monkeypatch.setattr(faults.Lab, "survive", lose)
    monkeypatch.setattr(faults, "make_data", lambda root: root)
    assert faults.main(["--only", "kill", "--processes", "1", "--out", str(tmp_path)]) == 1
    assert "**LOST**: FaultError: 2 differences" in next(tmp_path.glob("*_faults.md")).read_text()
