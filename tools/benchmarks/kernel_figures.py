"""What a compiled kernel takes of a GPU: registers, spills, shared and tensor memory, instructions.

Read from the binary with NVIDIA's cuobjdump, which Triton brings, or from the assembly with AMD's metadata.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import triton
from triton.runtime.errors import OutOfResources

from .stub_driver import CARDS, Card, Kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TENSOR_COLUMNS, LEAST_TENSOR_COLUMNS = 512, 32  # tensor memory of an SM, and the least that is allocated
PART_REGISTERS, REGISTER_UNIT = 2**14, 2**8  # of a quarter of an SM; a warp's registers come in such units
UNITS = ("cp.async", "wgmma", "tcgen05", "mma.sync", "mfma", "wmma")
SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)")
AMDGCN = re.compile(r"^\t([a-z]\w*?)(?:_e32|_e64)?\b", re.MULTILINE)
UNIFORM = re.compile(r"s_|U(?!TC|BLK)|R2UR")  # runs on a warp's scalar unit


@dataclass(frozen=True)
class Figures:
    """A kernel on one card; None where it was not compiled, and for what a card does not have."""

    kernel: str
    verdict: str  # ok, spills, out of resource, does not compile, refused
    reason: str = ""
    warps: int | None = None
    stages: int | None = None
    shared: int | None = None  # bytes of a block
    registers: int | None = None  # of a thread
    stack: int | None = None  # bytes of a thread; AMD: scratch
    local: int | None = None  # bytes of a thread
    spilled: int | None = None  # vector registers of a thread (AMD)
    tensor: int | None = None  # columns of tensor memory
    blocks: int | None = None  # that fit into an SM
    units: str = ""  # which of UNITS it uses
    instructions: int | None = None  # of the whole program
    classes: str = ""  # these by opcode, most frequent first
    hash: str = ""  # of the compiled kernel


def figures(kernel: Kernel, card_name: str) -> Figures:
    """What a kernel that was compiled for a card takes."""
    if kernel.compiled is None:
        return Figures(kernel.name, "does not compile", reason_of(kernel.error))
    card, asm, metadata = CARDS[card_name], kernel.compiled.asm, kernel.compiled.metadata
    tensor = getattr(metadata, "tmem_size", None) or None  # from Triton 3.3 on
    if card.target.backend == "cuda":
        usage = _cuobjdump(asm["cubin"], "--dump-resource-usage")
        found = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        opcodes, text = SASS.findall(_cuobjdump(asm["cubin"], "-sass")), asm["ptx"]
        part_warps = PART_REGISTERS // (ceil(found["reg"] * 32 / REGISTER_UNIT) * REGISTER_UNIT)
    else:
        text = asm["amdgcn"]
        names = {"reg": ".vgpr_count", "stack": ".private_segment_fixed_size"}
        names |= {"spilled": ".vgpr_spill_count", "warps": "; Occupancy"}
        found = {key: int(re.search(rf"{re.escape(x)}:\s+(\d+)", text)[1]) for key, x in names.items()}  # type: ignore[index]
        opcodes, part_warps = AMDGCN.findall(text.partition("s_endpgm")[0]), found["warps"]
    classes = Counter("uniform" if UNIFORM.match(opcode) else opcode for opcode in opcodes if opcode != "NOP")
    spills = bool(found["stack"] or found.get("local") or found.get("spilled"))
    return Figures(
        kernel=kernel.name,
        verdict="out of resource" if kernel.error else "spills" if spills else "ok",
        reason=reason_of(kernel.error),
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        shared=metadata.shared,
        registers=found["reg"],
        stack=found["stack"],
        local=found.get("local"),
        spilled=found.get("spilled"),
        tensor=tensor,
        blocks=blocks_per_sm(card, metadata.num_warps, part_warps, metadata.shared, tensor),
        units=" ".join(name for name in UNITS if re.search(rf"{re.escape(name)}(?!\.bulk)", text)),
        instructions=classes.total(),
        classes=", ".join(f"{name} {n}" for name, n in classes.most_common()),
        hash=kernel.compiled.hash,
    )


def reason_of(error: Exception | None) -> str:
    """An error in one line: what ran out, or what Triton's compiler says last."""
    if error is None:
        return ""
    if isinstance(error, OutOfResources):
        return f"{error.name}: {error.required} of {error.limit}"
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def blocks_per_sm(card: Card, warps: int, part_warps: int, shared: int, tensor: int | None) -> int:
    """Blocks that fit into an SM at the same time.

    Args:
        card: the GPU.
        warps: of a block.
        part_warps: warps that a part of an SM has registers for.
        shared: bytes of a block.
        tensor: columns of tensor memory of a block.
    """
    fit = [card.sm_blocks, min(part_warps, card.part_warps) * card.sm_parts // warps]
    if shared + card.reserved:
        fit.append(card.sm_shared // (shared + card.reserved))
    if tensor:
        fit.append(TENSOR_COLUMNS // max(LEAST_TENSOR_COLUMNS, 1 << (tensor - 1).bit_length()))
    return min(fit)


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
