"""Times the linear layers of a model on the CPU, as products and as the convolutions that compute the same.

    python tools/profile_linear.py --batch-size 8 --sizes 224 448

What the rule of `models/linear.py` is about; `chosen` says what it takes on this machine. A row is one
layer over the tokens of all images, in float32: the forward pass, and the one with gradients of input, weight
and bias.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import benchmark_common as common
import torch
from profile_attention import ROUND_SECONDS, ROUNDS
from torch import Tensor, nn
from torch.nn import functional as F

from config import load_config
from models import build_model, linear
from models.focal_transformer import FocalBlock

logger = logging.getLogger("profile_linear")

CPU = torch.device("cpu")
COLUMNS = (
    *("stage", "resolution", "layer", "rows", "input", "output", "pass", "product ms", "convolution ms"),
    *("speed-up", "lower quartile", "upper quartile", "chosen"),
)


def layers_of(block: FocalBlock) -> dict[str, nn.Linear]:
    """The linear layers that every token goes through."""
    return {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}


def profile(layer: nn.Linear, tokens: int, args: argparse.Namespace) -> list[list[common.Cell]]:
    """The two rows of one layer over so many tokens: forward, and with backward."""
    torch.manual_seed(1)
    x = torch.randn(tokens, layer.in_features, requires_grad=True)
    cotangent = torch.randn(tokens, layer.out_features)
    leaves = (x, *layer.parameters())
    rows: list[list[common.Cell]] = []
    for name in ("forward", "forward+backward"):

        def timer(call: Callable[..., Tensor], backward: bool) -> Callable[[], float]:
            def action() -> None:
                with torch.set_grad_enabled(backward):
                    y = call(x, layer.weight, layer.bias)
                if backward:
                    torch.autograd.grad(y, leaves, cotangent)

            single = min(common.seconds_of(action, 1, CPU) for _ in range(2))
            repeats = common.repeats_for(ROUND_SECONDS["cpu"], single)
            return lambda: common.seconds_of(action, repeats, CPU)

        calls = {"product": F.linear, "convolution": linear.convolution}
        timers = {key: timer(call, name != "forward") for key, call in calls.items()}
        times = common.alternate(timers, args.repeats or ROUNDS["cpu"])
        product, convolution = (1e3 * common.Spread.of(times[key]).median for key in calls)
        ratio = common.speed_ratio(times["convolution"], times["product"])
        with torch.set_grad_enabled(name != "forward"):
            chosen = "convolution" if linear.is_convolution(x, layer.weight, layer.bias) else "product"
        sizes = [tokens, layer.in_features, layer.out_features]
        spread = [ratio.median, ratio.lower, ratio.upper]
        rows.append([*sizes, name, product, convolution, *spread, chosen])
    return rows


def profile_model(resolution: int, args: argparse.Namespace) -> list[list[common.Cell]]:
    """Rows of the table for the first block of every stage."""
    model = build_model(load_config(args.cfg, ["DATA.IMG_SIZE", resolution]))
    rows: list[list[common.Cell]] = []
    size = model.built_for
    for stage, layer in enumerate(model.layers):
        for name, product in layers_of(layer.blocks[0]).items():
            made = profile(product, args.batch_size * size[0] * size[1], args)
            rows += [[stage + 1, resolution, name, *row] for row in made]
        size = size if layer.downsample is None else layer.downsample.output_size(*size)
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time linear layers as products and as convolutions.")
    default = common.REPO / "configs" / "focal_tiny_patch4_window7_224.yaml"
    parser.add_argument("--cfg", type=Path, default=default, help="configuration (default: Focal-T)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224], help="resolutions in pixels")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--repeats", type=int, help=f"rounds (default: {ROUNDS['cpu']})")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a dated .md and .csv here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for what the user can correct."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if args.threads is not None:
            if args.threads < 1:
                raise ValueError(f"--threads: expected 1 or more, got {args.threads}")
            torch.set_num_threads(args.threads)
        facts = common.describe_run(CPU)
        facts["Configuration"] = f"{args.cfg.stem}, batch {args.batch_size}, float32"
        rows = [row for resolution in args.sizes for row in profile_model(resolution, args)]
    except (ValueError, OSError) as error:
        logger.error(f"error: {error}")
        return 2
    common.publish(args.out, "linear", "Linear layers as products and convolutions", facts, [], COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
