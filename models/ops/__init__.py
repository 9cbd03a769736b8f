"""Faster attention operators; each adds itself to `focal_transformer.BACKENDS`.

An operator says why it cannot run somewhere; the plain one, in the network's own file, always can. Legend:
as in `focal_transformer`.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import distributed as dist

from ..focal_transformer import FocalAttention, FocalTransformer

# isort: split
from . import triton

# isort: split
from . import cpu  # the order is the priority: `auto` tries the last import first

__all__ = ["agree_on_backends", "cpu", "triton"]

logger = logging.getLogger(__name__)


def agree_on_backends(
    model: FocalTransformer, dtype: torch.dtype, group: dist.ProcessGroup | None = None
) -> list[str]:
    """Let all processes of a distributed run use the same attention operators.

    If `auto` chooses differently somewhere, as where one node has no C compiler, all layers become plain.
    Collective: every process of the group must call it. Without a process group it only asks the model.

    Args:
        model: on its device.
        dtype: of the activations.
        group: processes that must agree, all by default.

    Returns:
        What `FocalTransformer.attention_backends` says then.

    Raises:
        ValueError: a named operator cannot run in one of the processes.
        RuntimeError: another process failed in another way. The one that did raises its own error.
    """
    if not dist.is_available() or not dist.is_initialized():
        return model.attention_backends(dtype)
    names: list[str] = []
    failure, reported = None, None
    try:
        names = model.attention_backends(dtype)
    except Exception as error:  # the other processes wait for an answer
        failure, kind = error, ValueError if isinstance(error, ValueError) else RuntimeError
        reported = (kind, str(error))
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, (names, reported), group=group)
    if failure is not None:
        raise failure
    for rank, (_, failed) in enumerate(answers):
        if failed is not None:
            raise failed[0](f"process {rank}: {failed[1]}")
    chosen = [[name.partition(" ")[0] for name in found] for found, _ in answers]  # reasons name devices
    different = [rank for rank, found in enumerate(chosen) if found != chosen[0]]
    if not different:
        return names
    logger.warning(
        f"attention runs in PyTorch's own operations in all processes: process 0 can use {answers[0][0]}, "
        f"process {different[0]} {answers[different[0]][0]}"
    )
    for module in model.modules():
        if isinstance(module, FocalAttention):
            module.backend = "plain"
    return model.attention_backends(dtype)
