"""Times and checks the LayerNorm operators of a block alone, against the modules whose work they do.

    python tools/profile_block_ops.py --device cuda --precisions bf16 --batch-size 128 --sizes 224 448

`tokens` is LayerNorm, padding, pooling and concatenation; `sum` is stochastic depth, the residual sum and
LayerNorm. The map is float32, and what goes to a linear layer or comes from one is in the precision, as under
autocast. The floor is the bytes that a pass must read and write, over the bandwidth of a large copy in the
same run. Errors are relative to the norm of a result or gradient, found by the modules in float64, and may be
twice those of the modules in the same precision.
"""

import argparse
import copy
import logging
import sys
from collections.abc import Callable, Sequence

import benchmark_common as common
import torch
from profile_attention import DTYPES, ROUND_SECONDS, ROUNDS, TOLERANCE, measure_peaks, operator_parser
from torch import Tensor
from torch.nn import functional as F

from config import load_config
from models import block_ops, build_model
from models.focal_transformer import FocalBlock
from models.geometry import padded_size
from models.layers import pooled_tokens
from models.ops import resolve_backend
from utils import pick_device

logger = logging.getLogger("profile_block_ops")

LEAST_ERROR = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # never a fault below
COLUMNS = (
    *("stage", "resolution", "map", "channels", "precision", "operator", "pass", "ms", "modules ms"),
    *("speed-up", "floor ms", "times floor", "largest error", "of modules", "check"),
)
Results = tuple[Tensor, Tensor]


class Problem:
    """An operator, or the modules, with the inputs of a stage: the map to go on with, and the next input."""

    def __init__(
        self, operator: str, block: FocalBlock, inputs: Sequence[Tensor], dtype: torch.dtype
    ) -> None:
        """
        Args:
            operator: tokens | sum.
            block: the stage's first.
            inputs: map, branch [B, H, W, C] and the factor of each image's branch [B].
            dtype: the precision.
        """
        self.operator, self.block, self.dtype = operator, block, dtype
        self.x, self.branch, self.factor = (x.detach().clone() for x in inputs)
        parts = (block.norm2,) if operator == "sum" else (block.norm1, block.pool_layers)
        self.leaves = [self.x, *([self.branch] if operator == "sum" else [])]
        self.leaves = [x.requires_grad_() for x in self.leaves] + [p for m in parts for p in m.parameters()]

    def fused(self) -> Results:
        """By the operator."""
        from models.ops import triton_norm

        norm1, norm2, pools = self.block.norm1, self.block.norm2, self.block.pool_layers
        if self.operator == "sum":
            settings = (norm2.weight, norm2.bias, norm2.eps, self.dtype)
            return triton_norm.add_norm(self.x, self.branch, self.factor, *settings)[:2]
        pool = (pools[0].weight, pools[0].bias) if len(pools) else (None, None)
        window = self.block.attn.selection.window_size
        arguments = (self.x, norm1.weight, norm1.bias, *pool, window, norm1.eps, self.dtype)
        return triton_norm.NormTokens.apply(*arguments)

    def modules(self) -> Results:
        """By PyTorch."""
        if self.operator == "sum":
            total = self.x + self.branch * self.factor.view(-1, 1, 1, 1)
            return total, self.block.norm2(total).to(self.dtype)
        (height, width), window = self.x.shape[1:3], self.block.attn.selection.window_size
        rows, columns = padded_size(height, width, window)
        with torch.autocast(self.x.device.type, self.dtype, enabled=self.dtype.itemsize == 2):
            normed = F.pad(self.block.norm1(self.x), (0, 0, 0, columns - width, 0, rows - height))
            tokens = [normed.flatten(1, 2), *pooled_tokens(normed, self.block.pool_layers, window)]
            return self.x.view_as(self.x), torch.cat(tokens, dim=1).to(self.dtype)

    def train(self, function: Callable[[], Results], cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Results and gradients."""
        results = function()
        cotangents = [x.to(y.dtype) for x, y in zip(cotangents, results, strict=True)]
        return [*results, *torch.autograd.grad(results, self.leaves, cotangents)]


def floor_bytes(operator: str, x: Tensor, branch: Tensor, results: Sequence[Tensor], backward: bool) -> int:
    """What a pass reads and writes at least."""
    moved = sum(part.nbytes for part in results)  # of `tokens`: the map is read
    moved += x.nbytes + branch.nbytes if operator == "sum" else 0
    # Gradients of the results come in; the map, or the sum, is read, and its gradient written.
    return 2 * moved + (x.nbytes if operator == "sum" else 2 * x.nbytes) if backward else moved


def profile(
    block: FocalBlock,
    size: Sequence[int],
    operator: str,
    dtype: torch.dtype,
    bandwidth: float,
    args: argparse.Namespace,
) -> list[list[common.Cell]]:
    """Rows of one operator from `pass` on: forward, and with backward."""
    torch.manual_seed(1)
    x = torch.randn(args.batch_size, *size, block.norm1.weight.numel(), device=args.device)
    factor = 1.25 * (torch.rand(len(x), device=args.device) < 0.8).to(dtype)
    inputs = (x, torch.randn_like(x).to(dtype), factor)
    problem = Problem(operator, block, inputs, dtype)
    cotangents = [torch.randn_like(part) for part in problem.fused()]
    few = [part[: args.check_images] for part in (*inputs, *cotangents)]
    verdict = check(operator, block, few[:3], few[3:], dtype)
    rows: list[list[common.Cell]] = []
    for name in ("forward", "forward+backward"):
        backward = name != "forward"
        times = time_in_turns(problem, cotangents if backward else None, args)
        ms, theirs = (1e3 * common.Spread.of(times[who]).median for who in ("fused", "modules"))
        ratio = common.speed_ratio(times["fused"], times["modules"]).median
        floor = 1e3 * floor_bytes(operator, x, inputs[1], cotangents, backward) / bandwidth
        rows.append([name, ms, theirs, ratio, floor, ms / floor, *verdict])
    return rows


def check(
    operator: str,
    block: FocalBlock,
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[common.Cell]:
    """Largest error of results and gradients, that of the modules, and the verdict."""
    wide = [part.double() for part in inputs]
    precise = Problem(operator, copy.deepcopy(block).double(), wide, torch.float64)
    truth = precise.train(precise.modules, cotangents)
    small = Problem(operator, block, inputs, dtype)
    mine, theirs = (
        [float((x.double() - y).norm() / y.norm().clamp_min(1e-12)) for x, y in zip(made, truth, strict=True)]
        for made in (small.train(small.fused, cotangents), small.train(small.modules, cotangents))
    )
    allowed = [max(TOLERANCE * error, LEAST_ERROR[dtype]) for error in theirs]
    wrong = [i for i, (error, most) in enumerate(zip(mine, allowed, strict=True)) if not error <= most]
    return [max(mine), max(theirs), f"WRONG: numbers {wrong} of results and gradients" if wrong else "ok"]


def time_in_turns(
    problem: Problem, cotangents: Sequence[Tensor] | None, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds by name and round; forward alone, without gradients, where there are no cotangents."""

    def timer(function: Callable[[], Results]) -> Callable[[], float]:
        def action() -> None:
            if cotangents is not None:
                problem.train(function, cotangents)
                return
            with torch.no_grad():
                function()

        single = min(common.seconds_of(action, 1, args.device) for _ in range(2))
        repeats = common.repeats_for(ROUND_SECONDS[args.device.type], single)
        return lambda: common.seconds_of(action, repeats, args.device)

    timers = {"fused": timer(problem.fused), "modules": timer(problem.modules)}
    return common.alternate(timers, args.repeats or ROUNDS[args.device.type])


def profile_model(resolution: int, bandwidth: float, args: argparse.Namespace) -> list[list[common.Cell]]:
    """Rows of the table for the first block of every stage."""
    model = build_model(load_config(args.cfg, ["DATA.IMG_SIZE", resolution])).to(args.device).train()
    blocks = [stage.blocks[0] for stage in model.layers]
    if not all(block_ops.makes_tokens(block.attn, block.pool_layers) for block in blocks):
        raise ValueError(f"{args.cfg.stem}: the operators take one level of linear pooling; use another")
    rows: list[list[common.Cell]] = []
    size = model.built_for
    for stage, layer in enumerate(model.layers):
        block = layer.blocks[0]
        for precision in args.precisions:
            for operator in ("tokens", "sum"):
                head = [stage + 1, resolution, f"{size[0]}x{size[1]}", model.feature_dims[stage], precision]
                made = profile(block, size, operator, DTYPES[precision], bandwidth, args)
                rows += [[*head, operator, *row] for row in made]
        size = size if layer.downsample is None else layer.downsample.output_size(*size)
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    return operator_parser("Time and check the LayerNorm operators of a block.").parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a result is wrong, 2 for what the user can correct."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        args.device = pick_device(args.device)
        resolve_backend("triton", args.device, torch.float32, 32, 7)  # says why the kernels cannot run
        facts = common.describe_run(args.device)
        bandwidth = measure_peaks(args.device, ()).bytes_per_second
        facts["Peaks"] = f"{bandwidth / 1e9:.4g} GB/s copied"
        facts["Configuration"] = f"{args.cfg.stem}, batch {args.batch_size}"
        rows = [row for resolution in args.sizes for row in profile_model(resolution, bandwidth, args)]
    except (ValueError, OSError) as error:
        logger.error(f"error: {error}")
        return 2
    common.publish(args.out, "block_ops", "The LayerNorm operators of a block", facts, [], COLUMNS, rows)
    return 1 if any(str(row[-1]).startswith("WRONG") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
