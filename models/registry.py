"""The variants by name, and their place in timm: importing `models` makes `timm.create_model` know them.

    timm.create_model("focal_tiny_patch4_window7_224", num_classes=10, img_size=384)
    timm.create_model("focalv2_base_useconv_patch4_window7_224", features_only=True, out_indices=(1, 2, 3))

`TimmFocalTransformer` is the same network under the same parameter names, with the methods that timm expects
of a model. No weights are published: `pretrained=True` needs `pretrained_cfg_overlay={"file": ...}`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from torch import Tensor, nn

from .checkpoint import CHOICE_BUFFERS, HEAD, check_state, state_dict_of
from .focal_transformer import FocalBlock, FocalTransformer, check_images, initialise, next_map
from .layers import PatchEmbed
from .resize import choices_of_other_maps, resize_state

logger = logging.getLogger(__name__)

_TINY: dict[str, Any] = {
    "drop_path_rate": 0.2,
    "focal_pool": "fc",
    "focal_levels": (2, 2, 2, 2),
}
_SMALL = _TINY | {"drop_path_rate": 0.3, "depths": (2, 2, 18, 2)}
_BASE = _SMALL | {"drop_path_rate": 0.5, "embed_dim": 128, "num_heads": (4, 8, 16, 32)}
_LARGE = _BASE | {"embed_dim": 192, "num_heads": (6, 12, 24, 48)}
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
"""What each variant sets of the options of `FocalTransformer`; the rest are its defaults. The files in
configs/ say the same."""

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


class TimmFocalTransformer(FocalTransformer):
    """FocalTransformer with timm's interface.

    Departures from the class it extends: `forward_intermediates` takes and returns what timm's do, and the
    classifier's pooling can be chosen or left out.

    Args:
        num_classes: classes; 0 for no classifier.
        global_pool: avg | max | avgmax | catavgmax, or an empty text for the map itself.
        device: where parameters are made.
        dtype: their kind.
        options: see `FocalTransformer`.
    """

    output_fmt = "NHWC"
    global_pool: SelectAdaptivePool2d

    def __init__(
        self,
        num_classes: int = 1000,
        global_pool: str = "avg",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        with nullcontext() if device is None else torch.device(device):
            super().__init__(num_classes=0, **options)
            self.reset_classifier(num_classes, global_pool)
        if dtype is not None:
            self.to(dtype)
        stages: list[Any] = [*self.layers]
        self.feature_info = [
            {
                "num_chs": dim,
                "reduction": self.patch_embed.stride * 2**i,
                "module": f"layers.{i}.blocks.{len(stage.blocks) - 1}",  # a stage holds its downsampler
            }
            for i, (dim, stage) in enumerate(zip(self.feature_dims, stages, strict=True))
        ]

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As of nn.Module; a state without Focal-fast's choice of nearest keys leaves the model's own."""
        return super().load_state_dict(_with_choices(state_dict, self), strict, assign)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last map [B, H, W, C] to logits [B, num_classes], or to what enters the classifier."""
        x = self.global_pool(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(  # type: ignore[override]
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of chosen stages, after the stage's last block and before its downsampler.

        Args:
            x: image, [B, in_chans, H, W].
            indices: stages; a number n for the last n, None for all.
            norm: apply the final norm to the last stage's map.
            stop_early: leave out stages after the last chosen one.
            output_fmt: NCHW | NHWC, of the maps.
            intermediates_only: return the maps alone.

        Returns:
            The maps in ascending order; with them, and before them, the last computed map [B, H, W, C], which
            is that of `forward_features` where all stages ran.

        Raises:
            ValueError: a stage or a format that does not exist.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        wanted = self._stages(indices)
        last = len(self.layers) - 1
        until = max(wanted) if stop_early or intermediates_only else last
        maps = []
        x = self._stem(x)
        for i, stage in enumerate(self.layers[: until + 1]):
            x = stage(x)
            chosen = self.norm(x) if norm and i == last else x
            maps += [chosen] if i in wanted else []
            x = next_map(stage, x) if i < until else x
        maps = [m.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else m for m in maps]
        if intermediates_only:
            return maps
        return (self.norm(x) if until == last else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of chosen stages do not need; returns the stages, counted from the first.

        Args:
            indices: see `forward_intermediates`.
            prune_norm: remove the final norm; it goes with the last stage in any case.
            prune_head: remove pooling and classifier; they go with the last stage in any case.
        """
        wanted = self._stages(indices)
        shortened = max(wanted) < len(self.layers) - 1
        self.layers = self.layers[: max(wanted) + 1]
        last: Any = self.layers[-1]
        last.downsample = None
        self.num_features = self.feature_dims[max(wanted)]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return wanted

    def _stages(self, indices: int | Sequence[int] | None) -> list[int]:
        """The stages that `indices` of `forward_intermediates` mean."""
        count = len(self.layers)
        indices = count if indices is None else indices
        named = [*range(-indices, 0)] if isinstance(indices, int) else [*indices]
        if not named or min(named) < -count or max(named) >= count:
            raise ValueError(
                f"indices must name stages 0 to {count - 1} (or -{count} to -1), or say how many of the last "
                f"are meant, got {indices}"
            )
        return [i % count for i in named]

    def get_classifier(self) -> nn.Module:
        """The layer that makes logits."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one.

        Args:
            num_classes: classes; 0 for no classifier.
            global_pool: see the class; None for what there is.
        """
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool = SelectAdaptivePool2d(pool_type=pool, flatten=bool(pool), input_fmt="NHWC")
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        like = next(self.parameters())
        self.head = (
            nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            if num_classes > 0
            else nn.Identity()
        )
        initialise(self.head)
        for module in (self.global_pool, self.head):
            module.train(self.training)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Make this the model that it would be if built for another size, keeping its windows and parameters.

        Any size runs without it. It resizes the position embedding for good, and puts Focal-fast's choice of
        nearest keys for the new size into the state, where the choice of the old one was.

        Args:
            img_size: pixels, one side or (rows, columns).

        Raises:
            ValueError: smaller than what the model can take.
        """
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(height, width) < self.smallest_side:
            raise ValueError(
                f"img_size must be at least {self.smallest_side} pixels a side, got {height} x {width}"
            )
        size = self.patch_embed.output_size(height, width)
        if self.absolute_pos_embed is not None:
            resized = self._position_embedding(*size).detach().flatten(1, 2).clone()
            self.absolute_pos_embed = nn.Parameter(resized, self.absolute_pos_embed.requires_grad)
        self.built_for = size
        stages: list[Any] = [*self.layers]
        for stage in stages:
            for block in stage.blocks:
                block.attn.selection = block.attn.selection.made_for(block.attn, size)
            size = size if stage.downsample is None else stage.downsample.output_size(*size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        stages: list[Any] = [*self.layers]
        for stage in stages:
            stage.use_checkpoint = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters in the order of the layers, as timm's layer-wise learning rates need them: the stem, one
        group for each block (each stage if `coarse`), the classifier.

        A downsampler and the final norm go with the block before them.
        """
        with_previous = (99999,)
        fine = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", with_previous),
            (r"^norm", with_previous),
        ]
        coarsely = [(r"^layers\.(\d+)", None), (r"^norm", with_previous)]
        return {"stem": r"^patch_embed|^absolute_pos_embed", "blocks": coarsely if coarse else fine}


def _with_choices(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state dict with the model's own choice of nearest keys where it has none.

    Of a training checkpoint timm takes the averaged weights, which hold no whole numbers.
    """
    own = {key: value for key, value in model.state_dict().items() if CHOICE_BUFFERS.search(key)}
    if missing := own.keys() - state.keys():
        logger.warning(f"{len(missing)} choices of nearest keys are not in the file, the model's own stay")
    return {**own, **state}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """What timm loads of an original or own state dict: parameters, resized to the model's windows and input
    size (resize.py), and the nearest keys where they are those of its size, else the model's own.

    Raises:
        ValueError: there are no parameters in it, or not those of the model. timm itself fits the classifier
            and the first convolution, and takes no notice of missing keys where features alone are wanted.
    """
    own = model.state_dict()
    state = _with_choices(state_dict_of(state_dict), model)
    resize_state(state, own, getattr(model, "built_for", None))
    elsewhere = choices_of_other_maps(model, state)
    state |= {key: own[key] for key in elsewhere}
    fitted_by_timm = (*HEAD, "patch_embed.proj.weight")
    given, wanted = ({k: v for k, v in x.items() if k not in fitted_by_timm} for x in (state, own))
    check_state(given, wanted, "the pretrained file")
    return state


def _entrypoint(variant: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            TimmFocalTransformer,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **{**VARIANTS[variant], **kwargs},
        )

    create.__name__ = create.__qualname__ = variant
    create.__doc__ = f"{variant} for timm; further arguments are those of TimmFocalTransformer."
    return create


__all__ = ["VARIANTS", "TimmFocalTransformer", "checkpoint_filter_fn", "default_cfgs"]
for _variant in VARIANTS:  # register_model appends the names to __all__
    globals()[_variant] = register_model(_entrypoint(_variant))
for _leaf in (FocalBlock, PatchEmbed):
    register_notrace_module(_leaf)
register_notrace_function(check_images)
