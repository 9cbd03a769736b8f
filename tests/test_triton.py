"""The fused kernels in Triton's interpreter, against the definition.

The interpreter has to be chosen before Triton is imported, so this file runs itself once more in a process of
its own, with TRITON_INTERPRET=1; the tests marked `interpreted` run only there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import normal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

import triton
import triton.language as tl

from config import load_config
from models import FocalTransformer, build_model, load_checkpoint
from models.key_selection import NearestKeys, RingPooledKeys, SelectedKeys
from models.ops import reference, triton_kernel, triton_launch, triton_passes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the subprocess of test_in_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="compiles, so not in the interpreter")


def run_in_interpreter(file: str) -> None:
    """Run the tests of a file that need the interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@compiled
def test_in_interpreter() -> None:
    """All tests of this file that need the interpreter."""
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def bfloat16_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter multiplies the bits of bfloat16 as integers, and cuts numbers off to make them."""
    if INTERPRETED:
        from triton.runtime import interpreter

        dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

        def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
            return dot(self, _widened(a), _widened(b), *rest)

        def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
            if (source, target) != (tl.float32, tl.bfloat16):
                return convert(data, source, target, rounding)
            bits = data.view("uint32")
            return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("uint16")

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        monkeypatch.setattr(interpreter, "_convert_float", convert_float)
    yield


def _widened(operand: Any) -> Any:
    from triton.runtime.interpreter import TensorHandle

    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return TensorHandle((operand.data.astype("uint32") << 16).view("float32"), tl.float32)


def cut(x: np.ndarray) -> np.ndarray:
    """float32 as a tensor core reads it: ten bits of the mantissa."""
    return (np.ascontiguousarray(x).view("uint32") & np.uint32(0xFFFFE000)).view("float32")


def split_in_two(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest TF32, halves away from zero (`cvt.rna.tf32`), and what is missing, as the cores read it."""
    large = cut((np.ascontiguousarray(x).view("uint32") + np.uint32(0x1000)).view("float32"))
    return large, cut(x - large)


def product_in_three_parts(_: Any, a: Any, b: Any, total: Any, *__: Any) -> Any:
    """Triton's `tf32x3`, for its interpreter."""
    from triton.runtime.interpreter import TensorHandle

    (a_large, a_small), (b_large, b_small) = split_in_two(a.data), split_in_two(b.data)
    small = a_small @ b_large + a_large @ b_small
    return TensorHandle(small + a_large @ b_large + total.data, total.dtype.scalar)


def product_in_one_part(_: Any, a: Any, b: Any, total: Any, *__: Any) -> Any:
    """Triton's `tf32`."""
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(cut(a.data) @ cut(b.data) + total.data, total.dtype.scalar)


class Problem:
    """Random inputs of one selection and map size, and what a backend makes of them."""

    def __init__(
        self,
        selection: RingPooledKeys | NearestKeys,
        size: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
        heads: int = 2,
        batch: int = 1,
    ) -> None:
        torch.manual_seed(0)
        layer = nn.Module()
        selection.register(layer, heads, head_dim)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        if isinstance(selection, NearestKeys):
            selection.refresh(layer)
        keys: SelectedKeys = selection.keys(layer, *size, torch.device("cpu"))
        self.table, self.dtype, self.scale = keys.table, dtype, head_dim**-0.5
        self.tokens = self.table.height * self.table.width
        windows = self.tokens // self.table.window**2
        pooled = sum(windows * 4**level for level in range(selection.pooled_levels))
        self.qkv = torch.randn(batch, self.tokens + pooled, 3, heads, head_dim).to(dtype)
        bias = (
            selection.bias(layer, keys).detach() / self.scale
        )  # kernels take it in `dtype`, divided by that
        self.bias = bias.to(dtype).float() * self.scale
        self.cotangent = torch.randn(batch, self.tokens, heads * head_dim).to(dtype)

    def kernel_tables(self) -> triton_launch.KernelTables:
        """What the kernels are launched with."""
        table, tokens = self.table, self.qkv.shape[1]
        keys = (table.folded_index, table.folded_visible)
        return triton_launch.kernel_tables(*keys, table.height, table.width, table.window, tokens)

    def run(self, backend: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Output and gradients of queries, keys, values and bias."""
        dtype = dtype or self.dtype
        qkv = self.qkv.detach().to(dtype, copy=True).requires_grad_()
        bias = self.bias.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
        out = backend.attend(qkv, self.table, backend.prepare_bias(bias, self.table, dtype), self.scale)
        out.backward(self.cotangent.to(dtype))
        return [out.detach(), *qkv.grad.unbind(2), bias.grad]

    def errors(self, results: list[Tensor]) -> list[float]:
        """Error of each result against float64, relative to its norm."""
        exact = self.run(reference, torch.float64)
        return [float((x.double() - y).norm() / y.norm()) for x, y in zip(results, exact, strict=True)]


# window, ring, focal window, pooled levels, shift; then the map
RING = {
    "small window": (RingPooledKeys(4, 2, 3, 1), (8, 12), 16),
    "border, padding, two pooled levels": (RingPooledKeys(4, 1, 3, 2), (10, 7), 24),
    "shipped window": (RingPooledKeys(7, 3, 5, 1), (14, 14), 32),
    "one window": (RingPooledKeys(7, 0, 1, 1), (7, 7), 56),
    "ring meets itself": (RingPooledKeys(5, 2, 1, 1), (5, 10), 64),
    "queries of a window see different keys": (RingPooledKeys(4, 2, 3, 1, 2), (8, 8), 16),
    "several blocks of queries, more than 256 keys": (RingPooledKeys(12, 3, 3, 1), (12, 24), 16),
}
NEAREST = {
    "nearest": (NearestKeys(4, 20, 1, (8, 12)), (8, 12), 32),
    "whole tiles of keys": (NearestKeys(4, 26, 1, (8, 12)), (8, 12), 40),
    "nearest at another size, with padding": (NearestKeys(7, 30, 1, (14, 14)), (9, 13), 48),
}
LONG = {"nearest, more than 256 keys": (NearestKeys(12, 270, 0, (12, 24)), (12, 24), 64)}
TINY = {
    "tiny": (RingPooledKeys(4, 1, 1, 1), (4, 8), 16),
    "tiny nearest": (NearestKeys(4, 12, 1, (4, 8)), (4, 8), 16),
}
CASES = RING | NEAREST | LONG | TINY


@interpreted
@pytest.mark.parametrize("case", RING | NEAREST)
def test_equals_definition(case: str) -> None:
    """float32: output and every gradient."""
    problem = Problem(*CASES[case], torch.float32, heads=2 if "small" in case else 1)
    errors = problem.errors(problem.run(triton_kernel))
    assert max(errors) < 2e-6, errors


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["shipped window", "border, padding, two pooled levels", "nearest", *LONG])
def test_as_exact_as_definition(case: str, dtype: torch.dtype) -> None:
    """Half precision: at most twice the error of the definition in the same precision."""
    problem = Problem(*CASES[case], dtype, heads=1)
    errors, allowed = problem.errors(problem.run(triton_kernel)), problem.errors(problem.run(reference))
    assert all(mine <= 2 * theirs for mine, theirs in zip(errors, allowed, strict=True)), (errors, allowed)


@triton.jit
def fused_weight(score, row, scale, dtype: tl.constexpr):
    """`triton_passes._weight` in half precision, as hardware computes it."""
    unit = triton_passes._unit(scale, dtype)
    exact = score.to(tl.float64) * unit - (row * unit).to(tl.float64)
    return tl.exp2(exact.to(tl.float32))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [11, 12])
def test_a_tile_without_keys(window: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the seam of a rolled map queries may see no key of their first tile; the product and the sum
    before the exponential are rounded once, as on a GPU."""
    monkeypatch.setattr(triton_passes, "_weight", fused_weight)
    selection = RingPooledKeys(window, 0, 1, 0, window // 2)
    problem = Problem(selection, (2 * window, window), 16, dtype, heads=1)
    errors, allowed = problem.errors(problem.run(triton_kernel)), problem.errors(problem.run(reference))
    assert all(mine <= 2 * theirs for mine, theirs in zip(errors, allowed, strict=True)), (errors, allowed)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-3])
def test_any_scale(scale: float, dtype: torch.dtype) -> None:
    """Also one that a bias cannot be divided by."""
    problem = Problem(*CASES["tiny"], dtype, heads=1)
    problem.scale = scale
    found, expected = problem.run(triton_kernel), problem.run(reference, torch.float64)
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y).norm() <= (1e-5 if dtype == torch.float32 else 5e-2) * y.norm()


@interpreted
@pytest.mark.parametrize("case", TINY)
def test_slices_and_determinism(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the items are divided; and the same bits twice."""
    problem = Problem(*CASES[case], torch.float32, heads=1, batch=5)
    expected = problem.run(triton_kernel)
    assert all(torch.equal(x, y) for x, y in zip(problem.run(triton_kernel), expected, strict=True))
    for programs in (1, 4):
        monkeypatch.setattr(
            triton_launch, "TARGET_PROGRAMS", dict.fromkeys(("forward", "query_gradient"), programs)
        )
        for x, y in zip(problem.run(triton_kernel), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize("name", ["official_v1_nano", "official_v2_nano"])
def test_the_originals_logits(name: str) -> None:
    """A whole model in evaluation, with the original's weights, against what the original answered."""
    folder = Path(__file__).parent / "checkpoints"
    model = build_model(load_config(folder / f"{name}.yaml", ["MODEL.ATTENTION_BACKEND", "triton"])).eval()
    load_checkpoint(model, folder / f"{name}.pth")
    expected = np.load(folder / f"{name}_expected.npz")
    image = torch.from_numpy(normal(str(expected["input_salt"]) + "input", (2, 3, 224, 224))).float()
    with torch.no_grad():
        logits = model(image[:1])
    assert (logits - torch.from_numpy(expected["logits"][:1])).abs().max() < 1e-5


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_without_pooled_keys(dtype: torch.dtype) -> None:
    """All of them masked in some windows: the others share the softmax."""
    problem = Problem(*CASES["border, padding, two pooled levels"], dtype, heads=1)
    table = problem.table
    assert table.fold is not None and table.visible is not None
    visible = table.visible.clone()
    pooled = (table.index >= problem.tokens).any(dim=0)
    visible[::2, :, pooled] = False
    assert visible[1, :, pooled].any()
    kept = torch.cat((table.fold.single, table.fold.first))
    problem.table = replace(table, visible=visible, folded_visible=visible[..., kept])
    errors, allowed = problem.errors(problem.run(triton_kernel)), problem.errors(problem.run(reference))
    if dtype == torch.float32:
        allowed = [1e-6] * len(allowed)
    assert all(mine <= 2 * theirs for mine, theirs in zip(errors, allowed, strict=True)), (errors, allowed)


@interpreted
def test_operator_contract() -> None:
    """Schema, fake and gradient agree with what runs."""
    problem = Problem(*CASES["tiny"], torch.float32, heads=1)
    table = problem.table
    bias = triton_kernel.prepare_bias(problem.bias, table, torch.float32).requires_grad_()
    qkv = problem.qkv.clone().requires_grad_()
    rest = (bias, table.folded_index, table.folded_visible, table.height, table.width, table.window, 0.25)
    torch.library.opcheck(triton_kernel.attention, (qkv, *rest))
    out, lse = triton_kernel.attention(qkv.detach(), *rest)
    for with_bias in (True, False):
        inputs = (problem.cotangent, qkv.detach(), out.detach(), lse.detach(), bias.detach(), *rest[1:])
        torch.library.opcheck(triton_kernel.attention_backward, (*inputs, with_bias))


@interpreted
@pytest.mark.parametrize("case", TINY)
def test_an_empty_batch(case: str) -> None:
    """No image: an empty output, and a gradient of the bias that is zero."""
    problem = Problem(*CASES[case], torch.float32, heads=1, batch=0)
    out, *_, d_bias = problem.run(triton_kernel)
    assert out.shape == (0, problem.tokens, 16)
    assert not d_bias.any()


@interpreted
def test_what_training_keeps() -> None:
    """The input, the bias, the output and a number per query; checkpointing changes no gradient."""
    problem = Problem(*CASES["tiny"], torch.bfloat16, heads=1)
    bias = triton_kernel.prepare_bias(problem.bias.requires_grad_(), problem.table, torch.bfloat16)
    bias = bias.detach().requires_grad_()
    qkv = problem.qkv.clone().requires_grad_()
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.is_floating_point():
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = triton_kernel.attend(qkv, problem.table, bias, 0.25)
    lse_bytes = 4 * problem.tokens  # a window of 16 queries needs no padding
    assert sum(kept.values()) == sum(x.untyped_storage().nbytes() for x in (qkv, bias, out)) + lse_bytes
    expected = torch.autograd.grad(out, (qkv, bias), problem.cotangent)
    again = checkpoint(triton_kernel.attend, qkv, problem.table, bias, 0.25, use_reentrant=False)
    found = torch.autograd.grad(again, (qkv, bias), problem.cotangent)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@interpreted
@pytest.mark.parametrize(("kind", "train"), [("focal", True), ("focalv2", True), ("focalv2", False)])
def test_a_model_compiles_into_one_graph(kind: str, train: bool) -> None:
    """No graph break in a block; the same answer, under autocast too."""
    torch.manual_seed(0)
    sizes = dict(img_size=32, num_classes=3, embed_dim=16, depths=(1,), num_heads=(1,), window_size=4)
    keys = dict(focal_pool="fc", focal_levels=(2,), focal_windows=(3,), expand_sizes=(2,), focal_topk=8)
    more = dict(focal_stages=(0,), drop_path_rate=0.0, attention_backend="triton")
    model = FocalTransformer(kind=kind, **sizes, **keys, **more)
    model.train(train)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    image = torch.randn(1, 3, 32, 32)
    with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16):
        expected, found = model(image), compiled(image)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    if train:
        found.float().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@interpreted
@pytest.mark.parametrize("case", ["border, padding, two pooled levels", "nearest"])
def test_products_in_three_parts_are_float32(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tf32x3` as the tensor cores do it: at most twice the error of the definition in float32; one part
    (`tf32`) is not."""
    problem = Problem(*CASES[case], torch.float32, heads=1)
    allowed = problem.errors(problem.run(reference))
    errors = {}
    for name, product in {"tf32x3": product_in_three_parts, "tf32": product_in_one_part}.items():
        with monkeypatch.context() as patch:
            patch.setattr("triton.runtime.interpreter.InterpreterBuilder.create_dot", product)
            errors[name] = problem.errors(problem.run(triton_kernel))
    assert all(x <= 2 * y for x, y in zip(errors["tf32x3"], allowed, strict=True)), (errors, allowed)
    assert all(x > 2 * y for x, y in zip(errors["tf32"], allowed, strict=True)), (errors, allowed)


@interpreted
def test_compiles_into_one_graph() -> None:
    """`torch.compile` sees one operator, and gets the same numbers."""
    problem = Problem(*CASES["tiny"], torch.float32, heads=1)
    prepared = triton_kernel.prepare_bias(problem.bias, problem.table, torch.float32)

    def attend(qkv: Tensor) -> Tensor:
        return triton_kernel.attend(qkv, problem.table, prepared, 0.25)

    results = []
    for function in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        qkv = problem.qkv.clone().requires_grad_()
        function(qkv).sum().backward()
        results.append(qkv.grad)
    assert torch.equal(*results)


@interpreted
def test_no_bias_gradient_and_odd_strides() -> None:
    """A frozen bias gets no gradient; a cotangent that is expanded or permuted is read all the same."""
    problem = Problem(*CASES["tiny"], torch.float32, heads=1)
    prepared = triton_kernel.prepare_bias(problem.bias, problem.table, torch.float32)
    gradients = []
    for cotangent in (torch.ones(1, problem.tokens, 16), torch.ones(()).expand(1, problem.tokens, 16)):
        qkv = problem.qkv.permute(0, 2, 4, 3, 1).contiguous().permute(0, 4, 1, 3, 2).requires_grad_()
        triton_kernel.attend(qkv, problem.table, prepared, 0.25).backward(cotangent)
        gradients.append(qkv.grad)
    torch.testing.assert_close(*gradients)


@interpreted
def test_refuses() -> None:
    """What the kernels cannot do is said, with what to use instead."""
    table = Problem(*CASES["tiny"], torch.float32).table
    for qkv in (torch.zeros(1, 34, 3, 1, 12), torch.zeros(1, 34, 3, 1, 16, dtype=torch.float64)):
        assert "use" in (triton_kernel.unsupported(qkv.device, qkv.dtype, qkv.shape[-1], table.window) or "")
        with pytest.raises(ValueError, match="triton backend needs"):
            triton_kernel.attend(qkv, table, torch.zeros(1, 1, 16, 64), 1.0)
    assert triton_kernel.unsupported(torch.device("cpu"), torch.float32, 16, table.window) is None


def test_refuses_what_32_bits_do_not_address() -> None:
    """A map of 9500 x 9500 pixels of the largest first stage; at 896 a batch of any size is fine."""
    for side, many in ((896, False), (9600, True)):
        tokens = (side // 4) ** 2
        qkv = torch.empty(1000, tokens, 3, 4, 32, dtype=torch.bfloat16, device="meta")
        with pytest.raises(ValueError, match="sdpa") if many else nullcontext():
            triton_kernel._sizes(qkv, Problem(*CASES["tiny"], torch.float32).kernel_tables(), side // 4)


def test_precision_of_float32_follows_pytorch() -> None:
    """Three products unless TF32 is allowed, by whichever name of the switch."""
    matmul = torch.backends.cuda.matmul
    arrays = (torch.empty(0, 34, 3, 1, 32), torch.empty(1, 1, 64, 64), 7)
    name, allow = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, name)
    found = [triton_kernel._compile_time("forward", *arrays)["PRECISION"]]
    setattr(matmul, name, allow)
    try:
        found.append(triton_kernel._compile_time("forward", *arrays)["PRECISION"])
    finally:
        setattr(matmul, name, before)
    assert found == ["tf32x3", "tf32"]


@compiled
def test_refuses_cpu_tensors() -> None:
    reason = triton_kernel.unsupported(torch.device("cpu"), torch.float32, 16, 4)
    assert reason is not None and "CUDA" in reason


@pytest.mark.parametrize("case", CASES)
def test_every_sight_has_one_entry(case: str) -> None:
    """Entries name exactly the window, column and token of every key; blocks hold every token once."""
    selection, size, dim = CASES[case]
    problem = Problem(selection, size, dim, torch.float32, heads=1)
    table, tokens, made = problem.table, problem.qkv.shape[1], problem.kernel_tables()
    assert made.block_token[made.block_token >= 0].sort().values.tolist() == list(range(tokens))
    block = torch.repeat_interleave(torch.arange(len(made.block_token)), made.entry_start.diff().long())
    entry, slot = torch.nonzero(made.entry_column < made.keys, as_tuple=True)
    column, window = made.entry_column[entry, slot].long(), made.entry_window[entry].long()
    token = made.block_token[block[entry], slot]
    assert torch.equal(made.index[window, column], token)
    assert len({*zip(window.tolist(), column.tolist(), strict=True)}) == len(entry) == (made.index >= 0).sum()
    assert made.keys == table.folded_index.shape[1] < made.index.shape[1]  # absent keys have a column of bias
    assert (made.index[:, : made.always_seen] >= 0).all()
    assert made.always_seen == made.keys or (made.index[:, made.always_seen] < 0).any()


def test_blocks_are_seen_by_four_windows() -> None:
    """Moved by half a window, a block costs four tiles per window, as its gathered keys would."""
    table = RingPooledKeys(7, 3, 7, 1).keys(nn.Module(), 56, 56, torch.device("cpu")).table
    made = triton_launch.kernel_tables(table.folded_index, table.folded_visible, 56, 56, 7, 56 * 56 + 64)
    assert made.heavy_blocks == 1
    assert len(made.block_token) == 65
    assert len(made.entry_window) == 64 * 4 + 64
