"""A training run that can be launched, watched, disturbed and launched again, and compared with another one.

Everything goes through main.py and torchrun, with the same command before and after a fault. What a run has
done is read from its console, its metrics.jsonl and its checkpoints.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from data.demo import DemoOptions, write_demo
from models import read_checkpoint
from tools.benchmarks.common import REPO

STEP_LINE = re.compile(r"epoch (\d+)/\d+ step (\d+)/(\d+) ")
TIMEOUT = 600.0  # seconds that anything may take on a busy machine
IMAGES_PER_CLASS, BATCH_SIZE = {"train": 16, "val": 4}, 8
SAVE_EVERY = 5  # steps
TIME_FIELDS = {"img_per_s", "minutes", "memory_mb"}  # of metrics.jsonl
OPTIONS: dict[str, object] = {  # a small model, all randomness switched on, a log line for every step
    **{"DATA.BATCH_SIZE": BATCH_SIZE, "MODEL.FOCAL.EMBED_DIM": 32, "MODEL.FOCAL.NUM_HEADS": [1, 2]},
    **{"MODEL.DROP_PATH_RATE": 0.1, "AUG.MIXUP": 0.8, "AUG.CUTMIX": 1.0, "AUG.COLOR_JITTER": 0.2},
    **{"AUG.REPROB": 0.25, "TRAIN.WARMUP_EPOCHS": 1, "TRAIN.EMA.ENABLED": True, "TRAIN.EMA.DECAY": 0.98},
    **{"SAVE_FREQ": 1, "SAVE_STEPS": SAVE_EVERY, "PRINT_FREQ": 1},
}


class FaultError(Exception):
    """A run did not survive a fault as it should have."""


def make_data(root: Path) -> Path:
    """A few of the demo's digits."""
    data = write_demo(root / "demo", ["imagenet"], DemoOptions())["imagenet"]
    for split, count in IMAGES_PER_CLASS.items():
        for folder in (data / split).glob("*/"):
            for image in sorted(folder.iterdir())[count:]:
                image.unlink()
    return data


class TrainingRun:
    """One run, over all of its launches.

    Args:
        data: its images.
        output: its own folder, for console output and what main.py writes.
        processes: 1 is plain main.py, more is torchrun.
        epochs: of training.
        restarts: how often torchrun may restart it.
        options: of config.py, over OPTIONS.
    """

    process: psutil.Popen  # of the last launch: main.py, or torchrun

    def __init__(
        self, data: Path, output: Path, processes: int, epochs: int, restarts: int = 0, **options: object
    ) -> None:
        self.data, self.output, self.processes, self.epochs = data, output, processes, epochs
        self.restarts, self.options = restarts, options
        self.steps_per_epoch = 10 * IMAGES_PER_CLASS["train"] // (BATCH_SIZE * processes)
        self.folder, self.console = output / "demo" / "default", output / "console.txt"
        self.launches = 0
        self._start = 0  # of the last launch, in the console's output

    def launch(self) -> "TrainingRun":
        """Start it, for the first time or again, with the same command."""
        options = OPTIONS | {"TRAIN.EPOCHS": self.epochs, "DATA.NUM_WORKERS": self.processes - 1}
        options |= self.options
        words = f"-m torch.distributed.run --standalone --nproc_per_node {self.processes}".split()
        words = [*words, "--max-restarts", self.restarts] if self.processes > 1 else []
        words += ["main.py", "--cfg", "configs/demo.yaml", "--device", "cpu", "--data-path", self.data]
        words += ["--output", self.output, "--opts", *(word for pair in options.items() for word in pair)]
        command = [sys.executable, *map(str, words)]
        how = {"cwd": REPO, "env": os.environ | {"OMP_NUM_THREADS": "1", "PT_OUTPUT_DIR": ""}}
        how |= {"stderr": subprocess.STDOUT, "start_new_session": True}
        self.output.mkdir(parents=True, exist_ok=True)
        with self.console.open("ab") as console:
            self._start = console.tell()
            self.process = psutil.Popen(command, stdout=console, **how)
        self.launches += 1
        return self

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def ranks(self) -> list[psutil.Process]:
        """The training processes, by rank: torchrun starts them in this order."""
        if self.processes == 1:
            return [self.process]
        return sorted(filter(_is_alive, self.process.children()), key=lambda process: process.pid)

    def kill(self) -> None:
        """Send SIGKILL to all processes at once, and wait for their end."""
        children = self.process.children(recursive=True)
        for process in (self.process, *children):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.wait()
        psutil.wait_procs(children, TIMEOUT)

    def wait(self) -> int:
        """The exit code, once it has ended."""
        return self.process.wait(TIMEOUT)

    def finish(self) -> None:
        """Wait for its regular end."""
        if code := self.wait():
            raise FaultError(f"ended with exit code {code}: {self.last_words()}")

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for a condition while the run goes on."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            if not self.is_running:
                raise FaultError(f"ended with code {self.wait()} before {what}: {self.last_words()}")
            if time.monotonic() > deadline:
                raise FaultError(f"{what} did not come in {TIMEOUT:.0f} s")
            time.sleep(0.002)

    def until_step(self, number: int) -> None:
        """Wait until step `number` of the run, from 1, is logged by this launch."""
        self.until(lambda: self.last_step() >= number, f"step {number}")

    def last_step(self) -> int:
        """The last step that this launch logged, counted from 1 over the whole run; 0 before the first."""
        lines = STEP_LINE.findall(self.text())
        epoch, step, steps = map(int, lines[-1]) if lines else (1, 0, 0)
        return (epoch - 1) * steps + step

    def text(self) -> str:
        """Console output of this launch."""
        return self.console.read_bytes()[self._start :].decode(errors="replace")

    def last_words(self) -> str:
        """The last error, or the end of the output."""
        errors = [line for line in self.text().splitlines() if line.startswith("error:")]
        return [self.text()[-300:], *errors][-1][:300]

    def newest_checkpoint(self) -> Path:
        """The one that was written last; not best.pth."""
        return max(self.folder.glob("ckpt_*.pth"), key=lambda path: path.stat().st_mtime_ns)

    def temporary_files(self) -> set[Path]:
        """Files that are being written, or were when a process was killed."""
        return set(self.folder.glob("*.tmp"))


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


# --- Comparison ---------------------------------------------------------------------------------------------


def compare(run: TrainingRun, reference: TrainingRun) -> str:
    """Compare last checkpoint, best checkpoint and metrics of two finished runs.

    Returns:
        How much is equal: tensors to the last bit, metrics but for times.

    Raises:
        FaultError: the runs differ.
    """
    ours, theirs = results(run), results(reference)
    names = sorted(ours.keys() | theirs.keys())
    differences = [name for name in names if not equal(ours.get(name), theirs.get(name))]
    differences += [f"left over: {path.name}" for path in run.temporary_files()]
    if differences:
        raise FaultError(f"{len(differences)} differences: {'; '.join(differences[:3])}")
    return f"{len(theirs)} tensors and lines of metrics equal to the last bit"


def results(run: TrainingRun) -> dict[str, Any]:
    """Tensors of the last and of the best checkpoint, and records of metrics.jsonl, by name.

    Raises:
        FaultError: a checkpoint is missing.
    """
    found: dict[str, Any] = {}
    for name in (f"ckpt_epoch_{run.epochs - 1}.pth", "best.pth"):
        path = run.folder / name
        if not path.exists():
            raise FaultError(f"there is no {path}")
        found |= {name + key: x for key, x in tensors(read_checkpoint(path))}
    return found | {f"metrics.jsonl:{number}": x for number, x in enumerate(metrics(run), start=1)}


def equal(a: Any, b: Any) -> bool:
    """Whether both are equal; of tensors type, shape and bits, so that nan equals itself."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return a == b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


def tensors(tree: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(path, tensor) of nested dicts and lists, without measured times."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if "seconds" not in str(key):
                yield from tensors(value, f"{path}/{key}")


def metrics(run: TrainingRun) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, without times and memory."""
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [{key: x for key, x in json.loads(line).items() if key not in TIME_FIELDS} for line in lines]
