"""Optimizers, with the weight decay groups of the original recipe.

No decay for biases, for parameters of one dimension, and for those the model names itself
(``model.no_weight_decay()``: position embeddings and bias tables).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

ParamGroups = list[dict[str, Any]]


def parameter_groups(model: nn.Module, weight_decay: float) -> ParamGroups:
    """The trainable parameters in two groups, with and without weight decay; an empty group is left out.

    Args:
        model: its ``no_weight_decay()``, if it has one, returns names of parameters to exempt.
        weight_decay: decay of the first group.

    Raises:
        ValueError: nothing to train.
    """
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
            (no_decay if is_exempt else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("expected at least one trainable parameter, got none; every parameter is frozen")
    return groups


def build_optimizer(config: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer named by TRAIN.OPTIMIZER.NAME over ``parameter_groups``.

    Raises:
        ValueError: unknown name, or apex is missing for fused_adam and fused_lamb.
    """
    train = config.TRAIN
    groups = parameter_groups(model, train.WEIGHT_DECAY)
    on_cuda = groups[0]["params"][0].is_cuda
    adam = {"lr": train.BASE_LR, "eps": train.OPTIMIZER.EPS, "betas": train.OPTIMIZER.BETAS}
    choices: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(groups, fused=on_cuda, **adam),
        "sgd": lambda: torch.optim.SGD(
            groups, lr=train.BASE_LR, momentum=train.OPTIMIZER.MOMENTUM, nesterov=train.OPTIMIZER.MOMENTUM > 0
        ),
        "fused_adam": lambda: _apex_optimizer("FusedAdam")(groups, **adam),
        "fused_lamb": lambda: _apex_optimizer("FusedLAMB")(groups, **adam),
    }
    name = train.OPTIMIZER.NAME
    if name not in choices:
        raise ValueError(
            f"TRAIN.OPTIMIZER.NAME: expected one of {', '.join(choices)}, got {name!r}; use adamw"
        )
    return choices[name]()


def _apex_optimizer(name: str) -> Callable[..., torch.optim.Optimizer]:
    try:
        from apex import optimizers
    except ImportError as error:
        raise ValueError(
            "TRAIN.OPTIMIZER.NAME: fused_adam and fused_lamb need NVIDIA apex, which is not installed; "
            "use adamw, which is fused on CUDA without it"
        ) from error
    return getattr(optimizers, name)
