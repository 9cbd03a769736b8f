"""Parameters and multiply-adds of detectors, beside what the release reports, as a Markdown table:

    python -m detection.count --out table.md

Multiply-adds of matrix products, convolutions and deformable convolutions, for one image of 800 x 1280, from
the pixels to the heads' raw outputs, with as many proposals as the test config keeps; what the literature
calls FLOPs. Norms, activations, softmax, RoIAlign and NMS are not counted.

mmengine's own counter follows a trace and knows a fixed list of operators, in which fused attention counts
nothing. Here operators are counted as they are called: the backbone's on the meta device, where its attention
is plain matrix products (`attention_backend="reference"`), neck and heads on the CPU, since what they do with
proposals depends on values. Nothing is multiplied there either: products are zeros of the right shape.
"""

import argparse
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import openmmlab.ops_bridge  # noqa: F401  (before mmdet: makes its operators importable)

CONFIGS = Path(__file__).parent / "configs"
SIZE = (800, 1280)
CASCADED_MASKS = re.compile(r"roi_head\.mask_head\.\d+$")
PRODUCTS = {
    *(torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm),
    *(torch.ops.aten.convolution, torch.ops.torchvision.deform_conv2d),
}
HEADER = """\
| Config | Params (M) | reported | MACs (G) | reported | difference | backbone's | box, mask AP reported |
|---|---:|---:|---:|---:|---:|---:|---:|
"""


@dataclass(frozen=True)
class Cost:
    """Parameters of a detector, and multiply-adds of one image, in its backbone and in neck and heads."""

    parameters: int
    backbone_macs: int
    head_macs: int

    @property
    def macs(self) -> int:
        return self.backbone_macs + self.head_macs


class ZeroProducts(TorchDispatchMode):
    """While entered, matrix products and convolutions take no time: they give zeros of the right shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in PRODUCTS:
            return func(*args, **kwargs)
        shape = func(*tree_map_only(Tensor, lambda x: x.to("meta"), args), **kwargs).shape
        return args[0].new_zeros(shape)


class FixedMaps(nn.Module):
    """Stands in for a backbone that was counted already: maps of zeros, whatever the image.

    Args:
        shapes: [B, C_i, H_i, W_i] of each map.
    """

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.shapes = shapes

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Any image [B, 3, H, W] to the maps."""
        return tuple(torch.zeros(*shape) for shape in self.shapes)


def deform_conv_flops(
    image: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any
) -> int:
    """A deformable convolution's: those of the convolution, two per multiply-add; sampling is not counted.

    Args:
        image: [B, C, H, W].
        weight: [O, C / groups, h, w].
        out_shape: [B, O, H', W'].
    """
    batch, _, height, width = out_shape
    out, channels, rows, columns = weight
    return 2 * batch * height * width * out * channels * rows * columns


def count(config: ConfigDict, size: Sequence[int]) -> Cost:
    """Cost of the detector that `config.model` describes, on one image of `size` (height, width)."""
    from mmdet.registry import MODELS

    with DefaultScope.overwrite_default_scope("mmdet"):
        with torch.device("meta"):
            whole = MODELS.build(config.model)
            backbone = MODELS.build(plain_backbone(config.model.backbone))
            backbone.eval()  # mmdet's return nothing from it
            with counter() as in_backbone, torch.no_grad():
                maps = backbone(torch.empty(1, 3, *size))
        rest = headed(config.model, [list(x.shape) for x in maps])
        with ZeroProducts(), counter() as in_heads, torch.no_grad():
            rest(torch.zeros(1, 3, *size), [sample(size)], mode="tensor")
    parameters = sum(p.numel() for p in whole.parameters())
    in_heads_flops = in_heads.get_total_flops() - surplus_mask_flops(config.model, in_heads)
    return Cost(parameters, in_backbone.get_total_flops() // 2, in_heads_flops // 2)


def surplus_mask_flops(model: ConfigDict, seen: FlopCounterMode) -> int:
    """What the masks of proposals take that are no detections.

    Mask R-CNN's raw forward pass in mmdet makes 100 masks, that of cascades one for every proposal; the test
    config keeps 100 detections in both.
    """
    stages = {name: sum(ops.values()) for name, ops in seen.get_flop_counts().items()}
    of_masks = sum(flops for name, flops in stages.items() if CASCADED_MASKS.search(name))
    if of_masks == 0:
        return 0
    return of_masks - of_masks * model.test_cfg.rcnn.max_per_img // model.test_cfg.rpn.max_per_img


def plain_backbone(backbone: ConfigDict) -> dict[str, Any]:
    """A Focal backbone's config with attention as plain matrix products; others as they are."""
    plain = {"attention_backend": "reference", "with_cp": False} if backbone.type == "FocalBackbone" else {}
    return {**backbone, **plain, "init_cfg": None}


def counter() -> FlopCounterMode:
    """Counts while it is entered."""
    known = {torch.ops.torchvision.deform_conv2d: deform_conv_flops}
    return FlopCounterMode(display=False, custom_mapping=known)


def headed(model: ConfigDict, shapes: Sequence[Sequence[int]]) -> nn.Module:
    """The detector with maps of these shapes for a backbone."""
    from mmdet.registry import MODELS

    MODELS.register_module(module=FixedMaps, force=True)
    model = ConfigDict({**model, "backbone": {"type": "FixedMaps", "shapes": shapes}})
    return MODELS.build(model).eval()


def sample(size: Sequence[int]) -> Any:
    """What a detector wants to know of an image of `size`; it has no objects."""
    from mmdet.structures import DetDataSample

    shape = tuple(size)
    return DetDataSample(
        gt_instances=InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)),
        metainfo={
            "img_shape": shape,
            "ori_shape": shape,
            "pad_shape": shape,
            "batch_input_shape": shape,
            "scale_factor": (1.0, 1.0),
        },
    )


def row(name: str, cost: Cost, reported: dict[str, float] | None) -> str:
    """One line of the table."""
    said = reported or {}
    params, flops = said.get("params_m"), said.get("flops_g")
    accuracy = ", ".join(str(said[key]) for key in ("box_ap", "mask_ap") if key in said)
    change = f"{100 * (cost.macs / 1e9 / flops - 1):+.1f} %" if flops else ""
    cells = (
        name,
        f"{cost.parameters / 1e6:.1f}",
        params or "",
        f"{cost.macs / 1e9:.0f}",
        flops or "",
        change,
        f"{cost.backbone_macs / 1e9:.0f}",
        accuracy,
    )
    return "| " + " | ".join(map(str, cells)) + " |\n"


def table(paths: Sequence[Path]) -> str:
    """The table of these configs. Those with the same model (1x and 3x) are counted once."""
    known: dict[str, Cost] = {}
    rows = []
    for path in paths:
        config = Config.fromfile(path)
        key = repr(config.model)
        if key not in known:
            known[key] = count(config, SIZE)
        rows.append(row(path.stem, known[key], config.get("reported")))
    return HEADER + "".join(rows)


def versions() -> str:
    """The packages that the numbers come from."""
    import mmdet
    import mmengine

    parts = {"Python": platform.python_version(), "torch": torch.__version__}
    parts |= {"mmengine": mmengine.__version__, "mmdet": mmdet.__version__}
    return ", ".join(f"{name} {version}" for name, version in parts.items())


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, or write it to a file."""
    parser = argparse.ArgumentParser(description="Parameters and multiply-adds of detectors.")
    parser.add_argument("configs", nargs="*", type=Path, help="config files (all of detection/configs)")
    parser.add_argument("--out", type=Path, help="Markdown file to write instead of printing")
    args = parser.parse_args(argv)
    text = f"{table(args.configs or sorted(CONFIGS.glob('*_coco.py')))}\n{versions()}\n"
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
