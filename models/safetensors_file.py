"""Weights in the safetensors format: tensors by name and nothing else, so that a file cannot run code.

A file holds parameters alone; a training run is resumed from `.pth` files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    Raises:
        ValueError: no such file format, or damaged.
    """
    try:
        return dict(safetensors.torch.load_file(path, device="cpu"))
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip() or type(error).__name__
        raise ValueError(f"{path}: not a safetensors file, or damaged ({reason}); get it again") from error


def write_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name; what was at `path` is lost.

    Raises:
        OSError: it could not be written.
    """
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}  # own storage
    path.write_bytes(safetensors.torch.save(plain, metadata={"format": "pt"}))
