"""What a compiled kernel takes of a GPU: registers, spills, shared and tensor memory, instructions.

Read from the binary with NVIDIA's cuobjdump, which Triton brings, or from the assembly with AMD's metadata.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from math import ceil
from pathlib import Path
from typing import NamedTuple

import networkx  # comes with PyTorch
import triton
from triton.runtime.errors import OutOfResources

from .stub_driver import CARDS, Card, Kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TENSOR_COLUMNS, LEAST_TENSOR_COLUMNS = 512, 32  # tensor memory of an SM, and the least that is allocated
PART_REGISTERS, REGISTER_UNIT = 2**14, 2**8  # of a quarter of an SM; a warp's registers come in such units
UNITS = ("cp.async", "wgmma", "tcgen05", "mma.sync", "mfma", "wmma")


class Figures(NamedTuple):
    """A kernel on one card; None where it was not compiled, and for what a card does not have."""

    kernel: str
    verdict: str  # ok, spills, out of resource, does not compile
    reason: str = ""
    warps: int | None = None
    stages: int | None = None
    shared: int | None = None  # bytes of a block
    registers: int | None = None  # of a thread
    stack: int | None = None  # bytes of a thread, where spilled registers go; AMD: scratch
    tensor: int | None = None  # columns of tensor memory
    blocks: int | None = None  # that fit into an SM
    units: str = ""  # which of UNITS it uses
    instructions: int | None = None  # NVIDIA: of the largest loop's body, per warp; one inside counts once
    hash: str = ""  # of the compiled kernel


def figures(kernel: Kernel, card_name: str) -> Figures:
    """What a kernel that was compiled for a card takes."""
    if kernel.compiled is None:
        return Figures(kernel.name, "does not compile", reason_of(kernel.error))
    card, asm, metadata = CARDS[card_name], kernel.compiled.asm, kernel.compiled.metadata
    shared, warps = metadata.shared, metadata.num_warps
    tensor = getattr(metadata, "tmem_size", None) or None  # from Triton 3.3 on
    if card.target.backend == "cuda":
        usage, text = _cuobjdump(asm["cubin"], "--dump-resource-usage"), asm["ptx"]
        registers, stack = number("REG:", usage), number("STACK:", usage)
        part_warps = PART_REGISTERS // (ceil(registers * 32 / REGISTER_UNIT) * REGISTER_UNIT)
        instructions = len(main_loop(*parse_sass(_cuobjdump(asm["cubin"], "-sass")))) or None
    else:
        text = asm["amdgcn"]
        registers, stack = number(r"\.vgpr_count:", text), number(r"\.private_segment_fixed_size:", text)
        stack += number(r"\.vgpr_spill_count:", text)  # into other registers
        part_warps = number("; Occupancy:", text)
        instructions = None
    return Figures(
        kernel=kernel.name,
        verdict="out of resource" if kernel.error else "spills" if stack else "ok",
        reason=reason_of(kernel.error),
        warps=warps,
        stages=metadata.num_stages,
        shared=shared,
        registers=registers,
        stack=stack,
        tensor=tensor,
        blocks=blocks_per_sm(card, warps, min(part_warps, card.part_warps), shared, tensor),
        units=" ".join(name for name in UNITS if re.search(rf"{re.escape(name)}(?!\.bulk)", text)),
        instructions=instructions,
        hash=kernel.compiled.hash,
    )


def number(name: str, text: str) -> int:
    """What stands behind a name, which must be there."""
    return int(re.search(rf"{name}\s*(\d+)", text)[1])  # type: ignore[index]


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

    A block has `warps`, bytes of shared and columns of tensor memory; a part of an SM has registers for
    `part_warps`.
    """
    fit = [card.sm_blocks, part_warps * card.sm_parts // warps]
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


Edges = dict[int, list[int]]  # for each instruction the ones that may come next


def parse_sass(text: str) -> tuple[list[str], Edges]:
    """Opcodes of cuobjdump -sass, and which may follow which."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)([^;]*);", text)
    number = {int(address, 16): i for i, (address, *_) in enumerate(found)}
    edges: Edges = {}
    for i, (_, predicate, opcode, operands) in enumerate(found):
        target = re.search(r"(0x[0-9a-f]+)\s*$", operands) if opcode.startswith(("BRA", "JMP")) else None
        only_target = target is not None and operands.strip() == target[1]
        ends = opcode.startswith(("EXIT", "RET")) or only_target
        edges[i] = [] if ends and not predicate else [i + 1]
        if target:
            edges[i].append(number[int(target[1], 16)])
    return [opcode for _, _, opcode, _ in found], edges


def main_loop(opcodes: list[str], edges: Edges) -> list[str]:
    """Opcodes of the largest set of instructions that can all reach each other: of the largest loop with the
    ones inside it. None where there is no loop.
    """
    largest = max(networkx.strongly_connected_components(networkx.DiGraph(edges)), key=len)
    return [opcodes[i] for i in sorted(largest)] if len(largest) > 1 else []
