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

import importlib as _importlib
import sys as _sys
from collections.abc import Callable as _Callable
from importlib.machinery import PathFinder as _PathFinder
from importlib.util import module_from_spec as _module_from_spec
from importlib.util import spec_from_file_location as _spec_from_file_location
from pathlib import Path as _Path
from types import ModuleType as _Module
from typing import Any as _Any

from torch import nn as _nn

dependencies = ["numpy", "timm", "torch"]


def _own_models() -> _Module:
    """The package models/ of this folder. It is `models` where Python finds it under that name, else it gets
    another name: a user's own package `models` stays what it is."""
    file, name = _Path(__file__).resolve().with_name("models") / "__init__.py", "focal_transformer_hub"
    loaded = _sys.modules.get("models")
    found = loaded.__spec__ if loaded else _PathFinder.find_spec("models", _sys.path[1:])  # 0 is torch.hub's
    if found and found.origin and _Path(found.origin).resolve() == file:
        return _importlib.import_module("models")
    if name not in _sys.modules:
        spec = _spec_from_file_location(name, file)
        _sys.modules[name] = module = _module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del _sys.modules[name]
            raise
    return _sys.modules[name]


_models = _own_models()


def _entry(variant: str) -> _Callable[..., _nn.Module]:
    """The entry of a variant."""

    def create(
        pretrained: str | bool = False, reset_head: bool = False, resize: bool = False, **options: _Any
    ) -> _nn.Module:
        if pretrained is True:
            none = f"none are published for {variant}"
            raise ValueError(f"pretrained must be a file or an address of weights, got True: {none}")
        model = _models.FocalTransformer(**{**_models.VARIANTS[variant], **options})
        if pretrained:
            _models.load_checkpoint(model, str(pretrained), reset_head=reset_head, resize=resize)
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
