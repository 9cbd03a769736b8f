"""The fused kernels, compiled for every GPU without one: resources, spills, and what they are made of."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.3", reason="the stub driver needs Triton 3.3 or later")

import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from models.ops.triton import kernels
from tools.benchmarks.compile_matrix import compile_all, distinct_layers
from tools.benchmarks.kernel_figures import CUOBJDUMP, Figures, main_loop, parse_sass
from tools.benchmarks.operator_costs import count_launches
from tools.benchmarks.stub_driver import StubDriver

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton brings no cuobjdump"),
]

ATTENTION = ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")


CASES = {  # model, which of its distinct layers, card, dtype: one card for each table of settings
    **{
        f"focal {card}": ("focal_tiny", 0, card, "bf16")
        for card in ("sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
    },
    "focalv2 sm_100": ("focalv2_tiny_useconv", 0, "sm_100", "bf16"),
    "focal gfx942 fp32": ("focal_tiny", 0, "gfx942", "fp32"),
    "one window": ("focal_tiny", -1, "sm_90", "bf16"),
    "more keys than registers hold": ("focal_tiny window 12", 0, "sm_90", "bf16"),
    "heads of 64": ("focal_base wide heads", 0, "sm_90", "fp16"),
    "fp32, heads of 64": ("focal_base wide heads", 0, "sm_90", "fp32"),
}


def test_models_train_on_every_gpu() -> None:
    """Forward and backward: all kernels compile, fit the card and spill nothing; Hopper's use wgmma in half
    precision."""
    jobs = [(distinct_layers([model])[i], card, dtype) for model, i, card, dtype in CASES.values()]
    for (_, card, dtype), case, rows in zip(jobs, CASES, compile_all(jobs), strict=True):
        figures = [Figures(*row[-len(Figures._fields) :]) for row in rows]
        assert {f.kernel for f in figures} >= set(ATTENTION), case
        assert [f for f in figures if f.verdict != "ok"] == [], case
        attention = [f for f in figures if f.kernel in ATTENTION]
        assert all(f.blocks and (f.instructions or card.startswith("gfx")) for f in attention), case
        if card == "sm_90" and dtype != "fp32":
            assert all("wgmma" in f.units for f in attention), case


@pytest.mark.parametrize("model", ["focal_tiny", "focalv2_tiny_useconv"])
def test_other_batches_and_sizes_compile_nothing(model: str) -> None:
    """As many keys as a window has at most: what is compiled here is what runs on any large images."""
    layer, compiled, launches = distinct_layers([model])[0], [], []
    with StubDriver("sm_90") as driver, torch.autocast("cpu", torch.bfloat16):
        for batch, height, width in ((2, 84, 84), (1, 84, 84), (16, 77, 91), (3, 105, 112)):
            maps = torch.zeros(batch, height, width, layer.attention.qkv.in_features)
            layer.attention(maps, *layer.pools(maps)).float().sum().backward()
            compiled.append(len(driver.kernels))
            launches.append(len(driver.launches))
    assert len({*compiled}) == 1 and launches == sorted({*launches})


@triton.jit
def wide_product_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """y = x x^T, of one tile that is held in shared memory."""
    i = tl.arange(0, 64)[:, None]
    x = tl.load(x_ptr + i * BLOCK + tl.arange(0, BLOCK)[None, :])
    tl.store(y_ptr + i * 64 + tl.arange(0, 64)[None, :], tl.dot(x, tl.trans(x)))


@pytest.mark.parametrize("card", ["sm_89", "sm_90"])
def test_the_stub_notices_what_does_not_fit(card: str) -> None:
    """As Triton does on the card, by its own checks; one of the two has shared memory for two tiles."""
    x, y = torch.zeros(2**18, dtype=torch.float16), torch.zeros(2**18)
    with StubDriver(card) as driver:
        if card == "sm_90":
            wide_product_kernel[(2,)](x, y, 1024, num_warps=8)
            assert driver.launches == ["wide_product_kernel"]
        else:
            with pytest.raises(OutOfResources, match="shared memory"):
                wide_product_kernel[(2,)](x, y, 1024, num_warps=8)
            assert driver.launches == []


def test_the_stub_leaves_nothing_behind() -> None:
    """Tensors, torch and Triton are as before."""

    def state() -> list[Any]:
        names = ("tensor", "arange", "empty")
        functions = [getattr(torch, name) for name in names]
        cuda = [torch.cuda.device, torch.cuda.current_device, torch.cuda.get_device_capability]
        versions = [torch.version.cuda, torch.version.hip]
        return [*functions, *cuda, *versions, dict(vars(triton.runtime.driver)), triton.compiler.compile]

    before, x = state(), torch.zeros(1)
    with StubDriver("gfx942") as driver:
        assert x.is_cuda and x.device == driver.device
        assert torch.arange(2, device=x.device).sum() == 1
        assert torch.cuda.get_device_capability(x.device) == (9, 4)
        assert triton.runtime.driver.active.get_current_target().arch == "gfx942"
    assert state() == before
    assert not x.is_cuda and x.device.type == "cpu"
    assert driver.device.index not in kernels.forward_kernel.device_caches


SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;      /* 0x00 */
        /*0010*/              @!P0 BRA 0x0060 ;            /* 0x00 */
        /*0020*/                   FADD.FTZ R0, R0, R1 ;   /* 0x00 */
        /*0030*/                   FMUL R0, R0, R1 ;       /* 0x00 */
        /*0040*/              @!P1 BRA 0x0070 ;            /* 0x00 */
        /*0050*/               @P0 BRA 0x0020 ;            /* 0x00 */
        /*0060*/                   EXIT ;                  /* 0x00 */
        /*0070*/                   SYNCS R1 ;              /* 0x00 */
        /*0080*/              @!P1 BRA 0x0070 ;            /* 0x00 */
        /*0090*/                   BRA 0x0050 ;            /* 0x00 */
        /*00a0*/                   BRA 0xa0;               /* 0x00 */
"""


def test_main_loop() -> None:
    """Waiting code that lies behind the program belongs to the loop that it serves."""
    loop = main_loop(*parse_sass(SASS))
    assert loop == ["FADD.FTZ", "FMUL", "BRA", "BRA", "SYNCS", "BRA", "BRA"]


@pytest.mark.parametrize(("model", "embeddings"), [("focal_tiny", 2 * 2), ("focalv2_tiny_useconv", 2 * 12)])
def test_launches_of_a_layer(model: str, embeddings: int) -> None:
    """Between the projections: the kernels themselves, and what makes the bias and its gradient.

    Focal's goal is at most 6 forward and 14 backward. The gradient of an embedding takes two kernels, or
    twelve where its indices are many and so are sorted.
    """
    layer = distinct_layers([model])[0]
    counts = count_launches(layer.attention, layer.height, layer.width, "sm_90")
    forward, backward = counts["forward"], counts["backward"]
    assert forward["forward_kernel"] == 1 and "mm" not in forward
    assert backward["query_gradient_kernel"] >= 1 and backward["key_gradient_kernel"] == 1
    assert backward["embedding_dense_backward"] == embeddings
    assert model != "focal_tiny" or (forward.total() <= 6 and backward.total() <= 14)
