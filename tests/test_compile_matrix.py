"""The fused kernels, compiled for every GPU without one: resources, spills, and what they are made of."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.3", reason="the stub driver needs Triton 3.3 or later")

import triton
import triton.language as tl
from torch import nn
from triton.runtime.errors import OutOfResources

from models import FocalTransformer
from models.focal_transformer import FAMILIES, CoarseTokens
from models.ops.triton import kernels
from tools.benchmarks.compile_matrix import Layer, compile_all, distinct_layers
from tools.benchmarks.kernel_figures import CUOBJDUMP, Figures, main_loop, parse_sass
from tools.benchmarks.operator_costs import count_launches
from tools.benchmarks.stub_driver import StubDriver

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton brings no cuobjdump"),
]

ATTENTION = ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")


@dataclass(frozen=True)
class OneStage(Layer):
    """A whole model that has the first stage of Focal-T or Focal-fast-T alone."""

    whole: nn.Module

    @classmethod
    def build(cls, kind: str) -> OneStage:
        """Of a family."""
        options: dict[str, Any] = dict(depths=(1,), num_heads=(3,), focal_stages=(0,), expand_sizes=(3,))
        keys: dict[str, Any] = dict(focal_pool="fc", focal_levels=(2,), focal_windows=(7,))
        model = FocalTransformer(kind=kind, **options, **keys, attention_backend="triton")
        block = model.stages[0].blocks[0]
        return cls(kind, 1, block.attn, block.pool_layers, *model.train_resolution, model)

    def run(self, driver: StubDriver, dtype: torch.dtype) -> None:
        """Forward and backward of the whole model."""
        with driver, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            self.whole(torch.zeros(2, 3, 224, 224)).float().sum().backward()


def with_head_dim(head_dim: int) -> Layer:
    """The attention of Focal-T's first stage with heads of another width."""
    options = dict(expand_size=3, focal_window=7, pool="fc", pooled_levels=1, backend="triton")
    layer = FAMILIES["focal"](3 * head_dim, 3, 7, **options)
    return Layer(f"heads of {head_dim}", 1, layer, CoarseTokens(layer, 3 * head_dim), 28, 28)


CASES = {  # what builds a layer, card, dtype: one card for each table of settings
    **{
        f"focal {card}": (lambda: OneStage.build("focal"), card, "bf16")
        for card in ("sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
    },
    "focalv2 sm_100": (lambda: OneStage.build("focalv2"), "sm_100", "bf16"),
    "focal gfx942 fp32": (lambda: OneStage.build("focal"), "gfx942", "fp32"),
    "one window": (lambda: distinct_layers(["focal_tiny"])[-1], "sm_90", "bf16"),
    "more keys than registers hold": (lambda: distinct_layers(["focal_tiny window 12"])[0], "sm_90", "bf16"),
    "heads of 64": (lambda: with_head_dim(64), "sm_90", "fp16"),
    "fp32, heads of 64": (lambda: with_head_dim(64), "sm_90", "fp32"),
}


def test_models_train_on_every_gpu() -> None:
    """Forward and backward: all kernels compile, fit the card and spill nothing; Hopper's use wgmma in half
    precision."""
    jobs = [(build(), card, dtype) for build, card, dtype in CASES.values()]
    for (_, card, dtype), case, rows in zip(jobs, CASES, compile_all(jobs), strict=True):
        figures = [Figures(*row[-len(Figures._fields) :]) for row in rows]
        assert {f.kernel for f in figures} >= set(ATTENTION), case
        assert [f for f in figures if f.verdict != "ok"] == [], case
        attention = [f for f in figures if f.kernel in ATTENTION]
        assert all(f.blocks and (f.instructions or card.startswith("gfx")) for f in attention), case
        if card == "sm_90" and dtype != "fp32":
            assert all("wgmma" in f.units for f in attention), case


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_batches_and_sizes_compile_nothing(kind: str) -> None:
    """As many keys as a window has at most: what is compiled here is what runs on any large images."""
    layer, compiled, launches = OneStage.build(kind), [], []
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


@triton.jit
def three_products_kernel(x_ptr, y_ptr, COLUMNS: tl.constexpr):
    """Three products whose sums are all in use at the end of a loop."""
    i, k, j = tl.arange(0, 128)[:, None], tl.arange(0, 64), tl.arange(0, COLUMNS)
    a = tl.zeros([128, COLUMNS], tl.float32)
    b = tl.zeros([128, COLUMNS], tl.float32)
    c = tl.zeros([128, COLUMNS], tl.float32)
    for step in range(8):
        x = tl.load(x_ptr + step + i * 64 + k[None, :])
        w = tl.load(x_ptr + step + k[:, None] * COLUMNS + j[None, :])
        a = tl.dot(x, w, a)
        b = tl.dot(x + 1, w, b)
        c = tl.dot(x + 2, w, c)
    tl.store(y_ptr + i * COLUMNS + j[None, :], a * b + c)


@pytest.mark.parametrize(
    ("kernel", "size", "card", "reason"),
    [
        (wide_product_kernel, 1024, "sm_89", "shared memory"),
        (wide_product_kernel, 1024, "sm_90", None),
        (three_products_kernel, 256, "sm_100", "tensor memory"),
        (three_products_kernel, 128, "sm_100", None),
    ],
)
def test_the_stub_notices_what_does_not_fit(kernel: Any, size: int, card: str, reason: str | None) -> None:
    """As Triton does on the card, by its own checks."""
    x, y = torch.zeros(2**18, dtype=torch.float16), torch.zeros(2**18)
    with StubDriver(card) as driver:
        if reason is None:
            kernel[(2,)](x, y, size, num_warps=8)
            assert [(launch.name, launch.grid) for launch in driver.launches] == [
                (kernel.__name__, (2, 1, 1))
            ]
        else:
            with pytest.raises(OutOfResources, match=reason):
                kernel[(2,)](x, y, size, num_warps=8)
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
    """Waiting code that lies behind the program belongs to the loop that it serves, and makes no other."""
    loop = main_loop(*parse_sass(SASS))
    assert loop == ["FADD.FTZ", "FMUL", "BRA", "BRA", "SYNCS", "BRA", "BRA"]


@pytest.mark.parametrize(("kind", "embeddings"), [("focal", 2 * 2), ("focalv2", 4 * 12)])
def test_launches_of_a_layer(kind: str, embeddings: int) -> None:
    """Between the projections: the kernels themselves, and what makes the bias and its gradient.

    Focal's goal is at most 6 forward and 14 backward. The gradient of an embedding takes two kernels, or
    twelve where its indices are many and so are sorted.
    """
    layer = OneStage.build(kind)
    counts = count_launches(layer.attention, layer.height, layer.width, "sm_90")
    forward, backward = counts["forward"], counts["backward"]
    assert forward["forward_kernel"] == 1 and "mm" not in forward
    assert backward["query_gradient_kernel"] >= 1 and backward["key_gradient_kernel"] == 1
    assert backward["embedding_dense_backward"] == embeddings
    assert kind != "focal" or (forward.total() <= 6 and backward.total() <= 14)
