"""Focal attention in fused CUDA kernels (Triton), forward and backward.

attention.py holds the operator as PyTorch sees it, launch.py starts the kernels of kernels.py, tables.py
derives the index tables that they read. The package triton is imported when an operator is first asked for
on a GPU, or with TRITON_INTERPRET=1, where the kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import os

from torch import Tensor

from ...focal_transformer import BACKENDS, AttentionIndex, Backend, Request, Unsupported
from .tables import TritonTables, build_tables


def prepare(index: AttentionIndex, request: Request) -> TritonTables:
    """See `Backend`."""
    if request.device.type != "cuda" and "TRITON_INTERPRET" not in os.environ:
        raise Unsupported(f"needs a CUDA device, got {request.device}")
    try:
        from . import attention, kernels, launch, trial
    except ImportError as error:
        raise Unsupported(str(error)) from error
    if reason := attention.why_not(request, index.window):
        raise Unsupported(reason)
    if index.tokens * 3 * request.heads * request.head_dim > launch.MOST_NUMBERS:
        raise Unsupported(f"addresses {launch.MOST_NUMBERS} numbers of an image; this one has more")
    tables = build_tables(index, request.trains)
    case = trial.case_of(index, tables, request)
    if not kernels.INTERPRETED and (reason := trial.problem(case)):
        raise Unsupported(reason)
    return tables


def attend(qkv: Tensor, index: AttentionIndex, bias: Tensor, scale: float) -> Tensor:
    """See `Backend`."""
    from . import attention

    return attention.attend(qkv, index, bias, scale)


BACKENDS["triton"] = Backend(prepare, attend)
