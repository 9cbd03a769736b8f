"""From a config to a model, and what the model costs. The only file of this package that knows config
keys."""

from __future__ import annotations

import re
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from timm.layers import to_2tuple
from torch.utils.flop_counter import FlopCounterMode

from .focal_transformer import FocalTransformer

if TYPE_CHECKING:
    from yacs.config import CfgNode

CONFIG_KEYS = {  # option of FocalTransformer -> config key, for those that are not MODEL.FOCAL.<OPTION>
    "kind": "MODEL.TYPE",
    "img_size": "DATA.IMG_SIZE",
    "num_classes": "MODEL.NUM_CLASSES",
    "drop_rate": "MODEL.DROP_RATE",
    "drop_path_rate": "MODEL.DROP_PATH_RATE",
    "use_checkpoint": "TRAIN.USE_CHECKPOINT",
    "attention_backend": "MODEL.ATTENTION_BACKEND",
}


def build_model(config: CfgNode) -> FocalTransformer:
    """Make the model that a config (see `config.load_config`) describes, with fresh weights.

    Raises:
        ValueError: options that cannot be used or contradict each other, all of them by their config keys.
    """
    keys = {name.lower(): f"MODEL.FOCAL.{name}" for name in config.MODEL.FOCAL}
    keys |= CONFIG_KEYS
    options = {option: attrgetter(key)(config) for option, key in keys.items()}
    try:
        return FocalTransformer(**options)
    except ValueError as error:
        message = re.sub(r"\w+", lambda word: keys.get(word[0], word[0]), str(error))
        raise ValueError(message) from error


def count_params_and_macs(config: CfgNode) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one image at DATA.IMG_SIZE.

    Counted on the meta device with the plain operator, every matrix product and convolution that its
    definition needs; norms, activations and softmax are not counted.
    """
    config = config.clone()
    config.defrost()
    config.MODEL.ATTENTION_BACKEND = "plain"
    with torch.device("meta"), torch.no_grad():
        model = build_model(config).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, model.in_chans, *to_2tuple(config.DATA.IMG_SIZE)))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
