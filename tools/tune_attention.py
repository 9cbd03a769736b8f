"""Times and checks the attention kernels with other settings than those of `models/ops/triton/launch.py`.

    python tools/tune_attention.py --device cuda --precisions bf16 --batch-size 128

One setting is changed at a time, at every stage of a model, and timed in turns with what is in force. A ratio
above 1 is a setting that is faster: put it into the family's table there (tests/test_compile_matrix.py says
whether it spills). Results must stay those of the settings in force, but for rounding.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import benchmark_common as common
import torch
from benchmark_common import DTYPES
from profile_attention import (
    LEAST_ERROR,
    ROUND_SECONDS,
    ROUNDS,
    Contender,
    Shape,
    configured_model,
    errors,
    need_kernels,
    operator_parser,
    shapes_of,
)

from utils import pick_device

logger = logging.getLogger("tune_attention")

CHANGES: dict[str, dict[str, tuple[int, ...]]] = {  # kernel -> setting -> values; `programs`: TARGET_PROGRAMS
    "forward": {
        "num_stages": (1, 2, 3),
        "num_warps": (4, 8),
        "block_keys": (32, 64),
        "static_keys": (0, 224),
        "programs": (264, 528, 1056, 2112, 4224),
    },
    "query_gradient": {
        "num_stages": (1, 2, 3),
        "num_warps": (4, 8),
        "static_keys": (64, 128, 224),
        "programs": (132, 264, 528, 1056, 2112),
    },
    "key_gradient": {"num_stages": (1, 2, 3), "num_warps": (4, 8), "block_queries": (16, 32, 64)},
}
COLUMNS = (
    *("stage", "resolution", "map", "heads", "precision", "pass", "kernel", "setting"),
    *("ms", "lower quartile", "upper quartile", "times as fast", "check"),
)


@contextmanager
def changed(kernel: str, setting: str, value: int, head_dim: int, like: torch.Tensor) -> Iterator[bool]:
    """With one setting changed for tensors like one; yields whether it is another one than in force."""
    from models.ops.triton import launch

    if setting == "programs":
        table, key, new = launch.TARGET_PROGRAMS, kernel, value
    else:
        table = launch.CONFIGS[launch.device_family(like.device)]
        key = (kernel, 32 if head_dim <= 32 else 64, like.dtype.itemsize)
        new = replace(table[key], **{setting: value})
    before = table[key]
    table[key] = new
    try:
        yield new != before
    finally:
        table[key] = before


def candidates() -> Iterator[tuple[str, str, int]]:
    """Kernel, setting and value."""
    for kernel, settings in CHANGES.items():
        for setting, values in settings.items():
            yield from ((kernel, setting, value) for value in values)


def tune(shape: Shape, precision: str, args: argparse.Namespace) -> list[list[common.Cell]]:
    """Rows of the table for one operator."""
    device, dtype = args.device, DTYPES[precision]
    qkv, d_out = shape.inputs(args.batch_size, dtype)
    contender = Contender("triton", shape, qkv, d_out)
    few = slice(0, min(args.batch_size, args.check_images))
    checked = Contender("triton", shape, qkv[few], d_out[few])
    truth = checked.results()
    head = [
        shape.stage,
        shape.resolution,
        f"{shape.index.height}x{shape.index.width}",
        shape.heads,
        precision,
    ]
    rows = []
    for kernel, setting, value in candidates():
        kind = "forward" if kernel == "forward" else "forward+backward"
        action = contender.forward if kind == "forward" else contender.both
        name = [*head, kind, kernel, f"{setting} {value}"]
        with changed(kernel, setting, value, shape.head_dim, qkv) as is_other:
            if not is_other:
                continue
            try:
                off = errors(checked.results(), truth)
                single = min(common.seconds_of(action, 1, device) for _ in range(2))
            except Exception as error:  # shared memory, registers: whatever a compiler or driver says
                rows.append([*name, *[None] * 4, f"cannot run: {common.short_reason(error)}"])
                continue
        repeats = common.repeats_for(ROUND_SECONDS[device.type], single)

        def with_change(change=(kernel, setting, value), action=action, repeats=repeats) -> float:
            with changed(*change, shape.head_dim, qkv):
                return common.seconds_of(action, repeats, device)

        def in_force(action=action, repeats=repeats) -> float:
            return common.seconds_of(action, repeats, device)

        timers = {"other": with_change, "in force": in_force}
        times = common.alternate(timers, args.repeats or ROUNDS[device.type])
        ms = common.Spread.of([1e3 * seconds for seconds in times["other"]])
        ratio = common.speed_ratio(times["other"], times["in force"]).median
        rows.append([*name, ms.median, ms.lower, ms.upper, ratio, verdict(off, dtype)])
    return rows


def verdict(off: Sequence[float], dtype: torch.dtype) -> str:
    """Whether results differ by rounding alone."""
    wrong = [error for error in off if not error <= LEAST_ERROR[dtype]]  # one that is no number included
    return f"WRONG: off by {wrong[0]:.1e}" if wrong else "ok"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    return operator_parser("Time the attention kernels with other settings.", "bf16").parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a result is wrong, 2 for what the user can correct."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        args.device = pick_device(args.device)
        need_kernels(args.device)
        facts = common.describe_run(args.device)
        facts["Configuration"] = f"{args.cfg.stem}, batch {args.batch_size}"
        rows: list[list[common.Cell]] = []
        for resolution in args.sizes:
            model = configured_model(args.cfg, resolution, args.device)
            for shape in shapes_of(model, resolution):
                for precision in args.precisions:
                    rows += tune(shape, precision, args)
    except (ValueError, OSError) as error:
        logger.error(f"error: {error}")
        return 2
    note = "Times as fast: the settings in force take so many times as long, in the same rounds."
    common.publish(args.out, "tuning", "Settings of the attention kernels", facts, [note], COLUMNS, rows)
    return 1 if any(str(row[-1]).startswith("WRONG") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
