"""FocalTransformer as a backbone of MMDetection and MMSegmentation: chosen stages, each with its own
LayerNorm (norm0, norm1, ...), frozen stages, and weights of a classifier, detector or segmenter.
"""

import re
from collections.abc import Mapping, Sequence
from inspect import signature
from math import ceil
from operator import index as integer
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional

from models import VARIANTS, FocalTransformer, load_checkpoint, read_checkpoint
from models.checkpoint import PREFIXES, usual_weights
from optimizer import freeze_stages
from utils import UserError, user_input

OUTPUT_NORM = re.compile(PREFIXES.pattern + r"norm(\d)\.weight")  # in files of detectors and segmenters


@MODELS.register_module()
class FocalBackbone(FocalTransformer):
    """Stage maps for a neck. Stages after the last of `out_indices` are left out.

    Args:
        variant: name of a released model in `models.VARIANTS`, whose options `options` override.
        out_indices: stages whose maps are returned, ascending from 0.
        frozen_stages: -1 trains everything, 0 freezes the stem, n the first n stages as well, with their
            output norms; dropout and drop path are off there.
        with_cp: recompute activations in the backward pass to save memory.
        init_cfg: `dict(type="Pretrained", checkpoint=FILE)`, weights of an original or own classifier, or
            of an own detector or segmenter.
        options: those of `models.FocalTransformer`; `img_size` is that of the checkpoint, not of images.

    Raises:
        UserError: options that are unknown, contradict each other, or would do nothing.
    """

    def __init__(
        self,
        variant: str | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if variant is not None and variant not in VARIANTS:
            raise UserError(
                f"FocalBackbone: variant: expected one of {', '.join(VARIANTS)}, got {variant!r}; correct it"
            )
        known = signature(FocalTransformer).parameters.keys() - {"num_classes", "use_checkpoint"}
        if unknown := ", ".join(sorted(options.keys() - known)):
            raise UserError(
                f"FocalBackbone takes no {unknown}. Is it left from a base config's backbone (ResNet, Swin)? "
                "Then write backbone=dict(_delete_=True, ...), or for pretrained model=dict(pretrained=None)"
            )
        if init_cfg is not None and not (
            {*init_cfg} == {"type", "checkpoint"}
            and init_cfg["type"] == "Pretrained"
            and isinstance(init_cfg["checkpoint"], str | Path)
        ):
            raise UserError(f"expected init_cfg=dict(type='Pretrained', checkpoint=FILE), got {init_cfg}")
        options = {**VARIANTS.get(variant or "", {}), **options}
        with user_input("FocalBackbone"):
            super().__init__(num_classes=0, use_checkpoint=with_cp, **options)
        stages = len(self.layers)
        if not out_indices or sorted({*out_indices} & {*range(stages)}) != list(out_indices):
            raise UserError(f"out_indices must ascend within 0 to {stages - 1}, got {list(out_indices)}")
        if not -1 <= frozen_stages <= out_indices[-1] + 1:
            raise UserError(f"frozen_stages must be -1 to {out_indices[-1] + 1}, got {frozen_stages}")
        self.options, self.init_cfg = options, init_cfg
        self.out_indices = tuple(out_indices)
        self.prune_intermediate_layers(out_indices, prune_norm=True)
        where = {"device": options.get("device"), "dtype": options.get("dtype")}
        for index in out_indices:
            norm = nn.LayerNorm(self.feature_dims[index], **where).requires_grad_(index >= frozen_stages)
            self.add_module(f"norm{index}", norm)
        freeze_stages(self, frozen_stages)

    def init_weights(self) -> None:
        """Load this backbone's stages from the file that `init_cfg` names, resized to its windows: that of a
        classifier, or of a detector or segmenter, which has the output norms as well.

        Without one, the weights that the constructor made stay: mmengine calls this before training.

        Raises:
            UserError: no such file, or its weights do not fit; the message names the keys.
        """
        if self.init_cfg is None:
            return
        file = self.init_cfg["checkpoint"]
        with user_input("init_cfg"):
            norms = [OUTPUT_NORM.fullmatch(str(name)) for name in usual_weights(read_checkpoint(file))]
            found = {int(norm[1]) for norm in norms if norm}  # in a detector's or segmenter's file
            outputs = sorted(found & {*range(len(self.feature_dims))})
            if outputs and outputs[-1] < self.out_indices[-1]:
                raise ValueError(
                    f"{file}: expected a backbone with the output {self.out_indices[-1]}, got one with the "
                    f"outputs {outputs}; use another file, or out_indices up to {outputs[-1]}"
                )
            options = {"out_indices": outputs} if outputs else {"num_classes": 0}
            model = (FocalBackbone if outputs else FocalTransformer)(**options, **self.options)
            report = load_checkpoint(model, file, reset_head=True, resize=True)
        loaded, own = model.state_dict(), self.state_dict()
        self.load_state_dict({key: value for key, value in loaded.items() if key in own}, strict=False)
        unused = [*report.reset, *report.dropped, *sorted(loaded.keys() - own.keys())]
        dropped = ", ".join(unused) or "nothing"
        fresh = ", ".join(sorted(own.keys() - loaded.keys())) or "nothing"
        resized = ", ".join([*report.resized, *report.continued, *report.adapted]) or "nothing"
        print_log(
            f"{report.path}: loaded; not used here: {dropped}; new: {fresh}; resized: {resized}", "current"
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images [B, 3, H, W] to maps [B, C_i, H / (4 * 2^i), W / (4 * 2^i)] of the chosen stages.

        Images below `smallest_side` are padded with zeros, and their maps cropped, to one cell at least.
        """
        padded = padded_images(x, self.smallest_side)
        maps = self.forward_intermediates(
            padded, self.out_indices, output_fmt="NHWC", intermediates_only=True
        )
        outputs = []
        for index, stage_map in zip(self.out_indices, maps, strict=True):
            stage_map = cropped_map(stage_map, x, self.feature_info[index]["reduction"])
            outputs.append(self.get_submodule(f"norm{index}")(stage_map).permute(0, 3, 1, 2).contiguous())
        return tuple(outputs)


@torch.fx.wrap  # symbolic traces leave what looks at sizes to be called
def padded_images(x: Tensor, side: int) -> Tensor:
    """Images [B, C, H, W] with zeros below and to the right, up to `side` pixels; those without pixels and
    other shapes stay, for `check_images` to refuse."""
    if x.ndim != 4 or 0 in x.shape[2:]:
        return x
    height, width = integer(x.shape[2]), integer(x.shape[3])  # constants to a compiler, as in `check_images`
    more = (0, max(0, side - width), 0, max(0, side - height))
    return functional.pad(x, more) if any(more) else x


@torch.fx.wrap
def cropped_map(x: Tensor, images: Tensor, stride: int) -> Tensor:
    """The cells of a map [B, H', W', C] that hold a pixel of the images; those of unpadded ones all do."""
    height, width = (ceil(integer(side) / stride) for side in images.shape[2:])
    return x[:, :height, :width]
