"""Focal Transformer: everything about the network. Needs torch and timm, nothing else of this repository."""

from . import ops
from .build import build_model, count_params_and_macs
from .checkpoint import load_checkpoint, read_checkpoint
from .focal_transformer import FocalTransformer
from .ops import agree_on_backends
from .registry import VARIANTS

__all__ = [
    "VARIANTS",
    "FocalTransformer",
    "agree_on_backends",
    "build_model",
    "count_params_and_macs",
    "load_checkpoint",
    "ops",
    "read_checkpoint",
]
