"""The MLP in pieces is the MLP: same output and gradients, and plain wherever somebody looks inside."""

from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from models import mlp
from models.mlp import Mlp


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 4 rows, at any size."""
    monkeypatch.setattr(mlp, "LARGE", 0)
    monkeypatch.setattr(mlp, "_rows_at_once", lambda _: 4)


def make_mlp(**options: float) -> Mlp:
    torch.manual_seed(0)
    return Mlp(6, 24, **options).double()


def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients of input and parameters."""
    x = x.clone().requires_grad_()
    out = layer(x)
    grads = torch.autograd.grad(
        (out * torch.arange(out.numel()).view_as(out)).sum(), [x, *layer.parameters()]
    )
    return [out, *grads]


def runs_in_pieces(layer: nn.Module, x: Tensor) -> bool:
    """Whether more than the two products of the plain MLP are computed."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        layer(x)
    return sum(event.name == "aten::addmm" for event in trace.events()) > 2


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (8, 6), (1, 6), (3, 7, 6)], ids=str)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_pieces_change_nothing(shape: tuple[int, ...], is_transposed: bool) -> None:
    """Whole pieces, a rest, a single row; rows that are not contiguous."""
    layer, plain = make_mlp(), timm.layers.Mlp(6, 24).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    x = x.transpose(0, -2) if is_transposed and x.dim() > 2 else x
    for ours, timms in zip(results(layer, x), results(plain, x), strict=True):
        torch.testing.assert_close(ours, timms)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(x))
    assert torch.autograd.gradcheck(layer, x.clone().requires_grad_())


@pytest.mark.usefixtures("in_pieces")
def test_the_backward_pass_makes_nothing_as_large_as_the_hidden_layer() -> None:
    """It is what the pieces are there to avoid: no zeros for the inputs of the GELU, which nobody reads."""
    layer, x = make_mlp(), torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    out = layer(x).sum()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        out.backward()
    filled = [event.input_shapes[0] for event in trace.events() if event.name == "aten::zero_"]
    assert filled and [9, 24] not in filled, filled


@pytest.mark.usefixtures("in_pieces")
def test_plain_where_somebody_looks_inside() -> None:
    x = torch.randn(9, 6, dtype=torch.float64)
    layer = make_mlp()
    assert runs_in_pieces(layer, x) and runs_in_pieces(layer.eval(), x)
    assert not runs_in_pieces(make_mlp(drop=0.5), x)
    assert runs_in_pieces(make_mlp(drop=0.5).eval(), x)
    seen: list[torch.Size] = []
    layer.fc1.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    layer(x)
    assert seen == [torch.Size([9, 24])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make_mlp().float()(x.float()).dtype == torch.bfloat16


CHANGES = {  # what users do to an MLP
    "an adapter": lambda layer: setattr(layer, "fc2", nn.Sequential(layer.fc2)),
    "another GELU": lambda layer: setattr(layer, "act", nn.GELU("tanh")),
    "a norm": lambda layer: setattr(layer, "norm", nn.LayerNorm(24).double()),
    "no bias": lambda layer: setattr(layer, "fc1", nn.Linear(6, 24, bias=False).double()),
    "dropout when evaluated": lambda layer: setattr(layer.eval(), "drop1", nn.Dropout(0.5).train()),
    "half precision": lambda layer: layer.bfloat16(),
}


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_mlp_is_computed_as_timm_does(change: Callable[[Mlp], Any]) -> None:
    layer = make_mlp()
    change(layer)
    x = torch.randn(9, 6).to(layer.fc1.weight.dtype)
    assert not runs_in_pieces(layer, x)
    torch.manual_seed(1)
    ours = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, timm.layers.Mlp.forward(layer, x))


@pytest.mark.usefixtures("in_pieces")
def test_another_width_and_functional_gradients() -> None:
    layer, x = make_mlp(), torch.randn(9, 6, dtype=torch.float64)
    layer.fc2, layer.drop1 = nn.Linear(24, 10).double(), nn.Identity()
    assert runs_in_pieces(layer, x)
    torch.testing.assert_close(layer(x), timm.layers.Mlp.forward(layer, x))

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    gradients = torch.func.grad(loss)(dict(layer.named_parameters()))
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_small_maps_are_computed_whole() -> None:
    layer = make_mlp().float()
    assert not runs_in_pieces(layer, torch.randn(1000, 6))
    assert runs_in_pieces(layer, torch.randn(2**25 // 4 // 24 + 1, 6))


@pytest.mark.parametrize("threads", [1, 2, 64])
@pytest.mark.parametrize("width", [384, 3072, 2**24])
def test_no_piece_is_large(threads: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many threads there are: else each piece would be mapped anew."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for dtype in (torch.float32, torch.float64):
        rows = mlp._rows_at_once(torch.empty(width, 8, dtype=dtype, device="meta"))
        assert rows == 1 or rows * width * dtype.itemsize <= mlp.LARGE // 2
        assert rows <= mlp.ROWS_AT_ONCE * max(2, threads)


@pytest.mark.usefixtures("in_pieces")
def test_a_backward_pass_under_autocast_is_as_exact() -> None:
    """What was computed in float32 has gradients computed in float32."""
    layer, x = make_mlp().float(), torch.randn(9, 6)
    expected = results(layer, x)[1:]
    leaves = [x.requires_grad_(), *layer.parameters()]
    out = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(out, leaves, torch.arange(out.numel()).view_as(out).float())
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.usefixtures("in_pieces")
def test_frozen_weights_get_no_gradient() -> None:
    layer = make_mlp().requires_grad_(False)
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in layer.parameters())
