"""Parameters and multiply-adds of segmenters, beside what the release reports, as a Markdown table:

    python -m segmentation.count --out table.md

Multiply-adds of matrix products and convolutions, for one image of the test scale (512 x 2048, 640 x 2560),
through backbone and decode head; what the literature calls FLOPs. Norms, activations, softmax, pooling and
interpolation are not counted. Parameters include the auxiliary head, which serves in training only.

mmengine's own counter follows a trace and knows a fixed list of operators, in which fused attention counts
nothing. Here operators are counted as they are called, on the meta device, where nothing is computed and
attention is plain matrix products (`attention_backend="reference"`).
"""

import argparse
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch.utils.flop_counter import FlopCounterMode

from openmmlab.runner import read_config

CONFIGS = Path(__file__).parent / "configs"
HEADER = """\
| Config | Image | Params (M) | reported | MACs (G) | reported | difference | backbone's | mIoU, MS reported |
|---|---|---:|---:|---:|---:|---:|---:|---:|
"""


@dataclass(frozen=True)
class Cost:
    """Parameters of a segmenter, and multiply-adds of one image, in its backbone and in its decode head."""

    parameters: int
    backbone_macs: int
    head_macs: int

    @property
    def macs(self) -> int:
        return self.backbone_macs + self.head_macs


def count(model: ConfigDict, size: Sequence[int]) -> Cost:
    """Cost of the segmenter that a config's `model` describes, on one image of `size` (height, width)."""
    plain = {"attention_backend": "reference"} if model.backbone.type == "FocalBackbone" else {}
    model = ConfigDict({**model, "backbone": {**model.backbone, **plain}})
    with DefaultScope.overwrite_default_scope("mmseg"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmseg's own deprecated calls
        with torch.device("meta"):
            segmenter = MODELS.build(model).eval()
            image = torch.empty(1, 3, *size)
    with torch.no_grad():
        with FlopCounterMode(display=False) as in_backbone:
            maps = segmenter.backbone(image)
        with FlopCounterMode(display=False) as in_head:
            segmenter.decode_head(maps)
    parameters = sum(p.numel() for p in segmenter.parameters())
    return Cost(parameters, in_backbone.get_total_flops() // 2, in_head.get_total_flops() // 2)


def row(name: str, size: Sequence[int], cost: Cost, reported: Mapping[str, float] | None) -> str:
    """One line of the table."""
    said = reported or {}
    flops = said.get("flops_g")
    cells = (
        name,
        f"{size[0]} x {size[1]}",
        f"{cost.parameters / 1e6:.1f}",
        said.get("params_m", ""),
        f"{cost.macs / 1e9:.0f}",
        flops or "",
        f"{100 * (cost.macs / 1e9 / flops - 1):+.1f} %" if flops else "",
        f"{cost.backbone_macs / 1e9:.0f}",
        ", ".join(str(said[key]) for key in ("miou", "miou_ms") if key in said),
    )
    return "| " + " | ".join(map(str, cells)) + " |\n"


def image_size(config: Config) -> tuple[int, int]:
    """(height, width) of the image that a config's model is counted on: that of its test scale."""
    width, height = next(step for step in config.test_pipeline if step.type == "Resize").scale
    return height, width


def table(paths: Sequence[Path]) -> str:
    """The table of these configs."""
    rows = []
    for path in paths:
        config = read_config(str(path))
        import_segmenters()
        size = image_size(config)
        rows.append(row(path.stem, size, count(config.model, size), config.reported))
    return HEADER + "".join(rows)


def import_segmenters() -> None:
    """mmseg's models, once a config's `custom_imports` have put the operators in place."""
    import mmseg.models  # noqa: F401


def versions() -> str:
    """The packages that the numbers come from."""
    import mmengine
    import mmseg

    parts = {"Python": platform.python_version(), "torch": torch.__version__}
    parts |= {"mmengine": mmengine.__version__, "mmseg": mmseg.__version__}
    return ", ".join(f"{name} {version}" for name, version in parts.items())


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, or write it to a file."""
    parser = argparse.ArgumentParser(description="Parameters and multiply-adds of segmenters.")
    parser.add_argument("configs", nargs="*", type=Path, help="config files (all of segmentation/configs)")
    parser.add_argument("--out", type=Path, help="Markdown file to write instead of printing")
    args = parser.parse_args(argv)
    text = f"{table(args.configs or sorted(CONFIGS.glob('upernet_*.py')))}\n{versions()}\n"
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
