"""tools/benchmarks/gpu_report.py on the CPU, small: its kernels run in Triton's interpreter."""

import importlib
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from conftest import REPO, csv_rows

pytest.importorskip("triton")
from models.registry import VARIANTS
from tools.benchmarks import common, entries, gpu_checks, gpu_report

SMALL = {  # options of a model that the interpreter runs in seconds
    **{"img_size": 32, "embed_dim": 8, "depths": (1,), "num_heads": (1,), "window_size": 4},
    **{"focal_stages": (0,), "focal_levels": (2,), "focal_windows": (3,), "expand_sizes": (1,)},
    **{"focal_topk": 12},
}
PARTS = [
    ("kernels", 0.7, "attention --backends plain triton --cfg configs/demo.yaml"),
    ("models", 0.95, "models --models demo test_convnext"),
]
SMALL_REPORT = """
import sys
from tools.benchmarks import common, gpu_checks, gpu_report

common.in_process = lambda _, function, *arguments: (function(*arguments), "")
gpu_report.CHECKERS = 1
every = gpu_checks.cases
gpu_checks.cases = lambda device: [
    case for case in every(device) if case[::2][:2] == CHECKED and case.variant in gpu_checks.TINY
]
gpu_checks.VARIANTS = {name: options | SMALL for name, options in gpu_checks.VARIANTS.items()}
few = ["--rounds", "1", "--sizes", "32", "--batch-size", "1"]
gpu_report.commands = lambda: [(name, end, words.split() + few) for name, end, words in PARTS]
sys.exit(gpu_report.main(sys.argv[1:]))
"""
CHECKED = ("forward and backward", "fp32")


def test_the_whole_report(tmp_path: Path) -> None:
    """In a process of its own, since Triton's interpreter is chosen when Triton is imported."""
    out, script = tmp_path / "out", f"CHECKED, SMALL, PARTS = {CHECKED}, {SMALL}, {PARTS}\n{SMALL_REPORT}"
    command = [sys.executable, "-c", script, "--device", "cpu", "--out", str(out)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    checks = csv_rows(out, "_gpu_checks")
    assert {row["check"] for row in checks} == {CHECKED[0]}
    assert {row["model"] for row in checks} == {*gpu_checks.TINY}
    assert all(row["result"] == "ok" and float(row["error"]) <= float(row["limit"]) for row in checks)
    kernels = csv_rows(out, "_gpu_kernels")
    assert len(kernels) == 2 * 2 * 2  # stages, passes, backends
    assert all(float(row["ms"]) > 0 for row in kernels)
    speeds = csv_rows(out, "_gpu_models")
    assert [row["mode"] for row in speeds] == ["infer", "infer", "train", "train"]
    assert all(float(row["img/s"]) > 0 for row in speeds)
    assert len([*out.glob("*_gpu_*.md")]) == 3 and len([*out.glob("*_gpu_*.png")]) == 1


def run_checks_of(args: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The report's exit code without the parts behind the checks, and without a GPU."""
    monkeypatch.setattr(gpu_report, "FocalAttention", MagicMock())
    monkeypatch.setattr(gpu_report, "commands", lambda: [])
    return gpu_report.main(["--device", "cpu", *args])


def test_a_wrong_result_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = 0.0
    outcome = lambda case: [gpu_checks.Outcome("logits", error, 0.5)]  # noqa: E731
    monkeypatch.setitem(gpu_checks.CHECKS, "x", outcome)
    case = gpu_checks.Case("x", gpu_checks.TINY[0], "fp32", torch.device("cpu"))
    monkeypatch.setattr(gpu_checks, "cases", lambda *_: [case])
    monkeypatch.setattr(common, "in_process", lambda _, function, *of: (function(*of), ""))
    for error in (0.1, float("nan")):
        status = run_checks_of(["--out", str(tmp_path)], monkeypatch)
        (row,) = csv_rows(tmp_path, "_gpu_checks")
        assert (row["check"], row["part"], row["model"]) == ("x", "logits", case.variant)
        assert (row["result"], status) == (("ok", 0) if error == 0.1 else ("FAILED", 1))


def test_what_had_no_time_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_checks_of(["--minutes", "0", "--out", str(tmp_path)], monkeypatch) == 0
    rows = csv_rows(tmp_path, "_gpu_checks")
    assert {row["model"] for row in rows} == {*gpu_checks.RELEASED}
    assert {(row["result"], row["note"]) for row in rows} == {(gpu_checks.NOT_RUN, common.NO_TIME)}


def test_it_says_why_the_kernels_cannot_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "needs a CUDA device, got cpu" in capsys.readouterr().err


def test_the_other_parts_are_commands_of_the_benchmarks() -> None:
    """Which end in their order, within the time."""
    parts = gpu_report.commands()
    for _, _, (tool, *words) in parts:
        args = importlib.import_module(f"tools.benchmarks.{tool}").parse(words)
        if tool == "models":
            assert entries.entries(args.models)
        else:
            assert all((REPO / path).is_file() for path in args.cfg)
    ends = [gpu_report.CHECKS_END, *(end for _, end, _ in parts), 1]
    assert ends == sorted(ends)


def test_a_part_that_fails_or_hangs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = Namespace(device=torch.device("cpu"), out=tmp_path)
    with caplog.at_level("INFO"):
        assert not gpu_report.run_part(args, "x", ["no_such_tool"], time.monotonic() + 600)
        assert "x: ended with exit code 1" in caplog.text
        assert gpu_report.run_part(args, "late", ["models"], time.monotonic() - 1)
        assert "late: stopped" in caplog.text


@pytest.mark.parametrize("variant", gpu_checks.TINY)
def test_a_wrong_gradient_is_found(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any parameter, where it is nan or missing."""
    monkeypatch.setattr(gpu_checks, "VARIANTS", {variant: VARIANTS[variant] | SMALL})
    subject = gpu_checks.Subject(gpu_checks.Case("x", variant, "fp32", torch.device("cpu")))
    assert all(found.error <= found.limit for found in subject.compare(subject.plain))
    for name, value in subject.plain.items():
        for wrong in (value * float("nan"), torch.zeros_like(value)):
            logits, gradients = subject.compare(subject.plain | {name: wrong})
            found = logits if name == "logits" else gradients
            assert found.error > found.limit, (name, found)
            assert found.note in ("", name)
