"""One run at a time trains in an output folder, with real processes; a dead one holds nothing."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPO
from test_main import command, folder_of, run_process
from test_resume import run_two

import run_folder

HOLDER = """
import os, sys, time
from pathlib import Path
from run_folder import only_run_in
with only_run_in(Path(sys.argv[1])):
    if os.fork() == 0:  # as a loader worker, which may outlive its parent
        sys.stdout.close()
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock, with a child of its own."""
    words = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(words, cwd=REPO, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        yield holder
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


def test_a_second_process_is_refused_until_the_first_is_dead(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with held(tmp_path) as holder:
        with (
            pytest.raises(ValueError, match=rf"{tmp_path}: .* process {holder.pid} on .* another --tag"),
            run_folder.only_run_in(tmp_path, patience=0.1),
        ):
            pass
        assert f"held by process {holder.pid}" in caplog.text
        os.kill(holder.pid, signal.SIGKILL)  # its child lives on
        for _ in range(2):
            with run_folder.only_run_in(tmp_path, patience=20):
                assert f"process {os.getpid()} " in (tmp_path / run_folder.LOCK_NAME).read_text()


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with run_folder.only_run_in(tmp_path):
        assert "cannot be locked (No locks available)" in caplog.text


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_run_ends_with_one_sentence(
    processes: int, few_images: Path, nano_opts: list[object], tmp_path: Path
) -> None:
    """On all its processes, and nothing of the first one is touched."""
    folder = folder_of(tmp_path)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"kind": "tr')  # a line that is being written
    arguments = command(few_images, tmp_path, [*nano_opts, "DIST_TIMEOUT_MINUTES", 0.1])
    with run_folder.only_run_in(folder):
        done = run_process(arguments) if processes == 1 else run_two([str(REPO / "main.py")], arguments)
    said = f"error: {folder}: expected an output folder that no other run is writing to"
    assert done.stderr.count(said) == 1
    assert f"process {os.getpid()} on" in done.stderr
    assert done.returncode == 2 if processes == 1 else "exitcode  : 2 " in done.stderr
    assert (folder / "metrics.jsonl").read_text() == '{"kind": "tr'
    assert not list(folder.glob("tensorboard/*"))
