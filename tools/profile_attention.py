"""Times and checks the attention operator alone: every stage's shape, every backend, against the floor.

    python tools/profile_attention.py --cfg configs/focal_tiny_patch4_window7_224.yaml --device cuda \\
        --precisions bf16 --batch-size 128 --sizes 224 448

The floor is what no kernel can beat here: the larger of bytes over bandwidth and FLOPs over FLOP/s. Bytes are
q, k, v and the output once; with gradients, also those four, the output's gradient and the three gradients.
FLOPs are those of the matrix products with the keys that a window sees. The peaks are those of a large copy
and a large product in the same run.

Every backend is compared with `plain` in float64: the largest error of the output and of the gradients,
relative to the largest value, which may be twice that of `plain` in the same precision. Nothing of the model
runs but the operator.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import benchmark_common as common
import torch
from benchmark_common import DTYPES
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
from utils import pick_device

logger = logging.getLogger("profile_attention")

PASSES = ("forward", "forward+backward")
ROUNDS = {"cpu": 5, "cuda": 20}
ROUND_SECONDS = {"cpu": 0.2, "cuda": 0.1}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
TOLERANCE = 2.0  # errors up to so many times that of `plain` in the same precision
LEAST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # never a fault below
COLUMNS = (
    *("stage", "resolution", "map", "heads", "head dim", "windows", "keys", "precision", "pass", "backend"),
    *("ms", "lower quartile", "upper quartile", "floor ms", "times floor", "bound by"),
    *("error", "error of plain", "check"),
)
GRADIENTS = ("output", "d_qkv", "d_bias")


@dataclass(frozen=True)
class Peaks:
    """What the device reached in this run."""

    bytes_per_second: float
    flops_per_second: dict[str, float]  # by precision

    def __str__(self) -> str:
        flops = ", ".join(f"{name} {value / 1e12:.3g}" for name, value in self.flops_per_second.items())
        return f"{self.bytes_per_second / 1e9:.4g} GB/s copied; TFLOP/s: {flops}"


@dataclass(frozen=True)
class Shape:
    """The operator of a stage's first block."""

    stage: int
    resolution: int
    index: AttentionIndex
    bias: Tensor  # [N, P or 1, Q, K], float32
    tokens: int  # S
    heads: int
    head_dim: int
    scale: float

    @property
    def windows_and_keys(self) -> tuple[int, int]:
        """Windows of an image and keys of a window, without those that stand twice."""
        windows, keys = merge_duplicates(self.index).keys.shape
        return windows, keys

    @property
    def keys_seen(self) -> int:
        """Pairs of query and key, over all windows of one image and head."""
        merged, queries = merge_duplicates(self.index), self.index.window**2
        if merged.visible is None:
            return merged.keys.numel() * queries
        return int(merged.visible.expand(-1, queries, -1).sum())

    def inputs(self, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Random queries, keys and values [B, S, 3, N, D], and gradient of the output [B, T, N*D]."""
        torch.manual_seed(1)
        device, fine = self.bias.device, self.index.height * self.index.width
        qkv = torch.randn(batch, self.tokens, 3, self.heads, self.head_dim, device=device)
        d_out = torch.randn(batch, fine, self.heads * self.head_dim, device=device)
        return qkv.to(dtype), d_out.to(dtype)

    def floor(self, peaks: Peaks, batch: int, precision: str, backward: bool) -> tuple[float, str]:
        """Seconds that a pass takes at least, and what bounds it."""
        width = self.heads * self.head_dim * batch * DTYPES[precision].itemsize
        fine = self.index.height * self.index.width
        inputs, output = (fine + 2 * self.tokens) * width, fine * width
        moved = inputs + output
        flops = 4 * batch * self.heads * self.head_dim * self.keys_seen  # q k^T and p v
        if backward:
            moved += 2 * (inputs + output)  # in: q, k, v, o, gradient of o; out: gradients of q, k, v
            flops += 2.5 * flops  # scores again, and four products
        times = {"bytes": moved / peaks.bytes_per_second, "FLOPs": flops / peaks.flops_per_second[precision]}
        bound = max(times, key=lambda name: times[name])
        return times[bound], bound


def measure_peaks(device: torch.device, precisions: Sequence[str]) -> Peaks:
    """Bandwidth of a copy (read and written bytes), and FLOP/s of a square product."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _best(lambda: target.copy_(source), device)
    flops = {}
    for name in precisions:
        side = MATMUL_SIDE[device.type]
        a, b = (torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(2))
        flops[name] = 2 * side**3 / _best(lambda a=a, b=b: a @ b, device)
    return Peaks(2 * len(source) / seconds, flops)


def _best(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls."""
    common.seconds_of(action, 2, device)
    return min(common.seconds_of(action, 3, device) for _ in range(5))


def configured_model(config_file: Path, resolution: int, device: torch.device) -> FocalTransformer:
    """The model of a configuration for a resolution, with fresh weights."""
    torch.manual_seed(0)
    return build_model(load_config(config_file, ["DATA.IMG_SIZE", resolution])).to(device).eval()


def shapes_of(model: FocalTransformer, resolution: int) -> list[Shape]:
    """One operator per stage of a model in evaluation, with its index and its bias."""
    layers = [next(m for m in stage.modules() if isinstance(m, FocalAttention)) for stage in model.layers]
    shapes: list[Shape] = []

    def add(layer: FocalAttention, height: int, width: int, qkv: Tensor) -> None:
        index = layer.index(height, width, qkv.unflatten(-1, (3, layer.num_heads, layer.head_dim)))
        bias, dims = layer.bias(index, torch.float32), (layer.num_heads, layer.head_dim)
        shapes.append(Shape(len(shapes) + 1, resolution, index, bias, qkv.shape[1], *dims, layer.scale))

    sizes: list[torch.Size] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[1:3]))
        layer.qkv.register_forward_hook(lambda _, __, qkv, layer=layer: add(layer, *sizes[-1], qkv))
    with torch.no_grad():
        device = next(model.parameters()).device
        model(torch.zeros(1, model.in_chans, resolution, resolution, device=device))
    return shapes


def need_kernels(device: torch.device) -> None:
    """Raise ValueError, saying why, where the fused kernels cannot run."""
    layer = FocalAttention(32, 1, 7, expand_size=3, backend="triton")
    layer.index(14, 14, torch.empty(0, device=device))


class Contender:
    """A backend with the inputs of one shape."""

    def __init__(self, name: str, shape: Shape, qkv: Tensor, d_out: Tensor) -> None:
        """
        Args:
            name: of the backend.
            shape: of the operator.
            qkv: [B, S, 3, N, D].
            d_out: gradient of the output, [B, T, N*D].

        Raises:
            ValueError: it cannot run here.
        """
        self.name, self.scale, self.d_out = name, shape.scale, d_out
        self.qkv = qkv.detach().clone().requires_grad_()
        self.bias = shape.bias.to(torch.promote_types(qkv.dtype, torch.float32)).clone().requires_grad_()
        request = Request(name, qkv.device, qkv.dtype, shape.heads, shape.head_dim, True)
        self.index = choose_backend(shape.index, request)

    def attend(self) -> Tensor:
        """The output, with a graph."""
        return BACKENDS[self.name].attend(self.qkv, self.index, self.bias, self.scale)

    def forward(self) -> Tensor:
        """As in evaluation: a mask that wants a gradient would choose another kernel."""
        with torch.no_grad():
            inputs = self.qkv.detach(), self.index, self.bias.detach()
            return BACKENDS[self.name].attend(*inputs, self.scale)

    def both(self) -> None:
        """Forward and backward."""
        torch.autograd.grad(self.attend(), (self.qkv, self.bias), self.d_out)

    def results(self) -> list[Tensor]:
        """The output and the gradients of `qkv` and of the bias, in double."""
        out = self.attend()
        d_qkv, d_bias = torch.autograd.grad(out, (self.qkv, self.bias), self.d_out)
        d_qkv[:, self.index.height * self.index.width :, 0] = 0  # pooled tokens have no queries
        return [x.detach().double() for x in (out, d_qkv, d_bias)]


def errors(results: Sequence[Tensor], truth: Sequence[Tensor], least: float = 1e-12) -> list[float]:
    """Largest error of each, relative to its largest true value, or to `least` if that is more."""
    return [
        float((x - y).abs().max() / y.abs().max().clamp_min(least))
        for x, y in zip(results, truth, strict=True)
    ]


def limit(yardstick: float, dtype: torch.dtype) -> float:
    """Largest error that is none of the operator's, where `plain` has the error `yardstick`."""
    return max(TOLERANCE * yardstick, LEAST_ERROR[dtype])


def profile(shape: Shape, precision: str, peaks: Peaks, args: argparse.Namespace) -> list[list[common.Cell]]:
    """Rows of the table: every backend at one shape and precision, forward and with backward."""
    dtype = DTYPES[precision]
    qkv, d_out = shape.inputs(args.batch_size, dtype)
    few = slice(0, min(args.batch_size, args.check_images))
    truth = Contender("plain", shape, qkv[few].double(), d_out[few].double()).results()
    yardstick = errors(Contender("plain", shape, qkv[few], d_out[few]).results(), truth)
    map_size = f"{shape.index.height}x{shape.index.width}"
    sizes = (map_size, shape.heads, shape.head_dim, *shape.windows_and_keys)
    head = [shape.stage, shape.resolution, *sizes, precision]
    checks: dict[str, list[common.Cell]] = {}
    notes: dict[str, str] = {}
    ready: dict[str, Contender] = {}
    for name in args.backends:
        try:
            off = errors(Contender(name, shape, qkv[few], d_out[few]).results(), truth)
            checks[name] = [_listed(off), _listed(yardstick), verdict(off, yardstick, dtype)]
            ready[name] = Contender(name, shape, qkv, d_out)
        except (ValueError, RuntimeError) as error:
            notes[name] = f"cannot run: {common.short_reason(error)}"
    rows: list[list[common.Cell]] = []
    for kind in PASSES:
        floor, bound = shape.floor(peaks, args.batch_size, precision, backward=kind != "forward")
        times = time_in_turns(ready, kind, args, notes)
        for name in args.backends:
            if name in notes:
                rows.append([*head, kind, name, *[None] * 8, notes[name]])
                continue
            ms = common.Spread.of([1e3 * value for value in times[name]])
            spread = (ms.median, ms.lower, ms.upper, floor * 1e3, ms.median / floor / 1e3, bound)
            rows.append([*head, kind, name, *spread, *checks[name]])
    return rows


def time_in_turns(
    ready: dict[str, Contender], kind: str, args: argparse.Namespace, notes: dict[str, str]
) -> dict[str, list[float]]:
    """Seconds by backend and round; one that runs out of memory goes, with a note."""
    timers: dict[str, Callable[[], float]] = {}
    for name in list(ready):
        action = ready[name].forward if kind == "forward" else ready[name].both
        try:
            single = common.seconds_of(action, 1, args.device)
            single = common.seconds_of(action, 1, args.device)
        except RuntimeError as error:
            notes[name] = f"failed: {common.short_reason(error)}"
            del ready[name]
            continue
        repeats = common.repeats_for(ROUND_SECONDS[args.device.type], single)
        timers[name] = lambda action=action, repeats=repeats: common.seconds_of(action, repeats, args.device)
    return common.alternate(timers, args.repeats or ROUNDS[args.device.type])


def verdict(off: Sequence[float], yardstick: Sequence[float], dtype: torch.dtype) -> str:
    """Whether errors are those of the precision; else, of which results they are not."""
    wrong = [
        name
        for name, mine, theirs in zip(GRADIENTS, off, yardstick, strict=True)
        if not mine <= limit(theirs, dtype)
    ]
    return f"WRONG: {', '.join(wrong)}" if wrong else "ok"


def _listed(values: Sequence[float]) -> str:
    return " ".join(f"{value:.1e}" for value in values)


def operator_parser(description: str, precision: str = "fp32") -> argparse.ArgumentParser:
    """What the command lines of tools that time a model's operators share; `precision` is the one that is not
    given."""
    parser = argparse.ArgumentParser(description=description)
    default = common.REPO / "configs" / "focal_tiny_patch4_window7_224.yaml"
    parser.add_argument("--cfg", type=Path, default=default, help="configuration (default: Focal-T)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224], help="resolutions in pixels")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=[precision])
    parser.add_argument("--device", default="", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--repeats", type=int, help=f"rounds (default: {ROUNDS})")
    parser.add_argument("--check-images", type=int, default=2, help="images of the check of results")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a dated .md and .csv here")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = operator_parser("Time and check the attention operator alone.")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--name", default="attention", help="of the files")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a result is wrong, 2 for what the user can correct."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        args.device = pick_device(args.device)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        facts = common.describe_run(args.device)
        peaks = measure_peaks(args.device, args.precisions)
        facts["Peaks"] = str(peaks)
        facts["Configuration"] = f"{args.cfg.stem}, batch {args.batch_size}"
        rows: list[list[common.Cell]] = []
        for resolution in args.sizes:
            model = configured_model(args.cfg, resolution, args.device)
            for shape in shapes_of(model, resolution):
                for precision in args.precisions:
                    rows += profile(shape, precision, peaks, args)
    except (ValueError, OSError) as error:
        logger.error(f"error: {error}")
        return 2
    note = "Errors, relative to the largest value: output, gradient of q, k and v, gradient of the bias."
    common.publish(args.out, args.name, "The attention operator", facts, [note], COLUMNS, rows)
    return 1 if any(str(row[-1]).startswith("WRONG") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
