"""Inference speed of a model on synthetic images: no data set, no weights needed."""

import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from utils import Precision, peak_memory_mb, synchronize

WARM_UP_STEPS = {"cuda": 20, "cpu": 1}
REPEATS = {"cuda": 20, "cpu": 5}
REPEAT_SECONDS = {"cuda": 1.0, "cpu": 0.5}  # target; a repeat has at least one step
BUDGET_SECONDS = 60.0  # after three repeats, none starts later than this


def unique_backends(backends: list[str]) -> str:
    """The attention backends of all stages for a message: one name if they are the same."""
    return backends[0] if len(set(backends)) == 1 else "/".join(backends)


@dataclass
class Throughput:
    """One measurement; times are per batch."""

    images_per_second: float  # median over repeats
    images_per_second_iqr: float  # spread: upper minus lower quartile
    milliseconds: float  # median
    repeats: int
    steps_per_repeat: int
    batch_size: int
    image_size: tuple[int, int]
    peak_memory_mb: float
    precision: str
    backends: list[str]  # attention backend per stage
    device: str
    torch: str

    def __str__(self) -> str:
        return (
            f"{self.images_per_second:.1f} img/s (IQR {self.images_per_second_iqr:.1f}), "
            f"{self.milliseconds:.2f} ms per batch of {self.batch_size} at "
            f"{self.image_size[0]}x{self.image_size[1]}, median of {self.repeats} repeats of "
            f"{self.steps_per_repeat}; {self.peak_memory_mb:.0f} MB peak, {self.precision}, attention "
            f"{unique_backends(self.backends)}, {self.device}, torch {self.torch}"
        )

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def measure_throughput(
    model: nn.Module, images: torch.Tensor, precision: Precision, backends: list[str]
) -> Throughput:
    """Time the forward pass of ``model`` in eval mode.

    Args:
        model: on the device of ``images``.
        images: [B, C, H, W]; each step runs this batch.
        precision: of the forward pass.
        backends: attention backend per stage, for the report.
    """
    device = images.device
    model.eval()

    def seconds(steps: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        with torch.no_grad(), precision.autocast(device):
            for _ in range(steps):
                model(images)
        synchronize(device)
        return time.perf_counter() - start

    began = time.perf_counter()
    seconds(WARM_UP_STEPS[device.type])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = max(1, round(REPEAT_SECONDS[device.type] / seconds(1)))
    times: list[float] = []
    while len(times) < REPEATS[device.type]:
        if len(times) >= 3 and time.perf_counter() - began > BUDGET_SECONDS:
            break
        times.append(seconds(steps) / steps)
    rates = [len(images) / value for value in times]
    lower, _, upper = statistics.quantiles(rates, n=4, method="inclusive")
    return Throughput(
        images_per_second=statistics.median(rates),
        images_per_second_iqr=upper - lower,
        milliseconds=statistics.median(times) * 1e3,
        repeats=len(times),
        steps_per_repeat=steps,
        batch_size=len(images),
        image_size=(images.shape[2], images.shape[3]),
        peak_memory_mb=peak_memory_mb(device),
        precision=precision.name,
        backends=backends,
        device=_device_name(device),
        torch=torch.__version__,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
