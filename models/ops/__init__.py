"""Focal attention as one operator with several backends of the same signature and the same result.

Legend: B batch, H W rows and columns of the padded map, T = H*W, S = T + pooled tokens, N heads, D head
width, P windows, Q queries of a window, K keys of a window.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from . import reference, sdpa
from .key_table import Fold, KeyTable, lookup, lookup_columns

PORTABLE_BACKENDS: dict[str, ModuleType] = {"reference": reference, "sdpa": sdpa}
"""Backends that run on any device. Each is a module of this package with `prepare_bias(bias, table, dtype)`,
whose result may be kept, and `attend(qkv, table, bias, scale)`."""

BACKENDS = (*PORTABLE_BACKENDS, "triton")

BACKEND_CHOICES = ("auto", *BACKENDS)


def check_backend(name: str) -> str:
    """Return `name` if it is a backend or `auto`; ValueError otherwise."""
    if name not in BACKEND_CHOICES:
        raise ValueError(f"unknown attention backend {name!r}: choose one of {', '.join(BACKEND_CHOICES)}")
    return name


def backend_module(name: str) -> ModuleType:
    """The module of a backend; ImportError, saying what to install, where its package is not there."""
    if name == "triton":  # an optional package, imported when first used
        from . import triton_kernel

        return triton_kernel
    return PORTABLE_BACKENDS[name]


@torch.compiler.assume_constant_result
def resolve_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, window: int) -> str:
    """The backend that `name` stands for in a layer: `auto` is `triton` where it runs, else `sdpa`.

    Where it runs is for its module to say: on CUDA, for the head widths and windows it was written for,
    whatever the map's size; `tools/profile_attention.py` times it against the others layer by layer, which
    has not been done on a GPU yet. Whether `sdpa` gathers keys follows from the map (`geometry.DENSE_RATIO`,
    measured).

    Args:
        name: one of `BACKEND_CHOICES`.
        device: where the layer runs.
        dtype: of its queries, keys and values.
        head_dim: width of a head.
        window: window side.

    Raises:
        ValueError: an explicit choice cannot run here.
    """
    if check_backend(name) in PORTABLE_BACKENDS or (name == "auto" and device.type != "cuda"):
        return "sdpa" if name == "auto" else name
    reason = _why_not_triton(device, dtype, head_dim, window)
    if reason is not None and name != "auto":
        raise ValueError(reason)
    return "triton" if reason is None else "sdpa"


@lru_cache(maxsize=1024)
def _why_not_triton(device: torch.device, dtype: torch.dtype, head_dim: int, window: int) -> str | None:
    """Why the backend `triton` cannot run; None if it can. Kept, since an import that fails is tried anew."""
    try:
        return backend_module("triton").unsupported(device, dtype, head_dim, window)
    except ImportError as error:
        return str(error)


def focal_attention(
    qkv: Tensor, table: KeyTable, bias: Tensor, scale: float, backend: str = "auto"
) -> Tensor:
    """Attention of every window's queries to that window's keys.

    Args:
        qkv: queries, keys and values as one projection makes them, [B, S, 3, N, D]: fine tokens of the padded
            map in row-major order, then the pooled ones, whose queries are not used.
        table: which keys each window sees.
        bias: added to the scores, [N, P, Q, K], or [N, 1, Q, K] where windows share it.
        scale: factor of the scores.
        backend: one of `BACKEND_CHOICES`.

    Returns:
        [B, T, N*D], in the order of the fine tokens.
    """
    dim = qkv.shape[-1]
    chosen = backend_module(resolve_backend(backend, qkv.device, qkv.dtype, dim, table.window))
    return chosen.attend(qkv, table, chosen.prepare_bias(bias, table, qkv.dtype), scale)


__all__ = [
    "BACKENDS",
    "BACKEND_CHOICES",
    "Fold",
    "KeyTable",
    "PORTABLE_BACKENDS",
    "backend_module",
    "check_backend",
    "focal_attention",
    "lookup",
    "lookup_columns",
    "resolve_backend",
]
