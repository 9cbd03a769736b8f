"""Inference speed of a model on synthetic images: no data set, no weights needed."""

import platform
import statistics
import time
from typing import Any

import torch
from torch import nn

from utils import Precision, memory_mb, synchronize


def measure_throughput(
    model: nn.Module, images: torch.Tensor, precision: Precision, backends: list[str]
) -> dict[str, Any]:
    """Time the forward pass of `model` in eval mode.

    Args:
        model: on the device of `images`.
        images: [B, C, H, W]; each step runs this batch.
        precision: of the forward pass.
        backends: attention backend per block, for the report.

    Returns:
        The content of throughput.json: images per second, milliseconds per batch (medians over repeats), and
        what was measured.
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
    return {
        "images_per_second": len(images) / median,
        "milliseconds": median * 1e3,
        "batch_size": len(images),
        "image_size": list(images.shape[2:]),
        "memory_mb": memory_mb(device),
        "precision": precision.name,
        "backends": backends,
        "device": module.get_device_name(device) if named else f"{platform.machine()} {device.type}",
        "torch": torch.__version__,
    }
