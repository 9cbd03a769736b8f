"""Inference speed of a model on synthetic images: no data set, no weights needed."""

import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from utils import Precision, memory_mb, synchronize


def unique_backends(backends: list[str]) -> str:
    """The attention backends of all blocks for a message: each one once."""
    return " and ".join(dict.fromkeys(backends))


@dataclass
class Throughput:
    """One measurement; the median over repeats."""

    images_per_second: float
    milliseconds: float  # per batch
    batch_size: int
    image_size: tuple[int, int]
    memory_mb: float
    precision: str
    backends: list[str]  # attention backend per block
    device: str
    torch: str

    def __str__(self) -> str:
        return (
            f"{self.images_per_second:.1f} img/s, {self.milliseconds:.2f} ms per batch of {self.batch_size} "
            f"at {self.image_size[0]}x{self.image_size[1]}; {self.memory_mb:.0f} MB, "
            f"{self.precision}, attention {unique_backends(self.backends)}, {self.device}, torch {self.torch}"
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
        backends: attention backend per block, for the report.
    """
    device = images.device
    warm_up, repeats, repeat_seconds = (1, 5, 0.5) if device.type == "cpu" else (20, 20, 1.0)
    module = torch.get_device_module(device)
    model.eval()

    def seconds(steps: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        with torch.no_grad(), precision.autocast(device):
            for _ in range(steps):
                model(images)
        synchronize(device)
        return time.perf_counter() - start

    seconds(warm_up)
    if hasattr(module, "reset_peak_memory_stats"):
        module.reset_peak_memory_stats(device)
    steps = max(1, round(repeat_seconds / seconds(1)))
    median = statistics.median(seconds(steps) / steps for _ in range(repeats))
    named = hasattr(module, "get_device_name")
    return Throughput(
        images_per_second=len(images) / median,
        milliseconds=median * 1e3,
        batch_size=len(images),
        image_size=(images.shape[2], images.shape[3]),
        memory_mb=memory_mb(device),
        precision=precision.name,
        backends=backends,
        device=module.get_device_name(device) if named else f"{platform.machine()} {device.type}",
        torch=torch.__version__,
    )
