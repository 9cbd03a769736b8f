"""One run at a time trains in an output folder, with real processes; a dead one holds nothing."""

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from training import run_dir
from utils import UserError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Another process that holds the lock."""
    if not (holder := os.fork()):
        with run_dir.lock(folder, timeout=0):
            (folder / "ready").touch()
            time.sleep(60)
            os._exit(0)
    while not (folder / "ready").exists():
        time.sleep(0.01)
    yield holder
    with contextlib.suppress(ProcessLookupError):
        os.kill(holder, signal.SIGKILL)


def test_a_second_process_is_refused_until_the_first_is_dead(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with locked(tmp_path) as holder:
        with (
            pytest.raises(UserError, match=rf" process {holder} on .* another --tag"),
            run_dir.lock(tmp_path, timeout=0.1),
        ):
            pass
        assert f"locked by process {holder}" in caplog.text
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        for _ in range(2):
            with run_dir.lock(tmp_path, timeout=20):
                assert f"process {os.getpid()} " in (tmp_path / run_dir.HOLDER_NAME).read_text()


def test_a_refused_run_leaves_the_metrics_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "tr')  # a line that the first run is writing
    with (
        locked(tmp_path),
        pytest.raises(UserError, match="another --tag"),
        run_dir.open_run_dir(tmp_path, for_training=True, timeout_minutes=0.002),
    ):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == '{"kind": "tr'


@pytest.mark.skipif(not hasattr(os, "fork"), reason="flock is Unix's")
def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Twice, as after a kill: nothing that is left behind is taken for a lock."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    for _ in range(2):
        with run_dir.lock(tmp_path, timeout=0.1):
            assert "cannot be locked" in caplog.text
            caplog.clear()
