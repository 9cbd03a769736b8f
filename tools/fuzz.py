"""Reads thousands of hostile and broken files, and tells which of them misbehave.

    python tools/fuzz.py --count 3000
    python tools/fuzz.py --targets images --count 20000 --seed 7

Targets: yaml (config.load_config), maps and archives (data sets from map files and zip archives) and images
(training and evaluation samples, with both decoders). The first inputs of each are hostile cases with a name,
the rest good files with random damages; seed and number name an input, and `--show` reads one alone and keeps
its file.

Inputs are read in a process with limited memory. It may accept one, or raise a documented error whose message
names the file. Findings are other errors, messages without a file, programs that were started, files that
were written, processes that died, and inputs that take longer than a limit; with them the exit status is 1.
"""

import argparse
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import fuzz_archives
import fuzz_images
import fuzz_text
import torch
from benchmark_common import describe_run, markdown_report, markdown_table, result_stem
from fuzz_common import Target, Verdict, judge, limit_memory

TARGETS = {
    target.name: target
    for target in (fuzz_text.YAML, fuzz_text.MAPS, fuzz_archives.TARGET, fuzz_images.TARGET)
}
SECONDS = 20.0  # of computing that one input may take
PATIENCE = 10  # times as long may it wait: on a busy machine, or for nothing
PER_PROCESS = 500  # inputs, after which a new process begins with clean memory
OUTCOMES = ("accepted", "refused", "finding")


@dataclass
class Tally:
    """What came of a target's inputs."""

    target: Target
    outcomes: Counter = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0

    def add(self, number: int, verdict: Verdict) -> None:
        self.outcomes[verdict.outcome] += 1
        if verdict.outcome == "finding":
            self.findings.append(f"{self.target.name} {number} ({verdict.kind}): {verdict.detail}")


def _work(target: Target, numbers: range, seed: int, root: str, pipe: Connection) -> None:
    """Judge inputs in this process, and tell each verdict; None before each, so that a death has a number."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    judge(target, "warm-up", target.make(0, seed, Path(root, "warm-up"))[1])  # loads what it needs
    limit_memory(target.memory)
    for number in numbers:
        folder = Path(root, str(number), "in")
        kind, path = target.make(number, seed, folder)
        pipe.send((number, kind))
        pipe.send(judge(target, kind, path))
        shutil.rmtree(folder.parent)
    pipe.close()


def fuzz(target: Target, count: int, seed: int, root: Path) -> Tally:
    """Judge inputs 0 to `count` of a target; processes that die or hang are replaced."""
    tally, began, next_number = Tally(target), time.perf_counter(), 0
    context = multiprocessing.get_context("fork")
    while next_number < count:
        numbers = range(next_number, min(next_number + PER_PROCESS, count))
        receive, send = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(target, numbers, seed, str(root), send))
        worker.start()
        send.close()
        next_number = _listen(worker, receive, numbers, tally)
    tally.seconds = time.perf_counter() - began
    return tally


def _listen(
    worker: multiprocessing.process.BaseProcess, pipe: Connection, numbers: range, tally: Tally
) -> int:
    """Collect a process's verdicts; the number that comes next, after one that killed it or took too long."""
    number, kind, sent, used, waits = numbers.start, "start", time.perf_counter(), 0.0, 0
    try:
        while waits < PATIENCE and _cpu_seconds(worker.pid) - used < SECONDS:
            if not pipe.poll(SECONDS):
                waits += 1
                continue
            message, waits = pipe.recv(), 0
            if isinstance(message, Verdict):
                tally.add(number, message)
                tally.slowest = max(tally.slowest, time.perf_counter() - sent)
                number += 1
            else:
                (number, kind), sent, used = message, time.perf_counter(), _cpu_seconds(worker.pid)
        tally.add(number, Verdict(kind, "finding", f"no end after {time.perf_counter() - sent:.0f} s"))
        number += 1
    except EOFError:
        worker.join()
        if number < numbers.stop:
            tally.add(number, Verdict(kind, "finding", f"the process died with status {worker.exitcode}"))
            number += 1
    finally:
        worker.kill()
        worker.join()
    return number


def _cpu_seconds(pid: int | None) -> float:
    """What a process has computed so far; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def report(tallies: Sequence[Tally]) -> str:
    """The result as a markdown file."""
    columns = (
        "target",
        "inputs",
        "with a name",
        "accepted",
        "refused with a sentence",
        "findings",
        "slowest (s)",
    )
    rows = [
        (
            tally.target.name,
            sum(tally.outcomes.values()),
            len(tally.target.named),
            *(tally.outcomes[outcome] for outcome in OUTCOMES),
            round(tally.slowest, 2),
        )
        for tally in tallies
    ]
    facts = describe_run(torch.device("cpu"))
    notes = [
        "Each input was read in a process with limited memory: "
        + ", ".join(f"{tally.target.name} {tally.target.memory >> 20} MiB" for tally in tallies)
        + " beyond what the process had.",
        f"An input may take {SECONDS:.0f} s. Accepted are also damages that leave the file valid.",
        *(finding for tally in tallies for finding in tally.findings),
    ]
    return markdown_report("Hostile and broken files", facts, notes, [markdown_table(columns, rows)])


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 1 if anything misbehaved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--count", type=int, default=1000, help="inputs per target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, metavar="NUMBER", help="read this input alone, and keep its file")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write <date>_fuzz.md there")
    arguments = parser.parse_args(argv)
    if arguments.show is not None:
        target = TARGETS[arguments.targets[0]]
        kind, path = target.make(arguments.show, arguments.seed, Path(tempfile.mkdtemp(), "in"))
        print(path, judge(target, kind, path), sep="\n")
        return 0
    tallies = []
    for name in arguments.targets:
        with tempfile.TemporaryDirectory() as root:
            tallies.append(fuzz(TARGETS[name], arguments.count, arguments.seed, Path(root)))
        print(
            name,
            dict(tallies[-1].outcomes),
            f"{tallies[-1].seconds:.0f} s",
            *tallies[-1].findings,
            sep="\n  ",
        )
    text = report(tallies)
    if arguments.out is not None:
        result_stem(arguments.out, "fuzz").with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return int(any(tally.findings for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
