"""The fused LayerNorm kernels in Triton's interpreter, against plain PyTorch; and compiled for Hopper.

As test_triton.py, this file runs itself once more with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

import test_triton_hopper
from test_triton import bfloat16_as_on_a_gpu, compiled, interpreted, run_in_interpreter  # noqa: F401

from models.ops import triton_norm, triton_norm_passes

EPS = 1e-5
BFLOAT16 = torch.bfloat16


@compiled
def test_in_interpreter() -> None:
    """All tests of this file that need the interpreter."""
    run_in_interpreter(__file__)


class Tokens:
    """Random inputs of `norm_tokens`, and what it and plain PyTorch make of them: [B, numbers]."""

    def __init__(
        self,
        size: tuple[int, int, int],
        channels: int,
        window: int,
        with_pool: bool = True,
        with_map: bool = True,
        dtype: torch.dtype = torch.float32,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            size: images, rows and columns.
            channels: C.
            window: side.
            with_pool: whether windows have a pooled token.
            with_map: whether the map is handed on.
            dtype: of the map and all parameters.
            out_dtype: of the tokens; None for `dtype`.
        """
        torch.manual_seed(0)
        self.window, self.with_map, self.dtype, self.out_dtype = window, with_map, dtype, out_dtype or dtype
        shapes = [(*size, channels), (channels,), (channels,), *([(1, window**2), (1,)] if with_pool else [])]
        self.inputs = [(torch.randn(shape) + 0.5).to(dtype) for shape in shapes]
        self.cotangent = (torch.randn_like(self.plain(*self.inputs)) + 0.5).to(self.out_dtype)

    def fused(self, *inputs: Tensor) -> Tensor:
        pool = inputs[3:] or (None, None)
        arguments = (*inputs[:3], *pool, self.window, EPS, self.out_dtype)
        if not self.with_map:
            return triton_norm.norm_tokens(*arguments)[0].flatten(1)
        x, tokens = triton_norm.NormTokens.apply(*arguments)
        return torch.cat([tokens.flatten(1), x.flatten(1).to(tokens.dtype)], dim=1)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor, *pool: Tensor) -> Tensor:
        normed = F.layer_norm(x, weight.shape, weight, bias, EPS)
        height, width = x.shape[1:3]
        normed = F.pad(normed, (0, 0, 0, -width % self.window, 0, -height % self.window))
        parts = [normed, x] if self.with_map else [normed]
        if pool:
            cells = normed.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window))
            pooled = torch.einsum("bhiwjc,ij->bhwc", cells, pool[0].view(self.window, -1)) + pool[1]
            parts.insert(1, pooled)
        return torch.cat([part.flatten(1) for part in parts], dim=1)


class Sum:
    """Random inputs of `add_norm`, and what it and plain PyTorch make of them."""

    def __init__(
        self,
        size: tuple[int, ...],
        channels: int,
        with_factor: bool = True,
        dtype: torch.dtype = torch.float32,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            size: images, then any dimensions.
            channels: C.
            with_factor: whether branches are multiplied.
            dtype: of the map and LayerNorm's parameters.
            out_dtype: of the branch and the result; None for `dtype`.
        """
        torch.manual_seed(0)
        self.dtype, self.out_dtype = dtype, out_dtype or dtype
        shapes = [(*size, channels), (*size, channels), (channels,), (channels,)]
        self.inputs = [(torch.randn(shape) + 0.5).to(dtype) for shape in shapes]
        self.inputs[1] = self.inputs[1].to(self.out_dtype)
        self.factor = 1.25 * (torch.arange(size[0]) % 3 > 0).to(self.out_dtype) if with_factor else None
        self.cotangent = (torch.randn(2, *shapes[0]) + 0.5).to(self.out_dtype)

    def fused(self, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        made = triton_norm.add_norm(x, branch, self.factor, weight, bias, EPS, self.out_dtype)
        return torch.stack([made[0].to(made[1].dtype), made[1]])

    def plain(self, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.factor is not None:
            branch = branch * self.factor.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))
        x = x + branch
        normed = F.layer_norm(x, weight.shape, weight, bias, EPS)
        return torch.stack([x, normed])


Problem = Tokens | Sum


def run(problem: Problem, function: Callable[..., Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and all gradients; everything in `dtype` if it is given."""
    inputs = [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in problem.inputs]
    out = function(*inputs)
    out.backward(problem.cotangent.to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]


def errors(results: Sequence[Tensor], problem: Problem) -> list[float]:
    """Error of each result against float64, relative to its norm."""
    exact = run(problem, problem.plain, torch.float64)
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(results, exact, strict=True)]


# images, rows and columns; channels; window; pooled tokens; the map handed on
TOKENS: dict[str, tuple] = {
    "whole windows, no map": ((2, 8, 4), 16, 4, True, False),
    "padding": ((2, 7, 9), 48, 4, True),
    "no pooled tokens": ((1, 5, 7), 48, 4, False),
    "no pooled tokens, no map": ((1, 5, 7), 48, 4, False, False),
    "shipped window": ((1, 7, 9), 96, 7, True),
    "several warps": ((2, 3, 4), 192, 3, True),
    "an odd number of channels, one image": ((1, 4, 3), 19, 3, True),
    "windows of 12": ((1, 12, 5), 16, 12, True),
}
SUMS: dict[str, tuple[tuple[int, ...], int, bool]] = {
    "a factor": ((5, 3, 3), 16, True),
    "no factor": ((2, 3, 7), 48, False),
    "wide": ((3, 5), 96, True),
    "several warps": ((2, 3, 2), 192, True),
    "one row an image": ((3,), 19, True),
}
PROBLEMS: list[tuple[type[Problem], tuple]] = [
    *((Tokens, arguments) for arguments in TOKENS.values()),
    *((Sum, arguments) for arguments in SUMS.values()),
]
NAMES = [*(f"tokens, {name}" for name in TOKENS), *(f"sum, {name}" for name in SUMS)]
SMALL = [(Tokens, TOKENS["padding"]), (Sum, SUMS["a factor"])]
each_problem = pytest.mark.parametrize(("kind", "arguments"), PROBLEMS, ids=NAMES)
small_problems = pytest.mark.parametrize(("kind", "arguments"), SMALL, ids=["tokens", "sum"])


@interpreted
@each_problem
def test_equals_plain(kind: Callable[..., Problem], arguments: tuple) -> None:
    """float32: output and every gradient."""
    problem = kind(*arguments)
    found = errors(run(problem, problem.fused), problem)
    assert max(found) < 2e-6, found


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16])
@pytest.mark.parametrize(
    ("kind", "arguments"), [*SMALL, (Tokens, TOKENS["several warps"])], ids=["tokens", "sum", "wide"]
)
def test_as_exact_as_plain(kind: Callable[..., Problem], arguments: tuple, dtype: torch.dtype) -> None:
    """Half precision throughout: at most twice the error of plain PyTorch."""
    problem = kind(*arguments, dtype=dtype)
    found, allowed = (
        errors(run(problem, problem.fused), problem),
        errors(run(problem, problem.plain), problem),
    )
    assert all(mine <= 2 * theirs for mine, theirs in zip(found, allowed, strict=True)), (found, allowed)


@interpreted
@small_problems
def test_mixed_precision(kind: Callable[..., Problem], arguments: tuple) -> None:
    """A float32 map and bfloat16 beside it, as under autocast: errors are those of rounding the result."""
    problem = kind(*arguments, out_dtype=BFLOAT16)
    results = run(problem, problem.fused)
    assert results[0].dtype == BFLOAT16 and results[1].dtype == torch.float32
    assert max(errors(results, problem)) < 2**-8, errors(results, problem)
    if isinstance(problem, Sum):
        x, branch, weight, bias = problem.inputs
        total = triton_norm.add_norm(x, branch, problem.factor, weight, bias, EPS, BFLOAT16)[0]
        exact = problem.plain(*(x.double() for x in problem.inputs))[0]
        torch.testing.assert_close(total, exact.float())  # not rounded


@interpreted
@small_problems
def test_slices_and_determinism(
    kind: Callable[..., Problem], arguments: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the items are divided; and the same bits twice."""
    problem = kind(*arguments)
    expected = run(problem, problem.fused)
    assert all(torch.equal(x, y) for x, y in zip(run(problem, problem.fused), expected, strict=True))
    for warps in (1, 4):
        monkeypatch.setattr(triton_norm, "TARGET_WARPS", warps)
        torch.testing.assert_close(run(problem, problem.fused), expected, rtol=1e-5, atol=1e-5)


@interpreted
@small_problems
def test_an_empty_batch(kind: Callable[..., Problem], arguments: tuple) -> None:
    """No image: an empty output, and gradients of parameters that are zero."""
    size, *rest = arguments
    problem = kind((0, *size[1:]), *rest)
    out, dx, *others = run(problem, problem.fused)
    assert out.numel() == dx.numel() == 0
    assert not any(gradient.any() for gradient in others)


@interpreted
@small_problems
def test_odd_strides(kind: Callable[..., Problem], arguments: tuple) -> None:
    """Inputs and gradients that are permuted, cut out or expanded are read all the same."""
    problem = kind(*arguments)
    problem.cotangent = torch.ones_like(problem.cotangent)
    expected = run(problem, problem.fused)
    x = problem.inputs[0]
    for view in (
        x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        F.pad(x, (0, 0, 1, 2, 3, 1))[:, 3:-1, 1:-2],
        F.pad(x, (2, 1))[..., 2:-1],
    ):
        view = view.detach().requires_grad_()
        out = problem.fused(view, *problem.inputs[1:])
        out.backward(torch.ones(()).expand_as(out))
        torch.testing.assert_close([out.detach(), view.grad], expected[:2])


@interpreted
@small_problems
def test_frozen_inputs(kind: Callable[..., Problem], arguments: tuple) -> None:
    """Each input may be the only one that wants a gradient, which is the same then."""
    problem = kind(*arguments)
    expected = run(problem, problem.fused)[1:]
    for i, gradient in enumerate(expected):
        inputs = [x.detach().requires_grad_(i == j) for j, x in enumerate(problem.inputs)]
        problem.fused(*inputs).backward(problem.cotangent)
        assert torch.equal(inputs[i].grad, gradient), i
        assert all(x.grad is None for j, x in enumerate(inputs) if i != j)


@interpreted
def test_the_map_handed_on_alone() -> None:
    """What leads only through the map gives its gradient back as it is."""
    problem = Tokens(*TOKENS["padding"])
    inputs = [x.requires_grad_() for x in problem.inputs]
    x, _ = triton_norm.NormTokens.apply(*inputs, problem.window, EPS, torch.float32)
    cotangent = torch.randn_like(x)
    x.backward(cotangent)
    assert torch.equal(inputs[0].grad, cotangent) and all(x.grad is None for x in inputs[1:])


@interpreted
@pytest.mark.parametrize("used", [0, 1])
def test_one_result_without_the_other(used: int) -> None:
    """The sum alone, or the normalised sum alone, has a gradient too."""
    problem = Sum(*SUMS["a factor"])
    found = [x.clone().requires_grad_() for x in problem.inputs]
    made = triton_norm.add_norm(*found[:2], problem.factor, *found[2:], EPS, torch.float32)
    made[used].backward(problem.cotangent[used])
    plain = [x.clone().requires_grad_() for x in problem.inputs]
    problem.plain(*plain)[used].backward(problem.cotangent[used])
    for mine, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize("with_pool", [True, False])
def test_operator_contract_of_tokens(with_pool: bool) -> None:
    """Schema, fake and gradient agree with what runs."""
    problem = Tokens((2, 3, 5), 16, 4, with_pool, with_map=False)
    inputs = [x.requires_grad_() for x in problem.inputs]
    pool = inputs[3:] or [None, None]
    for dtype in (torch.float32, BFLOAT16):
        torch.library.opcheck(triton_norm.norm_tokens, (*inputs[:3], *pool, 4, EPS, dtype))
    x, *parameters = (x.detach() for x in inputs)
    out, mean, rstd = triton_norm.norm_tokens(x, *parameters[:2], *(parameters[2:] or pool), 4, EPS, dtype)
    for wanted in (True, False):
        saved = (x, mean, rstd, *parameters[:2], parameters[2] if with_pool else None)
        gradients = (torch.randn_like(out), torch.randn_like(x) if wanted else None)
        torch.library.opcheck(triton_norm.norm_tokens_backward, (*gradients, *saved, 4, wanted))


@interpreted
@pytest.mark.parametrize("with_factor", [True, False])
def test_operator_contract_of_sum(with_factor: bool) -> None:
    """Schema, fake and gradient agree with what runs."""
    problem = Sum((2, 3), 16, with_factor)
    x, branch, *parameters = (x.requires_grad_() for x in problem.inputs)
    inputs = (x, branch, problem.factor, *parameters, EPS)
    for dtype in (torch.float32, BFLOAT16):
        torch.library.opcheck(triton_norm.add_norm, (*inputs, dtype))
    total, _, mean, rstd = (made.detach() for made in triton_norm.add_norm(*inputs, torch.float32))
    for wanted in (True, False):
        saved = (total, mean, rstd, problem.factor, parameters[0].detach(), BFLOAT16, wanted, wanted)
        torch.library.opcheck(triton_norm.add_norm_backward, (*problem.cotangent, *saved))


def test_refuses_what_32_bits_do_not_address() -> None:
    """A map of 13600 x 13600 pixels of the largest first stage."""
    x, norm = torch.ones(1).expand(1, 3400, 3400, 192), (torch.ones(192), torch.ones(192))
    with pytest.raises(ValueError, match="sdpa"):
        triton_norm.norm_tokens(x, *norm, None, None, 7, EPS, BFLOAT16)


# --- Compiled for Hopper ------------------------------------------------------------------------------------

WIDTHS = (96, 192, 384, 768, 1024, 1536)
CASES: dict[str, dict[str, Any]] = {
    "norm_tokens": {"SIDE": 7, "WITH_POOL": True, "EPS": EPS},
    "norm_tokens_gradient": {"SIDE": 7, "WITH_MAP": True, "WITH_POOL": True, "WITH_PARAMETERS": True},
    "add_norm": {"WITH_FACTOR": True, "EPS": EPS},
    "add_norm_gradient": {"WITH_FACTOR": True, "WITH_BRANCH": True, "WITH_PARAMETERS": True},
}
FLOAT_POINTERS = (
    *("x_ptr", "dx_ptr", "d_map_ptr", "sum_ptr", "d_sum_ptr", "mean_ptr", "rstd_ptr"),
    *("weight_ptr", "bias_ptr", "pool_weight_ptr", "pool_bias_ptr", "d_norm_ptr", "d_pool_ptr"),
)
"""What is float32 under autocast; the tokens, the branch and the factor are not."""


@compiled
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("name", CASES)
def test_compiles_for_hopper_without_spills(
    name: str, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 map and bfloat16 beside it: no spilled registers, and at least 16 warps on an SM."""
    monkeypatch.setattr(test_triton_hopper, "FLOAT_POINTERS", FLOAT_POINTERS)
    arguments = triton_norm._compile_time(name, channels) | CASES[name]
    kernel = getattr(triton_norm_passes, f"{name}_kernel")
    usage = test_triton_hopper._hopper_usage(kernel, BFLOAT16, arguments, tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0, usage
    assert usage["REG"] <= 128, usage
    assert usage["shared"] <= 1024, usage  # for sums: no tile moves through it


@compiled
@pytest.mark.parametrize("name", CASES)
def test_sizes_make_no_kernel_of_their_own(name: str) -> None:
    """So what is compiled above is what runs, and a last batch of another size compiles nothing."""
    kernel = getattr(triton_norm_passes, f"{name}_kernel")
    free = [p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize]
    assert all(name.endswith("_ptr") for name in free), free
