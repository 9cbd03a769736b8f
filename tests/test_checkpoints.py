"""Checkpoint files: whole or absent, verified, the newest by name, few kept, written beside training."""

import errno
import json
import logging
import os
import resource
import signal
import threading
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from test_train_state import make_state

from logger import Metrics, TensorBoard, create_logger
from training.checkpoints import (
    BEST_NAME,
    AsyncCheckpointWriter,
    Checkpoints,
    file_name,
    find_checkpoints,
    is_valid,
    prune,
    remove_temporary_files,
    write_checkpoint,
)
from training.preemption import StopRequested
from training.state import Position, TrainState
from utils import UserError

CONTENT = {"model": {"weight": torch.arange(3000.0)}, "optimizer": {}, "note": "text"}


def write(folder: Path, epoch: int, step: int = 0) -> Path:
    path = folder / file_name(Position(epoch, step))
    write_checkpoint(CONTENT, path)
    return path


def write_best(folder: Path, epoch: int) -> Path:
    path = folder / BEST_NAME
    write_checkpoint(CONTENT | {"position": vars(Position(epoch)), "accuracy": 50.0}, path)
    return path


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def checkpoints_of(folder: Path, state: TrainState, metrics: Metrics | None = None) -> Checkpoints:
    return Checkpoints(state.config, folder, metrics or Metrics(None), state.position, best=0.0)


def reach(state: TrainState, checkpoints: Checkpoints, step: int, is_last: bool = False) -> None:
    """Make an update, and wait for a save that is due."""
    state.position.step, state.position.samples_seen = step, 8 * step
    checkpoints.after_update(state, is_last)
    checkpoints.writer.wait()


# --- Files --------------------------------------------------------------------------------------------------


def test_changed_tensors_and_cut_files_are_not_valid(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    assert is_valid(path)
    content = path.read_bytes()
    begin = content.index(CONTENT["model"]["weight"].numpy().tobytes())
    for place in range(begin, begin + 12000, 401):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert not is_valid(path), place
    for length in range(0, len(content), 101):
        path.write_bytes(content[:length])
        assert not is_valid(path), length
    assert not is_valid(tmp_path / "nowhere.pth")


def test_the_newest_valid_one_is_found_by_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    order = [(12, 0), (2, 30), (2, 4), (2, 0), (1, 10)]
    paths = [write(tmp_path, *position) for position in order]
    (tmp_path / "ckpt_epoch_x.pth").write_text("")
    (tmp_path / "ckpt_epoch_99.pth").mkdir()
    for path in paths:
        assert find_checkpoints(tmp_path).newest == path
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="got only what was skipped; move it away to start anew"):
        find_checkpoints(tmp_path)
    assert f"{paths[0]} is damaged or incomplete and was skipped" in caplog.text
    assert find_checkpoints(tmp_path / "nowhere").newest is None


def test_files_of_others_are_not_trusted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A copy under a later name would take every restart back; a best.pth may be another tool's."""
    for epoch, named in ((1, 1), (0, 7)):
        content = CONTENT | {"position": vars(Position(epoch + 1))}
        write_checkpoint(content, tmp_path / f"ckpt_epoch_{named}.pth")
    write_checkpoint(CONTENT | {"accuracy": 99.0}, tmp_path / BEST_NAME)
    found = find_checkpoints(tmp_path)
    assert (found.newest.name, found.best) == ("ckpt_epoch_1.pth", 0.0)
    assert "ckpt_epoch_7.pth holds another position" in caplog.text


@pytest.mark.parametrize("kind", ["disk error", "refused content"])
def test_a_whole_file_that_cannot_be_read_is_not_skipped(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training on from an older one would replace it."""
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    if kind == "disk error":
        read_bytes = Path.read_bytes

        def fails_for_newest(path: Path) -> bytes:
            if path == newest:
                raise OSError(errno.EIO, "Input/output error")
            return read_bytes(path)

        monkeypatch.setattr(Path, "read_bytes", fails_for_newest)
    else:
        torch.save({"model": Fraction(1, 3)}, newest)
    with pytest.raises(UserError, match=newest.name):
        find_checkpoints(tmp_path)


def test_best_is_the_newest_where_it_is_further_or_as_far(tmp_path: Path) -> None:
    best = write_best(tmp_path, epoch=2)
    assert find_checkpoints(tmp_path).newest == best
    for epoch, step, newest in ((1, 9, best), (2, 0, best), (2, 1, None)):
        path = write(tmp_path, epoch, step)
        assert find_checkpoints(tmp_path).newest == (newest or path)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (0, ["epoch_0", "epoch_1", "epoch_2", "epoch_3_step_4", "epoch_3_step_6"]),
        (1, ["epoch_3_step_6"]),
        (3, ["epoch_2", "epoch_3_step_4", "epoch_3_step_6"]),
    ],
)
def test_few_are_kept(tmp_path: Path, keep: int, left: list[str]) -> None:
    """best.pth and later epochs stay; those inside an epoch stay until it is over."""
    others = [write(tmp_path, 9), tmp_path / BEST_NAME]
    write_checkpoint(CONTENT, others[1])
    for epoch in range(4):
        for step in (0, 2, 4, 6):
            if epoch or step:
                write(tmp_path, epoch, step)
                prune(tmp_path, (epoch, step), keep)
    assert names_in(tmp_path) - {path.name for path in others} == {f"ckpt_{name}.pth" for name in left}
    assert all(path.exists() for path in others)


def test_a_new_one_inside_an_epoch_replaces_those_of_a_larger_number_of_steps(tmp_path: Path) -> None:
    """As after a restart with more processes, which count fewer steps; else the old ones would win."""
    for step in (70, 80, 45):
        write(tmp_path, 3, step)
    prune(tmp_path, (3, 45), keep=0)
    assert find_checkpoints(tmp_path).newest.name == "ckpt_epoch_3_step_45.pth"


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    before = path.read_bytes()
    if not (child := os.fork()):
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        write_checkpoint({}, path)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.read_bytes() == before
    assert len(names_in(tmp_path)) == 2
    (tmp_path / ".mine.tmp").write_text("not ours")
    remove_temporary_files(tmp_path)
    assert names_in(tmp_path) == {path.name, ".mine.tmp"}


# --- Writing in the background ------------------------------------------------------------------------------


def save(writer: AsyncCheckpointWriter, path: Path) -> None:
    writer.submit(CONTENT, path, lambda copied: write_checkpoint(copied, path))
    writer.wait()


def test_a_full_disk_keeps_the_older_file_and_ends_the_run_at_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    writer, path = AsyncCheckpointWriter(max_failures=2), tmp_path / "ckpt_epoch_0.pth"
    save(writer, path)
    before = path.read_bytes()
    request.getfixturevalue("full_disk")
    save(writer, path)
    assert "File too large" in writer.errors[-1] and "bytes free" in caplog.text
    assert writer.failure == ""
    save(writer, path)
    assert "2 of 2 in a row" in writer.failure
    assert names_in(tmp_path) == {path.name}
    assert path.read_bytes() == before


@pytest.mark.parametrize("failing", ["ckpt_epoch_0.pth", BEST_NAME])
def test_best_and_the_others_do_not_forgive_each_others_failures(tmp_path: Path, failing: str) -> None:
    writer = AsyncCheckpointWriter(max_failures=2)
    (tmp_path / failing).mkdir()
    for failures in (1, 2):
        for name in ("ckpt_epoch_0.pth", BEST_NAME):
            save(writer, tmp_path / name)
        assert [len(writer.errors), len(writer.best_errors)] == [
            failures * (failing == name) for name in ("ckpt_epoch_0.pth", BEST_NAME)
        ]
    assert f"{tmp_path / failing}: expected to write" in writer.failure
    (tmp_path / failing).rmdir()
    save(writer, tmp_path / failing)
    assert writer.errors == writer.best_errors == []


def test_a_bug_in_the_writer_is_raised() -> None:
    writer = AsyncCheckpointWriter(max_failures=3)
    writer.submit({}, Path("a.pth"), lambda copied: copied["missing"])
    with pytest.raises(KeyError):
        writer.wait()


def test_training_goes_on_while_a_copy_is_written() -> None:
    live = {"a": torch.zeros(3), "b": [{"c": torch.ones(2, 2).T, "d": 5}], "e": (1, 2)}
    writer, go_on, copies = AsyncCheckpointWriter(max_failures=1), threading.Event(), []
    writer.submit(live, Path("a.pth"), lambda copy: (go_on.wait(60), copies.append(copy)))
    live["a"].add_(1)
    live["b"][0]["c"].mul_(7)
    live["b"][0]["d"] = 6
    assert not copies
    go_on.set()
    writer.wait()
    assert (copies[0]["a"].tolist(), copies[0]["e"]) == ([0, 0, 0], (1, 2))
    assert (copies[0]["b"][0]["c"].tolist(), copies[0]["b"][0]["d"]) == ([[1, 1], [1, 1]], 5)


# --- When a run saves ---------------------------------------------------------------------------------------


def test_a_save_is_due_by_steps(tmp_path: Path) -> None:
    """At the first update at or after every third step; the last one of an epoch leaves it to the epoch's."""
    state = make_state(opts=("SAVE_STEPS", 3))
    checkpoints = checkpoints_of(tmp_path, state)
    for step in (2, 4, 6, 8, 10):
        reach(state, checkpoints, step, is_last=step == 10)
    assert names_in(tmp_path) == {"ckpt_epoch_0_step_4.pth", "ckpt_epoch_0_step_6.pth"}


def test_epochs_are_saved_by_frequency_and_at_the_end(tmp_path: Path) -> None:
    state = make_state(opts=("SAVE_FREQ", 3, "TRAIN.EPOCHS", 7, "TRAIN.WARMUP_EPOCHS", 0))
    checkpoints = checkpoints_of(tmp_path, state)
    for epoch in range(1, 8):
        state.position = Position(epoch)
        checkpoints.after_epoch(state)
    checkpoints.finish()
    assert names_in(tmp_path) == {"ckpt_epoch_2.pth", "ckpt_epoch_5.pth", "ckpt_epoch_6.pth"}


def test_a_run_that_cannot_be_saved_ends_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    state = make_state(opts=("SAVE_STEPS", 1, "SAVE_FAILURES_MAX", 2))
    checkpoints = checkpoints_of(tmp_path / "file", state)
    reach(state, checkpoints, 1)
    reach(state, checkpoints, 2)
    with pytest.raises(StopRequested):
        reach(state, checkpoints, 3)
    with pytest.raises(UserError, match=r"ckpt_epoch_0_step_2.pth: .* 2 of 2 in a row"):
        checkpoints.stop(state)


def test_a_stop_tries_a_failed_save_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.write_text("in the way")
    state = make_state()
    checkpoints = checkpoints_of(folder, state)
    state.position = Position(1)
    checkpoints.after_epoch(state)
    checkpoints.writer.wait()
    assert checkpoints.writer.errors
    folder.unlink()
    checkpoints.stop(state)
    assert names_in(folder) == {"ckpt_epoch_0.pth"}


def test_a_run_without_its_last_checkpoint_or_best_fails(tmp_path: Path) -> None:
    """Whichever was written last. A stop needs the checkpoint alone, so that the run is started again."""
    state = make_state()
    for lacking in ("ckpt_epoch_0.pth", BEST_NAME):
        folder = tmp_path / lacking.split(".")[0]
        (folder / lacking).mkdir(parents=True)
        state.position = Position()
        checkpoints = checkpoints_of(folder, state)
        checkpoints.save_if_best(state, 50.0)
        state.position = Position(1)
        checkpoints.after_epoch(state)
        checkpoints.save_if_best(state, 60.0)
        with pytest.raises(UserError, match=f"{lacking}: expected to write a checkpoint"):
            checkpoints.finish()
        if lacking == BEST_NAME:
            checkpoints.stop(state)


def test_best_gives_way_to_the_next_that_is_better_than_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What counts is what is on the disk; the run says at its end what it lacks."""
    state = make_state()
    checkpoints = checkpoints_of(tmp_path, state)

    def evaluated(accuracy: float) -> float:
        state.max_accuracy = max(state.max_accuracy, accuracy)
        checkpoints.save_if_best(state, accuracy)
        checkpoints.writer.wait()
        caplog.clear()
        checkpoints.warn_if_best_missing(state)
        return find_checkpoints(tmp_path).best

    assert evaluated(100 / 3) == 100 / 3  # to the last digit
    assert not caplog.text
    blocked = tmp_path / f".{BEST_NAME}.tmp"
    blocked.mkdir()
    assert evaluated(60.0) == 100 / 3
    blocked.rmdir()
    assert evaluated(50.0) == 50.0
    assert "ends without the best weights: 60.00% was reached, it holds 50.00%" in caplog.text
    write(tmp_path, 1)
    os.truncate(tmp_path / BEST_NAME, 3000)
    assert find_checkpoints(tmp_path).best == 0.0


# --- Metrics ------------------------------------------------------------------------------------------------


def losses_in(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / Metrics.NAME).read_text().splitlines()]


def test_metrics_are_on_the_disk_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = [], os.fsync

    def watched(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    state, metrics = make_state(), Metrics(tmp_path)
    state.position = Position(1)
    checkpoints = checkpoints_of(tmp_path, state, metrics)
    metrics.write("epoch", 0, loss=1.0)
    checkpoints.save(state)
    checkpoints.finish()
    assert synced == ["metrics.jsonl", ".ckpt_epoch_0.pth.tmp", tmp_path.name]


def test_metrics_end_where_a_resumed_run_goes_on(tmp_path: Path) -> None:
    """Inside an epoch, and after one, which may not have been evaluated; an unfinished line goes, too."""
    for next_step, epochs, left in (((1, 3), 1, 4), ((2, 0), 2, 6), ((2, 0), 1, 5), ((0, 0), 0, 0)):
        metrics = Metrics(tmp_path)
        metrics.truncate((0, 0), epochs=0)
        for epoch in (0, 1):
            for step in (1, 3):
                metrics.write("train", step, epoch=epoch, step=step, loss=10 * epoch + step)
            metrics.write("epoch", epoch, epoch=epoch, loss=10 * epoch)
        metrics.close()
        losses = losses_in(tmp_path)
        with (tmp_path / Metrics.NAME).open("a") as file:
            file.write('{"kind": "train", "epo')
        metrics = Metrics(tmp_path)
        assert metrics.truncate(next_step, epochs) == {"train": 4 if left else 0, "epoch": epochs}
        metrics.write("epoch", 2, epoch=2, loss=99)
        metrics.close()
        assert losses_in(tmp_path) == [*losses[:left], 99]


def test_a_damaged_line_hides_no_metrics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [f'{{"kind": "epoch", "position": {epoch}, "epoch": {epoch}}}' for epoch in (0, 1, 2)]
    damaged = ["", '{"kind": "tr', "a\rb", "[" * 100000, "5", "{}", '{"kind": "x", "epoch": 1}']
    damaged.append('{"kind": "epoch", "epoch": "x"}')
    path = tmp_path / Metrics.NAME
    path.write_text("\n".join([lines[0], *damaged, *lines[1:]]) + "\n")
    metrics = Metrics(tmp_path)
    assert metrics.truncate((2, 0), epochs=2) == {"train": 0, "epoch": 2}
    metrics.close()
    assert path.read_bytes().decode().split("\n") == [lines[0], *damaged, lines[1], ""]
    assert caplog.text.count("expected a record") == len(damaged)


def test_metrics_survive_a_full_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    metrics = Metrics(tmp_path)
    metrics.mirrors.clear()
    for number in range(120):
        metrics.write("epoch", number, loss=number)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    request.getfixturevalue("full_disk")
    for number in range(120, 200):
        metrics.write("epoch", number, loss=number)
    assert "expected to write metrics" in caplog.text
    assert (tmp_path / Metrics.NAME).read_bytes().endswith(b"}\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    metrics.close()
    assert losses_in(tmp_path) == list(range(200))


def test_a_full_disk_under_tensorboard_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("tensorboard")
    metrics = Metrics(tmp_path)
    metrics.start(TensorBoard, train=0)
    for step in range(1000):
        metrics.write("train", step, loss=1.0)
    request.getfixturevalue("full_disk")
    metrics.close()
    assert "TensorBoard lacks what was recorded last" in caplog.text


def test_a_full_disk_prints_no_traceback_for_each_line_of_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    create_logger(tmp_path, rank=1)
    request.getfixturevalue("full_disk")
    for _ in range(100):
        logging.getLogger("main").info("x" * 100)
    assert 0 < (tmp_path / "log_rank1.txt").stat().st_size <= 5000
    assert not capsys.readouterr().err
