"""Faster attention operators; each adds itself to `focal_transformer.BACKENDS`.

An operator says why it cannot run somewhere; the plain one, in the network's own file, always can. Legend:
as in `focal_transformer`.
"""

from __future__ import annotations

import logging

import torch
from torch import distributed as dist

from ..focal_transformer import FocalAttention, FocalTransformer
from . import triton  # before cpu, since `auto` takes the last that can run: on the CPU not the interpreter

# isort: split
from . import cpu

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
    """
    try:
        names, failure = model.attention_backends(dtype), None
    except ValueError as error:
        names, failure = [], error
    if not dist.is_available() or not dist.is_initialized():
        if failure:
            raise failure
        return names
    answers: list[tuple[list[str], str]] = [([], "")] * dist.get_world_size(group)
    dist.all_gather_object(answers, (names, str(failure or "")), group=group)
    for rank, (_, text) in enumerate(answers):
        if text:
            raise ValueError(f"process {rank}: {text}") from failure
    chosen = [[name.partition(" ")[0] for name in stages] for stages, _ in answers]  # reasons name devices
    different = [rank for rank, stages in enumerate(chosen) if stages != chosen[0]]
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
