"""Parameters and multiply-adds of detectors, beside what the release reports, as a Markdown table:

    python -m detection.flops --out table.md

For one image of 800 x 1280, from the pixels to the heads' raw outputs, with as many proposals as the test
config keeps: matrix products, convolutions and deformable convolutions. Norms, activations, softmax, RoIAlign
and NMS are not counted.

The backbone is counted on the meta device, where nothing is computed. Neck and heads are counted on the CPU,
because they select proposals by their values; their products are replaced by zeros of the right shape.
"""

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torchvision.ops  # noqa: F401  (makes torch.ops.torchvision)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from openmmlab import flops
from openmmlab.flops import Cost, Task, plain_backbone
from openmmlab.runner import import_mmengine

if TYPE_CHECKING:
    from mmengine.config import ConfigDict

SIZE = (800, 1280)
CASCADED_MASKS = re.compile(r"roi_head\.mask_head\.\d+$")
PRODUCTS = {
    *(torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm),
    *(torch.ops.aten.convolution, torch.ops.torchvision.deform_conv2d),
}


class ZeroProducts(TorchDispatchMode):
    """Context manager in which matrix products and convolutions return zeros without computing anything."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in PRODUCTS:
            return func(*args, **kwargs)
        shape = func(*tree_map_only(Tensor, lambda x: x.to("meta"), args), **kwargs).shape
        return args[0].new_zeros(shape)


class FixedMaps(nn.Module):
    """A backbone that returns maps of zeros of the given shapes [B, C_i, H_i, W_i], for any image."""

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.shapes = shapes

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(*shape) for shape in self.shapes)


def deform_conv_flops(image: Any, weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """FLOPs of a deformable convolution, two per multiply-add: those of a plain one; sampling is not counted.

    Args:
        image: shape [B, C, H, W]; not used.
        weight: shape [O, C / groups, h, w].
        out_shape: [B, O, H', W'].
    """
    batch, _, height, width = out_shape
    return 2 * batch * height * width * math.prod(weight)


def count(model: "ConfigDict", size: Sequence[int]) -> Cost:
    """Cost of the detector that a config's `model` describes, on one image of `size` (height, width)."""
    import_mmengine()  # before mmdet: makes its operators importable
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope("mmdet"):
        with torch.device("meta"):
            whole = MODELS.build(model)
            backbone = MODELS.build(plain_backbone(model.backbone))
            backbone.eval()  # not chained: eval() of mmdet's backbones returns None
            with counter() as in_backbone, torch.no_grad():
                maps = backbone(torch.empty(1, 3, *size))
        fixed = {"type": FixedMaps, "shapes": [list(x.shape) for x in maps]}
        rest = MODELS.build(type(model)({**model, "backbone": fixed})).eval()
        with ZeroProducts(), counter() as in_heads, torch.no_grad():
            rest(torch.zeros(1, 3, *size), [sample(size)], mode="tensor")
    parameters = sum(p.numel() for p in whole.parameters())
    in_heads_flops = in_heads.get_total_flops() - surplus_mask_flops(model, in_heads)
    return Cost(parameters, in_backbone.get_total_flops() // 2, in_heads_flops // 2)


def surplus_mask_flops(model: "ConfigDict", seen: FlopCounterMode) -> int:
    """FLOPs of the masks of proposals that the test config does not keep.

    Mask R-CNN's raw forward pass in mmdet makes 100 masks, that of cascades one for every proposal; the test
    config keeps 100 detections in both.
    """
    stages = {name: sum(ops.values()) for name, ops in seen.get_flop_counts().items()}
    of_masks = sum(flops for name, flops in stages.items() if CASCADED_MASKS.search(name))
    if of_masks == 0:
        return 0
    return of_masks - of_masks * model.test_cfg.rcnn.max_per_img // model.test_cfg.rpn.max_per_img


def counter() -> FlopCounterMode:
    """A FLOP counter that knows deformable convolutions."""
    known = {torch.ops.torchvision.deform_conv2d: deform_conv_flops}
    return FlopCounterMode(display=False, custom_mapping=known)


def sample(size: Sequence[int]) -> Any:
    """The data sample of an image of `size` without objects."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    sizes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), tuple(size))
    return DetDataSample(
        gt_instances=InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)),
        metainfo={**sizes, "scale_factor": (1.0, 1.0)},
    )


DETECTION = Task(
    package="mmdet",
    configs=Path(__file__).parent / "configs",
    pattern="*_coco.py",
    accuracies={"box_ap": "box", "mask_ap": "mask AP"},
    image_size=lambda config: SIZE,
    count=count,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command line."""
    return flops.main(DETECTION, __doc__.splitlines()[0], argv)


if __name__ == "__main__":
    sys.exit(main())
