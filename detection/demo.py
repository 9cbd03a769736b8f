"""Trains a small version of every method on the demo scenes, and writes a table of the results.

    python -m data.demo demo --kinds detection
    python detection/demo.py [METHOD ...] [--data demo/detection] [--out demo/output/methods] [--epochs 10]

A method is its full config's model with fewer channels, proposals and layers; backbone, data and schedule are
those of detection/configs/demo_mask_rcnn.py.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config

METHODS = {  # name -> config
    "mask_rcnn": "demo_mask_rcnn",
    "retinanet": "retinanet_focal-tiny_fpn_1x_coco",
    "atss": "atss_focal-tiny_fpn_amp-ms-crop-3x_coco",
    "atss_dyhead": "atss-dyhead_focal-large_fpn_amp-ms-480-1200-2x_coco",
    "cascade_mask_rcnn": "cascade-mask-rcnn_focal-tiny_fpn_amp-ms-crop-3x_coco",
    "sparse_rcnn": "sparse-rcnn_focal-tiny_fpn_amp-ms-crop-3x_coco",
    "reppoints_v2": "demo_reppoints_v2",
    "htc": "htc_focal-large_fpn_amp-ms-400-1400-6x_coco",
}
CONFIGS = Path(__file__).resolve().parent / "configs"
BASE = "demo_mask_rcnn"
SMALLER = {  # key -> {value in a full config: value here}
    "fc_out_channels": {1024: 256},
    "feedforward_channels": {2048: 256},
    "conv_out_channels": {256: 32},
    "num_proposals": {300: 50},
    "max_per_img": {1000: 100, 2000: 100, 300: 50, 100: 50},
    "nms_pre": {1000: 200, 2000: 200},
    "num": {512: 32},
    "pos_fraction": {0.25: 0.5},
    "num_convs": {4: 2},
    "num_blocks": {6: 1},
    "pred_kernel_size": {1: 3},
    "pad_size_divisor": {128: 32},
    "stacked_convs": {
        4: 2,
        0: 2,
    },  # with DyHead as well: so few blocks and channels alone learn digits slowly
    "num_classes": {80: 10},
    "num_groups": {32: 8},
    "sampling_ratio": {0: 2},
    "octave_base_scale": {8: 4},
}
OF_METHOD = {"htc": {"conv_out_channels": {256: 64}}}  # its mask heads add to each other's inputs
LEARNING_RATE = {"sparse_rcnn": 3e-4}  # its queries and dynamic convolutions diverge at the others' 1e-3
COLUMNS = {"box AP": "bbox_mAP", "AP50": "bbox_mAP_50", "mask AP": "segm_mAP", "mask AP50": "segm_mAP_50"}


def smaller(node: Any, rules: dict[str, dict[Any, Any]], key: str = "") -> Any:
    """A part of a model's config with values replaced by `rules`, see SMALLER, and 64 channels for 256."""
    if isinstance(node, dict):
        return type(node)({name: smaller(value, rules, name) for name, value in node.items()})
    if isinstance(node, list | tuple):
        return type(node)(smaller(item, rules, key) for item in node)
    values = ({256: 64} if "channel" in key else {}) | rules.get(key, {})
    return values.get(node, node) if isinstance(node, int | float) else node


def demo_config(method: str) -> "Config":
    """The small version of a method's config."""
    from openmmlab.runner import read_config

    config = read_config(str(CONFIGS / f"{METHODS[method]}.py"))
    if METHODS[method].startswith("demo_"):
        return config
    base = read_config(str(CONFIGS / f"{BASE}.py"))
    rules = SMALLER | OF_METHOD.get(method, {})
    base.model, backbone = smaller(config.model, rules), base.model.backbone
    stages = base.model.backbone.get("out_indices", (0, 1, 2, 3))
    pyramid = base.model.neck[0] if isinstance(base.model.neck, list) else base.model.neck
    pyramid.in_channels = [backbone.embed_dim * 2**stage for stage in stages]
    base.model.backbone = dict(backbone, out_indices=stages)
    base.custom_imports = config.custom_imports
    base.optim_wrapper.paramwise_cfg.custom_keys.spatial_conv_offset = dict(lr_mult=0.1)  # DyHead's
    base.optim_wrapper.optimizer.lr = LEARNING_RATE.get(method, base.optim_wrapper.optimizer.lr)
    if "segm" not in config.val_evaluator.metric:
        base.train_dataloader.dataset.pipeline[1].with_mask = False
        base.val_evaluator.metric = base.test_evaluator.metric = "bbox"
    return base


def train(method: str, data: Path, out: Path, epochs: int) -> dict[str, Any]:
    """Train a method, evaluating four times, and return its row of the table."""
    from openmmlab.runner import build_runner

    config = demo_config(method)
    config.work_dir, config.launcher = str(out / method), "none"
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.data_root = f"{data}/"
    annotations = str(data / "annotations/instances_val2017.json")
    config.val_evaluator.ann_file = config.test_evaluator.ann_file = annotations
    config.train_cfg.update(max_epochs=epochs, val_interval=max(epochs // 4, 1))
    config.param_scheduler[-1].T_max = epochs
    began = time.perf_counter()
    runner = build_runner(config)
    runner.train()
    minutes = (time.perf_counter() - began) / 60
    lines = (Path(runner.log_dir) / "vis_data/scalars.json").read_text(encoding="utf-8").splitlines()
    none = {"coco/bbox_mAP": 0.0, "coco/bbox_mAP_50": 0.0}  # nothing was found, so nothing was logged
    results = [line for line in map(json.loads, lines) if "coco/bbox_mAP" in line] or [none]
    last = {name: results[-1].get(f"coco/{key}") for name, key in COLUMNS.items()}
    parameters = sum(p.numel() for p in runner.model.parameters()) / 1e6
    first = {"AP50 at first": results[0]["coco/bbox_mAP_50"]}
    return {"method": method, "params (M)": parameters} | first | last | {"minutes": minutes}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table; missing values are empty."""

    def shown(value: Any) -> str:
        return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [[*rows[0]], ["---"] * len(rows[0]), *([shown(v) for v in row.values()] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""
    from utils import path_argument

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"{', '.join(METHODS)}; default: all")
    parser.add_argument(
        "--data", type=path_argument, default="demo/detection", help="demo scenes (demo/detection)"
    )
    parser.add_argument(
        "--out", type=path_argument, default="demo/output/methods", help="folder of runs and table.md"
    )
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training scenes (10)")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.methods) - set(METHODS))
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}: choose among {', '.join(METHODS)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command line."""
    args = parse(argv)
    data, out = Path(args.data), Path(args.out)
    if not (data / "annotations").is_dir():
        print(
            f"error: no scenes in {data}: run `python -m data.demo demo --kinds detection`",
            file=sys.stderr,
        )
        return 2
    rows = []
    for method in args.methods or METHODS:
        rows.append(train(method, data, out, args.epochs))
        (out / "table.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # models, openmmlab, detection
    sys.exit(main())
