"""A few of the faults of tools/fault_test.py, on real runs: killed, stopped, hanging, refused by the disk.

All of them end like a run that was left alone, which is made once for each number of processes.
"""

import shutil
import sys
from pathlib import Path

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "tools"))
import fault_cases
import fault_compare
import fault_storage
import fault_test
from fault_common import FaultError, Row, Setting, Trainer

ONE = Setting(1, 0, epochs=3)
TWO = Setting(2, 2, epochs=3)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> fault_cases.Lab:
    """Keeps the runs that were left alone."""
    return fault_cases.Lab(tmp_path_factory.mktemp("faults"))


def passed(rows: list[Row]) -> list[Row]:
    assert rows
    assert all(row.passed for row in rows), rows
    return rows


def test_kills_change_nothing(lab: fault_cases.Lab) -> None:
    rows = passed(fault_cases.kill_chain(lab, ONE, ("step", "save", "epoch")))
    assert all("tensors bit-identical" in row.verified for row in rows)
    assert sum("kB written" in row.where for row in rows) == 1


def test_kills_of_two_processes_with_workers_change_nothing(lab: fault_cases.Lab) -> None:
    passed(fault_cases.kill_chain(lab, TWO, ("save", "rank")))


def test_a_signal_saves_and_loses_no_step(lab: fault_cases.Lab) -> None:
    rows = passed(fault_cases.signals(lab, {ONE: [("SIGTERM", None), ("SIGUSR1", None)]}))
    assert [row.redone for row in rows] == [0, 0]


def test_torchrun_brings_a_killed_rank_back(lab: fault_cases.Lab) -> None:
    setting = Setting(2, 0, epochs=3, max_restarts=1)
    passed(fault_cases.elastic(lab, setting, ranks=(1,)))


def test_a_hanging_rank_ends_the_job_with_a_message(lab: fault_cases.Lab) -> None:
    setting = Setting(2, 0, epochs=3).with_options(DIST_TIMEOUT_MINUTES=fault_cases.HANG_MINUTES)
    passed(fault_cases.hang(lab, setting))


def test_a_refused_save_keeps_the_older_file(lab: fault_cases.Lab) -> None:
    setting = ONE.with_options(SAVE_FAILURES_MAX=1000)
    row = fault_storage.refused_save(lab, "limit", fault_storage.limit_files, lab.trainer(setting))
    assert row.passed
    assert "the run went on" in row.outcome


# --- The test of the test -----------------------------------------------------------------------------------


@pytest.fixture
def copied(lab: fault_cases.Lab, tmp_path: Path) -> Trainer:
    """A run like the reference to the last byte."""
    shutil.copytree(lab.reference(ONE).output, tmp_path / "run")
    return Trainer(lab.data, tmp_path / "run", ONE)


def test_comparison_finds_a_changed_bit(lab: fault_cases.Lab, copied: Trainer) -> None:
    import torch

    assert fault_compare.compare(copied, lab.reference(ONE)).differences == []
    path = copied.folder / "ckpt_epoch_2.pth"
    content = torch.load(path, weights_only=True)
    weight = content["model_ema"][sorted(content["model_ema"])[-1]].view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
    torch.save(content, path)
    with pytest.raises(FaultError, match="1 differences: ckpt_epoch_2.pth/model_ema"):
        fault_compare.compare(copied, lab.reference(ONE)).require_none()


def test_comparison_finds_lost_metrics_and_left_files(lab: fault_cases.Lab, copied: Trainer) -> None:
    lines = (copied.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied.folder / "metrics.jsonl").write_text("".join(lines[:10] + lines[11:]))
    (copied.folder / ".best.pth.tmp").touch()
    found = fault_compare.compare(copied, lab.reference(ONE)).differences
    assert found[0] == f"{len(lines) - 1} lines of metrics instead of {len(lines)}"
    assert found[-1] == "temporary files left: .best.pth.tmp"


def test_comparison_misses_the_best_one_unless_the_run_itself_does(
    lab: fault_cases.Lab, copied: Trainer
) -> None:
    """A save that was refused on the way excuses nothing: a later one may have made up for it, or not."""
    path = copied.folder / "best.pth"
    path.unlink()
    with copied.console.open("a") as console:
        console.write(f"{path}: expected to write a checkpoint, got: No space left on device\n")
    assert fault_compare.compare(copied, lab.reference(ONE)).differences == [f"no {path}"]
    with copied.console.open("a") as console:
        console.write(f"{path} ends without the best weights: 30.00% was reached, it holds 20.00%\n")
    compared = fault_compare.compare(copied, lab.reference(ONE))
    assert compared.differences == []
    assert "refused by the disk, says the run" in compared.note


def test_steps_made_again_are_counted(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, tmp_path, ONE)
    trainer.folder.mkdir(parents=True)
    trainer.log.write_text("".join(f"epoch 1/3 step {n}/20  loss\n" for n in (1, 2, 3, 2, 3, 4, 5, 4)))
    assert trainer.redone == 4


def test_the_tool_tells_of_a_run_that_did_not_survive(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def lost(lab: fault_cases.Lab) -> list[Row]:
        raise FaultError("2 differences")

    monkeypatch.setitem(fault_test.CASES, "hang", lost)
    assert fault_test.main(["--only", "hang", "--out", str(tmp_path), "--work", str(tmp_path / "work")]) == 1
    assert "**FAILED**: FaultError: 2 differences" in capsys.readouterr().out
    assert "**FAILED**" in next(tmp_path.glob("*_faults.md")).read_text()
