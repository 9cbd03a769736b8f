"""Breaks training in many ways, and shows that nothing is lost.

    python tools/fault_test.py                      every fault, some forty runs: an hour on two busy cores
    python tools/fault_test.py --only kills hang    some of them
    python tools/fault_test.py --quick              a few kills
    python tools/fault_test.py --minutes 60         the soak: demo training under random faults for an hour

Everything happens to real runs of main.py, under real torchrun where there are several processes, on a few of
the demo's digits. The table is printed and, with --out, written to FOLDER/<date>_faults.md (of the soak:
_soak.md). The exit code is 1 if a run did not survive.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import fault_cases
import fault_soak
import fault_storage
import torch
from benchmark_common import describe_run, markdown_report, markdown_table, result_stem, short_reason
from fault_cases import Lab
from fault_common import COLUMNS, FaultError, Row, Setting

CASES: dict[str, Callable[[Lab], list[Row]]] = {
    "kills": fault_cases.kills,
    "signals": fault_cases.signals,
    "elastic": fault_cases.elastic,
    "hang": fault_cases.hang,
    "world-size": fault_cases.world_size,
    "damage": fault_storage.damage,
    "refusals": fault_storage.refusals,
    "full-disk": fault_storage.full_disk,
    "images": fault_storage.rotten_images,
    "numbers": fault_storage.bad_numbers,
    "delays": fault_storage.delays,
}
NOTES = (
    "Every run has 4 epochs of 160 digits and a checkpoint every 5 steps, those of a soak as many epochs "
    "as its row says and one after each; everything random is switched on (Mixup, CutMix, drop path, "
    "erasing, jitter). Restarted means: the same command again. *Bit-identical*: all tensors of the last "
    "checkpoint and of best.pth (weights, their average, optimizer), and all lines of metrics.jsonl but "
    "for times and memory, are those of a run that was left alone.",
    "Steps redone: steps that were logged, lost, and made again.",
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Break training in many ways; nothing may be lost.")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    parser.add_argument("--quick", action="store_true", help="a few kills of one process, and no more")
    parser.add_argument("--minutes", type=float, default=0.0, help="soak for that long instead")
    parser.add_argument("--seed", type=int, default=0, help="of the times and places of faults")
    parser.add_argument(
        "--work", type=Path, help="folder for the runs, which then stay (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, help="folder for the table, such as tools/results")
    return parser.parse_args(argv)


def plan(args: argparse.Namespace) -> dict[str, Callable[[Lab], list[Row]]]:
    """What to run, by name."""
    if args.minutes:
        return {"soak": lambda lab: fault_soak.soak(lab, args.minutes)}
    if args.quick:
        return {"kills": lambda lab: fault_cases.kill_chain(lab, Setting(), ("step", "save", "epoch"))}
    return {name: CASES[name] for name in args.only}


def run(lab: Lab, cases: dict[str, Callable[[Lab], list[Row]]]) -> list[Row]:
    """All rows; a case that fails is one row that says why."""
    rows = []
    for name, case in cases.items():
        began = time.monotonic()
        try:
            found = case(lab)
        except (FaultError, OSError, LookupError, ValueError) as error:  # the other cases go on
            found = [Row(name, "", short_reason(error, 400), None, None, "", passed=False)]
        finally:
            lab.end_all()
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
        print(markdown_table(COLUMNS, [row.cells for row in found]), flush=True)
        rows += found
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 1 if something was lost."""
    args = parse(argv)
    facts = describe_run(torch.device("cpu"))
    root = args.work or Path(tempfile.mkdtemp(prefix="faults_"))
    try:
        rows = run(Lab(root.resolve(), args.seed), plan(args))
    finally:
        if args.work is None:
            shutil.rmtree(root, ignore_errors=True)
    if args.out:
        path = result_stem(args.out, "soak" if args.minutes else "faults").with_suffix(".md")
        table = markdown_table(COLUMNS, [row.cells for row in rows])
        path.write_text(markdown_report("Faults", facts, NOTES, [table]), encoding="utf-8")
    failed = sum(not row.passed for row in rows)
    print(f"{len(rows)} rows, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
