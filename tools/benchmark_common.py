"""What the measuring tools share: alternating rounds, spreads, processes, the description of a run, files.

On a machine that does other work too, a timing says little by itself. So everything that is compared is timed
in turns in one process, and compared by the median of the ratios within a round.
"""

import csv
import logging
import multiprocessing
import multiprocessing.process
import os
import platform
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

logger = logging.getLogger("benchmark")

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))  # the tools are run as files

import torch  # noqa: E402

from utils import synchronize  # noqa: E402

RESULTS = REPO / "tools" / "results"
MISSING = "-"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Cell = str | int | float | None


@dataclass(frozen=True)
class Spread:
    """A median with quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


def seconds_of(action: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds per call of `action`, over `repeats` calls and the device's work."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        action()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def repeats_for(seconds: float, single: float, most: int = 1000) -> int:
    """Calls that take about `seconds`, where one takes `single`; at least one."""
    return max(1, min(most, round(seconds / max(single, 1e-9))))


def warm_up(
    step: Callable[[], object], steps: int, seconds: float, held: int, device: torch.device
) -> tuple[int, float | None]:
    """Get a model ready for turns.

    Args:
        step: one step of it.
        steps: to do.
        seconds: that a turn should take.
        held: bytes on the device that belong to the model already.
        device: where it is.

    Returns:
        Steps of a turn; on CUDA the peak memory in MiB, without what does not belong to the model.
    """
    on_cuda = device.type == "cuda"
    if on_cuda:
        others = torch.cuda.memory_allocated(device) - held
    seconds_of(step, steps, device)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    single = seconds_of(step, 1, device)
    memory = (torch.cuda.max_memory_allocated(device) - others) / 2**20 if on_cuda else None
    return repeats_for(seconds, single), memory


def alternate(timers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every timer once a round, in turns of changing direction; what each returned, by round."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds):
        for name in timers if number % 2 == 0 else reversed(timers):
            times[name].append(timers[name]())
    return times


def speed_ratio(times: Sequence[float], of: Sequence[float]) -> Spread:
    """How many times as fast as `of`, with which `times` were taken in turns: the spread over rounds."""
    return Spread.of([theirs / ours for ours, theirs in zip(times, of, strict=True)])


class WorkerError(Exception):
    """What ended a call in a worker's process, in one line."""


class Worker:
    """A process that calls functions one after another; after a failure the next call starts a new one."""

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
        """What a function of a module returns there.

        Args:
            function, arguments: are pickled.
            seconds: after which the process is ended; None for never.

        Raises:
            TimeoutError: that time is over.
            WorkerError: the function raised something, or its process ended.
        """
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, its_end = context.Pipe()
            self._process = context.Process(target=_serve, args=(its_end,))
            self._process.start()
            its_end.close()
        try:
            self._pipe.send((function, arguments))
            in_time = self._pipe.poll(seconds)
            result, reason = self._pipe.recv() if in_time else (None, "")
        except (EOFError, ConnectionError):
            in_time, reason = True, "its process ended, for want of memory or as said above"
        if not in_time:
            self.close(wait=0.0)
            raise TimeoutError
        if reason:
            self.close()
            raise WorkerError(reason)
        return result

    def close(self, wait: float = 10.0) -> None:
        """End the process, by force if it does not end by itself within so many seconds."""
        if self._process is not None:
            self._pipe.close()
            self._process.join(wait)
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(pipe: Connection) -> None:
    """What a worker's process does: call functions until one raises something, or nobody asks any more."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    reason = ""
    while not reason:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result = function(*arguments)
        except Exception as error:
            result, reason = None, short_reason(error)
        pipe.send((result, reason))


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """Leave nothing behind when the parent is killed."""
    parent.join()
    os._exit(1)


def describe_run(device: torch.device) -> dict[str, str]:
    """What a reader has to know to judge a result."""
    cpu = f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    versions = [f"{name} {_version(name)}" for name in ("torch", "torchvision", "timm", "triton")]
    facts = {
        "Date": datetime.now().isoformat(timespec="minutes"),
        "Machine": f"{torch.cuda.get_device_name(device)}; {cpu}" if device.type == "cuda" else cpu,
        "Load": " ".join(f"{value:.2f}" for value in os.getloadavg()) + " (1, 5, 15 minutes, at the start)",
        "Versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "Commit": _commit(),
        "Command": shlex.join(["python", _short(sys.argv[0]), *sys.argv[1:]]),
    }
    if device.type == "cuda":
        facts["Versions"] += f", CUDA {torch.version.cuda}"
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _commit() -> str:
    """Of the repository; with a mark where files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(REPO), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "*.py", "configs")
        return git("rev-parse", "--short=12", "HEAD") + (" and changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _short(path: str) -> str:
    """A path below the repository relative to it."""
    full = Path(path).resolve()
    return full.relative_to(REPO).as_posix() if full.is_relative_to(REPO) else full.name


def result_stem(folder: Path, name: str) -> Path:
    """<folder>/<date>_<name>, without ending; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{datetime.now():%Y-%m-%d}_{name}"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table; None is shown as '-'."""
    lines = [columns, ["---"] * len(columns), *([show(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(value: Cell) -> str:
    """A cell's text, numbers with three digits or more."""
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "/").replace("\n", " ")


def markdown_report(title: str, facts: dict[str, str], notes: Sequence[str], tables: Sequence[str]) -> str:
    """A result file: what was measured where, then the tables."""
    listed = [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join(
        [f"# {title}", "", *listed, "", *(f"{note}\n" for note in notes), "\n\n".join(tables), ""]
    )


def publish(
    out: Path | None,
    name: str,
    title: str,
    facts: dict[str, str],
    notes: Sequence[str],
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
) -> None:
    """Log a report of one table, and write <date>_<name>.md and .csv to the folder `out`, if there is one."""
    report = markdown_report(title, facts, notes, [markdown_table(columns, rows)])
    logger.info(report)
    if out is not None:
        stem = result_stem(out, name)
        (stem.parent / f"{stem.name}.md").write_text(report, encoding="utf-8")
        write_csv(stem.parent / f"{stem.name}.csv", columns, rows)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """The same rows with all digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(["" if cell is None else cell for cell in row] for row in rows)


def short_reason(error: BaseException, length: int = 160) -> str:
    """An error in one line."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return text if len(text) <= length else text[: length - 3] + "..."
