"""Focal attention as one operator with several backends of the same signature and the same result.

Legend: B batch, H W rows and columns of the padded map, T = H*W, S = T + pooled tokens, N heads, D head
width, P windows, Q queries of a window, K keys of a window.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import reference, sdpa
from .key_table import Fold, KeyTable, lookup

BACKENDS: dict[str, ModuleType] = {"reference": reference, "sdpa": sdpa}
"""Each backend offers `prepare_bias(bias, table, dtype)`, which may be cached, and `attend(qkv, table, bias,
scale)`."""

BACKEND_CHOICES = ("auto", *BACKENDS)


def check_backend(name: str) -> str:
    """Return `name` if it is a backend or `auto`; ValueError otherwise."""
    if name not in BACKEND_CHOICES:
        raise ValueError(f"unknown attention backend {name!r}: choose one of {', '.join(BACKEND_CHOICES)}")
    return name


def resolve_backend(name: str) -> str:
    """The backend that `name` stands for: `auto` is the fastest that runs everywhere."""
    return "sdpa" if check_backend(name) == "auto" else name


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
    chosen = BACKENDS[resolve_backend(backend)]
    return chosen.attend(qkv, table, chosen.prepare_bias(bias, table, qkv.dtype), scale)


__all__ = [
    "BACKENDS",
    "BACKEND_CHOICES",
    "Fold",
    "KeyTable",
    "check_backend",
    "focal_attention",
    "lookup",
    "resolve_backend",
]
