"""Writes MODEL_ZOO.md: every row that the release reports, and beside it what this code counts.

    python -m tools.model_zoo --write

The quoted numbers are in tools/release_numbers.py. Parameters and multiply-adds of classifiers are counted
here; those of detectors and segmenters come from the newest tables in tools/results that detection/count.py
and segmentation/count.py made. Without --write, the page is printed.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path

from config import load_config
from models import count_params_and_macs
from tools import release_numbers as release
from utils import UserError

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "MODEL_ZOO.md"
RESULTS = REPO / "tools" / "results"

Cell = str | int | float | None

PAGE_TEXT = """\
# Model zoo

Every result that the [original release](https://github.com/microsoft/Focal-Transformer) reports, with the config for
it in this repository. **Accuracies, and numbers in brackets, are quoted from the release**: nothing was trained on
ImageNet, COCO or ADE20K here. All other numbers are counted from this code. The release says FLOPs where multiply-adds
(MACs) are meant. The name of a model or backbone links to the config.

<!-- Written by tools/model_zoo.py from tools/release_numbers.py: change those, and run
     python -m tools.model_zoo --write -->

- [Weights](#weights)
- [ImageNet-1K](#imagenet-1k)
- [Throughput](#throughput)
- [COCO](#coco)
- [ADE20K](#ade20k)

## Weights

The release published weights of its nine classifiers; the next table has their file names. **The download links were
dead when last tried, in November 2026.** It published no weights of Focal-L, of detectors or of segmenters, and this
project has none of its own. A local copy loads unchanged, with the config of its row, to evaluate it or to start a
detector from it:

```sh
python main.py --cfg configs/focal_tiny_patch4_window7_224.yaml --data-path imagenet --eval --resume focal-tiny-is224-ws7.pth
python detection/train.py detection/configs/mask-rcnn_focal-tiny_fpn_1x_coco.py --pretrained focal-tiny-is224-ws7.pth
```

The guide of [classification](classification/get_started.md#fine-tune) has fine-tuning and predictions, and
`models.load_checkpoint(model, "focal-tiny-is224-ws7.pth")` is for other code. If a weight does not fit, nothing is loaded
and an error lists what differs.

## ImageNet-1K

[ImageNet-1K](https://www.image-net.org), images of 224 x 224, no other data. The recipes are the release's, except for
Focal-L, of which it has no config.

{classifiers}
- "conv": overlapping convolutions as patch embeddings. Focal-fast is in the release's code, not in the paper.
- Matrix products and convolutions are counted; norms, activations and softmax are not.
- The release reports no classifier Focal-L: its config is here for the detectors and the segmenter below.

## Throughput

Images per second on one GPU by image size, **all quoted** from the release, which does not name the GPU. It reports
Focal-fast at 224 x 224 only. The same models measured on a CPU:
{measured}.

{speeds}
## COCO

[COCO 2017](https://cocodataset.org), AP on mini-val; 1x and 3x are 12 and 36 epochs. Methods:
[Mask R-CNN](https://arxiv.org/abs/1703.06870),
[RetinaNet](https://arxiv.org/abs/1708.02002),
[Cascade Mask R-CNN](https://arxiv.org/abs/1906.09756) (from [Cascade R-CNN](https://arxiv.org/abs/1712.00726)),
[ATSS](https://arxiv.org/abs/1912.02424),
[RepPointsV2](https://arxiv.org/abs/2007.08508),
[Sparse R-CNN](https://arxiv.org/abs/2011.12450),
[DyHead](https://arxiv.org/abs/2106.08322) and
[HTC++](https://arxiv.org/abs/1901.07518), an extended HTC.
The release has no configs of detectors: it says that it follows
[Swin Transformer's](https://github.com/SwinTransformer/Swin-Transformer-Object-Detection). So do the recipes here, with
exceptions that the configs name.

{detectors}
- Counted for one image of 800 x 1280, with 1000 proposals and 100 masks.
  {detection_table} compares all configs with the
  quoted numbers, also those with Focal-fast backbones, of which the release reports nothing.
- The two rows of Focal-L are in none of the release's tables, and it does not say their pretraining or schedule. Its
  introduction gives 58.7 box AP and 50.9 mask AP of the largest model (test-dev: 58.9 and 51.3), which are two models. The
  box AP is that of ATSS + DyHead, tested at several scales (at one: 56.4); this and its 229 M parameters are in the
  [FocalNet paper](https://arxiv.org/abs/2203.11926). The mask AP is that of HTC++, which the
  [Focal Transformer paper](https://arxiv.org/abs/2107.00641) uses for instance segmentation.
- The recipe of ATSS + DyHead, of 24 epochs, is MMDetection's for Swin-L; that of HTC++, of 72, was chosen here. Both have
  a `tta_pipeline` for `detection/test.py --tta`, with scales chosen here.

MACs that differ by more than 2 % from the quoted ones (the same heads on Swin's backbones have the MACs that Swin's
authors report, so the heads are not the reason):

- Mask R-CNN with Focal-T, -2.5 %, and ATSS, -3.1 %: 7 G less than quoted, as with Cascade Mask R-CNN. The quoted rows are
  24 G above Swin-T's, the counted ones 17 G. RetinaNet's rows agree, so the release counted two different backbones; how
  they differ is not known.
- Mask R-CNN with Focal-S, -4.1 %: 17 G less than quoted; RetinaNet with Focal-S has only 2 G less. The reason is not known.
- RepPointsV2, -39 %: the quoted row is 208 G above Swin-T's, more than the whole backbone takes. Neck and head take 186 G;
  counted twice they would make it 485 G. Whether they were is not known.

Parameters of ATSS + DyHead: 227.5 M with windows of 12 tokens, which Swin-L has; with windows of 7 it would be 213 M.

## ADE20K

[ADE20K](https://groups.csail.mit.edu/vision/datasets/ADE20K/), [UPerNet](https://arxiv.org/abs/1807.10221), 160,000
iterations; mIoU on the validation set, at one scale and at several. As with detectors, the release says that it follows
[Swin Transformer's](https://github.com/SwinTransformer/Swin-Transformer-Semantic-Segmentation) segmenters. So do the
recipes here, with exceptions that the configs name.

{segmenters}
- Counted for one image of 512 x 2048, or 640 x 2560 with Focal-L.
  {segmentation_table} compares all configs
  with the quoted numbers, also those with convolutional embeddings and Focal-fast backbones.

Numbers that differ by more than 2 % from the quoted ones:

- Parameters of T, S and B, -2.1 to -2.6 %: with convolutional embeddings they are 62.5, 84.8 and 126.8 M, nearly the quoted
  ones. The release does not say which embeddings it used.
- MACs of T, S and B, -3.6, -5.9 and -9.7 %: 36, 66 and 132 G less than quoted. This is in the backbones, since the same
  heads on Swin's have the MACs that Swin's authors report. Convolutional embeddings add only 5 to 9 G. More keys cannot be
  the reason: their cost grows with the width, so if S takes 66 G for them, B takes 88 G
  and not 132. The reason is not known.
- MACs of L, -24 %: the quoted number is for more pixels. Swin-L has 2580 G on 640 x 2560 and 3235 G on 800 x 2560, and is
  reported with 3230 G. Focal-L has 3231 G on 800 x 2560, or 3364 G with windows of 12 tokens, with which it has too many
  parameters (251 M).
"""  # noqa: E501


def markdown(columns: Sequence[str], alignment: str, rows: Iterable[Sequence[Cell]]) -> str:
    """A table; `alignment` has a letter per column, l or r, and None is an empty cell."""
    rules = [{"l": "---", "r": "---:"}[letter] for letter in alignment]
    cells = (["" if cell is None else str(cell) for cell in row] for row in rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, rules, *cells))


def link(text: str, path: str) -> str:
    """A link to a file, whose path is relative to the page."""
    return f"[{text}]({path})"


def beside(count: str, quoted: Cell) -> str:
    """A counted number, with the quoted one in brackets if there is one."""
    return count if quoted is None else f"{count} ({quoted})"


def newest(kind: str) -> Path:
    """The newest result file of a kind.

    Raises:
        UserError: there is none.
    """
    found = sorted(RESULTS.glob(f"*_{kind}.md"))
    if not found:
        raise UserError(f"{RESULTS}: expected a file *_{kind}.md, got none; make it with count.py")
    return found[-1]


def counted(path: Path) -> dict[str, tuple[str, str]]:
    """Parameters (M) and multiply-adds (G) by config, from a table that a count.py made.

    Raises:
        UserError: the file has no such table.
    """
    wanted = ("Config", "Params (M)", "MACs (G)")
    lines = iter(path.read_text(encoding="utf-8").splitlines())
    header = next((_cells(line) for line in lines if {*wanted} <= {*_cells(line)}), None)
    if header is None:
        raise UserError(f"{path}: expected a table with the columns {', '.join(wanted)}, got none")
    name, params, macs = (header.index(column) for column in wanted)
    rows = [_cells(line) for line in takewhile(lambda line: line.startswith("|"), lines)]
    return {row[name]: (row[params], row[macs]) for row in rows[1:]}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def cost_of(config: str, cost: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """Parameters and multiply-adds of a config; UserError if the table of costs lacks it."""
    if config not in cost:
        raise UserError(
            f"{config} is not in the newest table of tools/results: count all configs (python -m "
            "detection.count, python -m segmentation.count)"
        )
    return cost[config]


def classifiers_table() -> str:
    """Of ImageNet-1K; parameters and multiply-adds are counted now."""
    columns = ("Model", "Params, M (quoted)", "MACs, G (quoted)", "Top-1 %", "Top-5 %", "File of the release")
    rows = []
    for row in release.CLASSIFIERS:
        config = f"configs/{row.config}.yaml"
        params, macs = count_params_and_macs(load_config(REPO / config))
        cost = (beside(f"{params / 1e6:.1f}", row.params_m), beside(f"{macs / 1e9:.2f}", row.flops_g))
        file = f"`{row.weights}`" if row.weights else "not released"
        rows.append((link(row.model, config), *cost, row.top1, row.top5, file))
    return markdown(columns, "lrrrrl", rows)


def speeds_table() -> str:
    """Of throughput, as quoted."""
    columns = ("Model", "Top-1 %", "MACs (G)", "224 x 224", "448 x 448", "896 x 896")
    return markdown(columns, "lrrrrr", (row[1:] for row in release.SPEEDS))


def detectors_table(cost: dict[str, tuple[str, str]]) -> str:
    """Of COCO; `cost` from `counted`."""
    columns = ("Method", "Backbone", "Pretrained on", "Schedule", "Params, M (quoted)", "MACs, G (quoted)")
    columns += ("Box AP", "Mask AP")
    rows = []
    for row in release.DETECTORS:
        params, macs = cost_of(row.config, cost)
        backbone = link(row.backbone, f"detection/configs/{row.config}.py")
        numbers = (beside(params, row.params_m), beside(macs, row.flops_g), row.box_ap, row.mask_ap)
        rows.append((row.method, backbone, row.pretraining, row.schedule, *numbers))
    return markdown(columns, "llllrrrr", rows)


def segmenters_table(cost: dict[str, tuple[str, str]]) -> str:
    """Of ADE20K; `cost` from `counted`."""
    columns = ("Backbone", "Pretrained on", "Crop", "Params, M (quoted)", "MACs, G (quoted)")
    columns += ("mIoU", "mIoU, several scales")
    rows = []
    for row in release.SEGMENTERS:
        params, macs = cost_of(row.config, cost)
        backbone = link(row.backbone, f"segmentation/configs/{row.config}.py")
        numbers = (beside(params, row.params_m), beside(macs, row.flops_g), row.miou, row.miou_ms)
        rows.append((backbone, row.pretraining, f"{row.crop} x {row.crop}", *numbers))
    return markdown(columns, "lllrrrr", rows)


def page() -> str:
    """The whole page."""
    detection, segmentation = newest("detection_models"), newest("segmentation_models")
    results = {"detection_table": detection, "segmentation_table": segmentation}
    results["measured"] = newest("release_table")
    return PAGE_TEXT.format(
        classifiers=classifiers_table(),
        speeds=speeds_table(),
        detectors=detectors_table(counted(detection)),
        segmenters=segmenters_table(counted(segmentation)),
        **{name: link(path.name, f"tools/results/{path.name}") for name, path in results.items()},
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} instead of printing it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for what the user can correct."""
    args = parse(argv)
    try:
        text = page()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
