"""Linear layers computed as convolutions are linear layers, and only where that is the faster way."""

from __future__ import annotations

import copy
import csv
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(REPO / "tools"))
import profile_linear

from models import FocalTransformer, linear, mlp
from models.layers import PatchEmbed

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch has no oneDNN here"
)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor on which convolutions are the faster products, and two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(linear, "_outrun_products", lambda: True)
    yield
    torch.set_num_threads(threads)


def convolutions(call: Callable[[], Any]) -> int:
    """Convolutions that a call runs."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        call()
    names = [event.name for event in trace.events()]
    return names.count("aten::convolution") + names.count("aten::convolution_backward")


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "rows": torch.randn(1100, 24),
        "map": torch.randn(2, 25, 22, 24),
        "part of a map": torch.randn(2, 31, 30, 24)[:, 1:26, :22],
        "transposed": torch.randn(3, 24, 400).transpose(1, 2),
        "one row for all": torch.randn(1, 24).expand(1100, 24),
    }


def with_gradients(call: Callable[..., Tensor], x: Tensor, weight: Tensor, *bias: Tensor) -> list[Tensor]:
    """Result, gradients, and gradients of gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, *bias)]
    y = call(*leaves[:2], *(leaves[2:] or [None]))
    first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return [y, *first, *second]


@needs_onednn
@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("name", inputs())
@pytest.mark.parametrize("has_bias", [True, False])
def test_results_and_gradients_are_those_of_a_linear_layer(name: str, has_bias: bool) -> None:
    layer = nn.Linear(24, 40, bias=has_bias)
    leaves = [inputs()[name].requires_grad_(), *layer.parameters()]
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        linear.run(layer, leaves[0])
    assert "aten::mkldnn_convolution" in [event.name for event in trace.events()]
    ours, plain, exact = (
        with_gradients(call, *(x.to(dtype) for x in leaves))
        for call, dtype in (
            (linear.product, torch.float32),
            (F.linear, torch.float32),
            (F.linear, torch.float64),
        )
    )
    assert ours[0].is_contiguous()
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm() + 1e-5 * true.norm()
    with torch.inference_mode():
        torch.testing.assert_close(linear.run(layer, leaves[0]), layer(leaves[0]))


@needs_onednn
@pytest.mark.usefixtures("fast")
def test_gradients_without_autograd() -> None:
    rows, weight, bias, grad = (
        torch.randn(*s, requires_grad=True) for s in ((1100, 24), (40, 24), (40,), (1100, 40))
    )
    expected = torch.autograd.grad(F.linear(rows, weight, bias), (rows, weight, bias), grad)
    leaves = [x.detach() for x in (grad, rows, weight)]
    assert convolutions(lambda: linear.gradients(*leaves)) == 1
    ours = linear.gradients(*leaves)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)
    assert all(x.is_contiguous() for x in ours)
    exact = linear.gradients(*(x.double() for x in leaves))
    torch.testing.assert_close(exact, tuple(x.double() for x in expected), atol=1e-4, rtol=1e-5)


class Other(nn.Linear):
    """What a user may put in a linear layer's place."""


class Watched(Tensor):
    """A tensor that is not PyTorch's own."""


def hooked(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_hook(lambda *_: None)
    return layer


def biases_only(layer: nn.Linear) -> nn.Linear:
    layer.weight.requires_grad_(False)
    return layer


def sparse(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr())
    return layer


ROWS = torch.randn(1100, 24, generator=torch.Generator().manual_seed(0))
PLAIN: dict[
    str, Callable[[], tuple[nn.Linear, Tensor]]
] = {  # layers and inputs that are not for convolutions
    "few rows": lambda: (nn.Linear(24, 40), ROWS[:1023]),
    "few values": lambda: (nn.Linear(18, 40), ROWS[:, :18]),
    "a sparse weight": lambda: (sparse(nn.Linear(24, 40)), ROWS),
    "no output": lambda: (nn.Linear(24, 0), ROWS),
    "no row": lambda: (nn.Linear(24, 40), ROWS[:0]),
    "double": lambda: (nn.Linear(24, 40).double(), ROWS.double()),
    "half": lambda: (nn.Linear(24, 40).bfloat16(), ROWS.bfloat16()),
    "hooked": lambda: (hooked(nn.Linear(24, 40)), ROWS),
    "of another class": lambda: (Other(24, 40), ROWS),
    "parametrized": lambda: (torch.nn.utils.parametrizations.weight_norm(nn.Linear(24, 40)), ROWS),
    "of other tensors": lambda: (nn.Linear(24, 40), ROWS.as_subclass(Watched)),
    "frozen": lambda: (nn.Linear(24, 40).requires_grad_(False), ROWS.clone().requires_grad_()),
    "a trained bias alone": lambda: (biases_only(nn.Linear(24, 40)), ROWS),
}
PARTLY_TRAINED = ("frozen", "a trained bias alone")


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("name", PLAIN)
def test_all_else_runs_as_ever(name: str) -> None:
    """Each for what its name says alone: but for the last two nobody wants a gradient."""
    layer, x = PLAIN[name]()
    with torch.set_grad_enabled(name in PARTLY_TRAINED):
        assert convolutions(lambda: linear.run(layer, x)) == 0
        torch.testing.assert_close(linear.run(layer, x), layer(x))


@needs_onednn
@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("name", PARTLY_TRAINED)
def test_without_gradients_frozen_layers_convolve(name: str) -> None:
    layer, x = PLAIN[name]()
    with torch.no_grad():
        assert convolutions(lambda: linear.run(layer, x)) == 1


@needs_onednn
@pytest.mark.usefixtures("fast")
def test_what_is_asked_of_pytorch_is_respected() -> None:
    """Autocast, transforms, traces, less exact products, one thread, and oneDNN switched off."""
    layer = nn.Linear(24, 40).requires_grad_(False)

    def count() -> int:
        return convolutions(lambda: linear.run(layer, ROWS))

    assert count() == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert count() == 0 and linear.run(layer, ROWS).dtype == torch.bfloat16
    images = torch.stack((ROWS, 2 * ROWS))
    assert convolutions(lambda: torch.vmap(lambda x: linear.run(layer, x))(images)) == 0
    torch.testing.assert_close(torch.vmap(lambda x: linear.run(layer, x))(images), layer(images))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = torch.jit.trace(lambda x: linear.run(layer, x), ROWS)
    assert "convolution" not in str(trace.graph) and "linear" in str(trace.graph)
    torch.set_float32_matmul_precision("high")
    try:
        assert count() == 0
    finally:
        torch.set_float32_matmul_precision("highest")
    with torch.backends.mkldnn.flags(enabled=False):
        assert count() == 0
    torch.set_num_threads(1)
    assert count() == 0


@pytest.mark.usefixtures("fast")
@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="a setting of PyTorch 2.9"
)
def test_newer_settings_of_precision_are_respected() -> None:
    layer = nn.Linear(24, 40).requires_grad_(False)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert convolutions(lambda: linear.run(layer, ROWS)) == 0
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("fast")
def test_without_autograd_a_bias_is_summed_as_exactly_as_ever() -> None:
    """Over many rows of one sign, where sums in a row lose digits."""
    grad, x, weight = torch.rand(100_000, 8) + 0.5, torch.rand(100_000, 8), torch.rand(8, 8)
    exact = grad.double().sum(dim=0)
    assert ((linear.gradients(grad, x, weight)[2] - exact) / exact).abs().max() < 1e-6


@pytest.mark.usefixtures("fast")
def test_compiled_code_is_left_to_the_compiler() -> None:
    """It joins a product with what follows it, and chooses the library itself."""
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph.code)
        return graph.forward

    layer = nn.Linear(24, 40).requires_grad_(False)
    torch.compile(lambda x: linear.run(layer, x), backend=keep, fullgraph=True)(ROWS)
    assert graphs and "conv" not in graphs[0]


INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel\t\t: 85\n"
PROCESSORS = {
    "AMD": (INTEL.replace("GenuineIntel", "AuthenticAMD"), True),
    "Intel": (INTEL, False),
    "ARM": ("processor: 0", False),
}


@pytest.mark.parametrize(("info", "is_faster"), PROCESSORS.values(), ids=PROCESSORS)
def test_only_on_processors_where_it_was_measured(
    info: str, is_faster: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(info)
    monkeypatch.setattr(linear, "CPU_INFO", str(tmp_path / "cpuinfo"))
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(library, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    decide = linear._outrun_products.__wrapped__
    assert decide() == is_faster
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not decide()
    monkeypatch.setattr(linear, "CPU_INFO", str(tmp_path / "none"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert not decide()


def results(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Logits and the gradient of every parameter."""
    logits = model(images)
    weights = torch.arange(logits.numel()).view_as(logits).sin()
    return [logits, *torch.autograd.grad((logits * weights).sum(), list(model.parameters()))]


@needs_onednn
@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("kind", ["focal", "focalv2"])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_model_computes_the_same(kind: str, in_pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, with the MLP whole and in pieces: every product but the pools' and the head's."""
    torch.manual_seed(0)
    sizes = dict(img_size=64, num_classes=5, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4)
    model = FocalTransformer(
        kind=kind,
        focal_levels=(2, 2),
        focal_windows=(3, 1),
        expand_sizes=(2, 2),
        focal_topk=8,
        focal_pool="fc",
        focal_stages=(0, 1),
        use_conv_embed=kind == "focalv2",
        drop_path_rate=0.0,
        **sizes,
    )
    images = torch.randn(2, 3, 72, 60, requires_grad=True)
    if in_pieces:
        monkeypatch.setattr(mlp, "LARGE", 0)
        monkeypatch.setattr(mlp, "_rows_at_once", lambda _: 50)
    monkeypatch.setattr(linear, "FEWEST_ROWS", 1)
    monkeypatch.setattr(linear, "FEWEST_VALUES", 1)
    ours = results(model, images)
    counts = convolutions(lambda: model(images))
    mlps = 2 * 2 * (5 if in_pieces else 1)  # two layers in each of two blocks, in five pieces at least
    assert counts >= mlps + 2 * 2 + 2, counts  # and two around attention, and two embeddings
    monkeypatch.setattr(linear, "_outrun_products", lambda: False)
    assert convolutions(lambda: model(images)) == 0
    plain = results(copy.deepcopy(model), images)
    for mine, other in zip(ours, plain, strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm() + 1e-6


@needs_onednn
@pytest.mark.usefixtures("fast")
def test_an_embedding_keeps_its_convolution_as_parameter() -> None:
    """Gradients reach the kernel in its own shape and order."""
    embed, maps = PatchEmbed(4, 8, 2), torch.randn(2, 64, 64, 4, requires_grad=True)
    assert convolutions(lambda: embed(maps).sum().backward()) == 2
    gradient = embed.proj.weight.grad
    assert gradient is not None and gradient.shape == embed.proj.weight.shape


def test_profile_times_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four in each stage, without and with gradients; a mistake ends in one message."""
    monkeypatch.setitem(profile_linear.ROUND_SECONDS, "cpu", 0.0)
    nano = ["--cfg", str(REPO / "tests/checkpoints/official_v1_nano.yaml"), "--repeats", "1"]
    assert profile_linear.main([*nano, "--sizes", "64", "--batch-size", "3", "--out", str(tmp_path)]) == 0
    (report,) = tmp_path.glob("*_linear.csv")
    rows = list(csv.DictReader(report.read_text().splitlines()))
    assert len(rows) == 4 * 4 * 2 and {row["rows"] for row in rows} == {"768", "192", "48", "12"}
    assert all(float(row["product ms"]) > 0 and float(row["speed-up"]) > 0 for row in rows)
    assert profile_linear.main(["--cfg", str(tmp_path / "none.yaml")]) == 2
