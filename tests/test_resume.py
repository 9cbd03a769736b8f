"""A run that is killed or stopped anywhere ends like one that never was: the same bits, the same metrics."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_main import OPTS, command, folder_of

import main
from tools.faults.run import TIME_FIELDS, tensors
from training import run as training_run
from training.checkpoints import Checkpoints
from training.preemption import EXIT_STOPPED
from training.state import TrainState

RANDOM = [  # everything that draws random numbers or has a state, in groups that do not divide the epoch
    *["MODEL.DROP_PATH_RATE", 0.3, "MODEL.DROP_RATE", 0.1, "TRAIN.ACCUMULATION_STEPS", 3, "PRINT_FREQ", 2],
    *["TRAIN.EMA.ENABLED", True, "TRAIN.EMA.DECAY", 0.8, "SAVE_STEPS", 1],
]


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


def at_update(monkeypatch: pytest.MonkeyPatch, number: int, action: Any) -> None:
    """Do something after so many updates of a process, before it can save."""
    after_update, count = Checkpoints.after_update, iter(range(1, 1000))

    def patched(self: Checkpoints, state: TrainState, is_last: bool) -> None:
        if next(count) == number:
            action()
        after_update(self, state, is_last)

    monkeypatch.setattr(Checkpoints, "after_update", patched)


def kill() -> None:
    raise Killed


def metrics_of(output: Path) -> list[dict[str, float]]:
    lines = (folder_of(output) / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIME_FIELDS} for line in lines
    ]


def shown_by_tensorboard(output: Path) -> dict[str, list[tuple[int, str]]]:
    """The points (position, value, which may be nan) of each curve."""
    curves = {}
    for kind in ("train", "epoch"):
        files = (folder_of(output) / "tensorboard" / kind).glob("events*")
        files = sorted(files, key=lambda path: path.stat().st_mtime_ns)  # names order seconds
        joined = output / f"tfevents_{kind}"
        joined.write_bytes(b"".join(path.read_bytes() for path in files))
        events = EventAccumulator(str(joined)).Reload()
        for tag in {*events.Tags()["scalars"]} - {f"{kind}/{name}" for name in TIME_FIELDS}:
            curves[tag] = [(event.step, str(event.value)) for event in events.Scalars(tag)]
    return curves


def assert_same_end(left: Path, right: Path) -> None:
    for file in ("ckpt_epoch_1.pth", "best.pth"):
        one, other = (torch.load(folder_of(output) / file, weights_only=True) for output in (left, right))
        ours, theirs = dict(tensors(one)), dict(tensors(other))
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
        assert (one["position"], one["max_accuracy"]) == (other["position"], other["max_accuracy"])
    assert metrics_of(left) == metrics_of(right)
    assert shown_by_tensorboard(left) == shown_by_tensorboard(right)


@pytest.fixture(scope="module")
def whole(few_images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """The output of two epochs of Focal-fast, which has buffers, without a stop; and their options."""
    output = tmp_path_factory.mktemp("whole")
    opts = [*OPTS, *RANDOM, "MODEL.TYPE", "focalv2"]
    assert main.main(command(few_images, output, opts)) == 0
    return output, opts


Whole = tuple[Path, list[object]]


def test_killed_runs_end_like_the_whole_one(
    whole: Whole, few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kill is so many updates after the start; an epoch has three. The newest checkpoint is cut once."""
    output, opts = whole
    for number, workers in ((1, 0), (2, 2), (2, 0), (3, 0)):
        arguments = command(few_images, tmp_path, [*opts, "DATA.NUM_WORKERS", workers])
        with monkeypatch.context() as patch:
            at_update(patch, number, kill)
            with pytest.raises(Killed):
                main.main(arguments)
        if number == 3:
            newest = max(folder_of(tmp_path).glob("ckpt_*"), key=lambda path: path.stat().st_mtime)
            os.truncate(newest, newest.stat().st_size // 2)
            with (folder_of(tmp_path) / "metrics.jsonl").open("a") as file:
                file.write('{"kind": "train", "epo')
    assert main.main(arguments) == 0
    assert_same_end(output, tmp_path)
    assert not list(folder_of(tmp_path).glob("*_step_*"))


def test_a_last_smaller_accumulation_group_makes_an_update(whole: Whole) -> None:
    """8 batches in groups of 3: 3 updates per epoch."""
    state = torch.load(folder_of(whole[0]) / "ckpt_epoch_1.pth", weights_only=True)
    assert state["position"]["updates"] == 6
    assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {6}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_after_the_update_and_saves(
    number: signal.Signals,
    whole: Whole,
    few_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGTERM in training; SIGUSR1 in an evaluation after an epoch that was not due to be saved."""
    output, opts = whole
    arguments = command(few_images, tmp_path, [*opts, "SAVE_STEPS", 0, "SAVE_FREQ", 2])
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        if number == signal.SIGTERM:
            at_update(patch, 4, lambda: os.kill(os.getpid(), number))
        else:
            evaluate = training_run.evaluate

            def signalled(*given: Any) -> Any:
                os.kill(os.getpid(), number)
                return evaluate(*given)

            patch.setattr(training_run, "evaluate", signalled)
        assert main.main(arguments) == EXIT_STOPPED
    name = "ckpt_epoch_1_step_3.pth" if number == signal.SIGTERM else "ckpt_epoch_0.pth"
    content = torch.load(folder_of(tmp_path) / name, weights_only=True)
    assert content["evaluated"] == (number == signal.SIGTERM)
    assert signal.getsignal(number) == before
    assert main.main(arguments) == 0
    assert_same_end(output, tmp_path)


# --- Which run continues ------------------------------------------------------------------------------------


def test_a_run_that_has_lost_every_checkpoint_is_left_as_it_is(few_images: Path, tmp_path: Path) -> None:
    """Also where the disk cannot read the files. When they are gone it begins again, its metrics too."""
    arguments = command(few_images, tmp_path, [*OPTS, "TRAIN.EPOCHS", 1])
    assert main.main(arguments) == 0
    folder, once = folder_of(tmp_path), metrics_of(tmp_path)
    path = folder / "best.pth"
    path.rename(tmp_path / path.name)
    path.symlink_to("/proc/self/mem")
    assert main.main(arguments) == 2
    assert metrics_of(tmp_path) == once
    (tmp_path / path.name).replace(path)
    for path in folder.glob("*.pth"):
        os.truncate(path, path.stat().st_size // 2)
    assert main.main(arguments) == 2
    assert metrics_of(tmp_path) == once
    for path in folder.glob("*.pth"):
        path.unlink()
    assert main.main(arguments) == 0
    assert metrics_of(tmp_path) == once


def test_going_back_and_starting_elsewhere(
    few_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a folder has is continued, or refused, but never replaced."""
    folder, opts = folder_of(tmp_path), [*OPTS, "SAVE_FREQ", 1]
    assert main.main(command(few_images, tmp_path, opts)) == 0
    once = metrics_of(tmp_path)
    first = str(folder / "ckpt_epoch_0.pth")
    anew = [*opts, "TRAIN.AUTO_RESUME", False]
    before = {path: path.read_bytes() for path in folder.glob("*.[pj]*")}
    assert main.main(command(few_images, tmp_path, anew, "--resume", first)) == 2
    assert "TRAIN.AUTO_RESUME: expected True" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.glob("*.[pj]*")} == before
    for path in folder.glob("*.pth"):  # they may be moved to another disk
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert main.main(command(few_images, tmp_path, opts, "--resume", first)) == 0
    assert f"continuing from {folder}" in (folder / "log_rank0.txt").read_text()
    assert metrics_of(tmp_path) == once
    new = folder_of(tmp_path / "new")
    new.mkdir(parents=True)
    (new / "metrics.jsonl").write_text('{"kind": "train", "epoch": 0, "step": 1, "loss": 7.0}\n')
    assert main.main(command(few_images, tmp_path / "new", anew, "--resume", first)) == 0
    assert metrics_of(tmp_path / "new") == [r for r in once if r["kind"] == "epoch" or r["epoch"] == 1]


def test_steps_that_are_counted_again_are_recorded_once(
    few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another order of the images begins the epoch again; 80 images are 5 small batches, or 2 large ones."""
    opts = [*OPTS, "PRINT_FREQ", 1, "SAVE_STEPS", 1]
    with monkeypatch.context() as patch:
        at_update(patch, 14, kill)  # an epoch has 8
        with pytest.raises(Killed):
            main.main(command(few_images, tmp_path / "killed", opts))
    assert metrics_of(tmp_path / "killed")[-1]["step"] == 5
    for words, steps, position in (("--seed 1", 8, 15), ("--batch-size 32", 3, 6), ("--batch-size 64", 1, 8)):
        output = shutil.copytree(tmp_path / "killed", tmp_path / words)
        assert main.main(command(few_images, output, opts, *words.split())) == 0
        records = metrics_of(output)
        assert [record["step"] for record in records if "step" in record] == [*range(8), *range(steps)]
        assert [record for record in records if record["kind"] == "train"][-1]["position"] == position
        assert all(record["loss"] for record in records)  # the last has no whole batch left
