"""The trial of the fused kernels: what it covers, what it finds, and what a model does then.

Kernels are compiled for a GPU that is not here (tools/benchmarks/stub_driver.py), or run in the interpreter
(by test_triton.py).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

pytest.importorskip("triton")

import triton
import triton.language as tl
from attention_definition import request
from conftest import REPO
from test_triton import compiled, interpreted

from config import load_config
from models import FocalTransformer, agree_on_backends, build_model, focal_transformer
from models.focal_transformer import BACKENDS, Backend, Request, Unsupported
from models.ops.triton import attention, kernels, launch, trial
from tools.benchmarks.stub_driver import StubDriver

NANO: dict[str, Any] = {
    "img_size": 56,
    "embed_dim": 8,
    "depths": (1, 1),
    "num_heads": (1, 1),
    "num_classes": 2,
    "focal_levels": (1, 1),
    "focal_windows": (3, 3),
    "expand_sizes": (1, 1),
    "window_size": 4,
}


# --- In the interpreter: whether kernels that run are right -------------------------------------------------


def case(dtype: torch.dtype = torch.float32, **changes: Any) -> trial.Case:
    exact = dtype == torch.float32
    return trial.Case(request("triton", dtype, 16), 4, 20, 12, False, False, exact)._replace(**changes)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("by_query", "by_window"), [(False, False), (False, True), (True, True)])
def test_right_kernels_pass(dtype: torch.dtype, by_query: bool, by_window: bool) -> None:
    made = case(dtype, by_query=by_query, by_window=by_window)
    index = trial.example(made)
    assert trial.case_of(index, index.tables, made.request) == made
    assert trial.attempt(made) is None
    inference = made._replace(request=made.request._replace(trains=False))
    assert trial.attempt(inference) is None


@interpreted
def test_one_key_is_tried_without_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bias has no gradient. Autograd's thread may be the one that waits for the trial."""
    attend = attention.attention

    def without_graph(*args: Any) -> Any:
        assert not torch.is_grad_enabled()
        return attend(*args)

    monkeypatch.setattr(attention, "attention", without_graph)
    assert trial.attempt(case(keys=1, always_seen=1)) is None


@interpreted
def test_kernels_that_are_wrong_from_the_second_item_on_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    @triton.jit
    def stay(image, window, windows, SHARED: tl.constexpr):
        return image, window

    monkeypatch.setitem(kernels.forward_kernel.fn.__globals__, "_next_item", stay)
    assert "the kernels are wrong on cpu: off by" in str(trial.attempt(case()))


@interpreted
@pytest.mark.parametrize("wrong", ["a number", "not a number", "a gradient"])
def test_wrong_kernels_are_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the output or in a gradient, by a value or by none."""
    name = "key_gradient" if wrong == "a gradient" else "forward"
    right = getattr(launch, name)

    def changed(*args: Any) -> Any:
        found = right(*args)
        if wrong == "a gradient":
            args[5][:, 3, 1] += 1  # of d_qkv
        else:
            found[0][:, 3] = 7 if wrong == "a number" else float("nan")
        return found

    monkeypatch.setattr(launch, name, changed)
    assert "the kernels are wrong on cpu: off by" in str(trial.attempt(case()))


# --- Compiled for GPUs that are not here --------------------------------------------------------------------


@pytest.fixture
def hopper() -> Iterator[StubDriver]:
    """A GPU that compiles, and computes nothing."""
    pytest.importorskip("triton", minversion="3.3")  # the stub's least
    network = focal_transformer
    caches = (trial.problem, network.warn_once, network.cached_index)
    for cache in caches:
        cache.cache_clear()
    with StubDriver("sm_90", with_trial=True) as driver:
        yield driver
    for cache in caches:
        cache.cache_clear()


@compiled
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("focal_tiny_patch4_window7_224", []),
        ("focal_tiny_patch4_window7_224", ["MODEL.FOCAL.USE_SHIFT", True]),
        ("focalv2_tiny_useconv_patch4_window7_224", []),
    ],
    ids=["focal", "shifted", "focal-fast"],
)
def test_a_trial_compiles_what_the_layer_compiles(
    name: str, options: list[Any], hopper: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no layer meets a kernel that was not tried."""
    cases = []
    monkeypatch.setattr(trial, "problem", cases.append)  # answers None: no problem
    model = build_model(load_config(REPO / "configs" / f"{name}.yaml", options))
    for stage, size in zip(model.stages, model.map_sizes(model.train_resolution), strict=True):
        layer, before = stage.blocks[-1].attn, len(hopper.kernels)
        layer.backend = "triton"
        index = layer.index(*size, torch.empty(0, dtype=torch.bfloat16))
        trial.largest_error(cases.pop())
        assert len(hopper.kernels) > before
        tried = len(hopper.kernels)
        qkv = torch.zeros(2, index.tokens, 3, layer.num_heads, layer.head_dim, dtype=torch.bfloat16)
        bias = layer.bias(index, torch.float32)
        attention.attend(qkv.requires_grad_(), index, bias, layer.scale).sum().backward()
        assert len(hopper.kernels) == tried, [kernel.name for kernel in hopper.kernels[tried:]]


def without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, driver: StubDriver) -> None:
    """As on a node without gcc, where Triton cannot build its launcher."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)

    def build(*_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(driver, "launcher_cls", build)


def run(model: FocalTransformer) -> Tensor:
    return model(torch.randn(1, 3, 56, 56))


@compiled
def test_no_compiler(hopper: StubDriver, tmp_path: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` uses the plain operator, says so once, and what to do; a named operator is an error."""
    without_compiler(monkeypatch, tmp_path, hopper)
    expected = "the kernels do not run on .*sm_90.*Failed to find C compiler.*install gcc"
    with caplog.at_level(logging.WARNING):
        model = FocalTransformer(**NANO, attention_backend="auto")
        run(model).sum().backward()
        run(model)
    assert len([r for r in caplog.records if "slower than it could be" in r.message]) == 1
    names = model.attention_backends()
    assert all(name.startswith("plain (") and "install gcc" in name for name in names)
    with pytest.raises(ValueError, match=f"attention_backend triton: {expected}.*; use auto"):
        run(FocalTransformer(**NANO, attention_backend="triton"))


@compiled
def test_triton_does_not_start(hopper: StubDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver is built when the GPU is first looked at, so a compiler may be missed already there."""
    without_compiler(monkeypatch, tmp_path, hopper)
    monkeypatch.setattr(hopper, "get_current_target", hopper.launcher_cls)
    launch.device_family.cache_clear()
    names = FocalTransformer(**NANO).attention_backends()
    assert all("Triton does not start on" in name and "install gcc" in name for name in names)


@compiled
def test_too_little_shared_memory(hopper: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.compiler.compiler, "max_shared_mem", lambda device: 100)
    model = FocalTransformer(**NANO)
    run(model)
    assert all("OutOfResources" in name and "shared memory" in name for name in model.attention_backends())


@compiled
def test_cuda_graphs(hopper: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph reads stays; a size that was never run cannot be captured, which is said."""
    model = FocalTransformer(**NANO, attention_backend="plain")
    run(model)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(focal_transformer, "IN_CUDA_GRAPHS", kept := set())
    run(model)
    run(model)
    assert len(kept) == 2  # one for each stage
    with pytest.raises(RuntimeError, match="first map of 16 x 12 tokens .* CUDA graph .* run the model once"):
        model(torch.randn(1, 3, 64, 48))


def test_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """By looking at the machine, not at the words of the error."""
    assert launch.explain(KeyError("x")) == "KeyError: 'x'"
    assert "TRITON_CACHE_DIR" in launch.explain(PermissionError(13, "denied", "/root/.triton"))
    monkeypatch.setattr(launch.sysconfig, "get_path", lambda _: str(tmp_path))
    assert "install python3-dev" in launch.explain(RuntimeError("exit status 1"))


def test_a_trial_is_made_once_and_leaves_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under modes that the caller has set."""
    seen = []

    def attempt(case: trial.Case) -> None:
        modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        seen.append((torch.is_grad_enabled(), *modes))

    monkeypatch.setattr(trial, "attempt", attempt)
    trial.problem.cache_clear()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        trial.problem(case(window=5))
        trial.problem(case(window=5))
    assert seen == [(True, False, False)]
    state = torch.random.get_rng_state()
    trial.example(case())
    assert torch.equal(torch.random.get_rng_state(), state)


@compiled
def test_memory_that_is_full_now_may_be_free_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is known about the kernels, and nothing is remembered."""
    outcomes = [torch.OutOfMemoryError("full"), 0.0]
    monkeypatch.setattr(trial, "largest_error", Mock(side_effect=outcomes))
    with pytest.raises(torch.OutOfMemoryError):
        trial.problem(case(window=6))
    assert trial.problem(case(window=6)) is None


# --- Several processes --------------------------------------------------------------------------------------


def agree(rank: int, folder: Path) -> None:
    """One of two processes; writes what becomes of each backend."""

    def newest(index: Any, request: Request) -> None:
        if rank == 1:
            raise Unsupported("no C compiler here")

    BACKENDS["newest"] = Backend(newest, BACKENDS["plain"].attend)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    answers = {}
    for backend in ("auto", "newest", "cpu"):
        try:
            model = FocalTransformer(**NANO, attention_backend=backend)
            answers[backend] = agree_on_backends(model, torch.float32)
        except ValueError as error:
            answers[backend] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(answers))
    dist.destroy_process_group()


@compiled
def test_processes_agree(tmp_path: Path) -> None:
    """Where one of them cannot use an operator none does; a named one is an error in all."""
    torch.multiprocessing.start_processes(agree, (tmp_path,), nprocs=2, start_method="fork")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["auto"] == second["auto"] == ["plain"] * 2
    assert first["cpu"] == second["cpu"] == ["cpu"] * 2
    expected = "attention_backend newest: no C compiler here"
    assert first["newest"].startswith(f"process 1: {expected}")
    assert second["newest"].startswith(expected)
