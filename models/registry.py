"""The variants by name, and their place in timm: importing `models` makes `timm.create_model` know them.

    timm.create_model("focal_tiny_patch4_window7_224", num_classes=10, img_size=384)
    timm.create_model("focalv2_base_useconv_patch4_window7_224", features_only=True, out_indices=(1, 2, 3))

No weights are published: `pretrained=True` needs `pretrained_cfg_overlay={"file": ...}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .checkpoint import HEAD, STEM, STORED_KEYS, check_state, state_dict_of
from .focal_transformer import FocalTransformer
from .resize import resize_state

_TINY: dict[str, Any] = {
    "kind": "focal",
    "embed_dim": 96,
    "depths": [2, 2, 6, 2],
    "num_heads": [3, 6, 12, 24],
    "drop_path_rate": 0.2,
    "window_size": 7,
    "focal_pool": "fc",
    "focal_stages": [0, 1, 2, 3],
    "focal_levels": [2, 2, 2, 2],
    "focal_windows": [7, 5, 3, 1],
    "expand_sizes": [3, 3, 3, 3],
    "use_conv_embed": False,
}
_SMALL = _TINY | {"drop_path_rate": 0.3, "depths": [2, 2, 18, 2]}
_BASE = _SMALL | {"drop_path_rate": 0.5, "embed_dim": 128, "num_heads": [4, 8, 16, 32]}
_LARGE = _BASE | {"embed_dim": 192, "num_heads": [6, 12, 24, 48]}
_CONV = {"use_conv_embed": True}
_FAST = {"kind": "focalv2", "focal_topk": 128}

VARIANTS: dict[str, dict[str, Any]] = {
    "focal_tiny_patch4_window7_224": _TINY,
    "focal_small_patch4_window7_224": _SMALL,
    "focal_base_patch4_window7_224": _BASE,
    "focal_large_patch4_window7_224": _LARGE,
    "focal_tiny_useconv_patch4_window7_224": _TINY | _CONV,
    "focal_small_useconv_patch4_window7_224": _SMALL | _CONV,
    "focal_base_useconv_patch4_window7_224": _BASE | _CONV,
    "focalv2_tiny_useconv_patch4_window7_224": _TINY | _CONV | _FAST,
    "focalv2_small_useconv_patch4_window7_224": _SMALL | _CONV | _FAST,
    "focalv2_base_useconv_patch4_window7_224": _BASE | _CONV | _FAST,
}
"""What each variant sets of the options of `FocalTransformer`; the rest are its defaults. openmmlab/ reads
this table, and a test compares the yaml files in configs/ with it."""

default_cfgs = generate_default_cfgs(
    {
        name: {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": False,
            "pool_size": (7, 7),
            "crop_pct": 224 / 256,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "mit",
            "origin_url": "https://github.com/microsoft/Focal-Transformer",
            "paper_name": "Focal Self-attention for Local-Global Interactions in Vision Transformers",
            "paper_ids": "arXiv:2107.00641",
        }
        for name in VARIANTS
    }
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """What timm loads of an original or own state dict: parameters, resized to the model's windows and input
    size (resize.py), and stored keys, which the layers check.

    Raises:
        ValueError: there are no parameters in it, or not those of the model. timm itself fits the classifier
            and the first convolution, and takes no notice of missing keys where features alone are wanted.
    """
    own, state = model.state_dict(), state_dict_of(state_dict)
    resize_state(state, own, getattr(model, "train_resolution", None))
    given, wanted = (
        {key: x for key, x in items.items() if key not in (*HEAD, STEM) and not STORED_KEYS.search(key)}
        for items in (state, own)
    )
    check_state(given, wanted, "the pretrained file")
    return state


def _register(variant: str) -> Callable[..., nn.Module]:
    """Let `timm.create_model` know a variant; returns the function that makes it."""

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        """A model of this name; options as of `FocalTransformer`."""
        options = VARIANTS[variant] | options
        return build_model_with_cfg(
            FocalTransformer,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": tuple(range(len(options["depths"]))), "feature_cls": "getter"},
            **options,
        )

    create.__name__ = create.__qualname__ = variant
    return register_model(create)


focal_tiny_patch4_window7_224 = _register("focal_tiny_patch4_window7_224")
focal_small_patch4_window7_224 = _register("focal_small_patch4_window7_224")
focal_base_patch4_window7_224 = _register("focal_base_patch4_window7_224")
focal_large_patch4_window7_224 = _register("focal_large_patch4_window7_224")
focal_tiny_useconv_patch4_window7_224 = _register("focal_tiny_useconv_patch4_window7_224")
focal_small_useconv_patch4_window7_224 = _register("focal_small_useconv_patch4_window7_224")
focal_base_useconv_patch4_window7_224 = _register("focal_base_useconv_patch4_window7_224")
focalv2_tiny_useconv_patch4_window7_224 = _register("focalv2_tiny_useconv_patch4_window7_224")
focalv2_small_useconv_patch4_window7_224 = _register("focalv2_small_useconv_patch4_window7_224")
focalv2_base_useconv_patch4_window7_224 = _register("focalv2_base_useconv_patch4_window7_224")
