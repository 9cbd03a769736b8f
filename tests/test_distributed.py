"""Two real processes over gloo compute what one computes with twice the batch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO
from test_main import PLAIN, command, difference, folder_of, metrics_of

import main


def run_two(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*launcher, str(REPO / "main.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_two_processes_equal_one_with_the_double_batch(
    few_images: Path, nano_opts: list[object], tmp_path: Path
) -> None:
    """With accumulation, so that processes also skip and make the synchronisation at the right steps."""
    one, two = tmp_path / "one", tmp_path / "two"
    opts = [*nano_opts, *PLAIN, "TRAIN.ACCUMULATION_STEPS", 2]
    assert main.main(command(few_images, one, opts)) == 0
    done = run_two(command(few_images, two, opts, "--batch-size", "8"))
    assert done.returncode == 0, done.stderr
    assert difference(one, two, epoch=1) < 1e-5
    for kind in ("train", "epoch"):
        for ours, theirs in zip(metrics_of(one, kind), metrics_of(two, kind), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            assert ours.get("acc1") == theirs.get("acc1")
            assert ours.get("lr") == theirs.get("lr")
            assert ours.get("grad_norm", 0) == pytest.approx(theirs.get("grad_norm", 0), rel=1e-3)
    assert (folder_of(two) / "log_rank1.txt").exists()

    weights = str(folder_of(one) / "ckpt_epoch_1.pth")
    done = run_two(command(few_images, tmp_path / "eval", opts, "--eval", "--resume", weights))
    assert done.returncode == 0, done.stderr
    last = metrics_of(one, "epoch")[1]
    assert f"43 images: acc1 {last['acc1']:.3f}%  acc5 {last['acc5']:.3f}%" in done.stdout


def test_a_failing_run_ends_on_every_process(
    few_images: Path, nano_opts: list[object], tmp_path: Path
) -> None:
    opts = [*nano_opts, *PLAIN, "TRAIN.BASE_LR", 1e30, "TRAIN.CLIP_GRAD", 0, "TRAIN.BAD_STEPS_MAX", 2]
    done = run_two(command(few_images, tmp_path, opts))
    assert done.returncode != 0
    assert done.stderr.count("error: epoch 1, step ") == 1
    assert "expected a finite loss" in done.stderr
    assert not list(folder_of(tmp_path).glob("*.pth"))


def test_damaged_images_of_any_process_are_counted_and_told(
    few_images: Path, nano_opts: list[object], tmp_path: Path
) -> None:
    """Training goes on and counts them; in evaluation both processes stop, and one of them says why."""
    data = shutil.copytree(few_images, tmp_path / "data")
    for folder in (data / "train").iterdir():
        next(folder.iterdir()).write_bytes(b"damaged")
    opts = [*nano_opts, *PLAIN, "TRAIN.EPOCHS", 1, "DATA.NUM_WORKERS", 1]
    done = run_two(command(data, tmp_path, opts, "--batch-size", "8"))
    assert done.returncode == 0, done.stderr
    logs = [(folder_of(tmp_path) / f"log_rank{rank}.txt").read_text() for rank in (0, 1)]
    counts = [log.count("replaced an image that does not decode") for log in logs]
    assert min(counts) > 0
    assert metrics_of(tmp_path, "epoch")[0]["undecodable"] == sum(counts)

    second = sorted((data / "val").glob("*/*.png"))[1]  # the second process evaluates every other image
    second.write_bytes(b"damaged")
    weights = str(folder_of(tmp_path) / "ckpt_epoch_0.pth")
    done = run_two(command(data, tmp_path, opts, "--eval", "--resume", weights))
    assert done.returncode != 0
    assert done.stderr.count(f"error: {second}: expected an image file that decodes") == 1
    assert 'main.py", line' not in done.stderr
