"""A run that is killed or stopped anywhere ends like one that never was: the same bits, the same metrics."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO
from test_main import command, folder_of

import checkpoints
import main
from control import EXIT_STOPPED
from data import ShardSampler, TrainSampler
from data.workers import leave_signals_to_parent
from train_state import Position, TrainState

TIME_FIELDS = {"img_per_s", "memory_mb", "minutes"}
RANDOM = [  # everything on that draws random numbers or keeps a state, in groups that do not divide the epoch
    *["MODEL.DROP_PATH_RATE", 0.3, "MODEL.DROP_RATE", 0.1, "TRAIN.ACCUMULATION_STEPS", 3, "PRINT_FREQ", 2],
    *["TRAIN.EMA.ENABLED", True, "TRAIN.EMA.DECAY", 0.8, "SAVE_STEPS", 1],
]


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


def at_update(monkeypatch: pytest.MonkeyPatch, number: int, action: Any) -> None:
    """Do something after so many updates of a process, before it can save."""
    after_update, count = checkpoints.Checkpoints.after_update, iter(range(1, 1000))

    def patched(self: checkpoints.Checkpoints, state: TrainState, is_last: bool) -> None:
        if next(count) == number:
            action()
        after_update(self, state, is_last)

    monkeypatch.setattr(checkpoints.Checkpoints, "after_update", patched)


def kill() -> None:
    raise Killed


def metrics_of(output: Path) -> list[dict[str, float]]:
    lines = (folder_of(output) / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIME_FIELDS} for line in lines
    ]


def tensors_in(item: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(item, dict):
        for key, value in item.items():
            yield from tensors_in(value, f"{name}.{key}")
    elif torch.is_tensor(item):
        yield name, item


def assert_same_end(left: Path, right: Path, epoch: int = 1) -> None:
    contents = [
        torch.load(folder_of(output) / f"ckpt_epoch_{epoch}.pth", weights_only=True)
        for output in (left, right)
    ]
    ours, theirs = (dict(tensors_in(content)) for content in contents)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert contents[0]["position"] == contents[1]["position"]
    assert contents[0]["max_accuracy"] == contents[1]["max_accuracy"]
    assert metrics_of(left) == metrics_of(right)


@pytest.fixture(scope="module")
def whole(few_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of two epochs with all that is random, never stopped."""
    from conftest import NANO

    output = tmp_path_factory.mktemp("whole")
    opts = [word for pair in NANO.items() for word in pair]
    assert main.main(command(few_images, output, [*opts, *RANDOM])) == 0
    return output


@pytest.mark.parametrize(("workers", "kills"), [(0, (1, 2, 1, 3)), (2, (2, 2))])
def test_killed_runs_end_like_the_whole_one(
    workers: int,
    kills: tuple[int, ...],
    whole: Path,
    few_images: Path,
    nano_opts: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each kill is so many updates after the start; an epoch has three. The last save before it counts."""
    arguments = command(few_images, tmp_path, [*nano_opts, *RANDOM, "DATA.NUM_WORKERS", workers])
    for number in kills:
        with monkeypatch.context() as patch:
            at_update(patch, number, kill)
            with pytest.raises(Killed):
                main.main(arguments)
    assert main.main(arguments) == 0
    assert_same_end(whole, tmp_path)
    assert not list(folder_of(tmp_path).glob("*_step_*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_after_the_update_and_saves(
    number: signal.Signals,
    whole: Path,
    few_images: Path,
    nano_opts: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = command(few_images, tmp_path, [*nano_opts, *RANDOM, "SAVE_STEPS", 0])
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_update(patch, 4, lambda: os.kill(os.getpid(), number))
        assert main.main(arguments) == EXIT_STOPPED
    assert (folder_of(tmp_path) / "ckpt_epoch_1_step_3.pth").exists()
    assert signal.getsignal(number) == before
    assert main.main(arguments) == 0
    assert_same_end(whole, tmp_path)


def test_a_signal_during_evaluation_stops_too(
    whole: Path, few_images: Path, nano_opts: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The epoch was not due to be saved; it is before the process leaves."""
    arguments = command(few_images, tmp_path, [*nano_opts, *RANDOM, "SAVE_STEPS", 0, "SAVE_FREQ", 2])
    with monkeypatch.context() as patch:
        evaluate = main.finish_epoch

        def signalled(*given: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            evaluate(*given)

        patch.setattr(main, "finish_epoch", signalled)
        assert main.main(arguments) == EXIT_STOPPED
    content = torch.load(folder_of(tmp_path) / "ckpt_epoch_0.pth", weights_only=True)
    assert not content["evaluated"]
    assert main.main(arguments) == 0
    assert_same_end(whole, tmp_path)


def test_metrics_beside_checkpoints_of_older_versions_stay(
    few_images: Path, nano_opts: list[object], tmp_path: Path
) -> None:
    """They do not know their run, but there was one; without any checkpoint it was an attempt, done again."""
    opts = [*nano_opts, "TRAIN.EPOCHS", 1, "TRAIN.AUTO_RESUME", False]
    for older in (True, False):
        folder = folder_of(tmp_path / str(older))
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"kind": "epoch", "epoch": 0, "loss": 7.0}\n')
        if older:
            torch.save({}, folder / "ckpt_epoch_8.pth")
        assert main.main(command(few_images, tmp_path / str(older), opts)) == 0
        losses = [record["loss"] for record in metrics_of(tmp_path / str(older))]
        assert (losses[0] == 7.0) is older


def test_a_run_that_has_lost_every_checkpoint_begins_anew(
    few_images: Path, nano_opts: list[object], tmp_path: Path
) -> None:
    """Its metrics too, so that no epoch is recorded twice."""
    arguments = command(few_images, tmp_path, [*nano_opts, "TRAIN.EPOCHS", 1])
    assert main.main(arguments) == 0
    once = metrics_of(tmp_path)
    for path in folder_of(tmp_path).glob("*.pth"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    before = (folder_of(tmp_path) / "metrics.jsonl").read_bytes()
    assert main.main(arguments) == 0
    assert metrics_of(tmp_path) == once
    assert (folder_of(tmp_path) / "metrics.jsonl.before-1").read_bytes() == before


def test_checkpoints_that_cannot_be_read_for_a_moment_are_waited_for(
    few_images: Path, nano_opts: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The start ends with one sentence, and nothing is touched; the system fails to read the files."""
    arguments = command(few_images, tmp_path, [*nano_opts, "TRAIN.EPOCHS", 1])
    assert main.main(arguments) == 0
    folder, once = folder_of(tmp_path), metrics_of(tmp_path)
    paths = list(folder.glob("*.pth"))
    for path in paths:
        path.rename(tmp_path / path.name)
        path.symlink_to("/proc/self/mem")
    assert main.main(arguments) == 2
    assert "expected to read the checkpoint, got: Invalid argument" in capsys.readouterr().err
    assert metrics_of(tmp_path) == once
    for path in paths:
        (tmp_path / path.name).replace(path)
    assert main.main(arguments) == 0
    assert metrics_of(tmp_path) == once
    assert "resumed" in (folder / "log_rank0.txt").read_text()


def test_a_run_from_elsewhere_has_a_best_one_of_its_own(
    few_images: Path, nano_opts: list[object], tmp_path: Path
) -> None:
    """Though it does not come up to what was reached before, which it says at its end.

    Nor does it keep the metrics of an attempt that was killed before it saved.
    """
    assert main.main(command(few_images, tmp_path, [*nano_opts, "TRAIN.EPOCHS", 1])) == 0
    content = torch.load(folder_of(tmp_path) / "ckpt_epoch_0.pth", weights_only=True)
    torch.save(content | {"max_accuracy": 100.5, "evaluated": True}, tmp_path / "elsewhere.pth")
    flags, folder = ["--resume", str(tmp_path / "elsewhere.pth")], folder_of(tmp_path / "new")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"kind": "train", "loss": 7.0}\n')
    assert main.main(command(few_images, tmp_path / "new", nano_opts, *flags)) == 0
    assert 7.0 not in [record.get("loss") for record in metrics_of(tmp_path / "new")]
    accuracy = torch.load(folder / "best.pth", weights_only=True)["accuracy"]
    assert 0 < accuracy <= 100
    said = f"best.pth ends without the best weights: 100.50% was reached, it holds {accuracy:.2f}%"
    assert said in (folder / "log_rank0.txt").read_text()


def test_a_configuration_that_cannot_be_written_is_told(
    few_images: Path, nano_opts: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder_of(tmp_path) / "config.yaml").mkdir(parents=True)
    assert main.main(command(few_images, tmp_path, nano_opts)) == 2
    assert "config.yaml: expected to write the configuration, got: Is a directory" in capsys.readouterr().err


# --- Loader workers -----------------------------------------------------------------------------------------


def wait_for_a_signal(ready: Any) -> None:
    leave_signals_to_parent()
    ready.set()
    time.sleep(60)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_hears_its_parent_alone(method: str) -> None:
    """The parent may not be the process that forked it."""
    context = multiprocessing.get_context(method)
    ready = context.Event()
    worker = context.Process(target=wait_for_a_signal, args=(ready,))
    worker.start()
    assert ready.wait(60)
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


# --- Which images an epoch goes on with ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TrainSampler, ShardSampler])
def test_a_changed_number_of_processes_goes_on_with_the_unseen_images(
    kind: type[TrainSampler],
) -> None:
    """2 processes, then 3, then 1 with another batch size: no image twice, few left out."""
    position, seen, images = Position(), [], 101
    for processes, batch_size, steps in ((2, 5, 2), (2, 5, 1), (3, 4, 2), (1, 6, None)):
        taken = 0
        for rank in range(processes):
            sampler = kind(images, batch_size, rank, processes, seed=3)
            sampler.go_on(7, position.dealt)
            keys = list(sampler)
            assert len(keys) == len(sampler)
            mine = [index for epoch, index in keys if epoch == 7]
            mine = mine[: (steps or len(mine)) * batch_size]
            seen += mine
            taken += len(mine)
        position.deal(processes, taken)
    assert len(seen) == len(set(seen)) == position.images
    assert position.dealt == [[2, 30], [3, 24], [1, 42]]


@pytest.mark.parametrize("kind", [TrainSampler, ShardSampler])
def test_going_on_skips_exactly_what_was_given_out(kind: type[TrainSampler]) -> None:
    whole = kind(50, 4, 1, 2, seed=0)
    whole.set_epoch(3)
    part = kind(50, 4, 1, 2, seed=0)
    part.go_on(3, [[2, 16]])
    assert list(part) == list(whole)[8:]
    assert part.start_step == 2
    assert part.batch_indices(3, 2)[1] == [index for _, index in list(part)[:4]]
    for step in (0, 1, 2):
        assert part.batch_indices(3, step) == whole.batch_indices(3, step)


# --- Several processes --------------------------------------------------------------------------------------

SIGNALLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import checkpoints, main
after_update, count = checkpoints.Checkpoints.after_update, iter(range(1, 1000))
def patched(self, state, is_last):
    if next(count) == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), __import__("signal").SIGUSR1)
    after_update(self, state, is_last)
checkpoints.Checkpoints.after_update = patched
sys.exit(main.main(sys.argv[2:]))
"""


def run_two(script: list[str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*launcher, *script, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(
    few_images: Path, nano_opts: list[object], tmp_path: Path
) -> None:
    """And the next start ends like a run that was never stopped; then one process goes on from there."""
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    opts = [*nano_opts, *RANDOM, "SAVE_STEPS", 0, "TRAIN.ACCUMULATION_STEPS", 1, "DATA.NUM_WORKERS", 2]
    plain = [str(REPO / "main.py")]
    done = run_two(plain, command(few_images, tmp_path / "whole", opts, "--batch-size", "8"))
    assert done.returncode == 0, done.stderr
    arguments = command(few_images, tmp_path / "stopped", opts, "--batch-size", "8")
    done = run_two([str(tmp_path / "signalled.py"), str(REPO)], arguments)
    assert f"exitcode  : {EXIT_STOPPED} " in done.stderr
    saved = list(folder_of(tmp_path / "stopped").glob("*.pth"))
    assert [path.name for path in saved] == ["ckpt_epoch_0_step_3.pth"]
    for rank in (0, 1):
        log = (folder_of(tmp_path / "stopped") / f"log_rank{rank}.txt").read_text()
        assert "stopped by a signal after 0 epochs and 3 steps" in log
    inside = shutil.copy(saved[0], tmp_path / "inside.pth")
    done = run_two(plain, arguments)
    assert done.returncode == 0, done.stderr
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")
    flags = ["--batch-size", "8", "--resume", str(inside)]
    assert main.main(command(few_images, tmp_path / "one", [*opts, "TRAIN.EPOCHS", 1], *flags)) == 0
    log = (folder_of(tmp_path / "one") / "log_rank0.txt").read_text()
    assert "was written by 2 process(es), now there are 1: epoch 1 goes on with the images" in log
    content = torch.load(inside, weights_only=True)
    assert content["position"]["dealt"] == [[2, 48]]
    steps = [record["step"] for record in metrics_of(tmp_path / "one") if record["kind"] == "train"]
    assert steps[-1] + 1 == 48 // 8 + (130 - 48) // 8
