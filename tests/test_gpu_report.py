"""tools/gpu_report.py on the CPU, small: its kernels run in Triton's interpreter, in other processes."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO

pytest.importorskip("triton")
sys.path.insert(0, str(REPO / "tools"))
import benchmark_common as common
import gpu_checks
import gpu_report
from gpu_report import NO_TIME, Task, run_tasks

WRONG_KERNEL = """
import sys
sys.path[:0] = ["tools", "."]
import gpu_report
from models.focal_transformer import BACKENDS

right = BACKENDS["triton"]
BACKENDS["triton"] = right._replace(attend=lambda *inputs: right.attend(*inputs) * 1.001)
gpu_report.CHECKS, gpu_report.KERNELS = gpu_report.CHECKS[:1], gpu_report.KERNELS[2:]
gpu_report.groups = lambda quick: []
if __name__ == "__main__":
    sys.exit(gpu_report.main(sys.argv[1:]))
"""


def report_in_interpreter(script: str | Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(script), "--device", "cpu", "--quick", "--out", str(out)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(command, env=environment, cwd=REPO, capture_output=True, text=True)


def table(folder: Path, part: str) -> list[dict[str, str]]:
    (path,) = folder.glob(f"*_gpu_{part}.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_whole_report(tmp_path: Path) -> None:
    done = report_in_interpreter("tools/gpu_report.py", tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    checks = table(tmp_path, "checks")
    for check in gpu_checks.CHECKS:
        rows = [row for row in checks if row["check"].partition(":")[0] == check.name]
        assert {row["model"] for row in rows} == {*gpu_checks.TINY}
        if check.gpus:
            assert all(row["result"] == "not run" and row["note"].startswith("needs ") for row in rows)
        else:
            assert all(row["result"] == "ok" and float(row["error"]) <= float(row["limit"]) for row in rows)
    kernels = table(tmp_path, "kernels")
    assert len(kernels) == len(gpu_report.KERNELS) * 2 * 2  # passes, backends
    assert all(row["check"] == "ok" and float(row["ms"]) > 0 for row in kernels)
    speeds = table(tmp_path, "models")
    assert [row["mode"] for row in speeds] == ["infer", "infer", "train", "train"]
    assert all(float(row["img/s"]) > 0 and float(row["vs swin"]) > 0 for row in speeds)
    (text,) = (path.read_text() for path in tmp_path.glob("*_gpu.md"))
    for heading in ("## Checks", "## Attention kernels", "## infer, fp32, eager", "## train, fp32, eager"):
        assert heading in text
    assert "Without result" not in text
    assert len([*tmp_path.glob("*_gpu.png")]) == 1


def test_a_wrong_kernel(tmp_path: Path) -> None:
    """An output that is off by a thousandth."""
    script = tmp_path / "wrong.py"
    script.write_text(WRONG_KERNEL)
    done = report_in_interpreter(script, tmp_path / "out")
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    results = {row["precision"]: row["result"] for row in table(tmp_path / "out", "checks")}
    assert results["fp32"] == "FAILED"
    for row in table(tmp_path / "out", "kernels"):
        assert row["check"] == ("ok" if row["backend"] == "plain" else "WRONG: output, d_qkv, d_bias")


def test_without_time_everything_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "need_kernels", lambda _: None)
    words = ["--device", "cpu", "--minutes", "0", "--out", str(tmp_path)]
    assert gpu_report.main(words) == 0
    assert {row["model"] for row in table(tmp_path, "checks")} == {*gpu_checks.RELEASED}
    (text,) = (path.read_text() for path in tmp_path.glob("*_gpu.md"))
    assert text.count(f": {NO_TIME}") == len(gpu_report.KERNELS) * 4 + len(gpu_report.groups(quick=False))


def test_says_why_the_kernels_cannot_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert gpu_report.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "needs a CUDA device, got cpu" in caplog.text


@pytest.mark.parametrize("variant", gpu_checks.TINY)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_missing_or_no_number(variant: str, precision: str) -> None:
    """Of any parameter it is found and named; a missing one in float32: some are within bf16's noise."""
    subject = gpu_checks.Subject(gpu_checks.Case(variant, precision, torch.device("cpu"), quick=True))
    assert all(found.error <= found.limit for found in subject.compare(subject.plain))
    for name, value in subject.plain.items():
        wrong = [value * float("nan"), *([torch.zeros_like(value)] if precision == "fp32" else [])]
        for each in wrong:
            logits, gradients = subject.compare(subject.plain | {name: each})
            found = logits if name == "logits" else gradients
            assert found.error > found.limit, (name, found)
            assert found.note in ("", name)


def outcomes(tasks: list[Task], seconds: float) -> dict[str, tuple[object, str]]:
    """Result and reason of tasks, by label, in the order in which they ended."""
    found = {}
    run_tasks(
        tasks, time.monotonic() + seconds, 1, lambda task, *outcome: found.update({task.label: outcome})
    )
    return found


def test_a_task_fails_alone() -> None:
    """Also one that ends its process."""
    tasks = [
        Task("fails", int, ("x",)),
        Task("dies", os._exit, (3,)),
        Task("works", os.getpid, ()),
        Task("works again", os.getpid, ()),
        Task("in a new process", os.getpid, (), fresh=True),
    ]
    found = outcomes(tasks, 600)
    assert list(found) == [task.label for task in tasks]
    assert found["fails"][1].startswith("failed: ValueError: invalid literal")
    assert found["dies"][1] == "failed: its process ended, for want of memory or as said above"
    assert found["works"] == found["works again"] != found["in a new process"]


def test_tasks_end_in_time() -> None:
    began = time.monotonic()
    found = outcomes([Task("hangs", time.sleep, (600,)), Task("comes too late", os.getpid, ())], 2)
    assert time.monotonic() - began < 60
    assert found == {"hangs": (None, NO_TIME), "comes too late": (None, NO_TIME)}


def test_a_worker_ends_with_its_owner() -> None:
    with common.Worker() as worker:
        process = worker.call(os.getpid)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
