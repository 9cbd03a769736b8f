"""Optimizers and what they train: groups of weight decay and learning rate, frozen stages.

No weight decay, as in the original recipe, for biases, for parameters of one dimension, and for those the
model names itself (`model.no_weight_decay()`: position embeddings and bias tables). Layer-wise rates are
those of BEiT (Bao et al., 2021): the classifier learns at the full rate, every layer below it at a fixed
share of the rate above.
"""

from typing import Any

import torch
from timm.layers import DropPath
from timm.models import group_parameters
from torch import nn
from yacs.config import CfgNode

from models import FocalTransformer

ParamGroups = list[dict[str, Any]]


def freeze_stages(model: FocalTransformer, count: int) -> int:
    """Freeze the stem and the first stages: no gradients there, and dropout and drop path are off.

    Args:
        model: to change.
        count: -1 for nothing, 0 for the stem, n for the stem and the first n stages, each with its step to
            the next; all stages include the final norm and leave the classifier alone.

    Returns:
        The number of weights that are frozen.

    Raises:
        ValueError: more stages than there are.
    """
    stages = len(model.layers)
    if not -1 <= count <= stages:
        raise ValueError(
            f"TRAIN.FREEZE_STAGES: expected -1 to {stages}, the number of stages, got {count}; correct it"
        )
    if count < 0:
        return 0
    parts = [model.patch_embed, model.pos_drop, *model.layers[:count], *[model.norm] * (count == stages)]
    frozen = [parameter for part in parts for parameter in part.parameters()]
    frozen += [] if model.absolute_pos_embed is None else [model.absolute_pos_embed]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
    return sum(parameter.numel() for parameter in frozen)


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> ParamGroups:
    """The trainable parameters, grouped by share of the learning rate and weight decay.

    The largest share comes first, and of the same share the group with decay; at `layer_decay` 1 that is
    two groups. Layers are the stem, each block (with the downsampler or the norm that follows) and the
    classifier.

    Args:
        model: its `no_weight_decay()` and timm's `group_matcher()` are used if there are such.
        weight_decay: decay of those that have one.
        layer_decay: share of a layer's rate that the layer before it gets.

    Raises:
        ValueError: nothing to train.
    """
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    matcher: dict[str, Any] = getattr(model, "group_matcher", dict)()
    layers = group_parameters(model, matcher, reverse=True)
    last = max(layers.values(), default=0)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in exempt
            share = layer_decay ** (last - layers[name])
            groups.setdefault((share, decays), []).append(parameter)
    if not groups:
        raise ValueError("expected at least one trainable parameter, got none; every parameter is frozen")
    return [  # timm's schedulers multiply by `lr_scale`
        {"params": groups[share, decays], "weight_decay": weight_decay if decays else 0.0, "lr_scale": share}
        for share, decays in sorted(groups, reverse=True)
    ]


def build_optimizer(config: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer named by TRAIN.OPTIMIZER.NAME over `parameter_groups`.

    Raises:
        ValueError: nothing is left to train.
    """
    train = config.TRAIN
    groups = parameter_groups(model, train.WEIGHT_DECAY, train.LAYER_DECAY)
    if train.OPTIMIZER.NAME == "sgd":
        momentum = train.OPTIMIZER.MOMENTUM
        return torch.optim.SGD(groups, lr=train.BASE_LR, momentum=momentum, nesterov=momentum > 0)
    on_cuda = groups[0]["params"][0].is_cuda
    eps, betas = train.OPTIMIZER.EPS, train.OPTIMIZER.BETAS
    return torch.optim.AdamW(groups, lr=train.BASE_LR, eps=eps, betas=betas, fused=on_cuda)
