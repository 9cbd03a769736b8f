"""Times the attention operator alone, at the shape of every stage; gpu_checks.py compares its results.

    python -m tools.benchmarks.attention --device cuda --precisions bf16 --batch-size 128 --sizes 224 448
    python -m tools.benchmarks.attention --index --sizes 448 896

By default every backend is timed against the floor, which no kernel can beat: the larger of bytes over
bandwidth and FLOPs over FLOP/s, both as a large copy and a large product reach them in the same run. Bytes
are q, k, v and the output once; with gradients also those four, the output's gradient and three gradients.
FLOPs are those of the matrix products with the keys that a window sees.

--index times what a new image size costs: the index of keys of all stages, and the tables that the operators
derive from it for training.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from config import load_config
from models import build_model
from models.focal_transformer import (
    BACKENDS,
    AttentionIndex,
    FocalAttention,
    FocalTransformer,
    Request,
    choose_backend,
)
from models.ops.tables import merge_duplicates
from tools.figures.attention import stage_maps
from utils import path_argument, user_input

from . import common
from .common import DTYPES, Cell, Spread, Timer

PASSES = ("forward", "forward+backward")
ROUND_SECONDS = {"cpu": 0.2, "cuda": 0.1}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}
MATMUL_SIDE = {"cpu": 512, "cuda": 8192}
COLUMNS = (
    *("model", "stage", "resolution", "map", "heads", "head dim", "windows", "keys", "precision"),
    *("pass", "backend", "ms", "floor ms", "times floor", "bound by", "note"),
)
INDEX_COLUMNS = ("model", "resolution", "part", "ms")


# --- The operator of a stage --------------------------------------------------------------------------------


def measure_peaks(device: torch.device, precisions: Sequence[str]) -> dict[str, float]:
    """What the device reaches now, per second: `bytes` read and written by a copy, and by precision the
    FLOPs of a square product."""

    def fastest(action: Callable[[], object]) -> float:
        timer = Timer(action, device, warm_up=2)
        return min(timer() for _ in range(5))

    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    peaks = {"bytes": 2 * len(source) / fastest(lambda: target.copy_(source))}
    for name in precisions:
        side = MATMUL_SIDE[device.type]
        a, b = (torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(2))
        peaks[name] = 2 * side**3 / fastest(lambda a=a, b=b: a @ b)
    return peaks


@dataclass(frozen=True)
class Shape:
    """The operator of a stage's first block."""

    model: str
    stage: int
    resolution: int
    layer: FocalAttention
    index: AttentionIndex
    bias: Tensor  # [N, P or 1, Q, K], float32

    @property
    def fine(self) -> int:
        """Fine tokens T."""
        return self.index.height * self.index.width

    def cells(self, precision: str) -> list[Cell]:
        """The first of COLUMNS."""
        windows, keys = merge_duplicates(self.index).keys.shape
        size = f"{self.index.height}x{self.index.width}"
        heads, width = self.layer.num_heads, self.layer.head_dim
        return [self.model, self.stage, self.resolution, size, heads, width, windows, keys, precision]

    def inputs(self, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Random queries, keys and values [B, S, 3, N, D], and gradient of the output [B, T, N*D]."""
        torch.manual_seed(1)
        device, heads, width = self.bias.device, self.layer.num_heads, self.layer.head_dim
        qkv = torch.randn(batch, self.index.tokens, 3, heads, width, device=device)
        d_out = torch.randn(batch, self.fine, heads * width, device=device)
        return qkv.to(dtype), d_out.to(dtype)

    def floor(self, peaks: dict[str, float], batch: int, precision: str, backward: bool) -> tuple[float, str]:
        """Milliseconds that a pass takes at least, and what bounds it."""
        merged, queries = merge_duplicates(self.index), self.index.window**2
        pairs = merged.keys.numel() * queries  # of query and key, over all windows of one image and head
        if merged.visible is not None:
            pairs = int(merged.visible.expand(-1, queries, -1).sum())
        width = self.layer.num_heads * self.layer.head_dim * batch
        moved = 2 * (self.fine + self.index.tokens) * width * DTYPES[precision].itemsize  # q, output; k, v
        flops = 4 * width * pairs  # q k^T and p v
        if backward:
            moved += 2 * moved  # in: q, k, v, o, gradient of o; out: gradients of q, k, v
            flops += 2.5 * flops  # scores again, and four products
        times = {"bytes": moved / peaks["bytes"], "FLOPs": flops / peaks[precision]}
        bound = max(times, key=times.__getitem__)
        return 1e3 * times[bound], bound


def randomise(model: FocalTransformer) -> None:
    """Draw weights that are large enough for every part of a model to matter."""
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "bias_table" in name:
                x.normal_(std=0.5)
            elif name.endswith("bias"):
                x.normal_(std=0.1)
            elif x.ndim == 1:
                x.normal_(mean=1, std=0.1)
            else:
                scale = 0.2 if "coord2rpb" in name else 1.0  # whose inputs are not normalised
                x.normal_(std=scale * x[0].numel() ** -0.5)


def read_model(path: str, resolution: int, device: torch.device) -> FocalTransformer:
    """The model of a configuration with random weights, in evaluation."""
    torch.manual_seed(0)
    with user_input():
        model = build_model(load_config(path, ["DATA.IMG_SIZE", resolution])).to(device).eval()
    randomise(model)
    return model


def shapes_of(path: str, resolution: int, device: torch.device) -> list[Shape]:
    """One operator per stage of a configuration, with its index and its bias."""
    shapes = []
    maps = stage_maps(read_model(path, resolution, device), resolution, resolution, 0)
    with torch.no_grad():
        for stage, tokens in enumerate(maps, start=1):
            index, layer = tokens.index, tokens.layer
            bias = layer.bias(index, torch.float32)
            shapes.append(Shape(Path(path).stem, stage, resolution, layer, index, bias))
    return shapes


class Contender:
    """A backend with the inputs that `Shape.inputs` makes; ValueError if it cannot run here."""

    def __init__(self, name: str, shape: Shape, qkv: Tensor, d_out: Tensor) -> None:
        self.name, self.scale, self.d_out = name, shape.layer.scale, d_out
        self.qkv = qkv.detach().clone().requires_grad_()
        self.bias = shape.bias.to(torch.promote_types(qkv.dtype, torch.float32)).clone().requires_grad_()
        request = Request(name, qkv.device, qkv.dtype, shape.layer.num_heads, shape.layer.head_dim, True)
        self.index = choose_backend(shape.index, request)

    def forward(self) -> None:
        """As in evaluation: inputs that require gradients could choose another kernel."""
        with torch.no_grad():
            qkv, bias = self.qkv.detach(), self.bias.detach()
            BACKENDS[self.name].attend(qkv, self.index, bias, self.scale)

    def forward_backward(self) -> None:
        """As in training."""
        out = BACKENDS[self.name].attend(self.qkv, self.index, self.bias, self.scale)
        torch.autograd.grad(out, (self.qkv, self.bias), self.d_out)


# --- Measuring ----------------------------------------------------------------------------------------------


def milliseconds(times: Sequence[float]) -> Spread:
    """Of seconds."""
    return Spread.of([1e3 * value for value in times])


def time_backends(
    shape: Shape, precision: str, peaks: dict[str, float], args: argparse.Namespace
) -> list[list[Cell]]:
    """Rows of COLUMNS: every backend at one shape and precision, forward and with backward."""
    inputs = shape.inputs(args.batch_size, DTYPES[precision])
    notes: dict[str, str] = {}
    timers: dict[tuple[str, str], Timer] = {}
    for name in args.backends:
        try:
            contender = Contender(name, shape, *inputs)
            actions = zip(PASSES, (contender.forward, contender.forward_backward), strict=True)
            seconds = ROUND_SECONDS[args.device.type]
            timers |= {(kind, name): Timer(action, args.device, seconds) for kind, action in actions}
            notes[name] = ""
        except (ValueError, RuntimeError) as error:
            notes[name] = f"cannot run: {common.short_reason(error)}"
    times = common.alternate(timers, args.rounds)
    rows = []
    for kind, (name, note) in product(PASSES, notes.items()):
        speed: list[Cell] = [None] * 4
        if (kind, name) in times:
            floor, bound = shape.floor(peaks, args.batch_size, precision, backward=kind != "forward")
            spread = milliseconds(times[kind, name])
            speed = [spread, floor, spread.median / floor, bound]
        rows.append([*shape.cells(precision), kind, name, *speed, note])
    return rows


def time_index(path: str, resolution: int, args: argparse.Namespace) -> list[list[Cell]]:
    """Rows of INDEX_COLUMNS: the index of all stages, and the tables that each operator trains with."""
    from models.ops import cpu
    from models.ops.triton.tables import build_tables

    maps = stage_maps(read_model(path, resolution, args.device), resolution, resolution, 0)

    def indices() -> list[AttentionIndex]:
        with torch.autograd.forward_ad.dual_level():  # what is built while tracing is not cached
            return [tokens.index for tokens in maps]

    def cpu_tables() -> None:
        for tokens, index in zip(maps, built, strict=True):
            heads, width = tokens.layer.num_heads, tokens.layer.head_dim
            cpu.prepare(index, Request("cpu", args.device, torch.float32, heads, width, trains=True))

    def triton_tables() -> None:
        for index in built:
            build_tables(index, True)

    built, builders = indices(), {"index": indices, "triton": triton_tables}
    if args.device.type == "cpu":
        builders["cpu"] = cpu_tables
    timers = {name: Timer(build, args.device) for name, build in builders.items()}
    times = common.alternate(timers, args.rounds)
    return [[Path(path).stem, resolution, name, milliseconds(times[name])] for name in times]


# --- Command line -------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.new_parser("Time the attention operator alone.", "attention")
    default = str(common.REPO / "configs" / "focal_tiny_patch4_window7_224.yaml")
    parser.add_argument("--cfg", type=path_argument, nargs="+", default=[default], help="(default: Focal-T)")
    parser.add_argument("--sizes", type=common.positive, nargs="+", default=[224], help="resolutions, pixels")
    parser.add_argument("--batch-size", type=common.positive, default=8)
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--index", action="store_true", help="cost of a new image size, not backends")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> int:
    """Measure and publish."""
    facts, rows = common.describe_run(args.device), []
    if args.index:
        for path, resolution in product(args.cfg, args.sizes):
            rows += time_index(path, resolution, args)
        note = "All stages together, without a cache."
        common.publish(args, "A new image size", facts, [note], INDEX_COLUMNS, rows)
        return 0
    peaks = measure_peaks(args.device, args.precisions)
    flops = ", ".join(f"{name} {peaks[name] / 1e12:.3g}" for name in args.precisions)
    facts["Batch"] = str(args.batch_size)
    facts["Peaks"] = f"{peaks['bytes'] / 1e9:.4g} GB/s copied; TFLOP/s: {flops}"
    publish = partial(common.publish, args, "The attention operator", facts, [], COLUMNS)
    for precision, path, resolution in product(args.precisions, args.cfg, args.sizes):
        for shape in shapes_of(path, resolution, args.device):
            found = time_backends(shape, precision, peaks, args)
            rows += found
            publish(rows, news=common.markdown_table(COLUMNS, found))
    publish(rows)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for an error that the user can correct."""
    return common.run_command(parse(argv), measure)


if __name__ == "__main__":
    sys.exit(main())
