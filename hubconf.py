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

from typing import Any as _Any

from models import VARIANTS as _VARIANTS
from models import FocalTransformer as _FocalTransformer
from models import load_checkpoint as _load_checkpoint

dependencies = ["numpy", "timm", "torch"]


def _create(
    variant: str,
    pretrained: str | bool,
    reset_head: bool = False,
    resize: bool = False,
    **options: _Any,
) -> _FocalTransformer:
    """A variant; arguments as above."""
    if pretrained is True:
        raise ValueError(
            f"pretrained must be a file or an address of weights, got True: none are published for {variant}"
        )
    model = _FocalTransformer(**{**_VARIANTS[variant], **options})
    if pretrained:
        _load_checkpoint(model, str(pretrained), reset_head=reset_head, resize=resize)
    return model


def focal_tiny(pretrained: str | bool = False, **options: _Any) -> _FocalTransformer:
    """focal_tiny_patch4_window7_224. Arguments: see the head of hubconf.py."""
    return _create("focal_tiny_patch4_window7_224", pretrained, **options)


def focal_small(pretrained: str | bool = False, **options: _Any) -> _FocalTransformer:
    """focal_small_patch4_window7_224. Arguments: see the head of hubconf.py."""
    return _create("focal_small_patch4_window7_224", pretrained, **options)


def focal_base(pretrained: str | bool = False, **options: _Any) -> _FocalTransformer:
    """focal_base_patch4_window7_224. Arguments: see the head of hubconf.py."""
    return _create("focal_base_patch4_window7_224", pretrained, **options)


def focal_large(pretrained: str | bool = False, **options: _Any) -> _FocalTransformer:
    """focal_large_patch4_window7_224. Arguments: see the head of hubconf.py."""
    return _create("focal_large_patch4_window7_224", pretrained, **options)


def focal_tiny_conv(pretrained: str | bool = False, **options: _Any) -> _FocalTransformer:
    """focal_tiny_useconv_patch4_window7_224. Arguments: see the head of hubconf.py."""
    return _create("focal_tiny_useconv_patch4_window7_224", pretrained, **options)


def focal_small_conv(pretrained: str | bool = False, **options: _Any) -> _FocalTransformer:
    """focal_small_useconv_patch4_window7_224. Arguments: see the head of hubconf.py."""
    return _create("focal_small_useconv_patch4_window7_224", pretrained, **options)


def focal_base_conv(pretrained: str | bool = False, **options: _Any) -> _FocalTransformer:
    """focal_base_useconv_patch4_window7_224. Arguments: see the head of hubconf.py."""
    return _create("focal_base_useconv_patch4_window7_224", pretrained, **options)


def focal_fast_tiny(pretrained: str | bool = False, **options: _Any) -> _FocalTransformer:
    """focalv2_tiny_useconv_patch4_window7_224. Arguments: see the head of hubconf.py."""
    return _create("focalv2_tiny_useconv_patch4_window7_224", pretrained, **options)


def focal_fast_small(pretrained: str | bool = False, **options: _Any) -> _FocalTransformer:
    """focalv2_small_useconv_patch4_window7_224. Arguments: see the head of hubconf.py."""
    return _create("focalv2_small_useconv_patch4_window7_224", pretrained, **options)


def focal_fast_base(pretrained: str | bool = False, **options: _Any) -> _FocalTransformer:
    """focalv2_base_useconv_patch4_window7_224. Arguments: see the head of hubconf.py."""
    return _create("focalv2_base_useconv_patch4_window7_224", pretrained, **options)
