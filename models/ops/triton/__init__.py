"""Focal attention in fused CUDA kernels (Triton), forward and backward.

attention.py holds the operator as PyTorch sees it, launch.py starts the kernels of kernels.py, tables.py
derives the index tables that they read. The package triton is imported when an operator is first asked for
on a GPU, or with TRITON_INTERPRET=1, where the kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch
from torch import Tensor

from ...focal_transformer import BACKENDS, AttentionIndex, Backend
from .tables import build_tables


@lru_cache
def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, window: int) -> str | None:
    """See `Backend`."""
    if device.type != "cuda" and "TRITON_INTERPRET" not in os.environ:
        return f"needs a CUDA device, got {device}"
    try:
        from . import attention
    except ImportError as error:
        return str(error)
    return attention.why_not(device, dtype, head_dim, window)


def attend(qkv: Tensor, index: AttentionIndex, bias: Tensor, scale: float) -> Tensor:
    """See `Backend`."""
    from . import attention

    return attention.attend(qkv, index, bias, scale)


BACKENDS["triton"] = Backend(why_not, build_tables, attend)
