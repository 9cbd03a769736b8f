"""Shared by detection/flops.py and segmentation/flops.py: prints a Markdown table of parameters and
multiply-adds of configs' models, beside the numbers that the release reports.

Multiply-adds are those of matrix products and convolutions, which the literature calls FLOPs. Operators are
counted as they are called, with attention as plain matrix products; mmengine's counter would count 0 for
fused attention.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from openmmlab.runner import read_config, run_command
from utils import path_argument

if TYPE_CHECKING:
    from mmengine.config import Config, ConfigDict

COLUMNS = ("Config", "Image", "Params (M)", "reported", "MACs (G)", "reported", "difference", "backbone's")


class Cost(NamedTuple):
    """Parameters of a model, and multiply-adds of one image, in its backbone and in the rest."""

    parameters: int
    backbone_macs: int
    head_macs: int


@dataclass(frozen=True)
class Task:
    """What differs between detectors and segmenters."""

    package: str  # mmdet | mmseg
    configs: Path  # folder
    pattern: str  # of the configs that stand for a row of the release
    accuracies: Mapping[str, str]  # key of a config's `reported` -> its name in the table
    image_size: Callable[["Config"], tuple[int, int]]  # height, width of the image that counts
    count: Callable[["ConfigDict", Sequence[int]], Cost]  # of a config's `model` on an image of that size


def plain_backbone(backbone: "ConfigDict") -> dict[str, Any]:
    """A Focal backbone's config with attention as plain matrix products; others as they are. No weights."""
    plain = {"attention_backend": "plain", "with_cp": False} if backbone.type == "FocalBackbone" else {}
    return {**backbone, **plain, "init_cfg": None}


def table(task: Task, paths: Sequence[Path]) -> str:
    """The table of these configs. Those with the same model (1x and 3x) are counted once."""
    known: dict[str, Cost] = {}
    lines = [[*COLUMNS, f"{', '.join(task.accuracies.values())} reported"]]
    lines.append(["---", "---", *["---:"] * (len(COLUMNS) - 1)])
    for path in paths:
        config = read_config(str(path))
        size = task.image_size(config)
        key = repr((config.model, size))
        if key not in known:
            known[key] = task.count(config.model, size)
        cost, reported = known[key], config.get("reported") or {}
        macs, flops = (cost.backbone_macs + cost.head_macs) / 1e9, reported.get("flops_g")
        lines.append(
            [
                path.stem,
                f"{size[0]} x {size[1]}",
                f"{cost.parameters / 1e6:.1f}",
                str(reported.get("params_m", "")),
                f"{macs:.0f}",
                str(flops or ""),
                f"{100 * (macs / flops - 1):+.1f} %" if flops else "",
                f"{cost.backbone_macs / 1e9:.0f}",
                ", ".join(str(reported[key]) for key in task.accuracies if key in reported),
            ]
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(task: Task, description: str, argv: Sequence[str] | None = None) -> int:
    """Print the table, or write it to a file; returns 2 after a mistake of the user."""
    parser = argparse.ArgumentParser(description=description)
    default = f"{task.configs.parent.name}/configs"
    parser.add_argument("configs", nargs="*", type=path_argument, help=f"config files (those of {default})")
    parser.add_argument("--out", type=path_argument, help="Markdown file to write instead of printing")
    args = parser.parse_args(argv)

    def print_table() -> None:
        text = table(task, [*map(Path, args.configs)] or sorted(task.configs.glob(task.pattern)))
        versions = [
            f"{name} {import_module(name).__version__}" for name in ("torch", "mmengine", task.package)
        ]
        text = f"{text}\n{', '.join(versions)}\n"
        if args.out:
            Path(args.out).write_text(text, encoding="utf-8")
        else:
            print(text)

    return run_command(print_table)
