"""Properties of the model over families, options and sizes."""

import copy
import pickle
from weakref import WeakSet

import pytest
import torch
from small_models import build, every_kind, image, other_ties
from torch._dynamo.testing import CompileCounterWithBackend

from models import FocalTransformer
from models.focal_transformer import CACHED_INDEXES, AttentionIndex

ONE_BLOCK = {
    "depths": [1],
    "num_heads": [1],
    "focal_levels": [2],
    "focal_windows": [3],
    "expand_sizes": [3],
}
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

# --- What the model computes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "size"),
    [(name, size) for name in VARIANTS for size in (SIZES if name in ("focal", "focalv2") else SIZES[1:2])],
    ids=str,
)
def test_any_size_trains_and_evaluates_and_operators_agree(variant, size) -> None:
    """Every parameter gets a finite gradient, the same from both operators, whatever the size."""
    results = []
    for backend in ("plain", "cpu"):
        model = build(**VARIANTS[variant], attention_backend=backend).double().train()
        assert set(model.attention_backends(torch.float64)) == {backend}
        x = image(*size).double().requires_grad_()
        logits = model(x)
        logits.square().sum().backward()
        results.append([logits, x.grad, *(p.grad for p in model.parameters())])
        assert all(gradient is not None and gradient.isfinite().all() for gradient in results[-1])
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(x), logits)
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-10)


@every_kind
def test_checkpointing_changes_nothing(kind) -> None:
    gradients = []
    for use in (False, True):
        model = build(kind=kind, use_checkpoint=use, drop_path_rate=0.3).train()
        calls = []
        model.layers[0].blocks[0].attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(3)
        model(image(64, 64)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert len(calls) == 1 + use
    torch.testing.assert_close(*gradients)


def test_drop_path_rises_linearly() -> None:
    model = build(drop_path_rate=0.4)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.layers for b in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_initialisation() -> None:
    model = FocalTransformer(
        embed_dim=32, num_heads=(1, 2, 4, 8), focal_pool="fc", focal_levels=(2, 2, 2, 2), ape=True
    )
    normal = ("qkv.weight", "fc1.weight", "head.weight", "absolute_pos_embed")
    for name, p in model.named_parameters():
        if name.endswith("relative_position_bias_table") or name.endswith("bias") and "proj" not in name:
            assert not p.any(), name
        elif "bias_table_to" in name or name.endswith(normal):
            assert 0.017 < p.std() < 0.023, name


# --- What is kept: nothing stale, and not much --------------------------------------------------------------


@every_kind
def test_inference_mode_leaves_nothing_behind(kind) -> None:
    """What is made there serves training at sizes first seen there."""
    model, sizes = build(kind=kind), [(64, 64), (132, 236)]
    with torch.inference_mode():
        inside = [model(image(*size)) for size in sizes]
        build(kind=kind)(image(64, 64))
    for size, expected in zip(sizes, inside, strict=True):
        with torch.no_grad():
            assert torch.equal(model(image(*size)), expected)
        logits = model.train()(image(*size))
        torch.testing.assert_close(logits, expected.clone())
        logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@every_kind
def test_caches_are_bounded(kind) -> None:
    """After many sizes only the last ones' indexes are there."""
    attention, like = build(kind=kind, **ONE_BLOCK).layers[0].blocks[0].attn, torch.empty(1, 1, 3, 1, 8)
    made: WeakSet[AttentionIndex] = WeakSet()
    for columns in range(7, 7 * (CACHED_INDEXES + 10), 7):
        made.add(index := attention.index(7, columns, like))
    assert len(made) == CACHED_INDEXES
    assert attention.index(7, columns, like) is index


@every_kind
def test_copies_and_pickles(kind) -> None:
    """They compute the same, have a stored choice of their own, and go on by themselves; so does a model
    without memory that is given some and loads the state afterwards."""
    model, x = build(kind=kind), image(64, 64)
    model.load_state_dict(other_ties(model), strict=False)
    with torch.no_grad():
        expected = model(x)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        with torch.device("meta"):
            empty = build(kind=kind)
        empty = empty.to_empty(device="cpu")
        empty.load_state_dict(model.state_dict())
        twins.append(empty)
        for thing in [*model.parameters(), *model.buffers()]:
            thing.zero_()
        for twin in twins:
            torch.testing.assert_close(twin(x), expected)


# --- Compilation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "train"), [("focal", True), ("focalv2", False)])
def test_compiles_to_one_graph_per_size(kind, train) -> None:
    """No graph break, one graph for each input size, with the operator; the same gradients; a checkpoint
    loaded later counts."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = build(kind=kind, **ONE_BLOCK).train(train)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for size in ((64, 64), (96, 64), (64, 64)):
        results = []
        for run in (compiled, model):
            with torch.set_grad_enabled(train):
                logits = run(image(*size))
            wanted = [*model.parameters()] if train else []
            results.append([logits, *(torch.autograd.grad(logits.square().sum(), wanted) if train else ())])
        torch.testing.assert_close(*results)
    assert counter.frame_count == 2
    if train or hasattr(torch.compiler, "is_exporting"):  # PyTorch 2.6 cannot tell this from an export
        called = [[str(node.target) for node in graph.graph.nodes] for graph in counter.graphs]
        assert all(any("cpu_attention" in name for name in names) for names in called)
    with torch.set_grad_enabled(train):
        before = compiled(image(64, 64))
        other = build(seed=1, kind=kind, **ONE_BLOCK)
        other.load_state_dict(other_ties(other), strict=False)
        for choice in (other.state_dict(), dict(other.named_buffers())):
            model.load_state_dict(model.state_dict() | choice)
            twin = build(kind=kind, **ONE_BLOCK).train(train)
            twin.load_state_dict(model.state_dict())
            torch.testing.assert_close(compiled(image(64, 64)), twin(image(64, 64)))
            assert not torch.allclose(compiled(image(64, 64)), before)


# --- Errors -------------------------------------------------------------------------------------------------

CONTRADICTIONS = [
    ({"focal_windows": [6, 5, 3, 1]}, "stage 0: focal_windows must be odd, from 1 on, got 6"),
    ({"focal_windows": [-1, 5, 3, 1]}, "stage 0: focal_windows must be odd, from 1 on, got -1"),
    ({"num_heads": [1.0, 2, 2, 4]}, "num_heads must be a whole number for each of the 4 depths, got [1.0,"),
    ({"focal_pool": "avg"}, "focal_pool must be one of none, fc, conv, mean, max, got 'avg'"),
    ({"num_heads": [1, 3, 2, 4]}, "stage 1: num_heads must divide the 16 channels, got 3"),
    ({"num_heads": [1, 2]}, "num_heads must be a whole number for each of the 4 depths, got [1, 2]"),
    ({"kind": "focalv2", "focal_levels": [0, 1, 1, 1]}, "stage 0: Focal-fast has focal_levels 1 or 2, got 0"),
    ({"kind": "focalv2", "focal_pool": "none"}, "stage 0: focal_levels 2 of Focal-fast needs a pool"),
    ({"focal_levels": [4, 1, 1, 1]}, "stage 0: focal_levels must be 0 to 3, got 4"),
    ({"expand_sizes": [3, 8, 3, 3]}, "expand_sizes must lie between 0 and the window size 7, got 8"),
    ({"window_size": 1, "focal_levels": [3] * 4, "expand_sizes": [0] * 4}, "a window of 1 cannot be divided"),
    ({"use_conv_embed": True, "patch_size": 2}, "patch_size must be 4 with use_conv_embed"),
    ({"window_size": (7, 7)}, "window_size must be a whole number, at least 1, got (7, 7)"),
    ({"img_size": 16}, "img_size must be a side or two of at least 32 pixels, got 16"),
    ({"patch_size": 32}, "img_size must be a side or two of at least 256 pixels, got 64"),
    ({"focal_stages": [0, 7]}, "focal_stages must be stages from 0 to 3, got [0, 7]"),
    ({"drop_path_rate": 1.0}, "drop_path_rate must be in [0, 1), got 1.0"),
    ({"depths": [1, 0, 1, 1]}, "depths must be at least one stage of at least one block, got [1, 0, 1, 1]"),
]


@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS, ids=lambda value: str(value)[:40])
def test_contradictions_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match="do not fit together") as error:
        build(**options)
    assert message in str(error.value)


def test_images_that_cannot_run() -> None:
    with pytest.raises(ValueError, match="at least 32 x 32 pixels, got 31 x 64"):
        build()(image(31, 64))
    with pytest.raises(ValueError, match=r"\[B, C, H, W\]"):
        build()(image(64, 64)[0])
