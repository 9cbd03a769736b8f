"""tools/benchmarks/gpu_report.py on the CPU, small: its kernels run in Triton's interpreter."""

import csv
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from conftest import REPO

pytest.importorskip("triton")
from tools.benchmarks import gpu_checks, gpu_report
from tools.benchmarks.gpu_report import DIED, NO_TIME, Task, run_tasks

SMALL_REPORT = """
import sys
from tools.benchmarks import entries, gpu_checks, gpu_report
from tools.benchmarks.attention import MATMUL_SIDE

MATMUL_SIDE["cpu"] = 64
gpu_report.run_tasks = lambda tasks, *_: ((task, task.function(*task.arguments), "") for task in tasks)
gpu_report.KERNELS = gpu_report.KERNELS[2:]
every = gpu_checks.cases
gpu_checks.cases = lambda *of: [case for case in every(*of) if (case.check, case.precision) == CHECKED]
entries.FAMILIES["swin"] = {"tiny": "test_convnext"}
sys.exit(gpu_report.main(sys.argv[1:]))
"""
CHECKED = ("forward and backward", "fp32")


def table(folder: Path, part: str) -> list[dict[str, str]]:
    (path,) = folder.glob(f"*_gpu_{part}.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_whole_report(tmp_path: Path) -> None:
    """In a process of its own, since Triton's interpreter is chosen when Triton is imported."""
    out, script = tmp_path / "out", f"CHECKED = {CHECKED}\n{SMALL_REPORT}"
    command = [sys.executable, "-c", script, "--device", "cpu", "--quick", "--out", str(out)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    checks = table(out, "checks")
    assert {row["check"].partition(":")[0] for row in checks} == {CHECKED[0]}
    assert {row["model"] for row in checks} == {*gpu_checks.TINY}
    assert all(row["result"] == "ok" and float(row["error"]) <= float(row["limit"]) for row in checks)
    kernels = table(out, "kernels")
    assert len(kernels) == 2 * 2  # passes, backends
    assert all(row["check"] == "ok" and float(row["ms"]) > 0 for row in kernels)
    speeds = table(out, "models")
    assert [row["mode"] for row in speeds] == ["infer", "infer", "train", "train"]
    assert all(float(row["img/s"]) > 0 for row in speeds)
    (text,) = (path.read_text() for path in out.glob("*_gpu.md"))
    for heading in ("## Checks", "## Kernels", "## Models"):
        assert heading in text
    assert "Without result" not in text
    assert len([*out.glob("*_gpu.png")]) == 1


def test_a_wrong_result_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = 0.0
    outcome = lambda case: [gpu_checks.Outcome("logits", error, 0.5)]  # noqa: E731
    monkeypatch.setitem(gpu_checks.CHECKS, "x", outcome)
    case = gpu_checks.Case("x", gpu_checks.TINY[0], "fp32", torch.device("cpu"), quick=True)
    report = gpu_report.Report(Namespace(out=tmp_path, device=case.device))
    for error in (0.1, float("nan")):
        result = "ok" if error == 0.1 else "FAILED"
        report.checks = gpu_checks.run(case)
        assert report.checks[0][:4] == ["x: logits", case.variant, "fp32", result]
        assert report.is_wrong == (result == "FAILED")


def test_what_had_no_time_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "FocalAttention", MagicMock())
    assert gpu_report.main(["--device", "cpu", "--minutes", "0", "--out", str(tmp_path)]) == 0
    assert {row["model"] for row in table(tmp_path, "checks")} == {*gpu_checks.RELEASED}
    (text,) = (path.read_text() for path in tmp_path.glob("*_gpu.md"))
    assert text.count(f": {NO_TIME}") == len(gpu_report.KERNELS) + len(gpu_report.groups(quick=False))


def test_it_says_why_the_kernels_cannot_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert gpu_report.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "needs a CUDA device, got cpu" in caplog.text


@pytest.mark.parametrize("variant", gpu_checks.TINY)
def test_a_wrong_gradient_is_found(variant: str) -> None:
    """Of any parameter, where it is nan or missing."""
    subject = gpu_checks.Subject(gpu_checks.Case("x", variant, "fp32", torch.device("cpu"), quick=True))
    assert all(found.error <= found.limit for found in subject.compare(subject.plain))
    for name, value in subject.plain.items():
        for wrong in (value * float("nan"), torch.zeros_like(value)):
            logits, gradients = subject.compare(subject.plain | {name: wrong})
            found = logits if name == "logits" else gradients
            assert found.error > found.limit, (name, found)
            assert found.note in ("", name)


def test_tasks_fail_alone_and_end_in_time() -> None:
    tasks = [
        Task("fails", int, ("x",)),
        Task("dies", os._exit, (3,)),
        Task("works", os.getpid, ()),
        Task("works in the same process", os.getpid, ()),
    ]
    found = {task.label: outcome for task, *outcome in run_tasks(tasks, time.monotonic() + 600, 1)}
    assert list(found) == [task.label for task in tasks]
    assert found["fails"][1].startswith("failed: ValueError: invalid literal")
    assert found["dies"] == [None, f"failed: {DIED}"]
    assert found["works"] == found["works in the same process"]
    with pytest.raises(ProcessLookupError):
        os.kill(found["works"][0], 0)
    late = [Task("hangs", time.sleep, (600,)), Task("comes too late", os.getpid, ())]
    assert [outcome for _, *outcome in run_tasks(late, time.monotonic() + 1, 1)] == [[None, NO_TIME]] * 2
