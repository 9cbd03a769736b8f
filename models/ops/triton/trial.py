"""Try the kernels on a small case before a model depends on them.

On some machines they cannot be built (no C compiler), do not fit (too little memory on the chip), or could
be wrong. So what a layer will compile is compiled and run on random numbers first, once per process and
device, and compared with the plain operator.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from math import isnan
from threading import Lock
from typing import NamedTuple

import torch

from ...focal_transformer import AttentionIndex, Request, plain_attention
from . import attention, launch
from .tables import TritonTables, build_tables

BATCH = 3
LARGEST_ERROR = 0.05
EXACT_ERROR = 1e-3
"""Largest errors that rounding explains, in 16 bits or TF32 and in float32, relative to the largest value."""


class Case(NamedTuple):
    """What decides which kernels are compiled."""

    request: Request
    window: int  # s
    keys: int  # K'
    always_seen: int  # as in `TritonTables`
    by_query: bool  # queries of a window see different keys
    by_window: bool  # each window has a bias of its own
    exact: bool  # products are those of float32


def case_of(index: AttentionIndex, tables: TritonTables, request: Request) -> Case:
    """The case that stands for a layer."""
    visible = tables.merged.visible
    by_query = visible is not None and visible.shape[1] > 1
    by_window = len(index.keys) > 1 and (by_query or index.bias_by_window)
    exact = request.dtype == torch.float32 and not launch.tf32_allowed()
    count = tables.merged.keys.shape[1]
    request = request._replace(backend="triton")  # the same case, whoever asked for it
    return Case(request, index.window, count, tables.always_seen, by_query, by_window, exact)


@cache
def problem(case: Case) -> str | None:
    """Why the kernels cannot be used in this case; None if they work.

    Runs in a thread of its own, which no mode of the caller's reaches: autocast, inference mode, a dispatch
    mode, or torch.compile's tracing.

    Raises:
        torch.OutOfMemoryError: there is no memory to find out; the next call tries again.
    """
    with ONE_AT_A_TIME, ThreadPoolExecutor(1) as executor:
        return executor.submit(attempt, case).result()


ONE_AT_A_TIME = Lock()


def attempt(case: Case) -> str | None:
    """As `problem`, in this thread."""
    device = case.request.device
    where = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    try:
        error = largest_error(case)
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # whatever a compiler, driver or linker says
        return f"the kernels do not run on {where}: {launch.explain(failure)}"
    limit = EXACT_ERROR if case.exact else LARGEST_ERROR
    if error <= limit:
        return None
    return f"the kernels are wrong on {where}: off by {error:.2g} of the largest value, expected {limit:.2g}"


def largest_error(case: Case) -> float:
    """Largest difference from the plain operator in float64 on the CPU, relative to its largest value, or to
    1 if that is smaller: of the output, and in training of the gradients of qkv and of the bias."""
    index, request, scale = example(case), case.request, case.request.head_dim**-0.5
    generator = torch.Generator().manual_seed(0)
    heads, dim, queries = request.heads, request.head_dim, case.window**2
    shape = (heads, len(index.keys) if case.by_window else 1, queries, case.keys)
    sizes = ((BATCH, index.tokens, 3, heads, dim), (BATCH, index.height * index.width, heads * dim))
    qkv, d_out = (torch.randn(size, generator=generator).to(request.dtype) for size in sizes)
    bias = torch.randn(shape, generator=generator)
    inputs = [x.double().requires_grad_(request.trains) for x in (qkv, bias)]
    visible = None if index.visible is None else index.visible.cpu()
    out = plain_attention(inputs[0], replace(index, keys=index.keys.cpu(), visible=visible), inputs[1], scale)
    gradients = torch.autograd.grad(out, inputs, d_out.double()) if request.trains else ()
    token = launch.most_slices.set(1)  # programs go through several items, as in a large batch
    try:
        qkv, bias, d_out = (x.to(request.device) for x in (qkv, bias, d_out))
        found = attention.without_autograd(qkv, index, bias, scale, d_out if request.trains else None)
    finally:
        launch.most_slices.reset(token)
    pairs = zip(found, (out.detach(), *gradients), strict=True)
    errors = [((a.cpu().double() - b).abs().max() / b.abs().max().clamp_min(1)).item() for a, b in pairs]
    return max(float("inf") if isnan(error) else error for error in errors)


def example(case: Case) -> AttentionIndex:
    """An index of 2 x 2 windows that compiles the same kernels, with random keys."""
    generator, windows = torch.Generator().manual_seed(1), 4
    side, device = 2 * case.window, case.request.device
    tokens, level = side * side, windows
    while tokens < case.keys + 1:
        tokens, level = tokens + level, 4 * level
    keys = torch.rand(windows, tokens, generator=generator).argsort(dim=1)[:, : case.keys]
    rows = case.window**2 if case.by_query else 1
    visible = torch.rand(windows, rows, case.keys, generator=generator) < 0.8
    visible[..., : case.always_seen] = True
    visible[0, :, case.always_seen :] = False
    visible[0, 1:, 0] = False  # even if each key is seen by some query
    seen = None if bool(visible.all()) else visible.to(device)
    index = AttentionIndex(side, side, case.window, tokens, keys.to(device), seen, (), case.by_window)
    return replace(index, backend="triton", tables=build_tables(index, case.request.trains))
