"""One command for a machine with a GPU: does everything work there, and how fast is it?

    python -m tools.benchmarks.gpu_report

1. Checks (gpu_checks.py): the released models with the Triton operator against the plain one, forward and
   backward, and under torch.compile and CUDA graphs; each in a process of its own, several at a time.
2. tools.benchmarks.attention: the kernels alone against the limits of the device.
3. tools.benchmarks.models: inference and training against Swin and others.

Every part is stopped when its share of the time is over. It writes files <date>_gpu_* after each step, so it
leaves what it found. Neither a kernel that crashes its process nor a compiler that
hangs stops the other parts. Exit status 1: a result is wrong, or a part failed.
"""

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from models.focal_transformer import FocalAttention
from tools.figures.drawing import blank_figure
from utils import path_argument, user_input

from . import common, entries, gpu_checks
from .gpu_checks import FAILED, HALF, NOT_RUN, TINY

logger = logging.getLogger("benchmarks.gpu_report")

CHECKERS = 6  # most processes for checks, which do not need a quiet machine
CHECKER_BYTES = 12 * 2**30  # of GPU memory for one
CHECKS_END = 0.45  # of the time
SMALL, LARGE = "128", "32"  # images of a step, at 224 and at 448 pixels
FEW = ("focal", "focalv2", "swin")
BACKENDS = ("--backends", "plain", "triton")
CHECKS_NOTE = "gpu_checks.py defines errors and limits."


def run_checks(args: argparse.Namespace, end: float) -> bool:
    """Part 1, until `end` on the clock `time.monotonic`: whether no check failed."""
    workers = min(CHECKERS, (os.cpu_count() or 1) // 2)
    if args.device.type == "cuda":
        memory = torch.cuda.get_device_properties(args.device).total_memory
        workers = min(workers, memory // CHECKER_BYTES)
    output = argparse.Namespace(out=args.out, name="gpu_checks")
    facts, columns, names = common.describe_run(args.device), gpu_checks.COLUMNS, list(gpu_checks.CHECKS)
    cases, rows = gpu_checks.cases(args.device), []

    def run(case: gpu_checks.Case) -> list[list[common.Cell]]:
        found, reason = common.in_process(end - time.monotonic(), gpu_checks.run, case)
        result = NOT_RUN if reason == common.NO_TIME else FAILED
        return found or [case.row("", result, None, None, reason)]

    pool = ThreadPoolExecutor(max(1, workers))
    try:
        for done in as_completed([pool.submit(run, case) for case in cases]):
            rows += done.result()
            rows.sort(key=lambda row: names.index(row[0]))
            news = common.markdown_table(columns, done.result())
            common.publish(output, "Checks on a GPU", facts, [CHECKS_NOTE], columns, rows, news=news)
    finally:
        pool.shutdown(cancel_futures=True)
    return all(FAILED not in row for row in rows)


def commands() -> list[tuple[str, float, list[str]]]:
    """Parts 2 and 3, the most important first: name, end as a share of the time, and command."""
    kernels = ["attention", "--rounds", "10", "--batch-size", SMALL, "--precisions", HALF, "fp32"]
    models = ["models", "--rounds", "7", "--precisions", "bf16", "--models"]
    many = [*entries.OURS, "swin", "convnext", "focalnet"]
    tiny = [f"{family}-tiny" for family in FEW]
    return [
        ("kernels", 0.6, [*kernels, *BACKENDS, "--cfg", *(f"configs/{name}.yaml" for name in TINY)]),
        ("models", 0.8, [*models, *many, "--batch-size", SMALL]),
        ("compiled", 0.87, [*models, *tiny, "--batch-size", SMALL, "--compile", "compiled"]),
        ("models_448", 0.95, [*models, *FEW, "--batch-size", LARGE, "--sizes", "448"]),
    ]


def run_part(args: argparse.Namespace, name: str, words: Sequence[str], end: float) -> bool:
    """Run a command of `commands` until `end`; False if it failed, True also if its time ran out."""
    seconds = end - time.monotonic()
    tool, *options = words
    options += ["--device", str(args.device), "--out", os.path.abspath(args.out), "--name", f"gpu_{name}"]
    try:
        command = [sys.executable, "-m", f"tools.benchmarks.{tool}", *options]
        done = subprocess.run(command, cwd=common.REPO, timeout=max(0, seconds), check=False)
    except subprocess.TimeoutExpired:
        logger.info(f"{name}: stopped, no time is left")
        return True
    if done.returncode:
        logger.error(f"{name}: ended with exit code {done.returncode}")
    return done.returncode == 0


def measure(args: argparse.Namespace) -> int:
    """All parts; 1 if a result is wrong or a part failed."""
    start = time.monotonic()
    blank_figure()  # says that matplotlib is missing before, not after measuring
    layer = FocalAttention(32, 1, 7, expand_size=3, backend="triton")
    with user_input():
        layer.index(14, 14, torch.empty(0, device=args.device))  # says why the kernels cannot run here
    good = [run_checks(args, start + 60 * CHECKS_END * args.minutes)]
    for name, share, words in commands():
        good.append(run_part(args, name, words, start + 60 * share * args.minutes))
    logger.info(f"wrote the results to {args.out}")
    return int(not all(good))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a result is wrong, 2 for an error that the user can correct."""
    parser = argparse.ArgumentParser(description="Check and time everything on a GPU.", allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=12.0, help="that it may take (default: 12)")
    parser.add_argument("--device", default="", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument(
        "--out", type=path_argument, default=common.RESULTS, help="folder (default: tools/results)"
    )
    parser.set_defaults(threads=None, rounds=None)
    return common.run_command(parser.parse_args(argv), measure)


if __name__ == "__main__":
    sys.exit(main())
