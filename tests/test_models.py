"""Properties of the model over families, options and sizes."""

import copy
import itertools
import pickle
from collections import Counter

import pytest
import torch
import torch._dynamo.testing
from timm.layers import DropPath
from torch.utils._python_dispatch import TorchDispatchMode

from models import FocalTransformer, block_ops
from models.key_selection import CACHED_TABLES, _nearest_keys, _ring_pooled_keys
from models.layers import LinearPool, _cells
from models.ops import cpu_kernel

NANO = {
    "img_size": 64,
    "num_classes": 5,
    "embed_dim": 8,
    "depths": [2, 1, 1, 1],
    "num_heads": [1, 2, 2, 4],
    "focal_pool": "fc",
    "focal_levels": [2, 2, 2, 2],
    "drop_path_rate": 0.0,
}
KINDS = ("focal", "focalv2")
VARIANTS = {
    "focal": {"kind": "focal"},
    "focal_shift_conv": {"kind": "focal", "use_shift": True, "use_conv_embed": True},
    "focal_max_odd": {"kind": "focal", "focal_pool": "max", "expand_layer": "odd", "use_pre_norm": True},
    "focal_levels3": {"kind": "focal", "focal_levels": [3, 3, 2, 1], "focal_pool": "conv"},
    "focal_levels0": {"kind": "focal", "focal_levels": [0, 1, 0, 1], "focal_pool": "none"},
    "focal_scale_ape": {"kind": "focal", "use_layerscale": True, "ape": True, "patch_norm": False},
    "focal_window4": {"kind": "focal", "window_size": 4, "expand_sizes": [2, 2, 2, 2]},
    "focalv2": {"kind": "focalv2"},
    "focalv2_conv": {"kind": "focalv2", "use_conv_embed": True, "focal_topk": 20, "focal_pool": "mean"},
    "focalv2_level1": {
        "kind": "focalv2",
        "focal_levels": [1, 1, 1, 1],
        "focal_pool": "none",
        "use_shift": True,
    },
}
SIZES = [(32, 32), (33, 47), (64, 64), (50, 130), (224, 96)]


def build(seed: int = 0, **options) -> FocalTransformer:
    torch.manual_seed(seed)
    return FocalTransformer(**{**NANO, **options})


def image(*size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_size_trains_and_evaluates_and_backends_agree(variant, size) -> None:
    """Every parameter gets a finite gradient, the same from both backends, whatever the size."""
    results = []
    for backend in ("reference", "sdpa"):
        model = build(**VARIANTS[variant], attention_backend=backend).double().train()
        x = image(*size).double().requires_grad_()
        logits = model(x)
        logits.square().sum().backward()
        results.append([logits, x.grad, *(p.grad for p in model.parameters())])
        assert all(gradient is not None and gradient.isfinite().all() for gradient in results[-1])
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(x), logits)
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_error_is_bounded_by_the_references(kind) -> None:
    """In bf16 autocast no backend is further from float32 than twice the reference backend."""
    errors = {}
    for backend in ("reference", "sdpa"):
        model = build(kind=kind, attention_backend=backend).eval()
        with torch.no_grad():
            exact = model(image(64, 64))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                errors[backend] = (model(image(64, 64)).float() - exact).abs().max() / exact.abs().max()
    assert errors["sdpa"] < max(2 * errors["reference"], 0.02) and errors["reference"] < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_no_index_table_in_the_state(kind) -> None:
    model = build(kind=kind)
    before = set(model.state_dict())
    model(image(96, 64))
    assert set(model.state_dict()) == before
    stored = {name for name, _ in model.named_buffers()}
    assert all("topk_cloest_indice" in name for name in stored) and bool(stored) == (kind == "focalv2")


def test_table_caches_are_bounded() -> None:
    for kind, side in itertools.product(KINDS, range(32, 32 + 4 * CACHED_TABLES, 4)):
        build(
            kind=kind,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 1],
            focal_levels=[2, 2],
            focal_windows=[3, 3],
            expand_sizes=[3, 3],
        )(image(side, 32, batch=1)).sum().backward()
    for cache in (_ring_pooled_keys, _nearest_keys):
        assert 0 < cache.cache_info().currsize <= CACHED_TABLES
    for cache in (cpu_kernel._rows, cpu_kernel._slots):
        assert 0 < cache.cache_info().currsize <= cpu_kernel.CACHED_TABLES


@pytest.mark.parametrize("kind", KINDS)
def test_intermediate_maps(kind) -> None:
    model = build(kind=kind).eval()
    x = image(64, 96)
    with torch.no_grad():
        maps = model.forward_intermediates(x)
        chosen = model.forward_intermediates(x, [1, -1])
        features = model.forward_features(x)
    assert [list(m.shape) for m in maps] == [[2, 8 * 2**i, 16 // 2**i, 24 // 2**i] for i in range(4)]
    assert torch.equal(chosen[0], maps[1]) and torch.equal(chosen[1], maps[3])
    torch.testing.assert_close(model.norm(maps[3].permute(0, 2, 3, 1)), features)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, 64)
    with pytest.raises(ValueError, match="stages 0 to 3"):
        model.forward_intermediates(x, [4])


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_nothing(kind) -> None:
    gradients = []
    for use in (False, True):
        model = build(kind=kind, use_checkpoint=use, drop_path_rate=0.3).train()
        torch.manual_seed(3)
        model(image(64, 64)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_drop_path_rises_linearly() -> None:
    model = build(drop_path_rate=0.4)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.layers for b in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


class Operators(TorchDispatchMode):
    """How often each operator ran inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class DropNothing(DropPath):
    """Stochastic depth as a user might write it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


DROPS = {
    "subclass": lambda: DropNothing(0.5),
    "plain": lambda: DropPath(0.5),
    "rate 0": lambda: DropPath(0.0),
    "unscaled": lambda: DropPath(0.5, scale_by_keep=False),
    "evaluation": lambda: DropPath(0.5).eval(),
    "identity": torch.nn.Identity,
    "dropout": lambda: torch.nn.Dropout(0.5),
}


@pytest.mark.parametrize("look", ["", "hook", "dtype", "shape", "half"])
@pytest.mark.parametrize("drop", DROPS)
def test_sum_with_stochastic_depth_is_what_the_module_makes(drop: str, look: str) -> None:
    """Value, gradients and the numbers drawn; one operation where nobody looks and operands are alike."""
    drop_path, seen = DROPS[drop](), []
    if look == "hook":
        drop_path.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    x, branch = torch.randn(2, 8, 3, 5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    branch = {"dtype": branch.bfloat16(), "shape": branch[:, :1, :, :1]}.get(look, branch)
    x, branch = (x.bfloat16(), branch.bfloat16()) if look == "half" else (x, branch)

    results, operators = [], []
    for add in (block_ops.add, lambda x, branch, drop_path: x + drop_path(branch)):
        torch.manual_seed(3)
        with Operators() as recorded:
            y = add(x, branch, drop_path)
        gradients = torch.autograd.grad(y.square().sum(), [x, branch], retain_graph=True)
        results.append([y, *gradients, torch.rand(2)])
        operators.append(recorded.counts)
    torch.testing.assert_close(*results)
    is_one = drop in ("plain", "rate 0", "unscaled") and look in ("", "half")
    assert [counts["addcmul"] for counts in operators] == [is_one, 0]
    assert seen == ([branch.shape] * 2 if look == "hook" else [])
    is_random = drop in ("plain", "unscaled")
    assert not is_random or 0 < sum(map(torch.equal, results[0][0], x)) < len(x)


def test_a_block_adds_both_branches_in_one_operation_each() -> None:
    block, x = build(drop_path_rate=0.5).train().layers[1].blocks[0], torch.randn(2, 8, 8, 16)
    for train in (True, False):
        with Operators() as recorded:
            block.train(train)(x)
        assert recorded.counts["addcmul"] == (2 if train else 0)


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_compiled_traced_and_transformed_sums_leave_stochastic_depth_to_its_module() -> None:
    """The compiler joins the operations itself, and `torch.func` has rules of its own for random numbers."""
    drop_path = DropPath(0.5)
    x, branch = torch.randn(2, 4, 2, 2, 3)
    graphs = torch._dynamo.testing.EagerAndRecordGraphs()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return block_ops.add(x, branch, drop_path).sum()

    torch.compile(loss, backend=graphs, fullgraph=True)(x)
    (graph,) = graphs.graphs
    assert "addcmul" not in str(graph.graph) and "bernoulli" in str(graph.graph)
    traced = str(torch.jit.trace(loss, x, check_trace=False).graph)
    assert "addcmul" not in traced and "bernoulli" in traced
    with Operators() as recorded:
        torch.func.vmap(torch.func.grad(loss), randomness="same")(torch.stack([x, x]))
    assert not recorded.counts["addcmul"] and recorded.counts["bernoulli_"]
    with Operators() as recorded, torch.autograd.forward_ad.dual_level():
        loss(torch.autograd.forward_ad.make_dual(x, x))
    assert not recorded.counts["addcmul"] and recorded.counts["bernoulli_"]


def test_no_head_and_other_channels() -> None:
    assert build(num_classes=0)(image(64, 64)).shape == (2, 64)
    model = build(in_chans=1)
    assert model(image(64, 64)[:, :1]).shape == (2, 5)
    with pytest.raises(ValueError, match=r"\[B, 1, H, W\]"):
        model(image(64, 64))


def test_no_weight_decay_names_exist() -> None:
    model = build(ape=True)
    names = model.no_weight_decay()
    assert "absolute_pos_embed" in names and len(names) == 1 + sum(
        "bias_table" in n for n in model.state_dict()
    )
    assert names <= set(dict(model.named_parameters()))
    assert build(kind="focalv2").no_weight_decay() == set()


def test_initialisation() -> None:
    model = FocalTransformer(
        embed_dim=32, num_heads=(1, 2, 4, 8), focal_pool="fc", focal_levels=(2, 2, 2, 2), ape=True
    )
    for name, p in model.named_parameters():
        if name.endswith("relative_position_bias_table") or name.endswith("bias") and "proj" not in name:
            assert not p.any(), name
        elif (
            "bias_table_to" in name
            or name == "absolute_pos_embed"
            or name.endswith(("qkv.weight", "fc1.weight"))
        ):
            assert 0.017 < p.std() < 0.023, name


# --- What is kept in evaluation must never be stale ---------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["in_place", "load", "data", "dtype", "optimizer"])
def test_kept_bias_follows_the_weights(kind, change) -> None:
    model, other = build(kind=kind).eval(), build(seed=1, kind=kind).eval()
    x = image(64, 64)
    with torch.no_grad():
        before = model(x)
    if change == "in_place":
        with torch.no_grad():
            for mine, its in zip(model.parameters(), other.parameters(), strict=True):
                mine.copy_(its)
    elif change == "load":
        model.load_state_dict(other.state_dict())
    elif change == "data":  # as exponential moving averages do, between two switches of mode
        for mine, its in zip(model.parameters(), other.parameters(), strict=True):
            mine.data.copy_(its.data)
        model.eval()
    elif change == "dtype":
        model, other, x = (
            model.double(),
            other.double().load_state_dict(model.state_dict()) and other,
            x.double(),
        )
    else:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        torch.optim.AdamW(model.parameters(), lr=0.1).step()
        other.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x))
        assert change == "dtype" or not torch.allclose(model(x), before)


def test_kept_bias_notices_a_fused_step() -> None:
    """Fused optimizers write past the version counter; fine-tuning in evaluation mode must still count."""
    model, x = build().eval(), image(64, 64)
    with torch.no_grad():
        before = model(x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(x).square().sum().backward()
    optimizer.step()
    twin = build()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin.eval()(x))
        assert not torch.allclose(model(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_leaves_nothing_behind(kind) -> None:
    _ring_pooled_keys.cache_clear()
    _nearest_keys.cache_clear()
    model, x = build(kind=kind).eval(), image(96, 64)
    with torch.inference_mode():
        model(x)
        build(kind=kind).eval()(x)
        build(kind=kind).eval()(image(64, 64))
    with torch.no_grad():
        model(x)
    model.train()(x).sum().backward()
    model(image(64, 64)).sum().backward()


def test_stored_choice_follows_its_buffers() -> None:
    """Written to in place, as distributed checkpoints do, or allocated empty and loaded afterwards."""
    model, other = build(kind="focalv2").eval(), build(kind="focalv2").eval()
    x = image(64, 64)
    shuffled = {name: buffer.flip(0) for name, buffer in model.named_buffers()}
    other.load_state_dict(shuffled, strict=False)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(shuffled[name])
        torch.testing.assert_close(model(x), other(x))
        with torch.device("meta"):
            empty = build(kind="focalv2")
        empty = empty.to_empty(device="cpu").eval()
        empty.load_state_dict(other.state_dict())
        torch.testing.assert_close(empty(x), other(x))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles(kind) -> None:
    model = build(kind=kind).eval()
    x = image(64, 64)
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(twin(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_gradients(kind) -> None:
    """Those of the model as it is, through what compilation makes of the backward pass."""
    model = build(kind=kind)
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        run(image(64, 96)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
    assert all(gradient is not None for gradient in gradients[1])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [True, False])
def test_compiles_to_one_graph_per_size(kind, train) -> None:
    """No graph break, and one graph for each input size; a checkpoint loaded later is used."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = build(kind=kind).train(train)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for size in ((64, 64), (96, 64), (64, 64)):
        torch.testing.assert_close(compiled(image(*size)), model(image(*size)))
    assert counter.frame_count == 2
    other = build(seed=1, kind=kind).train(train)
    for name, buffer in other.named_buffers():
        other.load_state_dict({name: buffer.flip(0)}, strict=False)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(image(64, 64)), other(image(64, 64)))


# --- Errors ---------------------------------------------------------------------------------------------

CONTRADICTIONS = [
    ({"focal_windows": [6, 5, 3, 1]}, "focal_windows must be odd"),
    ({"kind": "swin"}, "kind must be one of focal, focalv2"),
    ({"focal_pool": "avg"}, "focal_pool must be one of none, fc"),
    ({"expand_layer": "some"}, "expand_layer must be one of all, even, odd"),
    ({"attention_backend": "flash"}, "attention_backend must be one of auto"),
    ({"num_heads": [1, 3, 2, 4]}, "num_heads must divide the 16 channels, got 3"),
    ({"num_heads": [1, 2]}, "num_heads must have one entry for each of the 4 depths"),
    ({"kind": "focalv2", "focal_levels": [0, 1, 1, 1]}, "Focal-fast has focal_levels 1 or 2, got 0"),
    ({"kind": "focalv2", "focal_levels": [3, 1, 1, 1]}, "Focal-fast has focal_levels 1 or 2, got 3"),
    ({"kind": "focalv2", "focal_pool": "none"}, "focal_levels 2 of Focal-fast needs a pool"),
    ({"focal_levels": [4, 1, 1, 1]}, "focal_levels must be 0 to 3"),
    (
        {"window_size": 1, "focal_levels": [3, 3, 3, 3], "expand_sizes": [0] * 4},
        "cannot be divided into 2 cells",
    ),
    ({"expand_sizes": [8, 3, 3, 3]}, "expand_sizes must lie between 0 and the window size 7"),
    ({"use_conv_embed": True, "patch_size": 2}, "patch_size must be 4"),
    ({"img_size": 16}, "at least 32 pixels"),
    ({"patch_size": 32}, "at least 256 pixels"),
    ({"drop_path_rate": 1.0}, "drop_path_rate must lie in"),
    ({"depths": []}, "depths must name at least one stage"),
]


@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS, ids=lambda value: str(value)[:40])
def test_contradictions_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match="do not fit together") as error:
        build(**options)
    assert message in str(error.value)


def test_all_contradictions_in_one_error() -> None:
    with pytest.raises(ValueError) as error:
        build(kind="swin", focal_pool="avg", drop_rate=2.0)
    assert all(word in str(error.value) for word in ("kind", "focal_pool", "drop_rate"))


def test_image_too_small() -> None:
    with pytest.raises(ValueError, match="at least 32 x 32 pixels, got 31 x 64"):
        build()(image(31, 64))


@pytest.mark.parametrize("size", [(14, 21), (7, 7), (28, 14)], ids=str)
@pytest.mark.parametrize("level", [0, 1])
def test_linear_pooling_is_a_weighted_sum(size: tuple[int, int], level: int) -> None:
    """Of every cell, also where some rows and columns of a window are left out; no images make no cells."""
    pool = LinearPool(7 // 2**level, 5).double()
    x = torch.randn(2, *size, 5, dtype=torch.float64, requires_grad=True)
    windows = (size[0] // 7, size[1] // 7)
    cells = _cells(x, pool.side, windows, 2**level)
    expected = torch.einsum("bhiwjc,ij->bhwc", cells, pool.weight.view(pool.side, pool.side)) + pool.bias
    torch.testing.assert_close(pool(cells), expected)
    sources = (x, pool.weight, pool.bias)
    slopes = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(pool(cells), sources, slopes), torch.autograd.grad(expected, sources, slopes)
    )
    assert pool(cells[:0]).shape == (0, *expected.shape[1:])
    with torch.autocast("cpu", torch.bfloat16):
        half = pool.float()(cells.float())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0.05, atol=0.05)
