"""Faster attention operators; each adds itself to `focal_transformer.BACKENDS`.

An operator says why it cannot run somewhere; the plain one, in the network's own file, always can. Legend:
as in `focal_transformer`.
"""

from . import triton  # before cpu, since `auto` takes the last that can run: on the CPU not the interpreter

# isort: split
from . import cpu

__all__ = ["cpu", "triton"]
