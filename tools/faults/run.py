"""A training run that can be launched, watched, disturbed and launched again, and compared with another one.

Everything goes through main.py and torchrun, with the same command before and after a fault. What a run has
done is read from its log, its metrics.jsonl and its checkpoints.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.demo import DemoOptions, write_demo
from models import read_checkpoint
from tools.convert_checkpoint import same_bits

REPO = Path(__file__).resolve().parents[2]
STEP_LINE = re.compile(rb"epoch (\d+)/(\d+) step (\d+)/(\d+) ")
TIMEOUT = 600.0  # seconds that anything may take on a busy machine
TRAIN_PER_CLASS, VAL_PER_CLASS, BATCH_SIZE = 16, 4, 8
SAVE_EVERY = 5  # steps
TIME_FIELDS = {"img_per_s", "minutes", "memory_mb", "data_ms", "step_ms", "save_ms"}  # of metrics.jsonl
OPTIONS: dict[str, object] = {  # a small model, all randomness switched on, a log line for every step
    **{"DATA.BATCH_SIZE": BATCH_SIZE, "MODEL.FOCAL.EMBED_DIM": 32, "MODEL.FOCAL.NUM_HEADS": [1, 2]},
    **{"MODEL.DROP_PATH_RATE": 0.1, "AUG.MIXUP": 0.8, "AUG.CUTMIX": 1.0, "AUG.COLOR_JITTER": 0.2},
    **{"AUG.REPROB": 0.25, "TRAIN.WARMUP_EPOCHS": 1, "TRAIN.EMA.ENABLED": True, "TRAIN.EMA.DECAY": 0.98},
    **{"SAVE_FREQ": 1, "SAVE_STEPS": SAVE_EVERY, "PRINT_FREQ": 1},
}


class FaultError(Exception):
    """A run did not survive a fault as it should have."""


@dataclass(frozen=True)
class Setting:
    """How a run is launched."""

    processes: int = 1  # 1 is plain main.py, more is torchrun
    epochs: int = 3
    max_restarts: int = 0  # of torchrun
    options: tuple[tuple[str, object], ...] = ()  # (key, value) pairs over OPTIONS

    @property
    def steps_per_epoch(self) -> int:
        return 10 * TRAIN_PER_CLASS // (BATCH_SIZE * self.processes)

    def command(self, data: Path, output: Path) -> list[str]:
        """The command line."""
        launcher = [sys.executable]
        if self.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc_per_node", self.processes, "--max-restarts", self.max_restarts]
        opts = OPTIONS | {"TRAIN.EPOCHS": self.epochs, "DATA.NUM_WORKERS": self.processes - 1}
        pairs = [word for pair in (opts | dict(self.options)).items() for word in pair]
        words = ["main.py", "--cfg", "configs/demo.yaml", "--data-path", data, "--output", output]
        return [str(word) for word in [*launcher, *words, "--device", "cpu", "--opts", *pairs]]


def make_data(root: Path) -> Path:
    """A few of the demo's digits: TRAIN_PER_CLASS and VAL_PER_CLASS images per class."""
    whole = write_demo(root / "demo", ["imagenet"], DemoOptions())["imagenet"]
    for split, count in (("train", TRAIN_PER_CLASS), ("val", VAL_PER_CLASS)):
        for folder in sorted(path for path in (whole / split).iterdir() if path.is_dir()):
            target = root / "digits" / split / folder.name
            target.mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                shutil.copy(image, target)
    return root / "digits"


# --- Processes ----------------------------------------------------------------------------------------------


def processes() -> dict[int, tuple[int, str]]:
    """Parent and state letter of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            found[int(entry.name)] = (int(fields[1]), fields[0])
    return found


def descendants(pid: int) -> list[int]:
    """Children of `pid`, their children and so on."""
    table, found = processes(), [pid]
    for parent in found:
        found += [child for child, (its_parent, _) in table.items() if its_parent == parent]
    return found[1:]


def send(number: signal.Signals, *pids: int) -> None:
    """Send a signal to those that still exist."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class TrainingRun:
    """One run, over all of its launches.

    Args:
        data: its images.
        output: its own folder, for console output and what main.py writes.
        setting: how it is launched.
    """

    def __init__(self, data: Path, output: Path, setting: Setting) -> None:
        self.data, self.output, self.setting = data, output, setting
        self.folder = output / "demo" / "default"
        self.log = self.folder / "log_rank0.txt"
        self.console = output / "console.txt"
        self.launches = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._starts = (0, 0)  # of log and console, at the last launch

    def launch(self) -> "TrainingRun":
        """Start it."""
        self.output.mkdir(parents=True, exist_ok=True)
        self._starts = (len(_content(self.log)), len(_content(self.console)))
        environment = {name: value for name, value in os.environ.items() if name != "PT_OUTPUT_DIR"}
        with self.console.open("ab") as console:
            self.process = subprocess.Popen(
                self.setting.command(self.data, self.output),
                stdout=console,
                stderr=subprocess.STDOUT,
                env=environment | {"OMP_NUM_THREADS": "1"},
                cwd=REPO,
                start_new_session=True,
            )
        self.launches += 1
        return self

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        """Of what was launched: main.py, or torchrun."""
        return self.process.pid

    @property
    def ranks(self) -> list[int]:
        """The training processes, by rank: torchrun starts them in this order."""
        children = [
            pid for pid, (parent, state) in processes().items() if parent == self.pid and state != "Z"
        ]
        return [self.pid] if self.setting.processes == 1 else sorted(children)

    def kill(self) -> None:
        """Send SIGKILL to all processes at once, and wait for their end."""
        family = [self.pid, *descendants(self.pid)]
        send(signal.SIGKILL, *family)
        self.wait()
        while any(processes().get(pid, (0, "X"))[1] not in "ZX" for pid in family):
            time.sleep(0.01)

    def wait(self) -> int:
        """The exit code, once it has ended."""
        return self.process.wait(TIMEOUT)

    def finish(self) -> None:
        """Wait for its regular end."""
        if code := self.wait():
            raise FaultError(f"ended with exit code {code}: {self.last_words()}")

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for a condition while the run goes on."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            if not self.is_running:
                raise FaultError(f"ended with code {self.wait()} before {what}: {self.last_words()}")
            if time.monotonic() > deadline:
                raise FaultError(f"{what} did not come in {TIMEOUT:.0f} s")
            time.sleep(0.002)

    def until_step(self, number: int) -> None:
        """Wait until step `number` of the run, from 1, is logged by this launch."""
        self.until(lambda: self.last_step() >= number, f"step {number}")

    def last_step(self) -> int:
        """The last step that this launch logged, counted from 1 over the whole run; 0 before the first."""
        return [0, *self.steps(self._starts[0])][-1]

    def steps(self, start: int = 0) -> list[int]:
        """All steps that the log reports from byte `start` on."""
        found = (map(int, match.groups()) for match in STEP_LINE.finditer(_content(self.log)[start:]))
        return [(epoch - 1) * steps + step for epoch, _, step, steps in found]

    @property
    def redone(self) -> int:
        """Steps that were logged and then repeated by a later launch."""
        made = self.steps()
        return sum(max(0, last - step + 1) for last, step in zip(made, made[1:], strict=False))

    def text(self) -> str:
        """Log and console output of this launch."""
        log, console = self._starts
        return (_content(self.log)[log:] + _content(self.console)[console:]).decode(errors="replace")

    def last_words(self) -> str:
        """The last error of the console, or its last line."""
        lines = [line for line in self.text().splitlines() if re.search(r"\w", line)] or ["no output"]
        return [lines[-1], *(line for line in lines if line.startswith("error:"))][-1][:300]

    def newest_checkpoint(self) -> Path:
        """The one that was written last; not best.pth."""
        return max(self.folder.glob("ckpt_*.pth"), key=lambda path: path.stat().st_mtime_ns)

    def temporary_files(self) -> set[Path]:
        """Files that are being written, or were when a process was killed."""
        return set(self.folder.glob("*.tmp"))


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


# --- Comparison ---------------------------------------------------------------------------------------------


def compare(run: TrainingRun, reference: TrainingRun) -> str:
    """Compare last checkpoint, best checkpoint and metrics of two finished runs.

    Returns:
        What is equal: tensors to the last bit, metrics but for times.

    Raises:
        FaultError: the runs differ.
    """
    differences, count = [], 0
    for name in (f"ckpt_epoch_{reference.setting.epochs - 1}.pth", "best.pth"):
        paths = [each.folder / name for each in (run, reference)]
        if missing := [str(path) for path in paths if not path.exists()]:
            differences.append(f"no {' and no '.join(missing)}")
            continue
        ours, theirs = (dict(tensors(read_checkpoint(path))) for path in paths)
        count += len(theirs)
        for key in sorted(ours.keys() | theirs.keys()):
            if not same_bits(ours.get(key), theirs.get(key)):
                differences.append(f"{name}{key}")
    our_metrics, their_metrics = metrics(run), metrics(reference)
    if len(our_metrics) != len(their_metrics):
        differences.append(f"{len(our_metrics)} lines of metrics instead of {len(their_metrics)}")
    for number, (our, their) in enumerate(zip(our_metrics, their_metrics, strict=False), 1):
        if our != their:
            differences.append(f"metrics line {number}: {our} instead of {their}")
    differences += [f"left over: {path.name}" for path in run.temporary_files()]
    if differences:
        raise FaultError(f"{len(differences)} differences: {'; '.join(differences[:3])}")
    return f"{count} tensors bit-identical, {len(their_metrics)} metrics equal"


def tensors(tree: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(path, tensor) of nested dicts and lists, without measured times."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if "seconds" not in str(key):
                yield from tensors(value, f"{path}/{key}")


def metrics(run: TrainingRun) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, without times and memory."""
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [{key: x for key, x in json.loads(line).items() if key not in TIME_FIELDS} for line in lines]
