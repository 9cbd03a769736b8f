"""Entry points of torch.hub, one for each model:

    torch.hub.load("path/to/this/folder", "focal_tiny", source="local")
    torch.hub.load("path/to/this/folder", "focal_fast_tiny", source="local", pretrained="focal_fast_tiny.pth")

Arguments of every entry:

    pretrained   file (.pth of the original or of this codebase, or .safetensors) or address of weights; none
                 are published
    reset_head   leave the classifier of the weights out, for another `num_classes`
    resize       fit the weights to another `img_size` or `window_size`, and those of 3 channels to other
                 `in_chans`
    options      those of models.FocalTransformer, such as num_classes, img_size and drop_path_rate

Errors: FileNotFoundError where there is no such file; ValueError for weights that do not fit, or options that
contradict each other.
"""

from collections.abc import Callable as _Callable
from typing import Any as _Any

from models import VARIANTS as _VARIANTS
from models import FocalTransformer as _FocalTransformer
from models import load_checkpoint as _load_checkpoint

dependencies = ["numpy", "timm", "torch"]


def _entry(variant: str) -> _Callable[..., _FocalTransformer]:
    """The entry of a variant."""

    def create(
        pretrained: str | bool = False, reset_head: bool = False, resize: bool = False, **options: _Any
    ) -> _FocalTransformer:
        if pretrained is True:
            none = f"none are published for {variant}"
            raise ValueError(f"pretrained must be a file or an address of weights, got True: {none}")
        model = _FocalTransformer(**{**_VARIANTS[variant], **options})
        if pretrained:
            _load_checkpoint(model, str(pretrained), reset_head=reset_head, resize=resize)
        return model

    create.__name__ = create.__qualname__ = variant
    create.__doc__ = f"{variant}. Arguments: see the head of hubconf.py."
    return create


focal_tiny = _entry("focal_tiny_patch4_window7_224")
focal_small = _entry("focal_small_patch4_window7_224")
focal_base = _entry("focal_base_patch4_window7_224")
focal_large = _entry("focal_large_patch4_window7_224")
focal_tiny_conv = _entry("focal_tiny_useconv_patch4_window7_224")
focal_small_conv = _entry("focal_small_useconv_patch4_window7_224")
focal_base_conv = _entry("focal_base_useconv_patch4_window7_224")
focal_fast_tiny = _entry("focalv2_tiny_useconv_patch4_window7_224")
focal_fast_small = _entry("focalv2_small_useconv_patch4_window7_224")
focal_fast_base = _entry("focalv2_base_useconv_patch4_window7_224")
