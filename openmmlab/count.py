"""Shared by detection/count.py and segmentation/count.py: a command that prints parameters and multiply-adds
of configs' models, beside what the release reports, as a Markdown table.

Multiply-adds are those of matrix products and convolutions, which the literature calls FLOPs. Operators are
counted as they are called, with attention as plain matrix products; mmengine's counter would count 0 for
fused attention.
"""

import argparse
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from openmmlab.runner import read_config, run_command
from utils import path_argument

if TYPE_CHECKING:
    from mmengine.config import Config, ConfigDict

COLUMNS = (
    *("Config", "Image", "Params (M)", "reported", "MACs (G)", "reported", "difference", "backbone's"),
)


@dataclass(frozen=True)
class Cost:
    """Parameters of a model, and multiply-adds of one image, in its backbone and in the rest."""

    parameters: int
    backbone_macs: int
    head_macs: int

    @property
    def macs(self) -> int:
        return self.backbone_macs + self.head_macs


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
    lines = [_line([*COLUMNS, f"{', '.join(task.accuracies.values())} reported"])]
    lines.append("|---|---|" + "---:|" * (len(COLUMNS) - 1) + "\n")
    for path in paths:
        config = read_config(str(path))
        size = task.image_size(config)
        key = repr((config.model, size))
        if key not in known:
            known[key] = task.count(config.model, size)
        lines.append(row(path.stem, size, known[key], config.get("reported"), [*task.accuracies]))
    return "".join(lines)


def row(
    name: str,
    size: Sequence[int],
    cost: Cost,
    reported: Mapping[str, float] | None,
    accuracies: Sequence[str],
) -> str:
    """One line of the table."""
    said = reported or {}
    flops = said.get("flops_g")
    return _line(
        [
            name,
            f"{size[0]} x {size[1]}",
            f"{cost.parameters / 1e6:.1f}",
            said.get("params_m", ""),
            f"{cost.macs / 1e9:.0f}",
            flops or "",
            f"{100 * (cost.macs / 1e9 / flops - 1):+.1f} %" if flops else "",
            f"{cost.backbone_macs / 1e9:.0f}",
            ", ".join(str(said[key]) for key in accuracies if key in said),
        ]
    )


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |\n"


def versions(package: str) -> str:
    """Versions of Python and of the packages that build the models."""
    parts = {"Python": platform.python_version(), "torch": torch.__version__}
    parts |= {name: import_module(name).__version__ for name in ("mmengine", package)}
    return ", ".join(f"{name} {version}" for name, version in parts.items())


def main(task: Task, description: str, argv: Sequence[str] | None = None) -> int:
    """Print the table, or write it to a file; returns 2 after a mistake of the user."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "configs",
        nargs="*",
        type=path_argument,
        help=f"config files (those of {task.configs.parent.name}/configs)",
    )
    parser.add_argument("--out", type=path_argument, help="Markdown file to write instead of printing")
    args = parser.parse_args(argv)

    def print_table() -> None:
        text = table(task, [*map(Path, args.configs)] or sorted(task.configs.glob(task.pattern)))
        text = f"{text}\n{versions(task.package)}\n"
        if args.out:
            Path(args.out).write_text(text, encoding="utf-8")
        else:
            print(text)

    return run_command(print_table)
