"""One command for whoever has a GPU: does everything work there, and how fast is it?

    python tools/gpu_report.py
    TRITON_INTERPRET=1 python tools/gpu_report.py --device cpu --quick

1. Checks (gpu_checks.py): the released models with the Triton operator against the plain one, forward and
   backward, and under what users put on top: torch.compile, CUDA graphs, torch.func.
2. The attention kernels alone against what the device allows, as tools/profile_attention.py.
3. The models in inference and training against Swin and others, as tools/benchmark.py.

Every part ends when its share of the time is over. Results are written to <date>_gpu.md, a .csv file for each
part and a picture, anew after each: a run that is cut short leaves what it found. What was left out is named
there. Everything runs in other processes, so that neither a kernel that ends its process nor a compiler that
takes too long stops the rest. Exit status 1: a result is wrong.
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

import benchmark
import benchmark_common as common
import benchmark_models
import benchmark_report
import gpu_checks
import profile_attention
import torch
from benchmark import MODES, NO_TIME
from benchmark_models import OURS, Entry
from benchmark_report import BASELINE, Row, Setting
from gpu_checks import CHECKS, FAILED, IMAGES, NOT_RUN, TINY, Case, precision_on
from profile_attention import Peaks, Shape, need_kernels

from utils import pick_device

logger = logging.getLogger("gpu_report")

CHECKERS = 6  # most processes for checks, which need no quiet machine but compile much
CHECKER_BYTES = 12 * 2**30  # of GPU memory for one
KERNELS = ((TINY[0], "half"), (TINY[1], "half"), (TINY[0], "fp32"))
KERNEL_ROUNDS = 10
KERNEL_COLUMNS = ("model", *profile_attention.COLUMNS)
KERNELS_SHOWN = (
    *("model", "stage", "map", "precision", "pass", "backend", "ms", "floor ms", "times floor", "bound by"),
    "check",
)
BATCH = 128  # at 224 pixels; fewer at more
MODEL_ROUNDS = 7
OTHERS = ("convnext", "focalnet")  # families beside the baseline, at 224 pixels
GRACE = 10.0  # seconds from when a group of models takes no more turns to the end of its process
NOTE = (
    "Errors and limits of checks are as tools/gpu_checks.py says, floor and check of kernels as "
    "tools/profile_attention.py does. Speeds are medians and quartiles of rounds in turns, ratios are within "
    "a round; `train` is forward, cross entropy, backward and AdamW."
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
    """Do tasks in processes, in this order.

    Args:
        tasks: what to do.
        end: when to stop, on the clock `time.monotonic`.
        workers: processes.
        done: is called with a task, its result, and the reason why there is none (then the result is None).
    """
    waiting, lock = deque(tasks), Lock()

    def serve() -> None:
        with common.Worker() as worker:
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
                    except common.WorkerError as error:
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
    """What was found so far."""

    def __init__(self, args: Namespace) -> None:
        self.stem = common.result_stem(args.out, "gpu")
        self.facts = common.describe_run(args.device)
        self.checks: list[list[common.Cell]] = []
        self.kernels: list[list[common.Cell]] = []
        self.models: list[Row] = []
        self.missing: list[str] = []

    def miss(self, task: Task, reason: str) -> None:
        """Name a task that has no result."""
        self.missing.append(f"{task.label}: {reason}")
        logger.info(self.missing[-1])

    @property
    def is_wrong(self) -> bool:
        """Whether a result is."""
        wrong = any(str(row[-1]).startswith("WRONG") for row in self.kernels)
        return wrong or any(row[3] == FAILED for row in self.checks)

    def tables(self) -> list[str]:
        """In Markdown, with headings."""
        places = [KERNEL_COLUMNS.index(name) for name in KERNELS_SHOWN]
        kernels = [[row[place] for place in places] for row in self.kernels]
        return [
            "## Checks\n\n" + common.markdown_table(gpu_checks.COLUMNS, self.checks),
            "## Attention kernels\n\n" + common.markdown_table(KERNELS_SHOWN, kernels),
            *benchmark_report.tables(self.models),
        ]

    def file(self, ending: str) -> Path:
        """Path of one of the files."""
        return self.stem.with_name(self.stem.name + ending)

    def write(self) -> Path:
        """All files; the path of the Markdown one."""
        names = [check.name for check in CHECKS]
        self.checks.sort(key=lambda row: names.index(str(row[0]).partition(":")[0]))
        results = [row[3] for row in self.checks]
        counts = ", ".join(f"{results.count(result)} {result}" for result in dict.fromkeys(results))
        facts = self.facts | {"Checks": counts or "none"}
        notes = [NOTE]
        if self.missing:
            notes.append("\n".join(["Without result:", "", *(f"- {line}" for line in self.missing)]))
        path = self.file(".md")
        report = common.markdown_report("GPU report", facts, notes, self.tables())
        path.write_text(report, encoding="utf-8")
        speeds = [list(row.cells().values()) for row in self.models]
        for part, columns, rows in (
            ("checks", gpu_checks.COLUMNS, self.checks),
            ("kernels", KERNEL_COLUMNS, self.kernels),
            ("models", benchmark_report.COLUMNS, speeds),
        ):
            common.write_csv(self.file(f"_{part}.csv"), columns, rows)
        if any(row.rate is not None for row in self.models):
            try:
                benchmark_report.draw(self.models, self.file(".png"))
            except ImportError as error:
                logger.info(f"no picture: {error}")
        return path


def do_checks(report: Report, args: Namespace, end: float) -> None:
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
        rows = rows or [gpu_checks.row(*task.arguments, "", result, None, None, reason)]
        report.checks += rows
        for row in rows:
            logger.info(" | ".join(map(common.show, row)))
        report.write()

    run_tasks(tasks, end, checkers(args.device), done)


def checkers(device: torch.device) -> int:
    """Processes for checks."""
    most = min(CHECKERS, (os.cpu_count() or 1) // 2)
    if device.type == "cuda":
        most = min(most, torch.cuda.get_device_properties(device).total_memory // CHECKER_BYTES)
    return max(1, most)


def do_kernels(report: Report, args: Namespace, end: float) -> None:
    """Part 2."""
    cases = [
        Case(variant, precision_on(args.device, precision), args.device, args.quick)
        for variant, precision in KERNELS
    ]
    tasks = [
        Task(f"kernels of {case.variant}, stage {stage + 1}, {case.precision}", time_kernels, (case, stage))
        for case in cases
        for stage in range(1 if args.quick else 4)
    ]

    def done(task: Task, found: tuple[str, list[list[common.Cell]]] | None, reason: str) -> None:
        if found is None:
            report.miss(task, reason)
        else:
            report.facts["Peaks"], rows = found
            report.kernels += rows
            places = [KERNEL_COLUMNS.index(name) for name in KERNELS_SHOWN]
            for row in rows:
                logger.info(" | ".join(common.show(row[place]) for place in places))
        report.write()

    run_tasks(tasks, end, 1, done)


def time_kernels(case: Case, stage: int) -> tuple[str, list[list[common.Cell]]]:
    """Peaks of the device, and rows of the table for one stage."""
    setting = Namespace(
        device=case.device,
        batch_size=1 if case.quick else BATCH,
        check_images=IMAGES,
        backends=["plain", "triton"],
        repeats=1 if case.quick else KERNEL_ROUNDS,
    )
    if case.device.type == "cuda":
        torch.cuda.set_device(case.device)
    peaks, shape = peaks_of(case.device), shapes_of(case)[stage]
    rows = profile_attention.profile(shape, case.precision, peaks, setting)
    return str(peaks), [[case.variant, *row] for row in rows]


@lru_cache
def peaks_of(device: torch.device) -> Peaks:
    """What the device reaches."""
    names = {precision_on(device, precision) for _, precision in KERNELS}
    return profile_attention.measure_peaks(device, sorted(names))


@lru_cache
def shapes_of(case: Case) -> list[Shape]:
    """The operators of a model."""
    model = gpu_checks.make_model(case, "plain")
    return profile_attention.shapes_of(model, gpu_checks.side_of(case))


def do_models(report: Report, args: Namespace, end: float) -> None:
    """Part 3."""
    rounds = 1 if args.quick else MODEL_ROUNDS
    tasks = []
    for setting, entries in groups(args.quick):
        batch = 1 if args.quick else BATCH * 224**2 // setting.resolution**2
        setup = Namespace(device=args.device, batch_size=batch, threads=None)
        arguments = (setting, entries, setup, rounds, end - GRACE)
        tasks.append(Task(f"models, {setting}", benchmark.run_group, arguments))

    def done(task: Task, rows: list[Row] | None, reason: str) -> None:
        if rows is None:
            report.miss(task, reason)
        else:
            benchmark.compare(rows)
            report.models += rows
            logger.info(
                common.markdown_table(benchmark_report.SHOWN, [benchmark_report.shown(row) for row in rows])
            )
        report.write()

    run_tasks(tasks, end, 1, done)


def groups(quick: bool) -> list[tuple[Setting, list[Entry]]]:
    """What is timed together, the most wanted first."""
    if quick:
        entries = [Entry("focal-tiny", "demo", "tiny"), *benchmark_models.entries([f"{BASELINE}-tiny"])]
        return [(Setting("tiny", 32, mode, "fp32", "eager"), entries) for mode in MODES]
    all_sizes, few, many = benchmark_models.SIZES, ("focal", "focalv2", BASELINE), (*OURS, BASELINE, *OTHERS)
    wanted = (
        *((224, "eager", size, many) for size in all_sizes),
        (224, "compiled", "tiny", few),
        *((448, "eager", size, few) for size in all_sizes),
    )
    return [
        (
            Setting(size, resolution, mode, "bf16", compiled),
            benchmark_models.entries([f"{family}-{size}" for family in families]),
        )
        for resolution, compiled, size, families in wanted
        for mode in MODES
    ]


PARTS = ((do_checks, 0.45), (do_kernels, 0.6), (do_models, 0.95))  # and the share of the time when they end


def parse(argv: Sequence[str] | None) -> Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Check and time everything on a GPU.", allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=12.0, help="that it may take (default: 12)")
    parser.add_argument("--device", default="", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--quick", action="store_true", help="tiny models: to try the report itself")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder (default: tools/results)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a result is wrong, 2 for what the user can correct."""
    began, args = time.monotonic(), parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        args.device = pick_device(args.device)
        need_kernels(args.device)
        report = Report(args)
        for part, share in PARTS:
            part(report, args, began + share * 60 * args.minutes)
        logger.info(f"wrote {report.write()}")
    except (ValueError, OSError) as error:
        logger.error(f"error: {error}")
        return 2
    return 1 if report.is_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
