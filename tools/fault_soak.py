"""The soak: hours of demo training in which something breaks every few seconds to minutes.

One run is made without faults first, for about a quarter of the time. Then the same run is made again and
again, with faults at random times: kills of the whole run, a damaged newest checkpoint, a disk that is full
for some seconds. Each of these runs must end like the first one, bit by bit, with every epoch in its metrics
once.

Memory is that of the training process, sampled twice a second. Its growth is the median of the last fifth of
a process's life over that of the fifth after a warm-up, for every process that lived long enough.
"""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fault_cases import Lab
from fault_common import FaultError, Row, Setting, Trainer, resident_kb
from fault_compare import compare, metrics
from fault_storage import DAMAGES, limit_files

from training import checkpoints as storage

WARM_UP = 30.0  # seconds of training before a process's memory counts
LEAST_LIFE = 60.0  # seconds of training from which on its growth is judged
MOST_GROWTH = 0.01
SAMPLE = 0.5
FAULTS = ("kill", "damage", "full disk", "full disk")
KILLING = ("kill", "damage")
OPTIONS = {"SAVE_STEPS": 20, "SAVE_KEEP": 3, "SAVE_FAILURES_MAX": 10}
OPTIONS |= {"PRINT_FREQ": 5}  # logs and metrics stay below FILE_LIMIT
REFUSAL = "expected to write"  # in what main.py says of a save that failed


@dataclass
class Soak:
    """What was done and seen.

    Attributes:
        faults: how often each was injected.
        unexpected: ends of the run that no fault explains.
        lives: (seconds, memory in kB) since the first step, of every process.
        restarts: launches after the first of each run.
        redone: steps that were made again, to PRINT_FREQ.
        refused: saves that a full disk refused.
        runs: finished ones, under faults.
        lost: epochs that are missing or doubled in the metrics of a finished run.
        verified: a sentence for each finished run.
    """

    faults: dict[str, int] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    lives: list[list[tuple[float, int]]] = field(default_factory=list)
    restarts: int = 0
    redone: int = 0
    refused: int = 0
    runs: int = 0
    lost: int = 0
    verified: list[str] = field(default_factory=list)

    def watch(self, trainer: Trainer, seconds: float) -> None:
        """Sample memory until the run ends, or for that time."""
        deadline = time.monotonic() + seconds
        while trainer.is_running and time.monotonic() < deadline:
            if self.lives[-1] or trainer.last_step():
                self.lives[-1].append((time.monotonic(), resident_kb(trainer.ranks[0])))
            time.sleep(min(SAMPLE, max(0.0, deadline - time.monotonic())))

    def launch(self, trainer: Trainer) -> None:
        """Launch, and begin to sample a new life."""
        trainer.launch()
        self.lives.append([])

    def growths(self) -> list[float]:
        """Relative growth of memory after warm-up in every life that was long enough."""
        return [growth(life) for life in self.lives if life and life[-1][0] - life[0][0] >= LEAST_LIFE]


def growth(life: list[tuple[float, int]]) -> float:
    """The median of the last fifth over that of the first fifth after the warm-up, less one."""
    memory = [value for moment, value in life if value and moment - life[0][0] >= WARM_UP]
    fifth = max(1, len(memory) // 5)
    return statistics.median(memory[-fifth:]) / statistics.median(memory[:fifth]) - 1


# --- Faults: each leaves the run going or ended, and says whether it did what it is called ------------------


def kill(trainer: Trainer, soak: Soak, lab: Lab) -> bool:
    trainer.kill()
    return True


def damage(trainer: Trainer, soak: Soak, lab: Lab) -> bool:
    """Kill it, and spoil the newest checkpoint, if another whole one is left to go on from."""
    trainer.kill()
    known = [path for _, path in storage.checkpoints_in(trainer.folder)]
    files = [*known, trainer.folder / storage.BEST_NAME]
    newest = storage.find_newest(trainer.folder)
    if newest is None or sum(path.is_file() and storage.is_valid(path) for path in files) < 2:
        return False
    lab.rng.choice(list(DAMAGES.values()))(newest, lab)
    return True


def fill(trainer: Trainer, soak: Soak, lab: Lab) -> bool:
    """No checkpoint can be written for some seconds; the run may end for that."""
    undo = limit_files(trainer)
    soak.watch(trainer, lab.rng.uniform(2, 12))
    undo()
    return True


ACTIONS: dict[str, Callable[[Trainer, Soak, Lab], bool]] = {"kill": kill, "damage": damage, "full disk": fill}


# --- The soak -----------------------------------------------------------------------------------------------


def soak(lab: Lab, minutes: float) -> list[Row]:
    """Run it for about that long; the rows of the table."""
    deadline = time.monotonic() + 60 * minutes
    setting = sized(lab, 60 * minutes / 4)
    seen = Soak()
    reference = lab.trainer(setting)
    seen.launch(reference)
    seen.watch(reference, float("inf"))
    reference.finish()
    undisturbed = seen.growths()
    while time.monotonic() < deadline:
        survive(lab, setting, reference, seen, deadline)
    return report(seen, setting, undisturbed, minutes)


def sized(lab: Lab, seconds: float) -> Setting:
    """A run that takes about that long when left alone."""
    trial = lab.trainer(Setting(1, 2, epochs=4).with_options(**OPTIONS))
    trial.launch()
    trial.until_step(1)
    began = time.monotonic()
    trial.finish()
    pace = (time.monotonic() - began) / trial.setting.epochs
    return replace(trial.setting, epochs=max(4, round(seconds / pace)))


def survive(lab: Lab, setting: Setting, reference: Trainer, seen: Soak, deadline: float) -> None:
    """One run under faults until it is finished; none are injected after the deadline."""
    trainer = lab.trainer(setting)
    mean = max(10.0, (deadline - time.monotonic()) / 40)
    while True:
        seen.launch(trainer)
        fault = live(trainer, seen, lab, mean, deadline)
        code = trainer.wait()
        if code == 0:
            break
        seen.restarts += 1
        words = trainer.last_words()
        if fault not in KILLING and not (fault == "full disk" and REFUSAL in words):
            seen.unexpected.append(f"exit code {code}: {words}")
        if len(seen.unexpected) > 3:
            raise FaultError(f"the run keeps ending: {seen.unexpected[-1]}")
    epochs = [record["epoch"] for record in metrics(trainer, "epoch")]
    seen.lost += len(set(range(setting.epochs)).symmetric_difference(epochs)) + len(epochs) - len(set(epochs))
    seen.redone += trainer.redone
    seen.refused += len(re.findall(rf"\.pth: {REFUSAL}", trainer.log.read_text(errors="replace")))
    seen.runs += 1
    seen.verified.append(compare(trainer, reference).require_none())


def live(trainer: Trainer, seen: Soak, lab: Lab, mean: float, deadline: float) -> str:
    """Inject faults until the process ends; the last one, '' if there was none.

    Args:
        trainer: just launched.
        seen: what counts them.
        lab: with the dice.
        mean: seconds between faults, on average.
        deadline: after which the run is left alone.
    """
    fault = ""
    while trainer.is_running:
        pause = 5 + lab.rng.expovariate(1 / mean)
        seen.watch(trainer, pause if time.monotonic() < deadline else float("inf"))
        if trainer.is_running and time.monotonic() < deadline:
            fault = lab.rng.choice(FAULTS)
            done = fault if ACTIONS[fault](trainer, seen, lab) else "kill"
            seen.faults[done] = seen.faults.get(done, 0) + 1
    return fault


def report(seen: Soak, setting: Setting, undisturbed: list[float], minutes: float) -> list[Row]:
    """One row for each thing promised."""
    under_faults = seen.growths()[len(undisturbed) :]
    faults = ", ".join(f"{count} x {name}" for name, count in sorted(seen.faults.items()))
    where = (
        f"{minutes:g} minutes, {setting}, {seen.runs} runs of {setting.epochs} epochs ({setting.steps} steps)"
    )
    ends = "; ".join(seen.unexpected) or "0"
    refused = seen.refused > 0 or "full disk" not in seen.faults
    rows = [
        Row("soak", where, faults, seen.restarts, seen.redone, "; ".join(sorted(set(seen.verified)))),
        Row("soak: saves refused", where, str(seen.refused), None, None, "log_rank0.txt", refused),
        Row("soak: lost epochs", where, str(seen.lost), None, None, "metrics.jsonl", seen.lost == 0),
        Row("soak: ends without a fault", where, ends, None, None, "exit codes", not seen.unexpected),
    ]
    for name, values in (("left alone", undisturbed), ("under faults", under_faults)):
        most = f"{100 * max(values, default=0.0):+.2f} % at most in {len(values)} processes"
        told = most if values else "no process lived long enough"
        longest = f"processes of {LEAST_LIFE:.0f} s and more, from {WARM_UP:.0f} s on"
        good = all(value < MOST_GROWTH for value in values)
        rows.append(Row(f"soak: memory growth {name}", longest, told, None, None, "VmRSS", good))
    return rows
