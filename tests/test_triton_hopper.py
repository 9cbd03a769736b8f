"""The fused kernels, compiled for Hopper without a GPU: registers, spills, shared memory."""

from __future__ import annotations

import os
import re
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from models.ops.triton import kernels, launch, tables

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")

HOPPER = [
    (name, head_dim, dtype, keys)
    for name in ("forward", "query_gradient", "key_gradient")
    for head_dim, dtype, keys in (
        (32, torch.bfloat16, 218),
        (32, torch.bfloat16, 178),
        (32, torch.bfloat16, 194),
        (32, torch.bfloat16, 50),
        (32, torch.bfloat16, 192),
        (32, torch.bfloat16, 256),
        (32, torch.bfloat16, 500),
        (64, torch.bfloat16, 218),
        (64, torch.bfloat16, 160),
        (64, torch.bfloat16, 287),
        (48, torch.bfloat16, 218),
        (48, torch.bfloat16, 144),
        (8, torch.bfloat16, 218),
        (24, torch.bfloat16, 218),
        (40, torch.bfloat16, 218),
        (56, torch.bfloat16, 218),
        (32, torch.float16, 218),
        (32, torch.float32, 218),
        (64, torch.float32, 218),
        (8, torch.float32, 218),
    )
]


@pytest.mark.parametrize(("name", "head_dim", "dtype", "keys"), HOPPER)
def test_compiles_for_hopper_without_spills(
    name: str, head_dim: int, dtype: torch.dtype, keys: int, tmp_path: Path
) -> None:
    """As launched for windows of 7: no spilled registers, and the tensor cores' wgmma instructions."""
    for arguments in _launches(name, head_dim, dtype, keys):
        usage = _hopper_usage(getattr(kernels, f"{name}_kernel"), dtype, arguments, tmp_path)
        print(name, head_dim, dtype, keys, arguments, usage)
        assert usage["STACK"] == usage["LOCAL"] == 0, usage
        assert usage["REG"] <= 255
        assert usage["wgmma"] or arguments["BLOCK_Q"] < 64 and name != "key_gradient"  # too short for them
        most = 227 if arguments["num_stages"] > 1 else 99  # what a block may have on Hopper; since Ampere
        assert usage["shared"] <= most * 1024


@pytest.mark.parametrize("name", ["forward", "query_gradient", "key_gradient"])
def test_sizes_make_no_kernel_of_their_own(name: str) -> None:
    """So what is compiled above is what runs, and a last batch of another size compiles nothing."""
    kernel = getattr(kernels, f"{name}_kernel")
    free = [p for p in kernel.params if not p.is_constexpr and not p.do_not_specialize]
    assert all(p.name.endswith(("_ptr", "scale")) for p in free)


def _launches(name: str, head_dim: int, dtype: torch.dtype, keys: int) -> Iterator[dict[str, Any]]:
    """Compile-time arguments of every launch of a kernel, taken from the code that launches it."""
    for groups, seen in ((1, keys * 3 // 4), (2, keys)):
        row, queries = tables.padded_keys(keys), launch.padded_queries(49)
        arrays = torch.empty(0, 8, 3, 3, head_dim, dtype=dtype), torch.empty(3, groups, queries, row)
        chosen, shared = launch.compile_time(name, "hopper", *arrays, 7)
        if name == "key_gradient":
            yield shared
        elif name == "forward":
            yield shared | launch.forward_tiles(keys, seen, chosen)
        else:
            for with_bias in (True, False):
                for _, tiles in launch.gradient_tiles(keys, seen, chosen, with_bias):
                    yield shared | tiles


INTEGER_POINTERS = (
    *("index_ptr", "first_ptr"),
    *("block_token_ptr", "entry_start_ptr", "entry_window_ptr", "entry_first_ptr", "entry_column_ptr"),
)
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
FLOAT_POINTERS = ("lse_ptr", "delta_ptr", "d_bias_ptr")


def _hopper_usage(kernel: Any, dtype: torch.dtype, arguments: dict[str, Any], folder: Path) -> dict[str, int]:
    """Registers, stack and local memory of a kernel compiled for compute capability 9.0."""
    triton = pytest.importorskip("triton", minversion="3.3")  # earlier, ASTSource took other arguments
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this triton brings no cuobjdump")
    options = {key: arguments[key] for key in OPTIONS if key in arguments}
    constants = {key: value for key, value in arguments.items() if key not in options}
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    types = (
        dict.fromkeys(INTEGER_POINTERS, "*i32") | dict.fromkeys(FLOAT_POINTERS, "*fp32") | {"scale": "fp32"}
    )
    types |= dict.fromkeys(constants, "constexpr")
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = types.get(name, element if name.endswith("_ptr") else "i32")
        if name.endswith("_ptr"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    constant_at = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=constant_at, attrs=attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    binary = folder / "kernel.cubin"
    binary.write_bytes(built.asm["cubin"])
    command = [tool, "--dump-resource-usage", binary]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage | {"wgmma": "wgmma" in built.asm["ptx"], "shared": built.metadata.shared}
