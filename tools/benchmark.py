"""Makes the speed table: models by resolution, mode, precision and compilation, timed in turns.

    python tools/benchmark.py --preset cpu
    python tools/benchmark.py --preset gpu
    python tools/benchmark.py --models focal-tiny swin-tiny --sizes 224 448 --modes infer --batch-size 8

Modes: `infer` is the forward pass without gradients; `train` is a whole training step: forward, cross
entropy, backward and AdamW. Inputs lie on the device; precisions other than fp32 are autocast, fp16 trains
with loss scaling. All models of one size class run in turns in one process, so that
`vs swin` is the median of ratios taken side by side, which a busy machine hardly disturbs. Every such group
has a process of its own, and on the CPU several, one after another: how its memory happens to lie decides
about a tenth of a model's time. When memory runs out, the batch is halved for the whole group, and the table
says so; a model that cannot run gets a row with the reason. Writes <date>_<name>.md, .csv and .png, anew
after every group.
"""

import argparse
import gc
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import benchmark_common as common
import benchmark_models
import torch
from benchmark_common import DTYPES
from benchmark_models import Entry
from benchmark_report import BASELINE, SHOWN, Row, Setting, shown, write
from torch import nn
from torch.nn import functional as F

from utils import Precision, pick_device

logger = logging.getLogger("benchmark")

PRESETS = {
    "cpu": {
        "models": [f"{family}-tiny" for family in benchmark_models.FAMILIES],
        "sizes": [224, 448],
        "modes": ["infer", "train"],
        "precisions": ["fp32"],
        "compile": ["eager"],
        "batch_size": 8,
        "device": "cpu",
    },
    "gpu": {
        "models": list(benchmark_models.FAMILIES),
        "sizes": [224, 448, 896],
        "modes": ["infer", "train"],
        "precisions": ["bf16"],
        "compile": ["eager", "compiled"],
        "batch_size": 128,
        "device": "cuda",
    },
}
DEFAULTS = PRESETS["cpu"] | {"sizes": [224], "device": ""}
MODES = ("infer", "train")
COMPILE = ("eager", "compiled")
PROCESSES = {"cpu": 3, "cuda": 1}
ROUNDS = {"cpu": 5, "cuda": 20}  # in each process
ROUND_SECONDS = {"cpu": 0.5, "cuda": 0.3}  # aimed at; a turn is at least one step
WARM_UP_STEPS = {"cpu": 1, "cuda": 5}
HALVINGS = 4
NO_TIME = "left out: no time"


def make_step(model: nn.Module, images: torch.Tensor, setting: Setting) -> Callable[[], object]:
    """One step of the mode, to be called again and again; waits for nothing."""
    device, precision = images.device, Precision(DTYPES[setting.precision])
    call = torch.compile(model, dynamic=False) if setting.compile == "compiled" else model
    if setting.mode == "infer":
        model.eval()

        def infer() -> torch.Tensor:
            with torch.no_grad(), precision.autocast(device):
                return call(images)

        return infer
    model.train()
    labels = torch.arange(len(images), device=device) % benchmark_models.CLASSES
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    scaler = precision.scaler(device)

    def train() -> None:
        with precision.autocast(device):
            loss = F.cross_entropy(call(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return train


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device, or of the host where PyTorch notices."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class Group:
    """The models of one setting, resident together."""

    def __init__(self, setting: Setting, entries: Sequence[Entry], args: argparse.Namespace) -> None:
        """
        Args:
            setting: that they have in common.
            entries: the models.
            args: the command line.
        """
        self.setting = setting
        self.device: torch.device = args.device
        self.batch: int = args.batch_size
        self.rows = [Row(entry, setting, self.batch) for entry in entries]
        self.models: dict[str, nn.Module] = {}
        self.steps: dict[str, Callable[[], object]] = {}

    def run(self, rounds: int, deadline: float = math.inf) -> list[Row]:
        """Measure everything that runs; begin neither a model nor a second round after the deadline, on the
        clock `time.monotonic`."""
        self.deadline = deadline
        for row in self.rows:
            row.note = benchmark_models.why_missing(row.entry) or ""
            if self._in_time(row):
                self._guarded(row, self._build)
        self._fit_batch()
        for row in self._running():
            if self._in_time(row):
                self._guarded(row, self._warm_up)
        for number in range(rounds):
            if number and time.monotonic() > deadline:
                break
            running = self._running()
            for row in running if number % 2 == 0 else reversed(running):
                self._guarded(row, self._take_turn)
        self._release()
        return self.rows

    def _running(self) -> list[Row]:
        return [row for row in self.rows if not row.note]

    def _in_time(self, row: Row) -> bool:
        """Whether to go on with a model."""
        if not row.note and time.monotonic() > self.deadline:
            self._drop(row, NO_TIME)
        return not row.note

    def _guarded(self, row: Row, action: Callable[[Row], object]) -> None:
        """Do something; an error takes the model out of the group and becomes its note."""
        try:
            action(row)
        except Exception as error:  # whatever a model does, the table goes on
            self._fail(row, error)

    def _fail(self, row: Row, error: Exception) -> None:
        logger.debug("failed", exc_info=True)
        error.__traceback__ = None  # it holds tensors
        self._drop(row, f"failed: {common.short_reason(error)}")

    def _drop(self, row: Row, note: str) -> None:
        """Take a model out of the group."""
        row.note, row.seconds = note, []
        self.models.pop(row.entry.label, None)
        self.steps.pop(row.entry.label, None)
        self._free()

    def _build(self, row: Row) -> None:
        row.params, row.macs = benchmark_models.costs(row.entry, self.setting.resolution)
        torch.manual_seed(0)
        with self.device:
            model = benchmark_models.build(row.entry, self.setting.resolution)
        model.to(self.device)
        row.params = sum(parameter.numel() for parameter in model.parameters())
        row.attention = benchmark_models.attention_backends(model, DTYPES[self.setting.precision])
        self.models[row.entry.label] = model

    def _images(self) -> torch.Tensor:
        side = self.setting.resolution
        return torch.randn(self.batch, 3, side, side, device=self.device)

    def _fit_batch(self) -> None:
        """Halve the batch until every model that runs at all can do a step."""
        images, asked = self._images(), self.batch
        for row in self._running():
            while self._in_time(row):
                try:
                    step = make_step(self.models[row.entry.label], images, self.setting)
                    common.seconds_of(step, 1, self.device)
                    break
                except Exception as error:  # as in _guarded
                    if not is_out_of_memory(error) or self.batch <= max(1, asked >> HALVINGS):
                        self._fail(row, error)
                        break
                    error.__traceback__ = None
                step, self.batch = None, self.batch // 2
                images = images[: self.batch].clone()
                self.models[row.entry.label].zero_grad()
                self._free()
                logger.info(f"{row.entry.label}: out of memory, the group goes on with batch {self.batch}")
        for row in self.rows:
            row.batch = self.batch
        images = self._images()
        for row in self._running():
            self.models[row.entry.label].zero_grad()
            self.steps[row.entry.label] = make_step(self.models[row.entry.label], images, self.setting)

    def _warm_up(self, row: Row) -> None:
        """Leaves the number of steps of a turn, and the peak memory without what other models hold."""
        model, step, device = self.models[row.entry.label], self.steps[row.entry.label], self.device
        held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        kind = device.type
        row.steps, row.memory_mb = common.warm_up(
            step, WARM_UP_STEPS[kind], ROUND_SECONDS[kind], held, device
        )

    def _take_turn(self, row: Row) -> None:
        step = self.steps[row.entry.label]
        row.seconds.append(common.seconds_of(step, row.steps, self.device))

    def _release(self) -> None:
        self.models.clear()
        self.steps.clear()
        torch.compiler.reset()
        self._free()

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def compare(rows: Sequence[Row]) -> None:
    """Ratios to the baseline of the same size, over the rounds that both took part in."""
    for row in rows:
        name = benchmark_models.FAMILIES[BASELINE].get(row.setting.size)
        base = next((other for other in rows if other.entry.name == name), None)
        if base is not None and base.seconds and row.seconds:
            row.ratio = common.speed_ratio(row.seconds, base.seconds)


def run_group(
    setting: Setting,
    entries: Sequence[Entry],
    args: argparse.Namespace,
    rounds: int,
    deadline: float = math.inf,
) -> list[Row]:
    """Measure a group in this process."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    return Group(setting, entries, args).run(rounds, deadline)


def run_apart(
    setting: Setting,
    entries: Sequence[Entry],
    args: argparse.Namespace,
    rounds: int,
    deadline: float = math.inf,
) -> list[Row]:
    """Measure a group in new processes, one after another, and put their rounds together."""
    runs: list[list[Row]] = []
    for _ in range(args.processes):
        if runs and time.monotonic() > deadline:
            break
        with common.Worker() as worker:
            try:
                rows = worker.call(run_group, setting, entries, args, rounds, deadline)
            except common.WorkerError as error:
                return [Row(entry, setting, args.batch_size, note=f"failed: {error}") for entry in entries]
        if runs and rows[0].batch < args.batch_size:
            runs.clear()  # other batches are not to be compared
        args = argparse.Namespace(**vars(args) | {"batch_size": rows[0].batch})
        runs.append(rows)
    for row, *others in zip(*runs, strict=True):
        for other in others:
            row.seconds = row.seconds + other.seconds
            row.note = row.note or other.note
        row.seconds = [] if row.note else row.seconds
    return runs[0]


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """In the order of running: small things first."""
    sizes = [size for size in (*benchmark_models.SIZES, "") if any(e.size == size for e in args.entries)]
    return [
        Setting(size, resolution, mode, precision, compiled)
        for resolution, size, mode, precision, compiled in product(
            args.sizes, sizes, args.modes, args.precisions, args.compile
        )
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a flag overrides the preset."""
    parser = argparse.ArgumentParser(description="Compare the speed of models.", allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, help="all of the settings below")
    parser.add_argument("--models", nargs="+", help="families, family-size, configurations, models of timm")
    parser.add_argument("--sizes", type=int, nargs="+", help="resolutions in pixels")
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument("--precisions", nargs="+", choices=DTYPES)
    parser.add_argument("--compile", nargs="+", choices=COMPILE)
    parser.add_argument("--batch-size", type=int, help="halved when memory runs out")
    parser.add_argument("--device", help="cpu, cuda or cuda:N")
    parser.add_argument("--repeats", type=int, help=f"rounds in a process (default: {ROUNDS})")
    parser.add_argument(
        "--processes", type=int, help=f"for a group (default: {PROCESSES}); 0: measure all in this one"
    )
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--minutes", type=float, help="stop after this time")
    parser.add_argument("--name", help="of the files (default: the preset, or custom)")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder (default: tools/results)")
    args = parser.parse_args(argv)
    for key, value in (PRESETS[args.preset] if args.preset else DEFAULTS).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for key, least in (("batch_size", 1), ("repeats", 1), ("threads", 1), ("processes", 0)):
        value = getattr(args, key)
        if value is not None and value < least:
            parser.error(f"--{key.replace('_', '-')}: expected {least} or more, got {value}")
    args.name = args.name or args.preset or "custom"
    return args


def measure(args: argparse.Namespace, facts: dict[str, str], notes: list[str]) -> list[Row]:
    """Run all groups; the files are written after each."""
    rows: list[Row] = []
    deadline = math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes
    rounds = args.repeats or ROUNDS[args.device.type]
    settings = settings_of(args)
    for number, setting in enumerate(settings):
        if time.monotonic() > deadline:
            notes.append(
                f"Stopped after {args.minutes:g} minutes with {len(settings) - number} groups to go."
            )
            break
        entries = [entry for entry in args.entries if entry.size == setting.size]
        logger.info(f"{setting}: {', '.join(entry.label for entry in entries)}")
        new = (run_apart if args.processes else run_group)(setting, entries, args, rounds, deadline)
        compare(new)
        logger.info(common.markdown_table(SHOWN, [shown(row) for row in new]))
        rows += new
        write(rows, facts, notes, args.out, args.name)
    if any(row.batch < args.batch_size for row in rows):
        notes.append(f"Memory ran out with batch {args.batch_size}; the column batch shows what was used.")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for what the user can correct."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        args.entries = benchmark_models.entries(args.models)
        args.device = pick_device(args.device)
        args.processes = PROCESSES[args.device.type] if args.processes is None else args.processes
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        facts = common.describe_run(args.device)
        rounds = args.repeats or ROUNDS[args.device.type]
        count = max(1, args.processes)
        notes = [
            f"Median and quartiles of {rounds * count} rounds in turns ({count} processes); "
            "a ratio is the median of the ratios within a round. `train` is forward, cross entropy, "
            f"backward and AdamW; stochastic depth {benchmark_models.DROP_PATH} everywhere. Peak memory, on "
            "CUDA only, without other models."
        ]
        rows = measure(args, facts, notes)
        logger.info(f"wrote {write(rows, facts, notes, args.out, args.name)}")
    except (ValueError, OSError, ImportError) as error:
        logger.error(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
