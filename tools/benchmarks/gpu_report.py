"""One command for a machine with a GPU: does everything work there, and how fast is it?

    python -m tools.benchmarks.gpu_report
    TRITON_INTERPRET=1 python -m tools.benchmarks.gpu_report --device cpu --quick

1. Checks (gpu_checks.py): the released models with the Triton operator against the plain one, forward and
   backward, and under torch.compile and CUDA graphs.
2. The attention kernels alone against the limits of the device, as attention.py.
3. The models in inference and training against Swin and others, as models.py.

Every part stops when its share of the time is over. Results are written to <date>_gpu.md, a .csv file for
each part and a picture after each step, so that a run that is cut short leaves what it found; the report
lists what is missing. Everything runs in other processes, so that neither a kernel that crashes its process
nor a compiler that hangs stops the rest. Exit status 1: a result is wrong.
"""

import argparse
import logging
import multiprocessing
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, TimeoutError, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch

from models.focal_transformer import FocalAttention
from tools.figures.drawing import blank_figure
from utils import path_argument

from . import attention, common, entries, gpu_checks, models
from .entries import OURS, Entry
from .gpu_checks import FAILED, HALF, NOT_RUN, TINY, Case
from .models import BASELINE, MODES, NO_TIME, Row, Setting

logger = logging.getLogger("benchmarks.gpu_report")

DIED = "its process ended, out of memory or with the error above"
CHECKERS = 6  # most processes for checks, which do not need a quiet machine
CHECKER_BYTES = 12 * 2**30  # of GPU memory for one
KERNELS = ((TINY[0], "half"), (TINY[1], "half"), (TINY[0], "fp32"))
KERNEL_ROUNDS = 10
KERNEL_COLUMNS = ("model", *attention.COLUMNS)
BATCH = 128  # at 224 pixels; fewer at more
MODEL_ROUNDS = 7
OTHERS = ("convnext", "focalnet")  # families beside the baseline, at 224 pixels
GRACE = 10.0  # seconds from the last round of a group of models to the end of its process
SHARES = {"checks": 0.45, "kernels": 0.6, "models": 0.95}  # of the time, when each part ends
NOTE = (
    "gpu_checks.py defines errors and limits of checks, attention.py floor and check of kernels. Speeds are "
    "medians and quartiles of alternating rounds, ratios are within a round; `train` is forward, cross "
    "entropy, backward and AdamW."
)


# --- Other processes ----------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A call in another process."""

    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Worker:
    """A process that runs tasks; after a failure the next one gets a new process."""

    pool: ProcessPoolExecutor | None = None

    def run(self, task: Task, seconds: float) -> tuple[Any, str]:
        """The result of a task, or None and why there is none."""
        if seconds <= 0:
            return None, NO_TIME
        try:
            if self.pool is None:
                set_up = partial(logging.basicConfig, level=logging.INFO, format="%(message)s")
                self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), set_up)
                self.pid = self.pool.submit(os.getpid).result()
            return self.pool.submit(task.function, *task.arguments).result(seconds), ""
        except TimeoutError:
            reason = NO_TIME
        except BrokenProcessPool:
            reason = f"failed: {DIED}"
        except Exception as error:  # whatever a task raises, the others go on
            reason = f"failed: {common.short_reason(error)}"
        self.close()
        return None, reason

    def close(self) -> None:
        """End the process, whatever it does."""
        if self.pool is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.pool.shutdown()
            self.pool = None


def run_tasks(tasks: Sequence[Task], end: float, workers: int) -> Iterator[tuple[Task, Any, str]]:
    """Run tasks in processes, the first ones first.

    Args:
        tasks: to run.
        end: when to stop, on the clock `time.monotonic`.
        workers: processes.

    Yields:
        Each task when it is done, its result, and the reason why there is none (then the result is None).
    """
    idle = [Worker() for _ in range(workers)]

    def run(task: Task) -> tuple[Task, Any, str]:
        worker = idle.pop()
        try:
            return task, *worker.run(task, end - time.monotonic())
        finally:
            idle.append(worker)

    pool = ThreadPoolExecutor(workers)
    try:
        for done in as_completed([pool.submit(run, task) for task in tasks]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)
        for worker in idle:
            worker.close()


# --- The report ---------------------------------------------------------------------------------------------


class Report:
    """The results so far.

    Args:
        args: the command line.
    """

    def __init__(self, args: Namespace) -> None:
        self.args, self.facts = args, common.describe_run(args.device)
        self.checks: list[list[common.Cell]] = []
        self.kernels: list[list[common.Cell]] = []
        self.models: list[Row] = []
        self.missing: list[str] = []

    def run_checks(self, end: float) -> None:
        """Part 1."""
        device = self.args.device
        workers = min(CHECKERS, (os.cpu_count() or 1) // 2)
        if device.type == "cuda":
            workers = min(workers, torch.cuda.get_device_properties(device).total_memory // CHECKER_BYTES)
        cases = gpu_checks.cases(device, self.args.quick)
        tasks = [Task(case.check, gpu_checks.run, (case,)) for case in cases]
        for task, rows, reason in run_tasks(tasks, end, max(1, workers)):
            result = NOT_RUN if reason == NO_TIME else FAILED
            rows = rows or [task.arguments[0].row("", result, None, None, reason)]
            self.checks += rows
            self.write(common.markdown_table(gpu_checks.COLUMNS, rows))

    def run_kernels(self, end: float) -> None:
        """Part 2."""
        device, tasks = self.args.device, []
        for variant, precision in KERNELS:
            precision = HALF[device.type] if precision == "half" else precision
            case = Case("kernels", variant, precision, device, self.args.quick)
            tasks.append(Task(f"kernels of {variant}, {precision}", time_kernels, (case,)))
        for task, found, reason in run_tasks(tasks, end, 1):
            if found:
                self.facts[f"Peaks, {task.label}"] = found[0]
                self.kernels += found[1]
            self.write(common.markdown_table(KERNEL_COLUMNS, found[1] if found else []), task, reason)

    def run_models(self, end: float) -> None:
        """Part 3."""
        tasks, quick = [], self.args.quick
        for setting, group in groups(quick):
            batch = 1 if quick else BATCH * 224**2 // setting.resolution**2
            arguments = (setting, group, batch, 1 if quick else MODEL_ROUNDS, self.args.device, end - GRACE)
            tasks.append(Task(f"models, {' '.join(map(str, setting))}", models.run_group, arguments))
        for task, rows, reason in run_tasks(tasks, end, 1):
            self.models += rows or []
            cells = [row.cells() for row in rows or []]
            self.write(common.markdown_table(models.COLUMNS, cells), task, reason)

    @property
    def is_wrong(self) -> bool:
        """Whether any result is wrong."""
        return attention.is_wrong(self.kernels) or any(row[3] == FAILED for row in self.checks)

    def write(self, news: str, task: Task | None = None, reason: str = "") -> None:
        """Log a new table, or why a task has none, and write all files."""
        if reason:
            news = f"{task.label}: {reason}"
            self.missing.append(news)
        logger.info(news)
        names = list(gpu_checks.CHECKS)
        self.checks.sort(key=lambda row: names.index(str(row[0]).partition(":")[0]))
        results = [row[3] for row in self.checks]
        counts = ", ".join(f"{results.count(result)} {result}" for result in dict.fromkeys(results))
        notes = [NOTE]
        if self.missing:
            notes.append("\n".join(["Without result:", "", *(f"- {line}" for line in self.missing)]))
        folder, tables = self.args.out, []
        for name, columns, rows in (
            ("checks", gpu_checks.COLUMNS, self.checks),
            ("kernels", KERNEL_COLUMNS, self.kernels),
            ("models", models.COLUMNS, [row.cells() for row in self.models]),
        ):
            tables.append(f"## {name.capitalize()}\n\n{common.markdown_table(columns, rows)}")
            path = common.result_path(folder, f"gpu_{name}.csv")
            path.write_text(common.csv_text(columns, rows), encoding="utf-8")
        text = common.markdown_report("GPU report", self.facts | {"Checks": counts}, notes, tables)
        common.result_path(folder, "gpu.md").write_text(text, encoding="utf-8")
        if figure := models.draw(self.models):
            figure.savefig(common.result_path(folder, "gpu.png"), dpi=120)


def time_kernels(case: Case) -> tuple[str, list[list[common.Cell]]]:
    """Peaks of the device, and rows of KERNEL_COLUMNS for all stages of a model."""
    setting = Namespace(device=case.device, backends=["plain", "triton"])
    setting.batch_size, setting.rounds = (1, 1) if case.quick else (BATCH, KERNEL_ROUNDS)
    if case.device.type == "cuda":
        torch.cuda.set_device(case.device)
    peaks = attention.measure_peaks(case.device, [case.precision])
    shapes = attention.shapes_of(gpu_checks.make_model(case, "plain"), case.side)
    rows = [attention.time_backends(shape, case.precision, peaks, setting) for shape in shapes]
    return str(peaks), [[case.variant, *row] for found in rows for row in found]


def groups(quick: bool) -> list[tuple[Setting, list[Entry]]]:
    """Models that are timed together, the most important first."""
    if quick:
        group = [Entry("focal-tiny", "demo", "tiny"), *entries.entries([f"{BASELINE}-tiny"])]
        return [(Setting("tiny", 32, mode, "fp32", "eager"), group) for mode in MODES]
    few, many = ("focal", "focalv2", BASELINE), (*OURS, BASELINE, *OTHERS)
    wanted = (
        *((224, "eager", size, many) for size in entries.SIZES),
        (224, "compiled", "tiny", few),
        *((448, "eager", size, few) for size in entries.SIZES),
    )
    return [
        (
            Setting(size, resolution, mode, "bf16", compiled),
            entries.entries([f"{family}-{size}" for family in families]),
        )
        for resolution, compiled, size, families in wanted
        for mode in MODES
    ]


# --- Command line -------------------------------------------------------------------------------------------


def measure(args: Namespace) -> int:
    """All parts; 1 if a result is wrong."""
    start = time.monotonic()
    blank_figure()  # says that matplotlib is missing before, not after measuring
    layer = FocalAttention(32, 1, 7, expand_size=3, backend="triton")
    layer.index(14, 14, torch.empty(0, device=args.device))  # says why the kernels cannot run here
    report, whole = Report(args), 60 * args.minutes
    report.run_checks(start + SHARES["checks"] * whole)
    report.run_kernels(start + SHARES["kernels"] * whole)
    report.run_models(start + SHARES["models"] * whole)
    logger.info(f"wrote the results to {args.out}")
    return int(report.is_wrong)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a result is wrong, 2 for an error that the user can correct."""
    parser = argparse.ArgumentParser(description="Check and time everything on a GPU.", allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=12.0, help="that it may take (default: 12)")
    parser.add_argument("--device", default="", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the report itself")
    parser.add_argument(
        "--out", type=path_argument, default=common.RESULTS, help="folder (default: tools/results)"
    )
    parser.set_defaults(threads=None, rounds=None)
    return common.run_command(parser.parse_args(argv), measure)


if __name__ == "__main__":
    sys.exit(main())
