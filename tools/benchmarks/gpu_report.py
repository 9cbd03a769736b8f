"""One command for a machine with a GPU: does everything work there, and how fast is it?

    python -m tools.benchmarks.gpu_report
    TRITON_INTERPRET=1 python -m tools.benchmarks.gpu_report --device cpu --quick

1. Checks (gpu_checks.py): the released models with the Triton operator against the plain one, forward and
   backward, and under torch.compile, CUDA graphs and torch.func.
2. The attention kernels alone against the limits of the device, as attention.py.
3. The models in inference and training against Swin and others, as models.py.

Every part stops when its share of the time is over. Results are written to <date>_gpu.md, a .csv file for
each part and a picture after each step, so that a run that is cut short leaves what it found; the report
lists what is missing. Everything runs in other processes, so that neither a kernel that crashes its process
nor a compiler that hangs stops the rest. Exit status 1: a result is wrong.
"""

import argparse
import logging
import os
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from . import attention, common, entries, gpu_checks, models
from .entries import OURS, Entry
from .gpu_checks import CHECKS, FAILED, IMAGES, NOT_RUN, TINY, Case, precision_on
from .models import BASELINE, MODES, NO_TIME, Row, Setting
from .worker import Worker, WorkerError

logger = logging.getLogger("benchmarks.gpu_report")

CHECKERS = 6  # most processes for checks, which do not need a quiet machine
CHECKER_BYTES = 12 * 2**30  # of GPU memory for one
KERNELS = ((TINY[0], "half"), (TINY[1], "half"), (TINY[0], "fp32"))
KERNEL_ROUNDS = 10
KERNEL_COLUMNS = ("model", *attention.COLUMNS)
KERNELS_SHOWN = (
    *("model", "stage", "map", "precision", "pass", "backend", "ms", "floor ms", "times floor", "bound by"),
    "check",
)
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


@dataclass(frozen=True)
class Task:
    """A call in another process."""

    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    fresh: bool = False  # in a new one


def run_tasks(
    tasks: Sequence[Task], end: float, workers: int, done: Callable[[Task, Any, str], object]
) -> None:
    """Run tasks in processes, in this order.

    Args:
        tasks: to run.
        end: when to stop, on the clock `time.monotonic`.
        workers: processes.
        done: is called with a task, its result, and the reason why there is none (then the result is None).
    """
    waiting, lock = deque(tasks), Lock()

    def serve() -> None:
        with Worker() as worker:
            while True:
                with lock:
                    if not waiting:
                        return
                    task = waiting.popleft()
                result, reason, seconds = None, NO_TIME, end - time.monotonic()
                if seconds > 0:
                    if task.fresh:
                        worker.close()
                    try:
                        result, reason = worker.call(task.function, *task.arguments, seconds=seconds), ""
                    except TimeoutError:
                        pass
                    except WorkerError as error:
                        reason = f"failed: {error}"
                with lock:
                    done(task, result, reason)

    with ThreadPoolExecutor(workers) as pool:
        serving = [pool.submit(serve) for _ in range(workers)]
        try:
            for each in serving:
                each.result()
        finally:
            waiting.clear()


class Report:
    """The results so far.

    Args:
        args: the command line.
    """

    def __init__(self, args: Namespace) -> None:
        self.stem = common.result_stem(args.out, "gpu")
        self.facts = common.describe_run(args.device)
        self.checks: list[list[common.Cell]] = []
        self.kernels: list[list[common.Cell]] = []
        self.models: list[Row] = []
        self.missing: list[str] = []

    def add_missing(self, task: Task, reason: str) -> None:
        """List a task that has no result."""
        self.missing.append(f"{task.label}: {reason}")
        logger.info(self.missing[-1])
        self.write()

    def add_checks(self, rows: list[list[common.Cell]]) -> None:
        """Rows of gpu_checks.COLUMNS."""
        self.checks += rows
        for row in rows:
            logger.info(" | ".join(map(common.show, row)))
        self.write()

    def add_kernels(self, peaks: str, rows: list[list[common.Cell]]) -> None:
        """Rows of KERNEL_COLUMNS, and the peaks of the device."""
        self.facts["Peaks"] = peaks
        self.kernels += rows
        logger.info(common.markdown_table(KERNELS_SHOWN, map(shown_kernel, rows)))
        self.write()

    def add_models(self, rows: list[Row]) -> None:
        """Rows of one group."""
        models.compare(rows)
        self.models += rows
        logger.info(common.markdown_table(models.SHOWN, [row.shown() for row in rows]))
        self.write()

    @property
    def is_wrong(self) -> bool:
        """Whether any result is wrong."""
        wrong = any(str(row[-1]).startswith("WRONG") for row in self.kernels)
        return wrong or any(row[3] == FAILED for row in self.checks)

    def write(self) -> Path:
        """Write all files; the path of the Markdown one."""
        names = [check.name for check in CHECKS]
        self.checks.sort(key=lambda row: names.index(str(row[0]).partition(":")[0]))
        results = [row[3] for row in self.checks]
        counts = ", ".join(f"{results.count(result)} {result}" for result in dict.fromkeys(results))
        notes = [NOTE]
        if self.missing:
            notes.append("\n".join(["Without result:", "", *(f"- {line}" for line in self.missing)]))
        tables = [
            "## Checks\n\n" + common.markdown_table(gpu_checks.COLUMNS, self.checks),
            "## Attention kernels\n\n"
            + common.markdown_table(KERNELS_SHOWN, map(shown_kernel, self.kernels)),
            *models.tables(self.models),
        ]
        facts = self.facts | {"Checks": counts or "none"}
        path = self._file(".md")
        path.write_text(common.markdown_report("GPU report", facts, notes, tables), encoding="utf-8")
        speeds = [row.cells() for row in self.models]
        common.write_csv(self._file("_checks.csv"), gpu_checks.COLUMNS, self.checks)
        common.write_csv(self._file("_kernels.csv"), KERNEL_COLUMNS, self.kernels)
        common.write_csv(self._file("_models.csv"), models.COLUMNS, [list(row.values()) for row in speeds])
        if any(row.rate is not None for row in self.models):
            try:
                models.draw(speeds).savefig(self._file(".png"), dpi=120)
            except ImportError as error:
                logger.info(f"no picture: {error}")
        return path

    def _file(self, ending: str) -> Path:
        return self.stem.with_name(self.stem.name + ending)


def shown_kernel(row: Sequence[common.Cell]) -> list[common.Cell]:
    """Of a row of KERNEL_COLUMNS, those of KERNELS_SHOWN."""
    return [row[KERNEL_COLUMNS.index(name)] for name in KERNELS_SHOWN]


# --- The three parts ----------------------------------------------------------------------------------------


def run_checks(report: Report, args: Namespace, end: float) -> None:
    """Part 1."""
    tasks = []
    for check in CHECKS:
        for case in check.cases(args.device, args.quick):
            if reason := check.why_not(args.device):
                report.checks.append(gpu_checks.row(check, case, "", NOT_RUN, None, None, reason))
            else:
                tasks.append(Task(check.name, gpu_checks.run, (check, case), check.fresh))

    def done(task: Task, rows: list[list[common.Cell]] | None, reason: str) -> None:
        result = NOT_RUN if reason == NO_TIME else FAILED
        report.add_checks(rows or [gpu_checks.row(*task.arguments, "", result, None, None, reason)])

    run_tasks(tasks, end, checkers(args.device), done)


def checkers(device: torch.device) -> int:
    """Processes for checks."""
    most = min(CHECKERS, (os.cpu_count() or 1) // 2)
    if device.type == "cuda":
        most = min(most, torch.cuda.get_device_properties(device).total_memory // CHECKER_BYTES)
    return max(1, most)


def run_kernels(report: Report, args: Namespace, end: float) -> None:
    """Part 2."""
    tasks = []
    for variant, precision in KERNELS:
        case = Case(variant, precision_on(args.device, precision), args.device, args.quick)
        for stage in range(1 if args.quick else 4):
            label = f"kernels of {case.variant}, stage {stage + 1}, {case.precision}"
            tasks.append(Task(label, time_kernels, (case, stage)))

    def done(task: Task, found: tuple[str, list[list[common.Cell]]] | None, reason: str) -> None:
        if found is None:
            report.add_missing(task, reason)
        else:
            report.add_kernels(*found)

    run_tasks(tasks, end, 1, done)


def time_kernels(case: Case, stage: int) -> tuple[str, list[list[common.Cell]]]:
    """Peaks of the device, and rows of the table for one stage."""
    setting = Namespace(
        device=case.device,
        batch_size=1 if case.quick else BATCH,
        check_images=IMAGES,
        backends=["plain", "triton"],
        rounds=1 if case.quick else KERNEL_ROUNDS,
    )
    if case.device.type == "cuda":
        torch.cuda.set_device(case.device)
    peaks, shape = peaks_of(case.device), shapes_of(case)[stage]
    rows = attention.time_backends(shape, case.precision, peaks, setting)
    return str(peaks), [[case.variant, *row] for row in rows]


@lru_cache
def peaks_of(device: torch.device) -> attention.Peaks:
    """Of all precisions that kernels are timed in."""
    names = {precision_on(device, precision) for _, precision in KERNELS}
    return attention.measure_peaks(device, sorted(names))


@lru_cache
def shapes_of(case: Case) -> list[attention.Shape]:
    """The operators of a model."""
    model = gpu_checks.make_model(case, "plain")
    return attention.shapes_of(model, gpu_checks.side_of(case))


def run_models(report: Report, args: Namespace, end: float) -> None:
    """Part 3."""
    tasks = []
    for setting, group in groups(args.quick):
        options = Namespace(
            device=args.device,
            batch_size=1 if args.quick else BATCH * 224**2 // setting.resolution**2,
            threads=None,
            rounds=1 if args.quick else MODEL_ROUNDS,
        )
        tasks.append(Task(f"models, {setting}", models.run_group, (setting, group, options, end - GRACE)))

    def done(task: Task, rows: list[Row] | None, reason: str) -> None:
        if rows is None:
            report.add_missing(task, reason)
        else:
            report.add_models(rows)

    run_tasks(tasks, end, 1, done)


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


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Check and time everything on a GPU.", allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=12.0, help="that it may take (default: 12)")
    parser.add_argument("--device", default="", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the report itself")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder (default: tools/results)")
    parser.set_defaults(threads=None, rounds=None)
    return parser.parse_args(argv)


def measure(args: Namespace) -> int:
    """All parts; 1 if a result is wrong."""
    start = time.monotonic()
    attention.require_kernels(args.device)
    report = Report(args)
    for name, part in {"checks": run_checks, "kernels": run_kernels, "models": run_models}.items():
        part(report, args, start + SHARES[name] * 60 * args.minutes)
    logger.info(f"wrote {report.write()}")
    return 1 if report.is_wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a result is wrong, 2 for an error that the user can correct."""
    return common.run_command(parse(argv), measure)


if __name__ == "__main__":
    sys.exit(main())
