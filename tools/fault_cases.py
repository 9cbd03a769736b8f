"""The faults that end a process: kills, signals, dead and hanging ranks, another number of processes.

Every case hurts runs of its own and answers with rows of the table; that a run went on exactly is shown by
comparing it with one that was left alone.
"""

import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fault_common import (
    PREEMPTED,
    FaultError,
    Row,
    Setting,
    Trainer,
    make_data,
    processes,
    send,
)
from fault_compare import compare, metrics

SAVE_EVERY = 5  # steps, see Setting.options
CHECKPOINT_SIZE = 1_400_000  # bytes, a little less than what these runs write
KILLS = ("step", "save", "epoch", "step", "save", "rank")  # of every setting, in a random order
HANG_MINUTES = 0.2
ELASTIC = Setting(2, 0, max_restarts=3)
HANGING = Setting(2, 0).with_options(DIST_TIMEOUT_MINUTES=HANG_MINUTES)


@dataclass
class Lab:
    """Where the faults happen.

    Attributes:
        root: an own folder.
        seed: of everything that is chosen at random.
        references: finished runs that were left alone.
        trainers: all runs.
    """

    root: Path
    seed: int = 0
    references: dict[object, Trainer] = field(default_factory=dict)
    trainers: list[Trainer] = field(default_factory=list)
    rng: random.Random = field(init=False)
    data: Path = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.root.mkdir(parents=True, exist_ok=True)
        self.data = make_data(self.root)

    def trainer(self, setting: Setting, data: Path | None = None) -> Trainer:
        """A new run with a folder of its own."""
        number = 1 + len(list(self.root.glob("run_*")))
        folder = self.root / f"run_{number:03d}"
        folder.mkdir()
        self.trainers.append(Trainer(data or self.data, folder, setting))
        return self.trainers[-1]

    def end_all(self) -> None:
        """Kill what a failed case has left running."""
        for trainer in self.trainers:
            if trainer.is_running:
                trainer.kill()

    def reference(self, setting: Setting) -> Trainer:
        """The finished run to compare with: one per number of processes and options that count.

        It is made without loader workers and without extra checkpoints, which must not matter.
        """
        options = tuple(pair for pair in setting.options if not pair[0].startswith(("SAVE_", "DIST_")))
        plain = replace(setting, workers=0, max_restarts=0, options=options)
        if plain not in self.references:
            self.references[plain] = self.trainer(plain).run()
        return self.references[plain]


# --- Kills --------------------------------------------------------------------------------------------------


def kill_at_step(trainer: Trainer, number: int, lab: Lab) -> str:
    """Everything at once, at a random moment of the step after step ``number``."""
    trainer.until_step(number)
    time.sleep(lab.rng.uniform(0, 0.04))
    trainer.kill()
    return f"after step {number}"


def kill_in_save(trainer: Trainer, number: int, lab: Lab) -> str:
    """Everything, in the middle of a save: the process is stopped, and killed if the file is unfinished."""
    trainer.until_step(number)
    began = time.time()
    while True:
        trainer.until(lambda: trainer.temporary_files(since=began), "a save", pause=0)
        least, patience = lab.rng.uniform(0, CHECKPOINT_SIZE), time.monotonic() + 1
        while written(trainer) < least and time.monotonic() < patience:
            continue  # no pause: a save lasts milliseconds
        writer = trainer.ranks[0]
        freeze(writer)
        unfinished = trainer.temporary_files(since=began)
        if unfinished:
            size = written(trainer)
            trainer.kill()
            return f"in the save after step {trainer.last_step()}, {size / 1024:.0f} kB written"
        send([writer], signal.SIGCONT)


def written(trainer: Trainer) -> int:
    """Bytes of the checkpoint that is being written; none is written if there are CHECKPOINT_SIZE."""
    try:
        return max((path.stat().st_size for path in trainer.temporary_files()), default=CHECKPOINT_SIZE)
    except FileNotFoundError:  # renamed in between
        return CHECKPOINT_SIZE


def freeze(pid: int) -> None:
    """Stop a process, and wait until it stands still."""
    send([pid], signal.SIGSTOP)
    while processes().get(pid, (0, "X"))[1] not in "TZX":
        time.sleep(0.001)


def kill_at_epoch_end(trainer: Trainer, number: int, lab: Lab) -> str:
    """Everything, around the end of the epoch of step ``number``: its save, its evaluation."""
    epochs = min(-(-number // trainer.setting.steps_per_epoch), trainer.setting.epochs - 1)
    trainer.until_step(epochs * trainer.setting.steps_per_epoch)
    time.sleep(lab.rng.uniform(0, 0.1))
    trainer.kill()
    return f"at the end of epoch {epochs}"


def kill_rank(trainer: Trainer, number: int, lab: Lab) -> str:
    """The last training process alone; its loader workers, the launcher and other ranks have to notice."""
    trainer.until_step(number)
    rank = trainer.setting.processes - 1
    send([trainer.ranks[rank]], signal.SIGKILL)
    code = trainer.wait()
    return f"rank {rank} alone after step {number}, exit code {code}"


KILLERS: dict[str, Callable[[Trainer, int, Lab], str]] = {
    "step": kill_at_step,
    "save": kill_in_save,
    "epoch": kill_at_epoch_end,
    "rank": kill_rank,
}


def kill_chain(lab: Lab, setting: Setting, kinds: Sequence[str]) -> list[Row]:
    """One run that is killed several times at random steps, and restarted with the same command each time."""
    total = setting.steps
    trainer, places = lab.trainer(setting), []
    points = sorted(lab.rng.sample(range(2, total - 3 * SAVE_EVERY), len(kinds)))
    for kind, number in zip(kinds, points, strict=True):
        trainer.launch()
        places.append(KILLERS[kind](trainer, max(number, trainer.last_step()), lab))
    trainer.launch()
    trainer.finish()
    verified = compare(trainer, lab.reference(setting)).require_none()
    redone = trainer.redone_by_launch()[1:]
    return [
        Row(
            "SIGKILL",
            f"{setting}{setting.notes}: {place}",
            "went on with the same command",
            1,
            count,
            verified,
        )
        for place, count in zip(places, redone, strict=True)
    ]


def kills(lab: Lab) -> list[Row]:
    """Six kills each in 1 and 2 processes, without and with loader workers; more with other ways to save."""
    rows = []
    for count in (1, 2):
        for workers in (0, 2):
            kinds = lab.rng.sample(KILLS, len(KILLS))
            rows += kill_chain(lab, Setting(count, workers), kinds)
    more = Setting()
    rows += kill_chain(lab, more.with_options(SAVE_ASYNC=False), ("save", "step", "save"))
    rows += kill_chain(lab, more.with_options(SAVE_STEPS=0, SAVE_MINUTES=0.02), ("step", "step"))
    rows += kill_chain(lab, more.with_options(TRAIN__ACCUMULATION_STEPS=4), ("step", "save"))
    return rows


# --- Signals and ranks --------------------------------------------------------------------------------------


def preempt(trainer: Trainer, number: int, name: str, rank: int | None) -> str:
    """Send a signal after step ``number``, and wait for the end; what happened, in words."""
    trainer.until_step(number)
    send([trainer.pid if rank is None else trainer.ranks[rank]], signal.Signals[name])
    began = time.monotonic()
    code = trainer.wait()
    seconds = time.monotonic() - began
    if "stopped by a signal" not in trainer.log_text():
        raise FaultError(f"{name}: the log tells of no signal: {trainer.last_words()}")
    told = set(re.findall(r"exitcode\s*: (-?\d+)", trainer.text()))  # by torchrun, of its children
    codes = told or ({str(code)} if trainer.setting.processes == 1 else {str(PREEMPTED)})
    # torchrun ends the others as soon as one is gone, which may be after they saved, while they leave.
    if codes - {str(-signal.SIGTERM)} != {str(PREEMPTED)}:
        raise FaultError(f"{name}: expected exit code {PREEMPTED}, got {codes}: {trainer.last_words()}")
    by = "" if trainer.setting.processes == 1 else " of torchrun"
    return f"saved, exit code {code}{by}, {seconds:.1f} s after the signal"


SIGNALS: dict[Setting, list[tuple[str, int | None]]] = {  # which, to which rank; None is what was launched
    Setting(1, 2): [("SIGTERM", None), ("SIGUSR1", None)],
    Setting(2, 2): [("SIGUSR1", 1), ("SIGTERM", None)],
}


def signals(lab: Lab, plans: dict[Setting, list[tuple[str, int | None]]] = SIGNALS) -> list[Row]:
    """SIGTERM and SIGUSR1, to one process and to a launcher or a rank of two: no step may be redone."""
    rows = []
    for setting, plan in plans.items():
        trainer, done = lab.trainer(setting), []
        points = sorted(lab.rng.sample(range(2, setting.steps - 10), len(plan)))
        for number, (name, rank) in zip(points, plan, strict=True):
            trainer.launch()
            outcome = preempt(trainer, number, name, rank)
            to = "torchrun" if setting.processes > 1 and rank is None else f"rank {rank or 0}"
            done.append((name, f"{setting}: to {to} after step {number}", outcome))
        trainer.launch()
        trainer.finish()
        verified = compare(trainer, lab.reference(setting)).require_none()
        if trainer.redone:
            raise FaultError(f"{setting}: {trainer.redone} steps were made again after a signal")
        rows += [Row(*words, 1, 0, verified) for words in done]
    return rows


def elastic(lab: Lab, setting: Setting = ELASTIC, ranks: Sequence[int] = (1, 0)) -> list[Row]:
    """torchrun --max-restarts: killed ranks come back without anybody's help."""
    trainer, places = lab.trainer(setting), []
    points = sorted(lab.rng.sample(range(2, setting.steps - 10), len(ranks)))
    trainer.launch()
    for rank, number in zip(ranks, points, strict=True):
        trainer.until_step(number)
        before = trainer.ranks
        send([before[rank]], signal.SIGKILL)
        trainer.until(lambda old=before: set(old).isdisjoint(trainer.ranks), "a restart")
        places.append(f"rank {rank} after step {number}")
    trainer.finish()
    verified = compare(trainer, lab.reference(setting)).require_none()
    outcome = f"torchrun --max-restarts {setting.max_restarts} brought it back, exit code 0"
    where = f"{setting}: {', '.join(places)}"
    return [Row("SIGKILL of a rank", where, outcome, len(ranks), trainer.redone, verified)]


def hang(lab: Lab, setting: Setting = HANGING) -> list[Row]:
    """A rank that stands still ends the job with a message within DIST_TIMEOUT_MINUTES."""
    trainer = lab.trainer(setting)
    number = lab.rng.randrange(2, setting.steps - 10)
    trainer.launch()
    trainer.until_step(number)
    stopped = trainer.ranks[1]
    send([stopped], signal.SIGSTOP)
    began = time.monotonic()
    try:
        message = re.compile(r"error: .*DIST_TIMEOUT_MINUTES")
        trainer.until(lambda: message.search(trainer.text()), "a message", pause=0.05)
        told = time.monotonic() - began
        code = trainer.wait()
        ended = time.monotonic() - began
    finally:
        send([stopped], signal.SIGKILL)
    if not code or told > 60 * HANG_MINUTES + 30:
        raise FaultError(f"a hanging rank: message after {told:.0f} s, exit code {code}")
    trainer.launch()
    trainer.finish()
    verified = compare(trainer, lab.reference(setting)).require_none()
    outcome = f"message after {told:.0f} s, job ended after {ended:.0f} s with exit code {code}; then went on"
    where = f"{setting}, DIST_TIMEOUT_MINUTES {HANG_MINUTES}: rank 1 after step {number}"
    return [Row("SIGSTOP of a rank", where, outcome, 1, trainer.redone, verified)]


def world_size(lab: Lab) -> list[Row]:
    """Restarted with another number of processes: goes on correctly, not bit by bit, and says so."""
    rows = []
    for before, after in ((1, 2), (2, 1)):
        trainer = lab.trainer(Setting(before))
        number = lab.rng.randrange(2, Setting(before).steps - 10)
        trainer.launch()
        kill_at_step(trainer, number, lab)
        trainer.launch(Setting(after))
        trainer.finish()
        said = [line for line in trainer.log_text().splitlines() if "process" in line and "WARNING" in line]
        epochs = [record["epoch"] for record in metrics(trainer, "epoch")]
        if not said or epochs != list(range(trainer.setting.epochs)):
            raise FaultError(f"{before} -> {after} processes: warnings {said}, epochs {epochs}")
        verified = f"warning; every epoch is in the metrics once; top-1 {trainer_accuracy(trainer):.0f} %"
        where = f"{before} -> {after} processes: after step {number}"
        rows.append(Row("other number of processes", where, "went on and said so", 1, None, verified))
    return rows


def trainer_accuracy(trainer: Trainer) -> float:
    """Best accuracy of a finished run, in percent."""
    return float(list(metrics(trainer, "epoch"))[-1]["max_accuracy"])
