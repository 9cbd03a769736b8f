"""The fused kernels in Triton's interpreter, against the definition.

The interpreter has to be chosen before Triton is imported, so this file runs itself and two others once more
in a process of its own, with TRITON_INTERPRET=1; the tests marked `interpreted` run only there.
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

import pytest
import torch
from attention_definition import Problem, defined_attention, request
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from models import FocalTransformer
from models.focal_transformer import (
    BACKENDS,
    AttentionIndex,
    choose_backend,
    focal_fast_keys,
    focal_keys,
    make_index,
    padded_size,
    plain_attention,
)
from models.ops.triton import attention, kernels, launch, tables

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the subprocess of test_in_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="compiles, so not in the interpreter")


@compiled
def test_in_interpreter() -> None:
    """All tests that need the interpreter, of this file and two others."""
    folder = Path(__file__).parent
    names = ("triton.py", "trial.py", "golden.py::test_kernels_give_the_same_results")
    files = [str(folder / f"test_{name}") for name in names]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


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


def for_triton(index: AttentionIndex) -> AttentionIndex:
    """With the kernels' tables, whether or not they can run."""
    return replace(index, backend="triton", tables=tables.build_tables(index, trains=True))


def ring(window: int, expand: int, focal_window: int, levels: int, *size: int, shift: int = 0) -> Any:
    """An index of Focal attention."""
    numbers = (window, expand, focal_window, levels, shift)
    size = padded_size(*size, window)
    return for_triton(make_index(focal_keys, (*size, *numbers), request("plain")))


def nearest(window: int, topk: int, levels: int, *size: int) -> Any:
    """An index of Focal-fast."""
    return for_triton(make_index(focal_fast_keys, (*size, window, topk, levels, None), request("plain")))


BORDER = "border, padding, two pooled levels"
SHIFTED = "queries of a window see different keys"
RING = {
    "small window": (ring(4, 2, 3, 1, 8, 12), 16),
    BORDER: (ring(4, 1, 3, 2, 10, 7), 24),
    "shipped window": (ring(7, 3, 5, 1, 14, 14), 32),
    "one window": (ring(7, 0, 1, 1, 7, 7), 56),
    "ring meets itself": (ring(5, 2, 1, 1, 5, 10), 64),
    SHIFTED: (ring(4, 2, 3, 1, 8, 8, shift=2), 16),
    "several blocks of queries": (ring(9, 2, 3, 1, 9, 18), 16),
}
NEAREST = {
    "nearest": (nearest(4, 20, 1, 8, 12), 32),
    "whole tiles of keys": (nearest(4, 26, 1, 8, 12), 40),
    "nearest, with padding": (nearest(7, 30, 1, 9, 13), 48),
}
LONG = {"more keys than registers hold": (nearest(9, 140, 1, 9, 18), 64)}
TINY = {"tiny": (ring(4, 1, 1, 1, 4, 8), 16), "tiny nearest": (nearest(4, 12, 1, 4, 8), 16)}
CASES = RING | NEAREST | LONG | TINY
SHORT = [case for case in RING | NEAREST if case not in ("shipped window", "several blocks of queries")]


@interpreted
@pytest.mark.parametrize("case", SHORT)
def test_equals_definition(case: str) -> None:
    """float32: output and every gradient."""
    problem = Problem(*CASES[case], torch.float32, heads=2 if "small" in case else 1)
    errors = problem.errors(attention.attend)
    assert max(errors) < 2e-6, errors


@interpreted
@pytest.mark.parametrize(
    ("case", "family", "dtype"),
    [
        ("shipped window", "ampere", torch.bfloat16),
        ("shipped window", "hopper", torch.float16),
        (BORDER, "blackwell", torch.bfloat16),
        ("nearest", "hopper", torch.bfloat16),
        *((case, "hopper", torch.float16) for case in LONG),
    ],
)
def test_as_exact_as_definition(
    case: str, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision: at most twice the error of the definition in the same precision; also where registers
    are few, so that the softmax is online and the gradient of queries a sum over launches."""
    monkeypatch.setattr(launch, "device_family", lambda device: family)
    problem = Problem(*CASES[case], dtype, heads=1)
    problem.check_as_exact(attention.attend)


@interpreted
@pytest.mark.parametrize(("case", "dtype"), [(BORDER, torch.float16), ("tiny", torch.float32)])
def test_one_key_outweighs_all_others(case: str, dtype: torch.dtype) -> None:
    """In any tile: beyond the range of the exponential, unless the largest score is subtracted."""
    problem = Problem(*CASES[case], dtype, heads=1)
    query = torch.arange(problem.index.window**2)
    problem.bias[:, :, query, query * 4 % problem.bias.shape[3]] += 300
    found, expected = problem.run(attention.attend), problem.run(defined_attention, torch.float64)
    assert all(x.isfinite().all() for x in found)
    for x, y in ((found[0], expected[0]), (found[3], expected[3])):  # the other gradients are almost zero
        assert (x.double() - y).norm() <= (1e-3 if dtype == torch.float16 else 1e-5) * y.norm()


@interpreted
@pytest.mark.parametrize("case", ["small window", "nearest"])
def test_a_token_that_a_window_does_not_see(case: str) -> None:
    """However large its scores would be: those that are masked by the bias are those of the window's keys."""
    problem = Problem(*CASES[case], torch.float32, heads=1)
    problem.qkv[:, :, 0] = 48 + 0.1 * problem.qkv[:, :, 0]
    problem.qkv[:, :, 1] = -48 + 0.1 * problem.qkv[:, :, 1]
    problem.qkv[:, 0, 1] = 48
    out = attention.attend(problem.qkv, problem.index, problem.bias, problem.scale)
    expected = problem.run(defined_attention, torch.float64)[0]
    assert (out.double() - expected).norm() < 1e-3 * expected.norm()


@triton.jit
def fused_weight(score, row, scale):
    """`kernels._weight` as hardware computes it."""
    exact = score.to(tl.float64) * scale - row.to(tl.float64)
    return tl.exp2(exact.to(tl.float32))


@interpreted
def test_a_tile_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the seam of a rolled map queries may see no key of their first tile; the product and the sum
    before the exponential are rounded once, as on a GPU."""
    monkeypatch.setattr(kernels, "_weight", fused_weight)
    problem = Problem(ring(11, 0, 1, 0, 22, 11, shift=5), 16, torch.float16, heads=1)
    problem.check_as_exact(attention.attend)


@interpreted
def test_a_scale_that_a_bias_cannot_be_divided_by() -> None:
    problem = Problem(*CASES["tiny"], torch.bfloat16, heads=1)
    problem.scale = 1e-3
    assert max(problem.errors(attention.attend)) < 5e-2


@interpreted
def test_a_bias_that_is_not_a_number_shows() -> None:
    """Low values are replaced by finite ones; NaN must stay, or a run that diverges would not be noticed."""
    problem = Problem(*CASES["tiny"], torch.float16, heads=1)
    problem.bias[0, 0, 3, 0], problem.bias[0, 0, 1, 0] = torch.nan, -torch.inf
    out = problem.run(attention.attend)[0].isnan().any(dim=-1)
    expected = problem.run(defined_attention)[0].isnan().any(dim=-1)
    assert out.any() and torch.equal(out, expected)


@interpreted
@pytest.mark.parametrize("case", TINY)
def test_slices_and_determinism(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the items are divided; and the same bits twice."""
    problem = Problem(*CASES[case], torch.float32, heads=1, batch=3)
    expected = problem.run(attention.attend)
    assert all(torch.equal(x, y) for x, y in zip(problem.run(attention.attend), expected, strict=True))
    for programs in (1, 4):
        monkeypatch.setattr(launch, "TARGET_PROGRAMS", dict.fromkeys(("forward", "query_gradient"), programs))
        for x, y in zip(problem.run(attention.attend), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@interpreted
def test_operator_contract() -> None:
    """Schema, fake and gradient agree with what runs."""
    problem = Problem(*CASES["tiny"], torch.float32, heads=1)
    index, made = problem.index, problem.index.tables
    arrays = [index.keys, made.columns, made.keys, made.first, *made.blocks]
    sizes = (index.height, index.width, index.window)
    inputs = [*problem.inputs(torch.float32), index.visible, arrays, made.always_seen, *sizes, 0.25]
    torch.library.opcheck(attention.attention, tuple(inputs))
    inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    found = attention.attention(*inputs)
    qkv, bias, visible = inputs[:3]
    numbers = (made.always_seen, index.width, index.window, 0.25)
    inputs = [problem.cotangent, *found, qkv, bias, visible, *arrays[1:], *numbers]
    torch.library.opcheck(attention.attention_backward, tuple(inputs))


@interpreted
def test_an_empty_batch() -> None:
    problem = Problem(*CASES["tiny"], torch.float32, heads=1, batch=0)
    out, *_, d_bias = problem.run(attention.attend)
    assert out.shape == (0, problem.tokens, 16) and not d_bias.any()


@interpreted
def test_what_training_keeps() -> None:
    """The input, the bias, the output and a number per query."""
    problem = Problem(*CASES["tiny nearest"], torch.bfloat16, heads=1)
    qkv, bias = problem.inputs(torch.bfloat16)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.is_floating_point():
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = attention.attend(qkv, problem.index, bias, 0.25)
    lse_bytes = 4 * problem.tokens  # a window of 16 queries needs no padding
    assert sum(kept.values()) == sum(x.untyped_storage().nbytes() for x in (qkv, bias, out)) + lse_bytes


@interpreted
def test_a_model_compiles_into_one_graph() -> None:
    """No graph break in a block; the same answer under autocast."""
    torch.manual_seed(0)
    sizes = dict(img_size=32, num_classes=3, embed_dim=16, depths=(1,), num_heads=(1,), window_size=4)
    keys = dict(focal_pool="fc", focal_levels=(2,), focal_windows=(3,), expand_sizes=(2,))
    more = dict(focal_stages=(0,), drop_path_rate=0.0, attention_backend="triton")
    model = FocalTransformer(**sizes, **keys, **more)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    image = torch.randn(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = model(image), compiled(image)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    found.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@interpreted
def test_no_bias_gradient_and_odd_strides() -> None:
    """A frozen bias gets no gradient; inputs and a cotangent of other strides are read all the same."""
    problem = Problem(*CASES["tiny"], torch.float32, heads=1)
    cotangent, gradients = torch.ones(1, problem.tokens, 16), []
    other_qkv = problem.qkv.permute(0, 2, 4, 3, 1).contiguous().permute(0, 4, 1, 3, 2)
    for qkv, bias, d_out in (
        (problem.qkv, problem.bias, cotangent),
        (other_qkv, problem.bias.mT.contiguous().mT, torch.ones(()).expand_as(cotangent)),
    ):
        qkv = qkv.detach().requires_grad_()
        BACKENDS["triton"].attend(qkv, problem.index, bias, 0.25).backward(d_out)
        gradients.append(qkv.grad)
    torch.testing.assert_close(*gradients)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


@interpreted
def test_an_output_that_gets_no_gradient() -> None:
    problem = Problem(*CASES["tiny"], torch.float32, heads=1)
    qkv = problem.qkv.clone().requires_grad_()
    out = BACKENDS["triton"].attend(qkv, problem.index, problem.bias, 0.25)
    NoGradient.apply(out).sum().backward()
    assert qkv.grad is None or not qkv.grad.any()


SMALL = AttentionIndex(4, 4, 4, 16, torch.arange(16)[None], None, (torch.arange(16),))


@interpreted
def test_refuses() -> None:
    """What the kernels cannot do is said; what is slow is not chosen."""
    for dtype, head_dim, window in ((torch.float32, 12, 4), (torch.float64, 16, 4), (torch.float32, 16, 13)):
        with pytest.raises(ValueError, match="attention_backend triton: needs .* use auto"):
            choose_backend(replace(SMALL, window=window), request("triton", dtype, head_dim))
    assert choose_backend(SMALL, request("triton")).backend == "triton"
    assert choose_backend(SMALL, request("auto")).backend == "cpu"  # never the interpreter


@interpreted
@pytest.mark.parametrize("case", [SHIFTED, "tiny nearest"])
def test_second_derivative(case: str) -> None:
    """Gradients of a function of the gradients are those of the plain operator."""
    found = []
    problem = Problem(*CASES[case], torch.float32, heads=1)
    for attend in (attention.attend, lambda *inputs: plain_attention(*inputs, fused=False)):
        qkv, bias = problem.inputs(torch.float32)
        out = attend(qkv, problem.index, bias, 0.25)
        d_qkv, d_bias = torch.autograd.grad(out, (qkv, bias), problem.cotangent, create_graph=True)
        loss = d_qkv.square().sum() + d_bias.square().sum()
        found.append([d_qkv, d_bias, *torch.autograd.grad(loss, (qkv, bias))])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@interpreted
def test_flops_are_counted() -> None:
    """Those of the products with the keys of a window: two forward, five backward."""
    problem = Problem(*CASES["tiny"], torch.float32, batch=2)
    windows, keys = problem.index.tables.merged.keys.shape
    product = 2 * 2 * 2 * windows * keys * 16 * 16  # batch, heads, ..., queries, head width
    qkv = problem.qkv.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = attention.attend(qkv, problem.index, problem.bias, 0.25)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * product


@pytest.mark.parametrize(
    ("target", "family"),
    [
        *((("cuda", arch, 32), "ampere") for arch in (80, 86, 89)),
        (("cuda", 90, 32), "hopper"),
        *((("cuda", arch, 32), "blackwell") for arch in (100, 103)),
        *((("cuda", arch, 32), "blackwell_rtx") for arch in (120, 130)),  # and unknown ones
        *((("hip", arch, 64), "cdna") for arch in ("gfx90a", "gfx950")),
        (("hip", "gfx1100", 32), "rdna"),
        *((target, None) for target in (("cuda", 75, 32), ("hip", "gfx906", 64), ("hip", "gfx1030", 32))),
    ],
    ids=str,
)
def test_families_of_gpus(target: tuple[str, Any, int], family: str | None) -> None:
    with nullcontext() if family else pytest.raises(ValueError, match="needs a GPU"):
        assert launch.target_family(GPUTarget(*target)) == family


def test_precision_of_float32_follows_pytorch() -> None:
    """Three products unless TF32 is allowed, by whichever name of the switch; on AMD's GPUs exact ones."""
    matmul = torch.backends.cuda.matmul
    name, allow = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, name)
    try:
        for expected in ("tf32x3", "tf32"):
            assert launch.precision("hopper", torch.float32) == expected
            assert launch.precision("cdna", torch.float32) == "ieee"
            setattr(matmul, name, allow)
    finally:
        setattr(matmul, name, before)


BLOCKS = CASES | {
    "one column of windows, ring as wide as a window": (ring(4, 4, 3, 2, 25, 3), 16),
    "keys that stand three times": (ring(7, 7, 1, 1, 7, 7), 16),
    "large map, two pooled levels": (ring(7, 3, 7, 2, 61, 100), 16),
    "two columns of windows, shift": (ring(7, 7, 3, 1, 60, 14, shift=3), 16),
    "large windows": (ring(12, 6, 3, 2, 70, 50), 16),
    "several windows in a block": (ring(3, 1, 3, 1, 50, 41), 16),
    "nearest, large map": (nearest(7, 128, 1, 61, 100), 16),
    "nearest, thin map": (nearest(7, 60, 1, 3, 90), 16),
}


@compiled
@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_are_the_inverse_of_the_keys(case: str) -> None:
    """Each key of a window is named once, in the block that holds its token; blocks hold every token once."""
    problem = Problem(*BLOCKS[case], torch.float32, heads=1)
    made, blocks = problem.index.tables, problem.index.tables.blocks
    count = made.merged.keys.shape[1]
    keys = made.keys[:, :count].long()
    seen = torch.ones_like(made.merged.keys, dtype=torch.bool)
    seen = seen if made.merged.visible is None else made.merged.visible.any(dim=1)
    assert torch.equal(keys, made.merged.keys.where(seen, -1))

    assert blocks.token[blocks.token >= 0].sort().values.tolist() == list(range(problem.qkv.shape[1]))
    assert torch.equal(blocks.first, made.first[blocks.window.long()])
    block = torch.arange(len(blocks.token)).repeat_interleave(blocks.start.diff().long())
    visit, place = torch.nonzero(blocks.column < count, as_tuple=True)
    column, window = blocks.column[visit, place].long(), blocks.window[visit].long()
    assert torch.equal(keys[window, column], blocks.token[block[visit], place].long())
    assert len((window * count + column).unique()) == len(visit) == (keys >= 0).sum()


def test_refuses_what_32_bits_do_not_address() -> None:
    """A map of 9500 x 9500 pixels of the largest first stage; at 896 a batch of any size is fine."""
    made = Problem(*CASES["tiny"], torch.float32).index.tables
    for side, many in ((896, False), (9600, True)):
        tokens = (side // 4) ** 2
        qkv = torch.empty(1000, tokens, 3, 4, 32, dtype=torch.bfloat16, device="meta")
        arguments = launch.Tables(made.keys, made.first, 50, 50, side // 4, 7, 1.0)
        with pytest.raises(ValueError, match="another attention_backend") if many else nullcontext():
            launch._sizes(qkv, arguments)
