"""Checkpoint files: whole or absent, verified, the newest by position, few kept, written beside training."""

import json
import logging
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO

import storage
from saver import Saver, Snapshot
from storage import Stamp

CONTENT = {"model": {"weight": torch.arange(3000.0)}, "optimizer": {}, "note": "text"}


def write(folder: Path, stamp: Stamp, name: str = "") -> Path:
    path = folder / (name or storage.file_name(stamp.epoch, stamp.step))
    storage.write(CONTENT, path, stamp)
    return path


def test_a_file_is_read_by_torch_and_knows_where_it_was_taken(tmp_path: Path) -> None:
    stamp = Stamp(run=2, epoch=3, images=640, evaluated=True, step=20)
    path = write(tmp_path, stamp)
    assert path.name == "ckpt_epoch_3_step_20.pth"
    assert storage.is_complete(path)
    assert storage.stamp_of(path) == stamp
    for mapped in (False, True):
        content = torch.load(path, weights_only=True, mmap=mapped)
        assert torch.equal(content["model"]["weight"], CONTENT["model"]["weight"])


def test_any_flipped_bit_and_any_cut_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, Stamp(epoch=1))
    content = path.read_bytes()
    places = [*range(0, len(content), 401), *range(len(content) - 300, len(content))]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert not storage.is_complete(path), place
        path.write_bytes(content[:place])
        assert not storage.is_complete(path), place
    path.write_bytes(content)
    assert storage.is_complete(path)


def test_files_of_older_versions_are_checked_by_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "ckpt_epoch_4.pth"
    torch.save(CONTENT, path)
    assert storage.is_complete(path)
    assert storage.stamp_of(path) == Stamp(epoch=5)
    content = bytearray(path.read_bytes())
    content[content.index(CONTENT["model"]["weight"].numpy().tobytes()) + 5] ^= 255
    path.write_bytes(content)
    assert not storage.is_complete(path)


def test_the_newest_is_the_furthest_of_the_last_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the clock says; a fresh run in the folder of a longer one continues itself."""
    stamps = [
        Stamp(run=1, epoch=9),
        Stamp(run=2, epoch=1),
        Stamp(run=2, epoch=1, images=320, step=10),
        Stamp(run=2, epoch=2),
        Stamp(run=2, epoch=2, images=160, step=5),
    ]
    paths = [write(tmp_path, stamp) for stamp in stamps]
    best = write(tmp_path, Stamp(run=2, epoch=2, evaluated=True), storage.BEST_NAME)
    for seconds, path in enumerate(reversed([*paths, best])):
        os.utime(path, (1000 + seconds, 1000 + seconds))
    order = [paths[4], best, paths[3], paths[2], paths[1], paths[0]]
    assert storage.next_run(tmp_path) == 3
    for path in order:
        assert storage.find_newest(tmp_path) == path
        path.write_bytes(path.read_bytes()[:-100])
    assert storage.find_newest(tmp_path) is None
    assert f"{best} is damaged or incomplete and was skipped" in caplog.text


@pytest.mark.parametrize("stamp", [Stamp(run=1, epoch=1), Stamp(run=1, epoch=3)])
def test_a_file_that_cannot_be_read_is_not_taken_for_damaged(tmp_path: Path, stamp: Stamp) -> None:
    """The system has the file and fails to read it, as where a disk or network is away; none is chosen."""
    kept = write(tmp_path, Stamp(run=1, epoch=2))
    lost = write(tmp_path, stamp)
    lost.unlink()
    lost.symlink_to("/proc/self/mem")
    for look in (storage.find_newest, storage.next_run):
        with pytest.raises(OSError, match=rf"{lost}: expected to read the checkpoint, got: Invalid argument"):
            look(tmp_path)
    storage.prune(tmp_path, Stamp(run=1, epoch=9), keep=1)
    assert kept.exists()
    lost.unlink()
    lost.mkdir()  # no checkpoint at all
    assert storage.find_newest(tmp_path) == kept
    assert storage.next_run(tmp_path / "new") == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        storage.find_newest(tmp_path / "file")


@pytest.mark.parametrize("length", [0, 1000])
def test_the_newest_is_told_of_when_it_was_cut_short(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, length: int
) -> None:
    kept = write(tmp_path, Stamp(run=1, epoch=1))
    cut = write(tmp_path, Stamp(run=1, epoch=2))
    cut.write_bytes(cut.read_bytes()[:length])
    assert storage.find_newest(tmp_path) == kept
    assert f"{cut} is damaged or incomplete and was skipped" in caplog.text
    assert kept.name not in caplog.text


def test_of_files_of_older_versions_the_last_written_is_the_newest(tmp_path: Path) -> None:
    for epoch, seconds in ((9, 1000), (0, 2000)):
        path = tmp_path / f"ckpt_epoch_{epoch}.pth"
        torch.save(CONTENT, path)
        os.utime(path, (seconds, seconds))
    assert storage.find_newest(tmp_path) == path
    (tmp_path / "ckpt_epoch_x.pth").write_text("")
    assert storage.find_newest(tmp_path) == path


def test_files_of_older_versions_are_not_all_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """There may be hundreds of gigabytes of them; one that was not read cannot be called damaged."""
    for epoch in range(3):
        path = tmp_path / f"ckpt_epoch_{epoch}.pth"
        torch.save(CONTENT, path)
        os.utime(path, (1000 + epoch, 1000 + epoch))
    content = bytearray((tmp_path / "ckpt_epoch_0.pth").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "ckpt_epoch_0.pth").write_bytes(content)
    os.utime(tmp_path / "ckpt_epoch_0.pth", (900, 900))
    assert storage.find_newest(tmp_path) == path
    assert not caplog.text
    path.write_bytes(path.read_bytes()[:-50])
    assert storage.find_newest(tmp_path) == tmp_path / "ckpt_epoch_1.pth"
    assert f"{path} is damaged" in caplog.text


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (0, ["best", "epoch_0", "epoch_1", "epoch_2", "epoch_3_step_4", "epoch_3_step_6"]),
        (1, ["best", "epoch_3_step_6"]),
        (3, ["best", "epoch_2", "epoch_3_step_4", "epoch_3_step_6"]),
    ],
)
def test_few_are_kept(tmp_path: Path, keep: int, left: list[str]) -> None:
    """The best one always, others of another run too; those inside an epoch until it is over."""
    foreign = write(tmp_path, Stamp(run=1, epoch=9))
    write(tmp_path, Stamp(run=2, epoch=1), storage.BEST_NAME)
    for epoch in range(4):
        for step in (0, 2, 4, 6):
            if epoch or step:
                stamp = Stamp(2, epoch, 8 * step, False, step)
                write(tmp_path, stamp)
                storage.prune(tmp_path, stamp, keep)
    names = {path.name for path in tmp_path.iterdir()} - {foreign.name}
    assert names == {f"{'' if name == 'best' else 'ckpt_'}{name}.pth" for name in left}
    assert foreign.exists()


def test_a_damaged_later_file_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    later = write(tmp_path, Stamp(run=1, epoch=2, images=80, step=10))
    later.write_bytes(later.read_bytes()[:50] + b"x" + later.read_bytes()[51:])
    now = Stamp(run=1, epoch=2, images=40, step=5)
    path = write(tmp_path, now)
    storage.prune(tmp_path, now, keep=1)
    assert storage.find_newest(tmp_path) == path


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = write(tmp_path, Stamp(epoch=1))
    before = path.read_bytes()
    code = (
        "import os, signal, sys, torch, storage; from pathlib import Path\n"
        "def half(state, file):\n"
        "    file.write(b'x' * 1000000); os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = half\n"
        "storage.write({}, Path(sys.argv[1]), storage.Stamp())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=REPO, check=False)
    assert done.returncode == -9
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
    assert storage.find_newest(tmp_path) == path
    (tmp_path / ".mine.tmp").write_text("not ours")
    storage.remove_leftovers(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, ".mine.tmp"}


def save(saver: Saver, path: Path, epoch: int = 0) -> None:
    saver.submit(CONTENT, path, Stamp(epoch=epoch), then=lambda: None)
    saver.wait()


def test_a_full_disk_keeps_the_older_file_and_ends_the_run_at_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The limit on the size of files makes real errors, in the middle of the file."""
    saver, path = Saver(background=True, most_failures=2), tmp_path / "ckpt_epoch_0.pth"
    save(saver, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        save(saver, path, epoch=1)
        assert "File too large" in saver.last_error
        assert saver.failure == ""
        save(saver, path, epoch=1)
        assert "2 in a row" in saver.failure
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in caplog.text
    assert "bytes free" in caplog.text
    assert "failure 1 of 2" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before
    saver = Saver(background=True, most_failures=2)
    (tmp_path / "file").write_text("")
    save(saver, tmp_path / "file" / "ckpt_epoch_0.pth")
    assert saver.failures == 1
    save(saver, path)
    assert (saver.failures, saver.last_error) == (0, "")


@pytest.mark.parametrize("part", ["model", "optimizer", "model_ema"])
def test_what_is_not_finite_is_never_written(tmp_path: Path, part: str) -> None:
    saver = Saver(background=True, most_failures=3)
    saver.submit({part: {"a": [torch.tensor([1.0, torch.nan])]}}, tmp_path / "a.pth", Stamp(), lambda: None)
    saver.wait()
    assert "finite" in saver.failure
    assert not list(tmp_path.iterdir())


def test_a_snapshot_shares_nothing_and_reuses_its_memory() -> None:
    live = {"a": torch.zeros(3), "b": [{"c": torch.ones(2, 2).T, "d": 5}], "e": (1, 2)}
    snapshot = Snapshot()
    first = snapshot.take(live)
    live["a"].add_(1)
    live["b"][0]["c"].mul_(7)
    live["b"][0]["d"] = 6
    assert first["a"].tolist() == [0, 0, 0]
    assert first["b"][0]["c"].tolist() == [[1, 1], [1, 1]]
    assert first["b"][0]["d"] == 5
    assert first["e"] == (1, 2)
    again = snapshot.take(live)
    assert again["a"].data_ptr() == first["a"].data_ptr()
    assert again["a"].tolist() == [1, 1, 1]


def test_the_step_that_saves_waits_for_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At most a tenth of a save, for 200 MB."""
    content = {"model": {str(index): torch.randn(1_000_000) for index in range(50)}}
    saver = Saver(background=True, most_failures=1)
    waits, saves = [], []
    for epoch in range(4):
        began = time.perf_counter()
        saver.submit(content, tmp_path / "a.pth", Stamp(epoch=epoch), then=lambda: None)
        waits.append(time.perf_counter() - began)
        saver.wait()
        saves.append(time.perf_counter() - began)
    with capsys.disabled():
        sys.stdout.write(
            f"\n  step delayed {min(waits) * 1e3:.0f} ms by a save of {min(saves) * 1e3:.0f} ms\n"
        )
    assert min(waits) < 0.1 * min(saves)
    assert saver.failure == ""


def test_metrics_are_on_the_disk_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And where they were lost all the same, a resumed run says so."""
    from test_train_state import checkpoints_of, make_state

    from logger import Metrics

    synced, fsync = [], os.fsync

    def watched(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    state, metrics = make_state(), Metrics(tmp_path)
    checkpoints = checkpoints_of(tmp_path, state)
    checkpoints.metrics = metrics
    metrics.write("epoch", 0, loss=1.0)
    size = metrics.flush()
    metrics.write("epoch", 1, loss=2.0)
    assert synced == []
    checkpoints.save(state)
    checkpoints.finish()
    assert synced[:2] == ["metrics.jsonl", ".ckpt_epoch_-1.pth.tmp"]
    recorded = torch.load(tmp_path / "ckpt_epoch_-1.pth", weights_only=True)["metrics_size"]
    metrics.rewind(recorded)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    os.truncate(tmp_path / "metrics.jsonl", size)
    metrics = Metrics(tmp_path)
    metrics.rewind(recorded)
    assert (
        f"expected the {recorded:,} bytes that were recorded before the checkpoint, got {size:,}"
        in caplog.text
    )
    metrics.write("epoch", 2, loss=3.0)
    metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.0, 3.0]


def test_metrics_of_an_earlier_run_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from logger import Metrics

    for loss in (1.0, 2.0, 3.0):
        metrics = Metrics(tmp_path)
        metrics.set_aside()
        metrics.write("epoch", 0, loss=loss)
        metrics.close()
    names = [f"metrics.jsonl{end}" for end in (".before-1", ".before-2", "")]
    losses = [json.loads((tmp_path / name).read_text())["loss"] for name in names]
    assert losses == [1.0, 2.0, 3.0]
    assert "is now in" in caplog.text


def test_a_full_disk_under_tensorboard_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard")
    from logger import Metrics

    metrics = Metrics(tmp_path)
    for step in range(1000):
        metrics.write("train", step, loss=1.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        metrics.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "TensorBoard lacks what was recorded last" in caplog.text


def test_metrics_survive_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from logger import Metrics

    metrics = Metrics(tmp_path)
    metrics.write("epoch", 0, loss=1.0)
    size, limits = metrics.flush(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))
    try:
        with caplog.at_level(logging.ERROR):
            metrics.write("epoch", 1, loss=2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "metrics.jsonl" in caplog.text
    assert (tmp_path / "metrics.jsonl").stat().st_size == size
    metrics.write("epoch", 2, loss=3.0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.0, 2.0, 3.0]
    metrics.rewind(size)
    metrics.write("epoch", 1, loss=4.0)
    metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.0, 4.0]
