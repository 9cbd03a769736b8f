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

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "MODEL_ZOO.md"
RESULTS = REPO / "tools" / "results"

Cell = str | int | float | None

PAGE_TEXT = """\
# Model zoo

Every row that the original release reports, with the config that stands for it here. **Quoted** columns are the
release's own numbers: nothing was trained on ImageNet, COCO or ADE20K here. The other columns are counted from
this code. The release says FLOPs where multiply-adds (MACs) are meant.

<!-- Written by tools/model_zoo.py from tools/release_numbers.py: change those, and run
     python -m tools.model_zoo --write -->

- [Weights](#weights)
- [ImageNet-1K](#imagenet-1k)
- [Throughput](#throughput)
- [COCO](#coco)
- [ADE20K](#ade20k)

## Weights

The release published weights of its nine classifiers; **its download links are dead**. It published none of its
detectors and segmenters, and none of Focal-L. There are no weights of this project's own. If you have a copy of a
file of the release, whose name is in the last column of the first table, it loads as it is, with the config of
its row:

```sh
# evaluate it, on ImageNet
python main.py --cfg configs/focal_tiny_patch4_window7_224.yaml --data-path imagenet --eval --resume focal-tiny-is224-ws7.pth
# name what it sees in images of your own
python classification/predict.py photos --cfg configs/focal_tiny_patch4_window7_224.yaml --resume focal-tiny-is224-ws7.pth
# fine-tune it on other classes
python main.py --cfg configs/focal_tiny_patch4_window7_224.yaml --dataset folder --data-path flowers --pretrained focal-tiny-is224-ws7.pth --tag flowers --opts MODEL.NUM_CLASSES 102 MODEL.RESET_HEAD True
# use it as the backbone of a detector or a segmenter
python detection/train.py detection/configs/mask-rcnn_focal-tiny_fpn_1x_coco.py --pretrained focal-tiny-is224-ws7.pth
python segmentation/train.py segmentation/configs/upernet_focal-tiny_8xb2-160k_ade20k-512x512.py --pretrained focal-tiny-is224-ws7.pth
```

In Python, `models.load_checkpoint(model, "focal-tiny-is224-ws7.pth")`. All weights fit, or none are loaded and an error
lists what differs.

## ImageNet-1K

For one image of 224 x 224. "conv" replaces the patch embeddings by overlapping convolutions. Matrix products and
convolutions are counted, of norms, activations and softmax nothing.

{classifiers}
Focal-L was trained on ImageNet-22K, for the large detector and segmenter below; its classifier is not reported.

## Throughput

Images per second on one GPU, **all quoted** from the release, which does not name the card; Focal-fast was measured
at 224 x 224 only. The same models, measured side by side on a CPU:
{measured}.

{speeds}
## COCO

Box and mask AP on mini-val. Counted for one image of 800 x 1280, with 1000 proposals and 100 masks, in
[{detection_table}](tools/results/{detection_table}),
which compares them with the reported numbers, and has the configs with Focal-fast backbones, of which the release
reports nothing.

{detectors}
The two rows of Focal-L are in none of the release's tables. Its README says 58.7 box AP and 50.9 mask AP of the largest
model (test-dev: 58.9 and 51.3), which are two models: the box AP is that of ATSS + DyHead, tested at several scales (56.4
at one), as the comparison table of the [FocalNet paper](https://arxiv.org/abs/2203.11926) says, where its 229 M parameters
come from; the mask AP is that of HTC++, the instance segmentation of the paper. Schedules in brackets were chosen here, with
what else the configs name. Both have a `tta_pipeline` for `detection/test.py --tta`.

Where multiply-adds differ by more than 2 % from the quoted ones (with Swin's backbones the same heads are counted as
Swin's authors report them, so that the difference is in the backbone):

- Mask R-CNN with Focal-T and ATSS, -2.5 and -3.1 %: 7 G, as with Cascade Mask R-CNN; the quoted rows are 24 G above Swin-T's,
  17 G here. RetinaNet's rows agree, so the release counted two different backbones; how they differ is not known.
- Mask R-CNN with Focal-S, -4.1 %: 17 G in the same way, where RetinaNet with Focal-S lacks 2; not known.
- RepPointsV2, -39 %: the quoted row is 208 G above Swin-T's, more than the whole backbone takes. Neck and head, 186 G, counted
  twice would make it 485 G; whether they were is not known.
- ATSS + DyHead: 227.5 M parameters with windows of 12 tokens, as Swin-L has; with 7, 213 M.

## ADE20K

UPerNet, 160,000 iterations; mIoU on the validation set, at one scale and at several. Counted for one image of
512 x 2048 (Focal-L: 640 x 2560) in
[{segmentation_table}](tools/results/{segmentation_table}),
which compares them with the reported numbers, and has the configs with convolutional embeddings and Focal-fast
backbones.

{segmenters}
Where the numbers differ by more than 2 % from the quoted ones:

- Parameters of T, S and B, -2.1 to -2.6 %: with convolutional embeddings they are 62.5, 84.8 and 126.8 M, nearly the quoted
  ones; the release does not say which embeddings it used.
- Multiply-adds of T, S and B, -3.6, -5.9 and -9.7 %: 36, 66 and 132 G in the backbones, since with Swin's the same heads give
  what Swin reports. Convolutional embeddings add 5 to 9 G; more keys cost in proportion to the width, 88 G for B where S
  takes 66. The rest is not known.
- Multiply-adds of L, -24 %: the quoted number is for more pixels. Swin-L takes 2580 G on 640 x 2560 and 3235 G on 800 x 2560,
  and is reported with 3230. Focal-L takes 3231 G on 800 x 2560, and 3364 G with windows of 12 tokens, which have too many
  parameters (251 M).
"""  # noqa: E501


def markdown(columns: Sequence[str], alignment: str, rows: Iterable[Sequence[Cell]]) -> str:
    """A table; `alignment` has a letter per column, l or r, and None is an empty cell."""
    rules = [{"l": "---", "r": "---:"}[letter] for letter in alignment]
    cells = (["" if cell is None else str(cell) for cell in row] for row in rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, rules, *cells))


def link(folder: str, name: str, ending: str) -> str:
    """A config by name."""
    return f"[{name}]({folder}/{name}.{ending})"


def newest(kind: str) -> Path:
    """The newest result file of a kind.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(RESULTS.glob(f"*_{kind}.md"))
    if not found:
        raise FileNotFoundError(f"{RESULTS}: expected a file *_{kind}.md, got none; make it with count.py")
    return found[-1]


def counted(path: Path) -> dict[str, tuple[str, str]]:
    """Parameters (M) and multiply-adds (G) by config, from a table that a count.py made.

    Raises:
        ValueError: the file has no such table.
    """
    wanted = ("Config", "Params (M)", "MACs (G)")
    lines = iter(path.read_text(encoding="utf-8").splitlines())
    header = next((_cells(line) for line in lines if {*wanted} <= {*_cells(line)}), None)
    if header is None:
        raise ValueError(f"{path}: expected a table with the columns {', '.join(wanted)}, got none")
    name, params, macs = (header.index(column) for column in wanted)
    rows = [_cells(line) for line in takewhile(lambda line: line.startswith("|"), lines)]
    return {row[name]: (row[params], row[macs]) for row in rows[1:]}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def cost_of(config: str, cost: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """Parameters and multiply-adds of a config; ValueError where the table of costs lacks it."""
    if config not in cost:
        raise ValueError(
            f"{config} is not in the newest table of tools/results: count all configs (python -m "
            "detection.count, python -m segmentation.count)"
        )
    return cost[config]


def classifiers_table() -> str:
    """Of ImageNet-1K; parameters and multiply-adds are counted now."""
    columns = ("Model", "Config", "Params (M)", "quoted", "MACs (G)", "quoted")
    columns += ("Top-1 % (quoted)", "Top-5 % (quoted)", "File of the release")
    rows = []
    for row in release.CLASSIFIERS:
        params, macs = count_params_and_macs(load_config(REPO / "configs" / f"{row.config}.yaml"))
        numbers = (f"{params / 1e6:.1f}", row.params_m, f"{macs / 1e9:.2f}", row.flops_g, row.top1, row.top5)
        file = f"`{row.weights}`" if row.weights else "not released"
        rows.append((row.model, link("configs", row.config, "yaml"), *numbers, file))
    return markdown(columns, "ll" + 6 * "r" + "l", rows)


def speeds_table() -> str:
    """Of throughput, as quoted."""
    columns = ("Model", "Top-1 %", "MACs (G)", "224 x 224", "448 x 448", "896 x 896")
    return markdown(columns, "l" + 5 * "r", (row[1:] for row in release.SPEEDS))


def detectors_table(cost: dict[str, tuple[str, str]]) -> str:
    """Of COCO; `cost` from `counted`."""
    columns = ("Method", "Backbone", "Schedule", "Config", "Params (M)", "quoted", "MACs (G)", "quoted")
    columns += ("Box AP (quoted)", "Mask AP (quoted)")
    rows = []
    for row in release.DETECTORS:
        params, macs = cost_of(row.config, cost)
        names = (row.method, row.backbone, row.schedule, link("detection/configs", row.config, "py"))
        rows.append((*names, params, row.params_m, macs, row.flops_g, row.box_ap, row.mask_ap))
    return markdown(columns, "llll" + 6 * "r", rows)


def segmenters_table(cost: dict[str, tuple[str, str]]) -> str:
    """Of ADE20K; `cost` from `counted`."""
    columns = ("Backbone", "Pre-training", "Crop", "Config", "Params (M)", "quoted", "MACs (G)", "quoted")
    columns += ("mIoU (quoted)", "several scales (quoted)")
    rows = []
    for row in release.SEGMENTERS:
        params, macs = cost_of(row.config, cost)
        crop, config = f"{row.crop} x {row.crop}", link("segmentation/configs", row.config, "py")
        numbers = (params, row.params_m, macs, row.flops_g, row.miou, row.miou_ms)
        rows.append((row.backbone, row.pretraining, crop, config, *numbers))
    return markdown(columns, "llll" + 6 * "r", rows)


def page() -> str:
    """The whole page."""
    detection, segmentation = newest("detection_models"), newest("segmentation_models")
    measured = newest("release_table")
    return PAGE_TEXT.format(
        classifiers=classifiers_table(),
        speeds=speeds_table(),
        measured=f"[{measured.name}](tools/results/{measured.name})",
        detection_table=detection.name,
        detectors=detectors_table(counted(detection)),
        segmentation_table=segmentation.name,
        segmenters=segmenters_table(counted(segmentation)),
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
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
