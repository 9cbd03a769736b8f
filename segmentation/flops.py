"""Parameters and multiply-adds of segmenters, beside what the release reports, as a Markdown table:

    python -m segmentation.flops --out table.md

For one image of the test scale (512 x 2048, 640 x 2560), through backbone and decode head: matrix products
and convolutions. Norms, activations, softmax, pooling and interpolation are not counted. Parameters include
the auxiliary head, which only training uses. All is counted on the meta device: nothing is computed.
"""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from openmmlab import flops
from openmmlab.flops import Cost, Task, plain_backbone

if TYPE_CHECKING:
    from mmengine.config import Config, ConfigDict


def count(model: "ConfigDict", size: Sequence[int]) -> Cost:
    """Cost of the segmenter that a config's `model` describes, on one image of `size` (height, width)."""
    import mmseg.models  # noqa: F401  (once a config's `custom_imports` have put the operators in place)
    from mmengine.registry import MODELS, DefaultScope

    model = type(model)({**model, "backbone": plain_backbone(model.backbone)})
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


def image_size(config: "Config") -> tuple[int, int]:
    """(height, width) of the image that a config's model is counted on: that of its test scale."""
    width, height = next(step for step in config.test_pipeline if step.type == "Resize").scale
    return height, width


SEGMENTATION = Task(
    package="mmseg",
    configs=Path(__file__).parent / "configs",
    pattern="upernet_*.py",
    accuracies={"miou": "mIoU", "miou_ms": "MS"},
    image_size=image_size,
    count=count,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command line."""
    return flops.main(SEGMENTATION, __doc__.splitlines()[0], argv)


if __name__ == "__main__":
    sys.exit(main())
