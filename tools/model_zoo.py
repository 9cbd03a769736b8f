"""Writes the tables of MODEL_ZOO.md: every row that the release reports, and beside it what this code counts.

    python -m tools.model_zoo

The quoted numbers are in tools/release_numbers.py. Parameters and multiply-adds of classifiers are counted
here; those of detectors and segmenters come from the newest tables in tools/results that detection/flops.py
and segmentation/flops.py made.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from config import load_config
from models import count_params_and_macs
from tools import release_numbers as release
from tools.benchmarks.common import REPO, RESULTS, Cell, markdown_table
from utils import UserError, run_command

PAGE = REPO / "MODEL_ZOO.md"
COST = ("Params, M (quoted)", "MACs, G (quoted)")


def table(columns: Sequence[str], alignment: str, rows: Iterable[Sequence[Cell]]) -> str:
    """A table, in which None is an empty cell; `alignment` as in `markdown_table`."""
    cells = (["" if cell is None else str(cell) for cell in row] for row in rows)
    return markdown_table(columns, cells, alignment) + "\n"


def beside(count: str, quoted: Cell) -> str:
    """A counted number, with the quoted one in brackets if there is one."""
    return count if quoted is None else f"{count} ({quoted})"


def newest(task: str) -> Path:
    """The newest table of the parameters and multiply-adds of a task's models."""
    return max(RESULTS.glob(f"*_{task}_models.md"))


def counted(task: str) -> dict[str, tuple[str, str]]:
    """Parameters (M) and multiply-adds (G) by config, from the newest table of a flops.py."""
    lines = newest(task).read_text(encoding="utf-8").splitlines()
    header, _, *rows = ([cell.strip() for cell in line.split("|")] for line in lines if line[:1] == "|")
    name, params, macs = (header.index(column) for column in ("Config", "Params (M)", "MACs (G)"))
    return {row[name]: (row[params], row[macs]) for row in rows}


def classifiers() -> str:
    """Of ImageNet-1K; parameters and multiply-adds are counted now."""
    rows = []
    for row in release.CLASSIFIERS:
        config = f"configs/{row.config}.yaml"
        params, macs = count_params_and_macs(load_config(REPO / config))
        cost = (beside(f"{params / 1e6:.1f}", row.params_m), beside(f"{macs / 1e9:.2f}", row.flops_g))
        file = f"`{row.weights}`" if row.weights else "not released"
        rows.append((f"[{row.model}]({config})", *cost, row.top1, row.top5, file))
    return table(("Model", *COST, "Top-1 %", "Top-5 %", "File of the release"), "lrrrrl", rows)


def speeds() -> str:
    """Of throughput, as quoted."""
    columns = ("Model", "Top-1 %", "MACs (G)", "224 x 224", "448 x 448", "896 x 896")
    return table(columns, "lrrrrr", (row[1:] for row in release.SPEEDS))


def backbone_and_cost(task: str, row: release.Detector | release.Segmenter) -> tuple[str, str, str]:
    """Link to the config, parameters, multiply-adds.

    Raises:
        UserError: the model was not counted.
    """
    known = counted(task)
    if row.config not in known:
        raise UserError(
            f"{row.config} is not in {newest(task)}: count all configs (python -m {task}.flops --out FILE)"
        )
    params, macs = known[row.config]
    link = f"[{row.backbone}]({task}/configs/{row.config}.py)"
    return link, beside(params, row.params_m), beside(macs, row.flops_g)


def detectors() -> str:
    """Of COCO."""
    columns = ("Method", "Backbone", "Pretrained on", "Schedule", *COST, "Box AP", "Mask AP")
    rows = []
    for row in release.DETECTORS:
        backbone, *cost = backbone_and_cost("detection", row)
        rows.append((row.method, backbone, row.pretraining, row.schedule, *cost, row.box_ap, row.mask_ap))
    return table(columns, "llllrrrr", rows)


def segmenters() -> str:
    """Of ADE20K."""
    columns = ("Backbone", "Pretrained on", "Crop", *COST, "mIoU", "mIoU, several scales")
    rows = []
    for row in release.SEGMENTERS:
        backbone, *cost = backbone_and_cost("segmentation", row)
        rows.append((backbone, row.pretraining, f"{row.crop} x {row.crop}", *cost, row.miou, row.miou_ms))
    return table(columns, "lllrrrr", rows)


def with_tables(page: str) -> str:
    """The page with new tables: each below a comment with its name."""
    for make in (classifiers, speeds, detectors, segmenters):
        comment = f"<!-- {make.__name__} -->\n"
        before, after = page.split(comment)
        after = re.sub(r"\A(\|.*\n)*", "", after)
        page = before + comment + make() + after
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for what the user can correct."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(argv)

    def write() -> None:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

    return run_command(write)


if __name__ == "__main__":
    sys.exit(main())
