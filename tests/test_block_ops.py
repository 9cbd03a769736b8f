"""The fused LayerNorm kernels in a model: the same results, and only where nothing else is asked of a block.

As test_triton.py, this file runs itself once more with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import copy
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import NANO, REPO
from torch import Tensor, nn

pytest.importorskip("triton")

sys.path.insert(0, str(REPO / "tools"))
import profile_attention
import profile_block_ops
import tune_attention
from test_triton import bfloat16_as_on_a_gpu, compiled, interpreted, run_in_interpreter  # noqa: F401

from models import FocalTransformer, block_ops, focal_transformer
from models.ops import triton_launch, triton_norm

BFLOAT16 = torch.bfloat16


@compiled
def test_in_interpreter() -> None:
    """All tests of this file that need the interpreter."""
    run_in_interpreter(__file__)


def tiny(kind: str = "focal", **more: Any) -> FocalTransformer:
    """Two stages of a block; the second has a map with padding, and stochastic depth."""
    torch.manual_seed(0)
    sizes = dict(img_size=32, num_classes=3, embed_dim=16, depths=(1, 1), num_heads=(1, 1), window_size=4)
    levels = dict(focal_levels=(2, 2), focal_windows=(3, 1), expand_sizes=(2, 2), focal_topk=8)
    rest = dict(focal_pool="fc", focal_stages=(0, 1), drop_path_rate=0.5, attention_backend="triton")
    model = FocalTransformer(kind=kind, **(sizes | levels | rest | more))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model


IMAGES = torch.randn(3, 3, 32, 40, generator=torch.Generator().manual_seed(0))


def results(model: nn.Module, autocast: bool = False) -> list[Tensor]:
    """Logits, and in training the gradient of every parameter."""
    torch.manual_seed(1)
    images = IMAGES.to(next(model.parameters()).dtype)
    with torch.autocast("cpu", BFLOAT16, enabled=autocast), torch.set_grad_enabled(model.training):
        logits = model(images)
    if not model.training:
        return [logits]
    model.zero_grad()
    logits.double().square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values()), gradients
    return [logits.detach(), *gradients.values()]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operators that a model called, in order."""
    made: list[str] = []
    for name in ("norm_tokens", "add_norm"):  # the first one is called by `NormTokens`
        operator = getattr(triton_norm, name)

        def called(*arguments: Any, name: str = name, operator: Any = operator) -> Any:
            made.append(name)
            return operator(*arguments)

        monkeypatch.setattr(triton_norm, name, called)
    return made


def plainly(model: nn.Module, monkeypatch: pytest.MonkeyPatch, autocast: bool = False) -> list[Tensor]:
    """`results` without the operators."""
    with monkeypatch.context() as patch:
        patch.setattr(focal_transformer, "takes_kernels", lambda *_: False)
        return results(model, autocast)


@interpreted
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["focal", "focalv2"])
def test_a_model_is_the_same(
    kind: str, train: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and every gradient, with the same images dropped from the same branches; one kind recomputes its
    activations in the backward pass."""
    model = tiny(kind, use_checkpoint=kind == "focalv2").train(train)
    expected = plainly(model, monkeypatch)
    assert not calls
    found = results(model)
    assert calls == ["norm_tokens", "add_norm"] * (4 if train and kind == "focalv2" else 2)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@interpreted
def test_a_model_under_autocast(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As exact as without the operators, over all gradients."""
    model = tiny().train()
    exact = results(tiny(attention_backend="reference").double())
    errors = []
    for made in (results(model, True), plainly(model, monkeypatch, True)):
        off = [(x.double() - y).norm() / y.norm() for x, y in zip(made, exact, strict=True)]
        errors.append([float(off[0]), float(torch.stack(off).median())])
    assert calls == ["norm_tokens", "add_norm"] * 2
    assert all(mine <= 1.5 * theirs for mine, theirs in zip(*errors, strict=True)), errors


@interpreted
def test_layer_scale_and_half_precision(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer scale comes before the sum; a model in bfloat16 has parameters of that."""
    model = tiny(use_layerscale=True, layerscale_value=0.5).to(BFLOAT16).eval()
    expected = plainly(model, monkeypatch)
    torch.testing.assert_close(results(model), expected, rtol=0.05, atol=0.05)
    assert calls == ["norm_tokens", "add_norm"] * 2


@interpreted
def test_compiles_into_one_graph_without_them(calls: list[str]) -> None:
    """`torch.compile` gets the steps themselves, to fuse as it likes."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    torch.compile(tiny().train(), backend=backend, fullgraph=True, dynamic=False)(IMAGES)
    assert len(graphs) == 1 and not calls
    code = graphs[0].code
    assert "attention" in code and "norm_tokens" not in code and "add_norm" not in code
    compiled = torch.compile(tiny().eval(), backend="aot_eager", fullgraph=True, dynamic=False)
    found = results(compiled)
    assert not calls
    torch.testing.assert_close(found, results(tiny().eval()))


class OtherNorm(nn.LayerNorm):
    """A norm of the user's own."""


def replace_norms(model: FocalTransformer, make: Callable[[int], nn.Module]) -> None:
    for block in (stage.blocks[0] for stage in model.layers):
        block.norm1, block.norm2 = (make(block.norm1.normalized_shape[0]) for _ in range(2))


def on_blocks(change: Callable[[Any], Any]) -> Callable[[FocalTransformer], None]:
    def apply(model: FocalTransformer) -> None:
        for stage in model.layers:
            change(stage.blocks[0])

    return apply


def ignore(*_: Any) -> None:
    """A hook."""


def patch_forward(module: nn.Module) -> None:
    module.forward = module.forward  # as accelerate does


CHANGES: dict[str, tuple[dict, Callable[[FocalTransformer], Any], set[str]]] = {
    "another norm": ({}, lambda m: replace_norms(m, OtherNorm), set()),
    "no affine": ({}, lambda m: replace_norms(m, lambda c: nn.LayerNorm(c, elementwise_affine=False)), set()),
    "no bias": ({}, lambda m: replace_norms(m, lambda c: nn.LayerNorm(c, bias=False)), set()),
    "hook on norm1": ({}, on_blocks(lambda b: b.norm1.register_forward_hook(ignore)), {"add_norm"}),
    "hook before norm2": (
        {},
        on_blocks(lambda b: b.norm2.register_forward_pre_hook(ignore)),
        {"norm_tokens"},
    ),
    "hook on attention": ({}, on_blocks(lambda b: b.attn.register_forward_hook(ignore)), {"add_norm"}),
    "hook on a pool": (
        {},
        on_blocks(lambda b: b.pool_layers[0].register_forward_hook(ignore)),
        {"add_norm"},
    ),
    "hook that broadcasts": (
        {},
        on_blocks(lambda b: b.attn.register_forward_hook(lambda m, i, o: o.mean((1, 2), keepdim=True))),
        set(),
    ),
    "compiled attention": (
        {},
        on_blocks(lambda b: b.attn.compile(backend="eager", dynamic=False)),
        {"add_norm"},
    ),
    "another forward": ({}, on_blocks(lambda b: patch_forward(b.attn)), {"add_norm"}),
    "dropout as stochastic depth": (
        {},
        on_blocks(lambda b: setattr(b, "drop_path", nn.Dropout(0.5))),
        {"norm_tokens"},
    ),
    "mean pool": ({"focal_pool": "mean"}, ignore, {"add_norm"}),
    "two pooled levels": ({"focal_levels": (3, 3)}, ignore, {"add_norm"}),
    "no pool": ({"focal_pool": "none", "focal_levels": (1, 1)}, ignore, {"norm_tokens", "add_norm"}),
    "shift": ({"use_shift": True, "depths": (2, 1)}, ignore, {"norm_tokens", "add_norm"}),
    "another backend": ({"attention_backend": "sdpa"}, ignore, set()),
}


@interpreted
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_computed_as_ever(
    change: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the operators do not compute is left to the modules, with the same result."""
    options, apply, expected_calls = CHANGES[change]
    model = tiny(**options)
    apply(model)
    model.eval()
    found = results(model)
    assert set(calls) == expected_calls
    if change == "shift":  # of the odd block
        assert calls.count("norm_tokens") == 2 and calls.count("add_norm") == 3
    for mine, theirs in zip(found, plainly(model, monkeypatch), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@interpreted
def test_hooks_of_all_modules_are_called(calls: list[str]) -> None:
    """Those that trackers register for every module."""
    block, x, seen = tiny().eval().layers[0].blocks[0], torch.randn(1, 8, 8, 16), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        block(x)
    finally:
        handle.remove()
    assert not calls
    assert {block.norm1, block.norm2, block.attn, block.pool_layers[0]} <= {*seen}


@interpreted
def test_hooks_see_what_they_saw(calls: list[str]) -> None:
    """On the attention layer the normalised map and the pools; on its projection the tokens, either way."""
    block = tiny().eval().layers[0].blocks[0]
    x, seen = torch.randn(2, 6, 8, 16), {}
    block.attn.qkv.register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0]))
    expected = block(x)
    assert calls == ["norm_tokens", "add_norm"]
    tokens = seen["tokens"]
    assert tokens.shape == (2, 8 * 8 + 4, 16)
    block.attn.register_forward_pre_hook(lambda _, inputs: seen.update(inputs=inputs))
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(seen["tokens"], tokens)
    torch.testing.assert_close(seen["inputs"][0], block.norm1(x))
    assert seen["inputs"][1] is block.pool_layers and calls.count("norm_tokens") == 1


@interpreted
def test_traces_and_transforms_do_without_them(calls: list[str]) -> None:
    """`torch.jit.trace`, and `torch.func`: what has no rule for the operators does not meet them."""
    block = tiny(attention_backend="triton").eval().layers[0].blocks[0]
    x = torch.randn(1, 4, 8, 16)
    with torch.no_grad():
        expected = block(x)
        calls.clear()
        traced = torch.jit.trace(copy.deepcopy(block), x, check_trace=False)
        torch.testing.assert_close(traced(x), expected)
    assert not calls

    def asks(x: Tensor) -> Tensor:
        seen.append(block_ops.takes_kernels(x, block.attn))
        return x.sum()

    seen: list[bool] = []
    torch.func.grad(asks)(x)
    torch.func.jvp(asks, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        asks(x)
    asks(x)
    assert seen == [False, False, False, True]


@compiled
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_devices_do_without_them(device: str, calls: list[str]) -> None:
    model = tiny(attention_backend="auto").eval().to(device)
    block = model.layers[0].blocks[0]
    assert block(torch.zeros(1, 8, 8, 16, device=device)).shape == (1, 8, 8, 16)
    assert not calls


@pytest.fixture
def nano(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line for a model of a few thousand weights."""
    monkeypatch.setitem(profile_attention.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(profile_block_ops.ROUND_SECONDS, "cpu", 0.0)
    path = tmp_path / "nano.yaml"
    focal = {key.rpartition(".")[2]: value for key, value in NANO.items() if ".FOCAL." in key}
    path.write_text(yaml.safe_dump({"MODEL": {"NAME": "nano", "FOCAL": focal}}))
    return ["--cfg", str(path), "--sizes", "32", "--batch-size", "1", "--repeats", "1", "--device", "cpu"]


@interpreted
def test_profile_checks_and_times(
    nano: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    """A row for each stage, operator and pass; exit status 1 where a result is wrong."""
    assert profile_block_ops.main([*nano, "--precisions", "bf16", "--out", str(tmp_path)]) == 0
    (report,) = tmp_path.glob("*_block_ops.csv")
    rows = list(csv.DictReader(report.read_text().splitlines()))
    assert len(rows) == len(NANO["MODEL.FOCAL.DEPTHS"]) * 2 * 2
    assert all(row["check"] == "ok" and float(row["ms"]) > 0 for row in rows)
    honest = profile_block_ops.Problem.fused

    def lying(self: profile_block_ops.Problem) -> tuple[Tensor, Tensor]:
        kept, made = honest(self)
        return kept, made * 1.01

    monkeypatch.setattr(profile_block_ops.Problem, "fused", lying)
    monkeypatch.setattr(profile_block_ops, "time_in_turns", lambda *_: {"fused": [1.0], "modules": [1.0]})
    assert profile_block_ops.main(nano) == 1


@compiled
def test_profile_says_what_it_needs(nano: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert profile_block_ops.main(nano) == 2
    assert "CUDA" in caplog.text


@interpreted
def test_tuning_checks_and_times(nano: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each stage and setting that is another; afterwards the settings are what they were."""
    changes = {
        "forward": {"block_keys": (32, 64), "programs": (1,)},
        "query_gradient": {"static_tiles": (1,)},
        "key_gradient": {"block_queries": (16,)},
    }
    monkeypatch.setattr(tune_attention, "CHANGES", changes)
    monkeypatch.setitem(tune_attention.ROUND_SECONDS, "cpu", 0.0)
    before = dict(triton_launch.CONFIGS), dict(triton_launch.TARGET_PROGRAMS)
    assert tune_attention.main([*nano, "--out", str(tmp_path)]) == 0
    assert before == (triton_launch.CONFIGS, triton_launch.TARGET_PROGRAMS)
    (report,) = tmp_path.glob("*_tuning.csv")
    rows = list(csv.DictReader(report.read_text().splitlines()))
    assert len(rows) == len(NANO["MODEL.FOCAL.DEPTHS"]) * 4
    assert all(row["check"] == "ok" and float(row["times as fast"]) > 0 for row in rows)
    honest = tune_attention.Contender.results

    def lying(self: tune_attention.Contender) -> list[Tensor]:
        factor = 1 if before[0] == triton_launch.CONFIGS else 1.1
        return [factor * x for x in honest(self)]

    monkeypatch.setattr(tune_attention.Contender, "results", lying)
    assert tune_attention.main(nano) == 1


@compiled
@pytest.mark.parametrize("off", [[0.0, float("nan"), 0.0], [float("nan")] * 3, [0.0, 0.0, 1.0]])
def test_tuning_passes_over_nothing(off: list[float]) -> None:
    """Not even over what is no number."""
    assert tune_attention.verdict(off, torch.bfloat16).startswith("WRONG")
    assert tune_attention.verdict([0.0, 1e-3, 0.0], torch.bfloat16) == "ok"


@compiled
def test_tuning_says_what_it_needs(nano: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert tune_attention.main(nano) == 2
    assert "CUDA" in caplog.text
