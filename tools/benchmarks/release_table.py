"""Measures the release's table of throughput again, side by side on one machine.

    python -m tools.benchmarks.release_table
    python -m tools.benchmarks.release_table --device cuda

All 17 rows of the table, with Focal-fast beside them, at 224, 448 and 896 pixels: inference, float32 on a CPU
and bfloat16 on CUDA. The models of a size are timed at a resolution in alternating rounds, in a process of
their own that cannot take more memory than is free; where it runs out, the batch is halved for all of them.
A model that cannot run has the reason in its row. The table shows each ratio to Swin beside the release's.
Parameters and multiply-adds are those at the smallest resolution measured.

DeiT, ViT and Swin are timm's, ViL is in vil.py, PVT and CvT are those of transformers, which
`pip install -r tools/benchmarks/requirements.txt` installs. Writes <date>_<name>.md, .csv and .png.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from tools.figures.drawing import blank_figure
from utils import UserError

from . import common, models
from .entries import FAMILIES, SIZES, Entry, Source
from .models import Row, Setting
from .vil import ViL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("benchmarks.release_table")

RESOLUTIONS = (224, 448, 896)
BATCH = {"cpu": 8, "cuda": 128}
PRECISION = {"cpu": "fp32", "cuda": "bf16"}
COLUMNS = (
    *("model", "size", "resolution", "precision", "batch", "rounds", "img/s", "vs swin", "reported img/s"),
    *("reported vs swin", "params M", "reported params M", "GMACs", "reported GMACs", "note"),
)


# --- Models -------------------------------------------------------------------------------------------------


def pvt(depths: list[int], img_size: int, num_classes: int) -> nn.Module:
    """Pyramid Vision Transformer, version 1."""
    return from_transformers("Pvt", num_labels=num_classes, image_size=img_size, depths=depths)


def cvt(depths: list[int], img_size: int, num_classes: int) -> nn.Module:
    """Convolutional vision Transformer, whose weights fit all sizes of images."""
    return from_transformers("Cvt", num_labels=num_classes, depth=depths)


def from_transformers(family: str, **options: object) -> nn.Module:
    """A classifier of transformers that returns its logits alone; the options are those of its configuration.

    Raises:
        UserError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError("pip install -r tools/benchmarks/requirements.txt") from error
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForImageClassification")(config)
    model.register_forward_hook(lambda model, images, output: output.logits)
    return model


class Model(NamedTuple):
    """A row of the release's table: how it is built, and what is reported of it, None where nothing is."""

    family: str
    size: str
    source: Source
    params_m: float  # millions of parameters, in the model's own paper
    macs_g: float  # G multiply-adds, which the release calls FLOPs, at 224 pixels
    rates: tuple[int | None, ...]  # images per second at RESOLUTIONS, on a GPU that the release does not name


FAST = FAMILIES["focalv2"]
MODELS: dict[str, Model] = {
    "DeiT-Small/16": Model("DeiT", "tiny", "deit_small_patch16_224", 22, 4.6, (939, 101, 20)),
    "PVT-Small": Model("PVT", "tiny", partial(pvt, [3, 4, 6, 3]), 24.5, 3.8, (794, 172, 31)),
    "CvT-13": Model("CvT", "tiny", partial(cvt, [1, 2, 10]), 20, 4.5, (746, 125, 14)),
    "ViL-Small": Model("ViL", "tiny", partial(ViL, (1, 2, 8, 1)), 24.6, 5.1, (397, 87, 17)),
    "Swin-Tiny": Model("Swin", "tiny", FAMILIES["swin"]["tiny"], 29, 4.5, (760, 189, 48)),
    "Focal-Tiny": Model("Focal", "tiny", FAMILIES["focal"]["tiny"], 28.9, 4.9, (319, 105, 27)),
    "PVT-Medium": Model("PVT", "small", partial(pvt, [3, 4, 18, 3]), 44.2, 6.7, (517, 111, 20)),
    "CvT-21": Model("CvT", "small", partial(cvt, [1, 4, 16]), 32, 7.1, (480, 85, 10)),
    "ViL-Medium": Model("ViL", "small", partial(ViL, (1, 4, 16, 1)), 39.7, 9.1, (251, 53, 8)),
    "Swin-Small": Model("Swin", "small", FAMILIES["swin"]["small"], 50, 8.7, (435, 111, 28)),
    "Focal-Small": Model("Focal", "small", FAMILIES["focal"]["small"], 51.1, 9.4, (192, 63, 17)),
    "ViT-Base/16": Model("ViT", "base", "vit_base_patch16_224", 86, 17.6, (291, 57, 8)),
    "DeiT-Base/16": Model("DeiT", "base", "deit_base_patch16_224", 86, 17.6, (291, 57, 8)),
    "PVT-Large": Model("PVT", "base", partial(pvt, [3, 8, 27, 3]), 61.4, 9.8, (352, 77, 14)),
    "ViL-Base": Model("ViL", "base", partial(ViL, (1, 8, 24, 1)), 55.7, 13.4, (145, 35, 5)),
    "Swin-Base": Model("Swin", "base", FAMILIES["swin"]["base"], 88, 15.4, (291, 70, 17)),
    "Focal-Base": Model("Focal", "base", FAMILIES["focal"]["base"], 89.8, 16.4, (138, 44, 11)),
    "Focal-fast-Tiny, conv": Model("Focal-fast", "tiny", FAST["tiny"], 30.2, 5.0, (483, None, None)),
    "Focal-fast-Small, conv": Model("Focal-fast", "small", FAST["small"], 51.5, 9.4, (293, None, None)),
    "Focal-fast-Base, conv": Model("Focal-fast", "base", FAST["base"], 91.2, 16.4, (203, None, None)),
}


def reported_rate(model: str, resolution: int) -> int | None:
    """Images per second in the release's table."""
    return dict(zip(RESOLUTIONS, MODELS[model].rates, strict=True)).get(resolution)


def reported_ratio(model: str, resolution: int) -> float | None:
    """To Swin of the same size, in the release's table."""
    ours = reported_rate(model, resolution)
    swin = reported_rate(f"Swin-{MODELS[model].size.capitalize()}", resolution)
    return ours / swin if ours and swin else None


# --- Measuring ----------------------------------------------------------------------------------------------


def run_group(args: argparse.Namespace, size: str, resolution: int) -> list[Row]:
    """Time the chosen models of a size at a resolution; above 224, batch and rounds are smaller."""
    group = [Entry(label, MODELS[label].source, size) for label in args.models if MODELS[label].size == size]
    scale = min(1.0, 224 / resolution)
    setting = Setting(size, resolution, "infer", PRECISION[args.device.type], "eager")
    batch = max(1, round((args.batch_size or BATCH[args.device.type]) * scale**2))
    rounds = max(1, round(args.rounds * scale))
    logger.info(f"{setting}, batch {batch}: {', '.join(entry.label for entry in group)}")
    job = (setting, group, batch, rounds, args.device)
    rows, reason = common.in_process(None, run_in_process, args.device, torch.get_num_threads(), *job)
    return rows or [Row(entry, setting, batch, note=reason) for entry in group]


def run_in_process(device: torch.device, threads: int, *job: Any) -> list[Row]:
    """`models.run_group(*job)`; on a CPU, a model that needs more memory than is free now fails alone."""
    torch.set_num_threads(threads)
    if device.type == "cpu" and sys.platform == "linux":
        import resource

        import psutil

        resource.setrlimit(resource.RLIMIT_DATA, (psutil.virtual_memory().available, resource.RLIM_INFINITY))
    return models.run_group(*job)


# --- Results ------------------------------------------------------------------------------------------------


def cells(row: Row) -> list[common.Cell]:
    """By COLUMNS."""
    model, resolution = row.entry.label, row.setting.resolution
    speed = (row.batch, len(row.seconds), row.rate, row.ratio)
    reported = (reported_rate(model, resolution), reported_ratio(model, resolution))
    params, macs = row.params and row.params / 1e6, row.macs and row.macs / 1e9
    counts = (params, MODELS[model].params_m, macs, MODELS[model].macs_g)
    return [model, row.entry.size, resolution, row.setting.precision, *speed, *reported, *counts, row.note]


def table(rows: Sequence[Row]) -> str:
    """A line per model, and for each resolution images per second, ratio to Swin, and that of the release."""
    found = {(row.entry.label, row.setting.resolution): row for row in rows}
    resolutions = sorted({resolution for _, resolution in found})
    columns = ["Model", "params M", "reported", "GMACs", "reported"]
    for resolution in resolutions:
        columns += [f"img/s at {resolution}", "vs Swin", "release"]
    lines = []
    for model in (label for label in MODELS if (label, resolutions[0]) in found):
        line = [model, *cells(found[model, resolutions[0]])[-5:-1]]
        for resolution in resolutions:
            row = found.get((model, resolution))
            if row is None:  # not yet measured
                line += [None] * 3
                continue
            rate = row.rate.median if row.rate else row.note
            line += [rate, row.ratio and row.ratio.median, reported_ratio(model, resolution)]
        lines.append(line)
    return common.markdown_table(columns, lines)


def draw(rows: Sequence[Row]) -> "Figure":
    """Images per second against resolution: a panel per size of models."""
    from matplotlib.ticker import NullLocator

    sizes = [size for size in SIZES if any(row.entry.size == size for row in rows)]
    resolutions = sorted({row.setting.resolution for row in rows})
    families = list(dict.fromkeys(model.family for model in MODELS.values()))
    figure, handles = blank_figure(figsize=(4 * len(sizes), 4.5)), {}
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        for label, model in MODELS.items():
            measured = [row for row in rows if row.entry.label == label and row.rate and model.size == size]
            width, colour = 1 + 1.5 * model.family.startswith("Focal"), f"C{families.index(model.family)}"
            places = [row.setting.resolution for row in measured]
            rates = [row.rate.median for row in measured]
            (handles[model.family],) = axes.loglog(places, rates, ".-", color=colour, linewidth=width)
        axes.set_title(size)
        axes.set_xticks(resolutions, labels=map(str, resolutions))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3, which="both")
    figure.supxlabel("side of the images in pixels")
    figure.supylabel("images per second")
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles))
    return figure


# --- Command line -------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.new_parser("Measure the release's table of throughput again.", "release_table")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--sizes", type=common.positive, nargs="+", default=RESOLUTIONS, help="of the images")
    parser.add_argument("--batch-size", type=common.positive, help=f"at 224 pixels (default: {BATCH})")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> int:
    """Run all groups; the files are written after each."""
    blank_figure()  # says that matplotlib is missing before, not after measuring
    facts, rows = common.describe_run(args.device), []
    facts["Versions"] += f", transformers {common.version('transformers')}"
    notes = [
        f"Inference in {PRECISION[args.device.type]}, medians of alternating rounds; the .csv file has "
        "batches and rounds. `release` is the ratio to Swin of the same size that the release reports, for "
        "a GPU that it does not name. Reported parameters are those of each model's paper, reported GMACs "
        "those of the release, both at 224 pixels. The models of timm and ViL use PyTorch's fused "
        "attention; PVT and CvT, of transformers, do not. ViT-Base/16 and DeiT-Base/16 are the same "
        "network: the difference between their rows is noise."
    ]
    sizes = [size for size in SIZES if any(MODELS[label].size == size for label in args.models)]
    for resolution, size in product(sorted(args.sizes), sizes):
        rows += run_group(args, size, resolution)
        title, lines, figure = "The release's table of throughput", [cells(row) for row in rows], draw(rows)
        common.publish(args, title, facts, notes, COLUMNS, lines, [table(rows)], figure)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for an error that the user can correct."""
    return common.run_command(parse(argv), measure)


if __name__ == "__main__":
    sys.exit(main())
