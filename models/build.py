"""From a config to a model, and what the model costs. The only file of this package that knows config
keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from .focal_transformer import FocalTransformer

if TYPE_CHECKING:
    from yacs.config import CfgNode


def build_model(config: CfgNode) -> FocalTransformer:
    """Make the model that a config (see `config.load_config`) describes, with fresh weights.

    Raises:
        ValueError: options that contradict each other.
    """
    focal = config.MODEL.FOCAL
    return FocalTransformer(
        kind=config.MODEL.TYPE,
        img_size=config.DATA.IMG_SIZE,
        patch_size=focal.PATCH_SIZE,
        in_chans=focal.IN_CHANS,
        num_classes=config.MODEL.NUM_CLASSES,
        embed_dim=focal.EMBED_DIM,
        depths=focal.DEPTHS,
        num_heads=focal.NUM_HEADS,
        window_size=focal.WINDOW_SIZE,
        mlp_ratio=focal.MLP_RATIO,
        qkv_bias=focal.QKV_BIAS,
        qk_scale=focal.QK_SCALE,
        drop_rate=config.MODEL.DROP_RATE,
        drop_path_rate=config.MODEL.DROP_PATH_RATE,
        ape=focal.APE,
        patch_norm=focal.PATCH_NORM,
        use_shift=focal.USE_SHIFT,
        focal_pool=focal.FOCAL_POOL,
        focal_stages=focal.FOCAL_STAGES,
        focal_levels=focal.FOCAL_LEVELS,
        focal_windows=focal.FOCAL_WINDOWS,
        focal_topk=focal.FOCAL_TOPK,
        expand_sizes=focal.EXPAND_SIZES,
        expand_layer=focal.EXPAND_LAYER,
        use_conv_embed=focal.USE_CONV_EMBED,
        use_layerscale=focal.USE_LAYERSCALE,
        layerscale_value=focal.LAYERSCALE_VALUE,
        use_pre_norm=focal.USE_PRE_NORM,
        use_checkpoint=config.TRAIN.USE_CHECKPOINT,
        attention_backend=config.MODEL.ATTENTION_BACKEND,
    )


def count_params_and_macs(config: CfgNode) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one image at DATA.IMG_SIZE.

    Counted on the meta device with the plain operator, every matrix product and convolution that its
    definition needs; norms, activations and softmax are not counted.
    """
    config = config.clone()
    config.defrost()
    config.MODEL.ATTENTION_BACKEND = "plain"
    size = config.DATA.IMG_SIZE
    size = [size, size] if isinstance(size, int) else size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model = build_model(config).to("meta").eval()
        model(torch.empty(1, model.in_chans, *size, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
