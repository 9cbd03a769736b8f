"""What the benchmarks share: a timer, alternating rounds, calls in other processes, tables and files.

On a machine that does other work too, a single timing says little. So everything that is compared is timed in
alternating rounds in one process, and compared by the median of the ratios within a round.
"""

import argparse
import csv
import logging
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import psutil
import torch

import utils

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("benchmarks")

REPO = Path(__file__).resolve().parents[2]
RESULTS = REPO / "tools" / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDS = {"cpu": 5, "cuda": 20}
MAX_CALLS = 1000  # of an action in one round
NO_TIME = "left out: no time"
DIED = "failed: its process ended, for lack of memory or with the error above"
EXIT_SECONDS = 10.0  # that a process may take to end after its result


# --- Timing -------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """A median with quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(*np.quantile(values, [0.5, 0.25, 0.75]).tolist())


Cell = str | int | float | Spread | None
Key = TypeVar("Key")


def seconds_of(action: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds per call of `action`, over several calls, including the device's work."""
    utils.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        action()
    utils.synchronize(device)
    return (time.perf_counter() - start) / calls


class Timer:
    """Times an action; making a timer warms it up. Calling the timer measures one round.

    A round should take `seconds`, and is one call at least. On CUDA, `peak` is the most memory that was
    allocated during a call, in bytes.
    """

    def __init__(
        self, action: Callable[[], object], device: torch.device, seconds: float = 0.0, warm_up: int = 1
    ) -> None:
        self.action, self.device, self.peak = action, device, 0
        single = seconds_of(action, warm_up, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if device.type == "cuda" or single < seconds:  # a slower action is called once a round in any case
            single = seconds_of(action, 1, device)
        if device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(device)
        self.calls = max(1, min(MAX_CALLS, round(seconds / max(single, 1e-9))))

    def __call__(self) -> float:
        """Seconds per call of the action."""
        return seconds_of(self.action, self.calls, self.device)


def alternate(timers: dict[Key, Callable[[], float]], rounds: int) -> dict[Key, list[float]]:
    """Call every timer once a round, each round in the opposite order of the last one: their results."""
    times: dict[Key, list[float]] = {name: [] for name in timers}
    for number in range(rounds):
        for name in timers if number % 2 == 0 else reversed(timers):
            times[name].append(timers[name]())
    return times


def speed_ratio(times: Sequence[float], base: Sequence[float]) -> Spread:
    """How many times as fast as `base`: the spread over the rounds that both were timed in."""
    return Spread.of([theirs / ours for ours, theirs in zip(times, base, strict=True)])


# --- Other processes ----------------------------------------------------------------------------------------


def in_process(seconds: float | None, function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """Call a function in a process of its own, which may crash or hang.

    Args:
        seconds: until the process is killed; None: never.
        function, arguments: can be pickled.

    Returns:
        What the function returned, or None and why there is nothing.
    """
    if seconds is not None and seconds <= 0:
        return None, NO_TIME
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return None, NO_TIME
        outcome = receiver.recv()
        process.join(EXIT_SECONDS)
        return outcome
    except (EOFError, OSError):  # it ended before its result, or within
        return None, DIED
    finally:
        process.kill()
        process.join()


def _call(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        sender.send((function(*arguments), ""))
    except Exception as error:  # whatever it raises, the caller goes on
        sender.send((None, f"failed: {short_reason(error)}"))


# --- Command lines ------------------------------------------------------------------------------------------


def new_parser(description: str, name: str) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks; `name` is that of the result files."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--device", default="", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--threads", type=positive, help="of PyTorch on the CPU")
    parser.add_argument("--rounds", type=positive, help="alternating rounds; each command has its default")
    parser.add_argument("--name", default=name, help=f"of the result files ({name})")
    parser.add_argument(
        "--out", type=utils.path_argument, metavar="FOLDER", help="write <date>_<name>.md, .csv, .png there"
    )
    return parser


def positive(text: str) -> int:
    """An argument of a command line that is 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return int(text)


def run_command(args: argparse.Namespace, measure: Callable[[argparse.Namespace], int]) -> int:
    """Set up logging, device and threads, then measure: its exit status, or 2 for a mistake of the user.

    Of the options of `new_parser`, `device` becomes a torch.device, and `rounds` a number.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def run() -> int:
        args.device = utils.pick_device(args.device)
        if args.device.type not in ROUNDS:
            raise utils.UserError(f"--device: expected cpu or cuda, got {args.device}; use --device cpu")
        args.rounds = args.rounds or ROUNDS[args.device.type]
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        try:
            return measure(args)
        except torch.OutOfMemoryError as error:
            raise utils.UserError(f"{error} Take a smaller batch.") from error

    return utils.run_command(run)


# --- Reports ------------------------------------------------------------------------------------------------


def describe_run(device: torch.device) -> dict[str, str]:
    """What a reader has to know to judge a result."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.machine()
    cpu += f", {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    versions = [f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "triton")]
    versions += [f"CUDA {torch.version.cuda}"] if device.type == "cuda" else []
    changes = git("status", "--porcelain", "--", "*.py", "configs")
    return {
        "Date": datetime.now().isoformat(timespec="minutes"),
        "Machine": f"{torch.cuda.get_device_name(device)}; {cpu}" if device.type == "cuda" else cpu,
        "Load": "{:.2f} {:.2f} {:.2f} (1, 5, 15 minutes, at the start)".format(*psutil.getloadavg()),
        "Versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "Commit": (git("rev-parse", "--short=12", "HEAD") or "unknown") + " and changes" * bool(changes),
        "Command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def version(package: str) -> str:
    """Of an installed package; "missing" where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def git(*words: str) -> str:
    """Output of a git command in this repository; '' where git or its folder is missing."""
    try:
        command = ["git", "-C", str(REPO), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def short_reason(error: BaseException, length: int = 160) -> str:
    """An error in one line."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return text if len(text) <= length else text[: length - 3] + "..."


def show(value: Cell) -> str:
    """A cell's text; numbers have at least three digits, a spread its quartiles in brackets, None is '-'."""
    if value is None:
        return "-"
    if isinstance(value, Spread):
        return f"{show(value.median)} ({show(value.lower)}-{show(value.upper)})"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "/").replace("\n", " ")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *([show(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(
    args: argparse.Namespace,
    title: str,
    facts: dict[str, str],
    notes: Sequence[str],
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    tables: Sequence[str] = (),
    figure: "Figure | None" = None,
    news: str = "",
) -> None:
    """Log a report, or `news` in its place; write it, its rows and a picture as `--out` and `--name` say.

    The report has `tables`, or else one of all rows. The .csv file has all rows with all digits; None is an
    empty cell there, and of a spread there is the median.
    """
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    parts = [f"# {title}", listed, *notes, *(tables or [markdown_table(columns, rows)])]
    report = "\n\n".join(parts) + "\n"
    logger.info(news or report)
    if args.out is not None:
        path = Path(args.out, f"{datetime.now():%Y-%m-%d}_{args.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.md").write_text(report, encoding="utf-8")
        with open(f"{path}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            for row in rows:
                writer.writerow([cell.median if isinstance(cell, Spread) else cell for cell in row])
        if figure is not None:
            figure.savefig(f"{path}.png", dpi=120)
        logger.info(f"wrote {path}.*")
