"""What the fault tests share: a training run that can be launched, watched, hurt and launched again.

Everything goes through the real main.py and the real torchrun, with the same command before and after a
fault. What a run has done is read from the outside: from its log, its metrics.jsonl and its checkpoints.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))  # the tools are run as files

from data.demo import DemoOptions, write_demo  # noqa: E402

CONFIG = REPO / "configs" / "demo.yaml"
PREEMPTED = 75  # main.py's exit code after SIGTERM or SIGUSR1
STEP_LINE = re.compile(rb"epoch (\d+)/(\d+) step (\d+)/(\d+) ")
STEP_NAME = re.compile(r"ckpt_epoch_(\d+)(?:_step_(\d+))?\.pth")
PATIENCE = 600.0  # seconds that anything may take on a busy machine
TRAIN_PER_CLASS, VAL_PER_CLASS, BATCH_SIZE = 16, 4, 8

OPTIONS: dict[str, object] = {  # a small model, everything random switched on, and a log line for every step
    "DATA.BATCH_SIZE": BATCH_SIZE,
    "MODEL.FOCAL.EMBED_DIM": 32,
    "MODEL.FOCAL.NUM_HEADS": [1, 2],
    "MODEL.DROP_PATH_RATE": 0.1,
    "TRAIN.WARMUP_EPOCHS": 1,
    "TRAIN.EMA.ENABLED": True,
    "TRAIN.EMA.DECAY": 0.98,
    "AUG.MIXUP": 0.8,
    "AUG.CUTMIX": 1.0,
    "AUG.COLOR_JITTER": 0.2,
    "AUG.REPROB": 0.25,
    "SAVE_FREQ": 1,
    "PRINT_FREQ": 1,
}


class FaultError(Exception):
    """A run did not survive a fault as it should have."""


@dataclass(frozen=True)
class Setting:
    """How a run is launched.

    Attributes:
        processes: 1 is plain main.py, more is torchrun.
        workers: loader processes of each process.
        epochs: of the whole run.
        max_restarts: of torchrun.
        options: (key, value) pairs over OPTIONS.
    """

    processes: int = 1
    workers: int = 0
    epochs: int = 4
    max_restarts: int = 0
    options: tuple[tuple[str, object], ...] = (("SAVE_STEPS", 5),)

    def with_options(self, **changes: object) -> "Setting":
        """The same with other options; '__' in a name stands for a dot."""
        named = {name.replace("__", "."): value for name, value in changes.items()}
        return replace(self, options=tuple((dict(self.options) | named).items()))

    def __str__(self) -> str:
        return f"{self.processes} process{'es' if self.processes > 1 else ''}, workers {self.workers}"

    @property
    def steps_per_epoch(self) -> int:
        return 10 * TRAIN_PER_CLASS // (BATCH_SIZE * self.processes)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.steps_per_epoch * self.epochs

    @property
    def notes(self) -> str:
        """The options that are not the usual ones."""
        usual = dict(Setting.options)
        return "".join(f", {key} {value}" for key, value in self.options if usual.get(key) != value)

    def command(self, data: Path, output: Path) -> list[str]:
        """The command line."""
        launch = [sys.executable]
        if self.processes > 1 or self.max_restarts:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
            launch += ["--max-restarts", str(self.max_restarts)]
        opts = OPTIONS | {"TRAIN.EPOCHS": self.epochs, "DATA.NUM_WORKERS": self.workers} | dict(self.options)
        words = ["--cfg", CONFIG, "--data-path", data, "--output", output, "--device", "cpu", "--opts"]
        pairs = [word for pair in opts.items() for word in pair]
        return [*launch, str(REPO / "main.py"), *map(str, [*words, *pairs])]


@dataclass
class Row:
    """A line of the table."""

    fault: str
    where: str
    outcome: str
    restarts: int | None
    redone: int | None  # steps
    verified: str
    passed: bool = True

    @property
    def cells(self) -> list[str | int | None]:
        """By column of COLUMNS."""
        outcome = self.outcome if self.passed else f"**FAILED**: {self.outcome}"
        return [self.fault, self.where, outcome, self.restarts, self.redone, self.verified]


COLUMNS = ("fault", "where", "outcome", "restarts", "steps redone", "verified")


# --- Data ---------------------------------------------------------------------------------------------------


def make_data(root: Path) -> Path:
    """A few of the demo's digits: TRAIN_PER_CLASS and VAL_PER_CLASS images per class."""
    data = root / "digits"
    if not data.exists():
        whole = write_demo(root / "demo", ["imagenet"], DemoOptions())["imagenet"]
        part = root / "digits.part"
        for split, count in (("train", TRAIN_PER_CLASS), ("val", VAL_PER_CLASS)):
            for folder in sorted(path for path in (whole / split).iterdir() if path.is_dir()):
                target = part / split / folder.name
                target.mkdir(parents=True)
                for image in sorted(folder.iterdir())[:count]:
                    shutil.copy(image, target)
        part.rename(data)
    return data


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
    """Children of ``pid``, their children and so on, nearest first."""
    table, found = processes(), [pid]
    for parent in found:
        found += [child for child, (its_parent, _) in table.items() if its_parent == parent]
    return found[1:]


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to those that still exist."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def resident_kb(pid: int) -> int:
    """Resident memory of a process; 0 if it is gone."""
    try:
        match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(match[1]) if match else 0


class Trainer:
    """One training run, over all of its launches.

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
        self._log_starts: list[int] = []
        self._console_start = 0

    def launch(self, setting: Setting | None = None) -> None:
        """Start it; with another ``setting`` from now on, if one is given."""
        assert not self.is_running
        self.setting = setting or self.setting
        self.output.mkdir(parents=True, exist_ok=True)
        self._log_starts.append(_size(self.log))
        self._console_start = _size(self.console)
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

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        """Of what was launched: main.py, or torchrun."""
        assert self.process is not None
        return self.process.pid

    @property
    def ranks(self) -> list[int]:
        """The training processes, without their loader workers, by rank."""
        if self.setting.processes == 1 and not self.setting.max_restarts:
            return [self.pid]
        table = processes()
        return sorted(
            (pid for pid, (parent, state) in table.items() if parent == self.pid and state != "Z"),
            key=_rank_of,
        )

    def kill(self) -> None:
        """End everything at once, as a dying machine does."""
        family = [self.pid, *descendants(self.pid)]
        send(family, signal.SIGKILL)
        self.wait()
        deadline = time.monotonic() + PATIENCE
        while any(state not in "ZX" for pid, (_, state) in processes().items() if pid in family[1:]):
            if time.monotonic() > deadline:
                raise FaultError("processes outlived SIGKILL")
            time.sleep(0.01)

    def wait(self, patience: float = PATIENCE) -> int:
        """The exit code, once it has ended."""
        assert self.process is not None
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired as error:
            raise FaultError(f"still running after {patience:.0f} s") from error

    def finish(self) -> None:
        """Wait for the regular end."""
        code = self.wait()
        if code:
            raise FaultError(f"ended with exit code {code}: {self.last_words()}")

    def run(self) -> "Trainer":
        """Launch it and wait for its regular end."""
        self.launch()
        self.finish()
        return self

    def until(self, condition: Callable[[], Any], what: str, pause: float = 0.002) -> None:
        """Wait for a condition while the run goes on."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if not self.is_running:
                raise FaultError(f"ended with code {self.wait()} before {what}: {self.last_words()}")
            if time.monotonic() > deadline:
                raise FaultError(f"{what} did not come in {PATIENCE:.0f} s")
            time.sleep(pause)

    def until_step(self, number: int) -> None:
        """Wait until step ``number`` of the run, from 1, is logged since the launch."""
        self.until(lambda: self.last_step() >= number, f"step {number}")

    def last_step(self) -> int:
        """The last step logged since the launch, counted from 1 over the whole run; 0 before the first."""
        return [0, *steps_in(_tail(self.log, self._log_starts[-1]))][-1]

    @property
    def redone(self) -> int:
        """Steps that were logged and then made again, by main.py or by a restart of torchrun's."""
        made = list(steps_in(_tail(self.log, 0)))
        return sum(max(0, last - step + 1) for last, step in zip(made, made[1:], strict=False))

    def redone_by_launch(self) -> list[int]:
        """Steps that each launch made again; the first is 0."""
        counts, last, content = [], 0, _tail(self.log, 0)
        for start, end in zip(self._log_starts, [*self._log_starts[1:], len(content)], strict=True):
            steps = list(steps_in(content[start:end]))
            counts.append(max(0, last - steps[0] + 1) if steps else 0)
            last = steps[-1] if steps else last
        return counts

    def log_text(self) -> str:
        """What was logged since the launch."""
        return _tail(self.log, self._log_starts[-1]).decode(errors="replace")

    def text(self) -> str:
        """Console output since the launch."""
        return _tail(self.console, self._console_start).decode(errors="replace")

    def last_words(self) -> str:
        """The error that the console shows, or its last line."""
        lines = [line.strip() for line in self.text().splitlines() if re.search(r"\w", line)]
        errors = [line for line in lines if line.startswith("error:")]
        return (errors or lines or ["nothing was said"])[-1][:300]

    def checkpoints(self) -> list[Path]:
        """Files by position, newest first; without best.pth."""
        files = [path for path in self.folder.glob("ckpt_*.pth") if path.is_file()]
        named = {path: STEP_NAME.fullmatch(path.name) for path in files}
        where = {
            path: (int(m[1]), int(m[2])) if m[2] else (int(m[1]) + 1, 0) for path, m in named.items() if m
        }
        return sorted(where, key=where.__getitem__, reverse=True)

    def temporary_files(self, since: float = 0.0) -> list[Path]:
        """Files that are being written, or were when a process was killed; only those changed ``since``."""
        try:
            entries = [entry for entry in os.scandir(self.folder) if entry.name.endswith(".tmp")]
            return [Path(entry.path) for entry in entries if entry.stat().st_mtime >= since]
        except FileNotFoundError:  # no folder yet, or a file that was renamed in between
            return []


def _rank_of(pid: int) -> int:
    """RANK in the environment of a process; -1 for one that has none."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return -1
    return next((int(word[5:]) for word in words if word.startswith(b"RANK=")), -1)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tail(path: Path, start: int) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(start)
        return file.read()


def steps_in(log: bytes) -> Iterator[int]:
    """The steps that a log reports, counted from 1 over the whole run."""
    for match in STEP_LINE.finditer(log):
        epoch, _, step, steps = map(int, match.groups())
        yield (epoch - 1) * steps + step
