"""Times what a new image size costs: the index of all four stages, and what operators derive of it.

    python tools/profile_index.py --size 800 1333 --threads 1 --out tools/results

Parts: the index alone, as the plain operator uses it; what the operators `cpu` and `triton` derive for the
forward pass, and for both, on the device that is asked for. Nothing is taken from a cache. Milliseconds,
medians and quartiles of rounds in turns.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import benchmark_common as common
import torch

from config import load_config
from models import build_model
from models.focal_transformer import AttentionIndex, FocalAttention, Request
from models.ops import cpu
from models.ops.triton.tables import build_tables
from utils import pick_device

logger = logging.getLogger("profile_index")

CONFIGS = ("focal_tiny_patch4_window7_224", "focalv2_tiny_useconv_patch4_window7_224")
COLUMNS = ("model", "part", "ms", "lower quartile", "upper quartile")


def layers_of(name: str, size: Sequence[int]) -> list[tuple[FocalAttention, int, int]]:
    """The first attention of each stage, and rows and columns of its map at an image size."""
    with torch.device("meta"):
        model = build_model(load_config(common.REPO / "configs" / f"{name}.yaml"))
    found, (height, width) = [], model.patch_embed.output_size(*size)
    for stage in model.stages:
        found.append((stage.blocks[0].attn, height, width))
        if stage.downsample is not None:
            height, width = stage.downsample.output_size(height, width)
    return found


def new_index(layer: FocalAttention, height: int, width: int, device: torch.device) -> AttentionIndex:
    """The layer's index, for the plain operator: what is asked for by somebody who traces is never kept."""
    qkv = torch.empty(0, device=device)
    with torch.autograd.forward_ad.dual_level():
        return layer.index(height, width, qkv)


def parts_of(name: str, size: Sequence[int], device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed, by name: the index, and the tables of each operator for one pass or both."""
    layers = layers_of(name, size)
    made = [new_index(*layer, device) for layer in layers]

    def cpu_tables(trains: bool) -> None:
        for index, (layer, _, _) in zip(made, layers, strict=True):
            cpu.prepare(index, Request("cpu", device, torch.float32, layer.num_heads, layer.head_dim, trains))

    def triton_tables(trains: bool) -> None:
        for index in made:
            build_tables(index, trains)

    parts: dict[str, Callable[[], object]] = {"index": lambda: [new_index(*x, device) for x in layers]}
    timed = (
        {"cpu": cpu_tables, "triton": triton_tables} if device.type == "cpu" else {"triton": triton_tables}
    )
    for backend, build in timed.items():
        parts[f"{backend}, forward"] = lambda build=build: build(False)
        parts[f"{backend}, both"] = lambda build=build: build(True)
    return parts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Time what a new image size costs.")
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1333], help="rows and columns, pixels")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a dated .md and .csv here")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    facts, rows = common.describe_run(device), []
    for name in CONFIGS:
        parts = parts_of(name, args.size, device)
        timers = {part: lambda run=run: common.seconds_of(run, 1, device) for part, run in parts.items()}
        common.alternate(timers, 1)
        for part, times in common.alternate(timers, args.rounds).items():
            spread = common.Spread.of([1000 * seconds for seconds in times])
            rows.append([name, part, spread.median, spread.lower, spread.upper])
    note = f"All four stages at {args.size[0]} x {args.size[1]} pixels, {args.rounds} rounds in turns."
    common.publish(args.out, "index", "What a new image size costs", facts, [note], COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
