"""Parameters and multiply-adds of detectors and segmenters, as a Markdown table:

    python -m openmmlab.flops detection/configs/*_coco.py --out table.md

For one image, from the pixels to the heads' raw outputs: of 800 x 1280 pixels for a detector, with as many
proposals and masks as the test config keeps, and of the test scale for a segmenter. Matrix products,
convolutions and deformable convolutions are counted; norms, activations, softmax, pooling, RoIAlign and NMS
are not. Parameters include heads that only training uses. Operators are counted as they are called, with
attention as plain matrix products; mmengine's counter would count 0 for fused attention.
"""

import argparse
import math
import re
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torchvision.ops  # noqa: F401  (makes torch.ops.torchvision)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from openmmlab.runner import read_config, run_command
from utils import keep_inputs, path_argument

if TYPE_CHECKING:
    from mmengine.config import Config

DETECTORS_IMAGE = (800, 1280)  # height, width
COLUMNS = ("Config", "Image", "Params (M)", "MACs (G)", "backbone's")
CASCADED_MASKS = re.compile(r"roi_head\.mask_head\.\d+$")
PRODUCTS = {
    *(torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm),
    *(torch.ops.aten.convolution, torch.ops.torchvision.deform_conv2d),
}


class Cost(NamedTuple):
    """Parameters of a model, and multiply-adds of one image: all, and those of the backbone."""

    parameters: int
    macs: int
    backbone_macs: int


class ZeroProducts(TorchDispatchMode):
    """Context manager in which matrix products and convolutions return zeros without computing anything.

    Heads select proposals by their values, so there must be some.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in PRODUCTS:
            return func(*args, **kwargs)
        shape = func(*tree_map_only(Tensor, lambda x: x.to("meta"), args), **kwargs).shape
        return args[0].new_zeros(shape)


def deform_conv_flops(image: Any, weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """FLOPs of a deformable convolution, two per multiply-add: those of a plain one; sampling is not counted.

    Args:
        image: shape [B, C, H, W]; not used.
        weight: shape [O, C / groups, h, w].
        out_shape: [B, O, H', W'].
    """
    batch, _, height, width = out_shape
    return 2 * batch * height * width * math.prod(weight)


def counter() -> FlopCounterMode:
    """A FLOP counter that knows deformable convolutions."""
    known = {torch.ops.torchvision.deform_conv2d: deform_conv_flops}
    return FlopCounterMode(display=False, custom_mapping=known)


def image_size(config: "Config") -> tuple[int, int]:
    """(height, width) of the image that a config's model is counted on."""
    if config.default_scope == "mmdet":
        return DETECTORS_IMAGE
    width, height = next(step for step in config.test_pipeline if step.type == "Resize").scale
    return height, width


def count(config: "Config", size: tuple[int, int]) -> Cost:
    """Cost of a config's model on one image of `size` (height, width)."""
    import_module(f"{config.default_scope}.models")
    from mmengine.registry import MODELS, DefaultScope

    backbone = {**config.model.backbone, "init_cfg": None}
    if backbone["type"] == "FocalBackbone":
        backbone |= {"attention_backend": "plain", "with_cp": False}
    model = type(config.model)({**config.model, "backbone": backbone})
    samples = [detectors_sample(size)] if config.default_scope == "mmdet" else None
    with DefaultScope.overwrite_default_scope(config.default_scope), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packages' own deprecated calls
        built = MODELS.build(model)
    built.eval()
    with ZeroProducts(), counter() as seen, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        built(torch.zeros(1, 3, *size), samples, mode="tensor")
    parts = {name: sum(operators.values()) for name, operators in seen.get_flop_counts().items()}
    flops = seen.get_total_flops() - surplus_mask_flops(config, parts)
    in_backbone = parts[f"{type(built).__name__}.backbone"]
    return Cost(sum(p.numel() for p in built.parameters()), flops // 2, in_backbone // 2)


def surplus_mask_flops(config: "Config", parts: dict[str, int]) -> int:
    """FLOPs of the masks of proposals that the test config does not keep, from those of each module.

    Mask R-CNN's raw forward pass in mmdet makes 100 masks, that of cascades one for every proposal; the test
    config keeps 100 detections in both.
    """
    of_masks = sum(flops for name, flops in parts.items() if CASCADED_MASKS.search(name))
    if of_masks == 0:
        return 0
    kept = config.model.test_cfg
    return of_masks - of_masks * kept.rcnn.max_per_img // kept.rpn.max_per_img


def detectors_sample(size: tuple[int, int]) -> Any:
    """The data sample of an image of `size` without objects."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    sizes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), size)
    return DetDataSample(
        gt_instances=InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)),
        metainfo={**sizes, "scale_factor": (1.0, 1.0)},
    )


def table(paths: Sequence[str]) -> str:
    """A row for each config."""
    lines = [[*COLUMNS], ["---", "---", *["---:"] * (len(COLUMNS) - 2)]]
    for path in paths:
        config = read_config(path)
        size = image_size(config)
        cost = count(config, size)
        numbers = (
            f"{cost.parameters / 1e6:.1f}",
            f"{cost.macs / 1e9:.0f}",
            f"{cost.backbone_macs / 1e9:.0f}",
        )
        lines.append([Path(path).stem, f"{size[0]} x {size[1]}", *numbers])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or write it to a file; returns 2 after a mistake of the user."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configs", nargs="+", type=path_argument, help="config files")
    parser.add_argument("--out", type=path_argument, help="Markdown file to write instead of printing")
    args = parser.parse_args(argv)

    def print_table() -> None:
        keep_inputs(args.configs, [Path(args.out)] if args.out else [])
        text = table(args.configs)
        if args.out:
            Path(args.out).write_text(text, encoding="utf-8")
        else:
            print(text)

    return run_command(print_table)


if __name__ == "__main__":
    sys.exit(main())
