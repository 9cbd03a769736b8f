"""Disturbs training in many ways, and shows that nothing is lost.

    python -m tools.faults
    python -m tools.faults --only kill disk --processes 1

Every fault hits a run of its own several times, at random steps. After each hit the same command is started
again if the run has ended. In the end all tensors of its last and of its best checkpoint must be those of an
undisturbed run to the last bit, and its metrics.jsonl too, but for times.

kill      SIGKILL to all processes, at a random moment of a step
save      SIGKILL to all processes in the middle of a save
truncate  SIGKILL, then the newest checkpoint is cut off; the run must warn and go on from the one before
disk      the disk is full for a while: the run must go on, and older checkpoints stay (needs rights to mount)
rank      SIGKILL to one of several processes, which torchrun --max-restarts brings back
hang      SIGSTOP to one of several processes: the others end with a message

Prints a line for each; --out writes <date>_faults.md and .csv. Exit status 1: something was lost.
"""

import argparse
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import product
from pathlib import Path

import psutil
import torch

from tools.benchmarks import common
from utils import path_argument

from .run import SAVE_EVERY, FaultError, TrainingRun, compare, make_data

logger = logging.getLogger("faults")

HANG_MINUTES, DISK_MB = 0.2, 24


# --- Faults: each disturbs a run after a step, and says what happened ---------------------------------------


def kill(run: TrainingRun, step: int, rng: random.Random) -> str:
    """SIGKILL to everything, at a random moment of the step after `step`."""
    run.until_step(step)
    time.sleep(rng.uniform(0, 0.05))
    run.kill()
    return f"killed after step {step}"


def kill_in_save(run: TrainingRun, step: int, rng: random.Random) -> str:
    """SIGKILL to everything while a checkpoint is being written."""
    run.until_step(step)
    old = run.temporary_files()
    run.until(lambda: run.temporary_files() - old, "a save")
    for rank in run.ranks:
        rank.kill()
    run.kill()
    return f"killed in the save after step {run.last_step()}"


def truncate(run: TrainingRun, step: int, rng: random.Random) -> str:
    """SIGKILL to everything; then the newest checkpoint loses its end. The next launch must name it."""
    kill(run, max(step, 2 * SAVE_EVERY + 2), rng)
    newest = run.newest_checkpoint()
    os.truncate(newest, rng.randrange(newest.stat().st_size))
    run.launch()
    run.until(run.last_step, "the first step")
    if newest.name not in run.text():
        raise FaultError(f"{newest.name} was cut off, and the log does not name it")
    return f"{newest.name} cut off"


def fill_disk(run: TrainingRun, step: int, rng: random.Random) -> str:
    """The disk is full until a refused save is logged; the newest checkpoint must stay as it is.

    Not at the end of an epoch, if the run goes on: of a refused best.pth a later epoch's takes the place.
    """
    step += 1 - (step - 1) % run.steps_per_epoch % SAVE_EVERY  # just after a save within an epoch
    if (step - 1) % run.steps_per_epoch + SAVE_EVERY >= run.steps_per_epoch:
        later = step + SAVE_EVERY
        step = later if later < run.steps_per_epoch * run.epochs else step
    run.until_step(step)
    filler = run.folder.parent / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    time.sleep(0.1)
    content = (newest := run.newest_checkpoint()).read_bytes()
    run.until(lambda: "No space left" in run.text(), "a refused save")
    if newest.read_bytes() != content:
        raise FaultError(f"{newest.name} was changed by a save that failed")
    filler.unlink()
    return f"disk full after step {step}"


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A tmpfs of DISK_MB as `folder`; CalledProcessError if this user must not mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    subprocess.run(mount, capture_output=True, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def kill_rank(run: TrainingRun, step: int, rng: random.Random) -> str:
    """SIGKILL to the last rank alone; torchrun starts all of them again."""
    run.until_step(step)
    before = run.ranks
    before[-1].kill()
    run.until(lambda: run.ranks and set(before).isdisjoint(run.ranks), "a restart by torchrun")
    return f"rank {len(before) - 1} killed after step {step}"


def hang(run: TrainingRun, step: int, rng: random.Random) -> str:
    """SIGSTOP to the last rank: the others must end with a message within DIST_TIMEOUT_MINUTES."""
    run.until_step(step)
    stopped = run.ranks[-1]
    stopped.suspend()
    began = time.monotonic()
    try:
        run.until(lambda: "did not answer for DIST_TIMEOUT_MINUTES" in run.text(), "a message")
        seconds, code = time.monotonic() - began, run.wait()
    finally:
        with suppress(psutil.NoSuchProcess):
            stopped.kill()
    if not code or seconds > 60 * HANG_MINUTES + 30:
        raise FaultError(f"message after {seconds:.0f} s, exit code {code}")
    return f"stopped after step {step}: message after {seconds:.0f} s, exit code {code}"


FAULTS: dict[str, Callable[[TrainingRun, int, random.Random], str]] = {
    **{"kill": kill, "save": kill_in_save, "truncate": truncate, "disk": fill_disk},
    **{"rank": kill_rank, "hang": hang},
}
FOR_MORE = ("rank", "hang")  # processes than one; the others are for both
COLUMNS = ("fault", "processes", "what happened", "launches", "result")
OPTIONS = {
    "disk": {"SAVE_FAILURES_MAX": 1000},
    "hang": {"DIST_TIMEOUT_MINUTES": HANG_MINUTES},
}


class Lab:
    """Runs under faults, and undisturbed ones to compare them with, in an empty folder `root`."""

    def __init__(self, root: Path, epochs: int) -> None:
        self.root, self.epochs = root, epochs
        self.rng = random.Random(0)
        self.data = make_data(root)
        self.references: dict[int, TrainingRun] = {}

    def reference(self, count: int) -> TrainingRun:
        """The finished run of `count` processes that nothing happens to."""
        if count not in self.references:
            run = TrainingRun(self.data, self.root / f"reference_{count}", count, self.epochs)
            run.launch().finish()
            self.references[count] = run
        return self.references[count]

    def survive(self, faults: Sequence[str], count: int) -> list[common.Cell]:
        """A run of `count` processes that is hit by faults, one after another: a row of the table.

        Raises:
            FaultError: it did not survive, or ended differently.
        """
        reference, output = self.reference(count), Path(tempfile.mkdtemp(dir=self.root))
        options = {key: value for fault in faults for key, value in OPTIONS.get(fault, {}).items()}
        run = TrainingRun(self.data, output, count, self.epochs, faults.count("rank"), **options)
        last = run.steps_per_epoch * self.epochs - 2 * SAVE_EVERY
        steps = sorted(self.rng.sample(range(SAVE_EVERY + 1, last), len(faults)))
        happened = []
        with small_disk(run.folder.parent) if "disk" in faults else nullcontext():
            run.launch()
            try:
                for fault, step in zip(faults, steps, strict=True):
                    happened.append(FAULTS[fault](run, max(step, run.last_step() + 1), self.rng))
                    if not run.is_running:
                        run.launch()
                run.finish()
                result = compare(run, reference)
            finally:
                if run.is_running:
                    run.kill()
        return [", ".join({*faults}), count, "; ".join(happened), run.launches, result]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), help="(all)")
    parser.add_argument("--processes", nargs="+", type=int, choices=(1, 2), default=[1, 2], help="(1 2)")
    parser.add_argument("--times", type=common.positive, default=3, help="hits of each run (3)")
    parser.add_argument("--out", type=path_argument, metavar="FOLDER", help="for the table")
    parser.set_defaults(name="faults")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if something was lost."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    facts, rows, lost = common.describe_run(torch.device("cpu")), [], 0
    with tempfile.TemporaryDirectory(prefix="faults_", ignore_cleanup_errors=True) as root:
        lab = Lab(Path(root), epochs=3 + args.times // 10)  # so that two processes have as many steps
        for count, fault in product(args.processes, args.only):
            if count == 1 and fault in FOR_MORE:
                continue
            try:
                row = lab.survive([fault] * args.times, count)
            except (FaultError, psutil.Error, subprocess.SubprocessError) as error:  # the others go on
                lost += 1
                row = [fault, count, None, None, f"**LOST**: {common.short_reason(error, 400)}"]
            logger.info(" | ".join(map(common.show, row)))
            rows.append(row)
    note = f"Each run: {lab.epochs} epochs of 160 digits, a checkpoint every {SAVE_EVERY} steps."
    common.publish(
        args, "Faults", facts, [note], COLUMNS, rows, news=f"{len(rows)} runs, {lost} lost something"
    )
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
