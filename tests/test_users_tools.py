"""What users put on top of the model, each with the tool itself: both families behave as any PyTorch model.

A small model at 64 pixels has all parts of the released ones: several windows with rings and pooled tokens,
padding, and a last stage that is a single window. test_export.py writes files by the newer exporters, and
test_users_checkpoints.py reads checkpoints of other tools.
"""

import copy
import pickle
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import small_models
import timm
import torch
from functorch.compile import aot_module, make_boxed_func, nop
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import models
from models import focal_transformer

FAMILIES = ("focal_tiny_patch4_window7_224", "focalv2_tiny_useconv_patch4_window7_224")
SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "depths": (1, 1, 1),
    "num_heads": (1, 1, 2),
    "focal_levels": (2, 2, 2),
    "focal_windows": (7, 5, 3),
    "expand_sizes": (3, 3, 3),
}
New = Callable[..., models.FocalTransformer]
since_2_7 = pytest.mark.skipif(
    torch.__version__ < "2.7",
    reason="PyTorch 2.6 shards on GPUs alone, and strict exports look like torch.compile",
)
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
OTHER_BATCH = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def build(variant: str, seed: int = 0, **options: Any) -> models.FocalTransformer:
    """A small model in training mode; the same weights every time, unless a seed is given."""
    return small_models.build(seed, variant, **SMALL | options).train()


@pytest.fixture(params=FAMILIES, ids=["focal", "focal-fast"])
def new(request: pytest.FixtureRequest) -> New:
    """`build` for one family."""
    return lambda **options: build(request.param, **options)


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that compute something themselves."""
    return {
        name: module
        for name, module in model.named_modules()
        if not [*module.children()] and not isinstance(module, nn.ModuleList)
    }


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def logits(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return model(images)


def trains_with_real_tensors(model: nn.Module, images: Tensor) -> None:
    out = model(images)
    out.sum().backward()
    assert type(out) is Tensor and all(type(p.grad) is Tensor for p in model.parameters())


def test_hooks_rename_what_is_loaded(new: New) -> None:
    """Of a module, for the modules in it, too."""
    model, state = new(), new(seed=1).state_dict()
    attention, place = model.layers[0].blocks[0].attn, "layers.0.blocks.0.attn."
    given = {key.replace(f"{place}qkv", f"{place}to_qkv"): value for key, value in state.items()}
    names = [*given]

    def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for key in [key for key in state if key.startswith(prefix + "to_qkv.")]:
            state[key.replace("to_qkv", "qkv")] = state.pop(key)

    attention.register_load_state_dict_pre_hook(rename)
    model.load_state_dict(given)
    assert torch.equal(attention.qkv.weight, state[f"{place}qkv.weight"])
    assert [*given] == names


# --- Exporters, and what they leave behind: nothing ---------------------------------------------------------


@since_2_7
def test_strict_export_with_any_batch(new: New) -> None:
    model, images = new().eval(), torch.randn(2, 3, 72, 64)  # of a size that was not seen before
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=True)
    assert not any("cpu_attention" in str(node.target) for node in program.graph.nodes)
    for batch in (images, torch.randn(3, 3, 72, 64)):
        torch.testing.assert_close(program.module()(batch), logits(model, batch))
    trains_with_real_tensors(new(), images)


@pytest.mark.parametrize("backend", ["auto", "plain"])  # exporters use the plain one in any case
def test_an_export_that_fails(new: New, backend: str) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = new().eval()

        def forward(self, x: Tensor) -> Tensor:
            x = self.model(x)
            return x if float(x.sum()) > 0 else -x  # looks at a value

    images = torch.randn(1, 3, 64, 96)
    with pytest.raises(Exception):  # noqa: B017
        torch.export.export(Broken(), (images,))
    trains_with_real_tensors(new(attention_backend=backend), images)


@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_fake_tensors(new: New, backend: str) -> None:
    images = torch.randn(1, 3, 96, 128)
    with FakeTensorMode():
        new(img_size=96)(torch.randn(1, 3, 96, 128)).sum().backward()
    trains_with_real_tensors(new(img_size=96, attention_backend=backend), images)


@pytest.mark.filterwarnings("ignore")
def test_onnx_by_torchscript(new: New, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = new().eval(), str(tmp_path / "model.onnx")
    names: dict[str, Any] = {"input_names": ["images"], "dynamic_axes": {"images": {0: "batch"}}}
    torch.onnx.export(model, (IMAGES,), path, dynamo=False, **names)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for images in (IMAGES, OTHER_BATCH):
        (found,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), logits(model, images), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_with_its_check(new: New) -> None:
    model = new().eval()
    traced = torch.jit.trace(model, IMAGES)
    assert "cpu_attention" not in str(traced.inlined_graph)
    for images in (IMAGES, OTHER_BATCH):
        torch.testing.assert_close(traced(images), logits(model, images))


@pytest.mark.parametrize("ape", [True, False])
def test_torchvisions_feature_extractor(new: New, ape: bool) -> None:
    """By torch.fx; any size runs, and can be trained."""
    model = new(ape=ape).eval()
    extractor = create_feature_extractor(model, ["layers.0.blocks.0", "layers.1.blocks.0", "norm", "head"])
    assert torch.fx.symbolic_trace(model)(IMAGES).shape == (2, 5)
    for images in (IMAGES, torch.randn(1, 3, 96, 128)):
        with torch.no_grad():
            found = extractor(images)
            maps = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
            expected = [maps[0], maps[1], model.forward_features(images), model(images)]
            torch.testing.assert_close([*found.values()], expected)
    extractor.train()(IMAGES)["norm"].sum().backward()


def test_traces_of_a_new_model(new: New) -> None:
    """By torch.fx and by AOTAutograd, before the model has run."""
    traced = make_fx(new().eval())(IMAGES)
    torch.testing.assert_close(traced(IMAGES), logits(new().eval()))
    compiled, model = aot_module(new(), nop), new()
    for each in (compiled, model):
        each(IMAGES).sum().backward()
    for (name, given), wanted in zip(compiled.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(given.grad, wanted.grad, msg=name)


def test_compiled_for_sizes_that_change(new: New) -> None:
    """A graph is of one image size and any batch: Inductor fails at strides that depend on the size, and
    where an index's tensors change with a batch that is as large as one of their sides."""
    one_stage = {"depths": [1], "num_heads": [1], "focal_windows": [3], "expand_sizes": [3]}
    model, variables = new(**one_stage, focal_levels=[2]).eval(), []

    def compiler(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        sizes = [x.shape for x in inputs if isinstance(x, Tensor)]
        assert sum(any(isinstance(side, torch.SymInt) for side in size) for size in sizes) == 1
        variables.append(sum(isinstance(x, torch.SymInt) for x in inputs))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=compiler), dynamic=True)
    for batch, height, width in ((9, 64, 64), (3, 64, 64), (2, 96, 64), (2, 72, 104)):  # 9 windows
        images = torch.randn(batch, 3, height, width)
        torch.testing.assert_close(logits(compiled, images), logits(model, images))
    assert max(variables) == 1
    torch.compiler.reset()


# --- Weights that change, and state -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["in place", "another tensor", "fused optimizer"])
def test_evaluation_follows_the_weights(new: New, how: str) -> None:
    """As of a momentum teacher: written past autograd, with no switch of mode in between."""
    teacher, student = new().eval(), new(seed=1).eval()
    before = logits(teacher)
    if how == "fused optimizer":
        teacher(IMAGES).square().sum().backward()
        torch.optim.AdamW(teacher.parameters(), lr=0.1, fused=True).step()
        student.load_state_dict(teacher.state_dict())
    else:
        for mine, its in zip(teacher.parameters(), student.parameters(), strict=True):
            if how == "in place":
                mine.data.mul_(0.0).add_(its.data)
            else:
                mine.data = its.data.clone()
    torch.testing.assert_close(logits(teacher), logits(student))
    assert not torch.allclose(logits(teacher), before)


def test_stored_keys_that_are_written_to_count() -> None:
    """As by the broadcast of DistributedDataParallel, where only one process has loaded a file."""
    model, expected = build(FAMILIES[1]).eval(), build(FAMILIES[1]).eval()
    expected.load_state_dict(other := small_models.other_ties(expected), strict=False)
    before = logits(model)
    for name, buffer in model.named_buffers():
        buffer.copy_(other[name])
    torch.testing.assert_close(logits(model), logits(expected))
    assert not torch.allclose(logits(model), before)


def test_weights_after_the_meta_device(new: New) -> None:
    """Memory that holds anything becomes a fresh model."""
    fresh = new(ape=True, use_layerscale=True)
    with torch.device("meta"):
        model = new(ape=True, use_layerscale=True)
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else 3)
    model.init_weights()
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), name
    for (name, value), other in zip(model.named_buffers(), fresh.buffers(), strict=True):
        assert torch.equal(value, other), name
    attention = model.layers[0].blocks[0].attn
    assert 0.015 < model.absolute_pos_embed.std() < 0.025 and 0.015 < attention.qkv.weight.std() < 0.025
    assert model.layers[0].blocks[0].gamma_1.unique().tolist() == [pytest.approx(1e-4)]
    assert logits(model).isfinite().all()


# --- Every module is called, and what replaces it counts ----------------------------------------------------


def test_hooks_of_every_module_are_called(new: New) -> None:
    model = new(drop_path_rate=0.2, drop_rate=0.1)
    for train in (True, False):
        calls: Counter[str] = Counter()
        hooks = [
            module.register_forward_hook(lambda *_, name=name, calls=calls: calls.update([name]))
            for name, module in leaves(model).items()
        ]
        model.train(train)(IMAGES)
        assert {name for name in leaves(model) if not calls[name]} == set()
        for hook in hooks:
            hook.remove()


class Silent(nn.Module):
    """What a module makes, times zero: a stand-in without its attributes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = [module]  # not a submodule

    def forward(self, *inputs: Any) -> Tensor:
        return torch.zeros_like(self.inner[0](*inputs))


def test_no_parameter_is_read_by_anyone_but_its_module(new: New) -> None:
    """A module that is replaced by one that answers zeros leaves no trace of its parameters. So packed
    weights, such as those of 8 and 4 bits, are as good as others."""
    model = new().eval()
    for name, module in leaves(model).items():
        if not [*module.parameters()]:
            continue
        replace(model, name, Silent(module))
        before = logits(model)
        with torch.no_grad():
            for parameter in module.parameters():
                nn.init.normal_(parameter)
        assert torch.equal(logits(model), before), name
        replace(model, name, module)


def test_layers_keep_the_contract_of_their_class(new: New) -> None:
    """Tools walk over plain layers: a Linear takes [..., in_features], a Conv2d [B, C, H, W]."""
    shapes: dict[str, tuple[int, ...]] = {}
    model = new()
    for name, module in leaves(model).items():
        if isinstance(module, focal_transformer.BiasTables):
            continue
        assert type(module).__module__.startswith(("torch.nn.", "timm.layers.")), name
        module.register_forward_pre_hook(lambda _, x, name=name: shapes.update({name: x[0].shape}))
    logits(model)
    for name, module in leaves(model).items():
        if isinstance(module, nn.Linear):
            assert shapes[name][-1] == module.in_features, name
        if isinstance(module, nn.Conv2d):
            assert len(shapes[name]) == 4 and shapes[name][1] == module.in_channels, name


def test_lora_on_all_linear_layers(new: New) -> None:
    """Every adapter learns, and merging it keeps the model's answer."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(new(), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model(IMAGES).square().sum().backward()
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    linear = [m for m in new().modules() if isinstance(m, nn.Linear)]
    assert len(adapters) >= 2 * (len(linear) - 1)  # peft leaves the classifier out
    assert [name for name, p in adapters.items() if p.grad is None or not p.grad.any()] == []
    expected = logits(model.eval())
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_quantize_dynamic(new: New) -> None:
    exact = new().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(exact, {nn.Linear})
    quantised = [m for m in model.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(quantised) == sum(isinstance(m, nn.Linear) for m in exact.modules())
    assert 0 < (logits(model) - logits(exact)).abs().max() < 0.1 * logits(exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(new: New, dtype: torch.dtype) -> None:
    model = new().eval()
    exact = logits(model)
    with torch.autocast("cpu", dtype):
        model(IMAGES).sum().backward()
        assert (logits(model) - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    out = logits(model.to(dtype), IMAGES.to(dtype))
    assert out.dtype == dtype and (out - exact).abs().max() < 0.1 * exact.abs().max()


class Wrapped(nn.Module):
    """Calls another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def test_every_module_can_be_wrapped(new: New) -> None:
    model = new().eval()
    expected = logits(model)
    for name, module in [*model.named_modules()][:0:-1]:
        if not isinstance(module, nn.ModuleList) or name.endswith("pool_layers"):
            replace(model, name, Wrapped(module))
    assert torch.equal(logits(model), expected)


def test_children_run_one_after_the_other(new: New) -> None:
    """As in a feature extractor made of `children()`, cut before the classifier."""
    model = new().eval()
    *body, _ = model.children()
    with torch.no_grad():
        assert torch.equal(
            nn.Sequential(*body)(IMAGES), model.forward_head(model.forward_features(IMAGES), True)
        )


def test_modules_get_no_modules(new: New) -> None:
    """As tools expect that count, move or attribute by what enters a module."""
    model, kinds = new(), Counter()
    for module in model.modules():
        module.register_forward_pre_hook(lambda _, args: kinds.update(map(type, args)))
    model(IMAGES)
    assert {*kinds} <= {Tensor, int}


# --- Parameters are plain -----------------------------------------------------------------------------------


def test_parameters_are_contiguous_and_can_be_saved_and_pruned(new: New, tmp_path: Path) -> None:
    import safetensors.torch

    model = new()
    assert all(p.is_contiguous() and type(p) is nn.Parameter for p in model.parameters())
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    again = new(seed=1)
    again.load_state_dict(safetensors.torch.load_file(tmp_path / "w.safetensors"))
    assert torch.equal(logits(again), logits(model))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            prune.l1_unstructured(module, "weight", 0.5)
    assert not torch.equal(logits(model), logits(again))
    model(IMAGES).sum().backward()


@since_2_7
@pytest.mark.parametrize("parts", ["blocks", "leaves"])
def test_fully_sharded(new: New, one_process: None, parts: str) -> None:
    """FSDP2, by blocks, or by every module that has parameters: the same logits and gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, model = new(), new()
    mesh = init_device_mesh("cpu", (1,))
    for module in reversed([*model.modules()]):
        has_own = any(True for _ in module.parameters(recurse=False))
        if isinstance(module, focal_transformer.FocalBlock) if parts == "blocks" else has_own:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for x in (plain, model):
        x(IMAGES).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, msg=name)
    torch.testing.assert_close(logits(model), logits(plain))


# --- Global state: threads, default devices -----------------------------------------------------------------


def test_another_default_type(new: New) -> None:
    """It decides what is made from now on, not what earlier models compute, nor what later ones share."""
    model = new().eval()
    expected = logits(model)
    focal_transformer.cached_index.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(logits(model), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(logits(new().eval()), expected)


def test_a_stem_of_ones_own(new: New) -> None:
    """For other channels, as a spectrometer's."""
    model = new()
    model.patch_embed.proj = nn.Conv2d(5, 16, 7, 4, 2)
    assert model(torch.randn(2, 5, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize("sizes", [[(64, 64)] * 4, [(64, 64), (96, 64), (64, 96), (80, 112)]], ids=str)
@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_four_threads_on_one_model(new: New, backend: str, sizes: list[tuple[int, int]]) -> None:
    """Two of which want gradients."""
    images = [torch.randn(1, 3, *size) for size in sizes]
    expected = [logits(new().eval(), x) for x in images]
    model, start = new(attention_backend=backend).eval(), threading.Barrier(4)

    def serve(first: int) -> list[int]:
        """Images whose answer was wrong."""
        start.wait()
        wrong = []
        for number in [(first + step) % 4 for step in range(12)]:
            with torch.set_grad_enabled(first % 2 == 0):
                if not torch.allclose(model(images[number]), expected[number], atol=1e-5):
                    wrong.append(number)
        return wrong

    with ThreadPoolExecutor(4) as executor:
        assert [*executor.map(serve, range(4))] == [[]] * 4


def test_a_default_device_changes_nothing(new: New) -> None:
    """Where a user's factories make tensors is no matter of the model's tables."""
    model, images = new(), torch.randn(1, 3, 128, 64)
    with torch.device("meta"):
        out = model(images)
        out.sum().backward()
    assert out.device.type == "cpu"
    torch.testing.assert_close(new()(images), out)


# --- Counting, and derivatives of all kinds -----------------------------------------------------------------


@pytest.mark.parametrize(("variant", "expected"), zip(FAMILIES, (9.9e9, 10.2e9), strict=True))
def test_flops(variant: str, expected: float) -> None:
    """Of a whole model at 224; backward: twice as many, and scores once again."""
    model = timm.create_model(variant, num_classes=10)
    with FlopCounterMode(display=False) as counter:
        out = model(torch.randn(1, 3, 224, 224))
    assert abs(counter.get_total_flops() / expected - 1) < 0.01
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert 1.85 < counter.get_total_flops() / expected < 2.1
    plain = timm.create_model(variant, num_classes=10, attention_backend="plain")
    with FlopCounterMode(display=False) as counter:
        logits(plain, torch.randn(1, 3, 224, 224))
    assert abs(counter.get_total_flops() / expected - 1) < 0.01


def test_gradient_penalty(new: New) -> None:
    """A second derivative, the same as that of the plain operator; of a frozen model as well."""
    gradients, images = [], IMAGES.double().requires_grad_()
    for backend in ("auto", "plain"):
        model = new(attention_backend=backend).double()
        (gradient,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
        wanted = [p for name, p in model.named_parameters() if name != "head.bias"]
        gradients.append(torch.autograd.grad(gradient.square().sum(), [images, *wanted]))
        model.requires_grad_(False)
        (gradient,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
        assert torch.equal(*torch.autograd.grad(gradient.square().sum(), images), gradients[-1][0])
    torch.testing.assert_close(*gradients)


def test_transforms_of_torch_func(new: New) -> None:
    model, images = new().double().eval(), IMAGES.double()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def out(weights: dict[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(model, (weights, buffers), (images,))

    def loss(weights: dict[str, Tensor], images: Tensor) -> Tensor:
        return out(weights, images).square().sum()

    total = torch.func.grad(loss)(weights, images)
    model(images).square().sum().backward()
    per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, images[:, None])
    torch.compiler.reset()
    compiled = torch.compile(torch.func.grad(loss), backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(weights, images), total)
    for name, p in model.named_parameters():
        torch.testing.assert_close(total[name], p.grad, msg=name)
        torch.testing.assert_close(per_image[name].sum(0), p.grad, msg=name)
    direction, step = torch.randn_like(images), 1e-6
    _, tangent = torch.func.jvp(lambda x: out(weights, x), (images,), (direction,))
    ahead, behind = (logits(model, images + way * step * direction) for way in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)
    moves = {name: torch.randn_like(w) for name, w in weights.items()}
    _, tangent = torch.func.jvp(lambda w: out(w, images), (weights,), (moves,))
    ahead, behind = (out({n: w + s * moves[n] for n, w in weights.items()}, images) for s in (step, -step))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-3, atol=1e-5)


def test_batched_gradients(new: New) -> None:
    model, images = new().eval(), IMAGES.clone().requires_grad_()
    out = model(images)
    slopes = torch.randn(3, *out.shape)
    found = torch.autograd.grad(out, images, slopes, retain_graph=True, is_grads_batched=True)[0]
    for gradient, slope in zip(found, slopes, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(out, images, slope, retain_graph=True)[0])


# --- What makes this so -------------------------------------------------------------------------------------


def test_private_names_that_the_model_asks_for_exist() -> None:
    """`is_traced` asks PyTorch by names that are not public; a release without them must be noticed."""
    assert torch._C._are_functorch_transforms_active() is False
    assert torch.autograd.forward_ad._current_level == -1
    assert isinstance(torch.empty(1)._version, int)
    x = torch.zeros(2)
    assert not focal_transformer.is_traced(x)
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(focal_transformer.is_traced(x))
        return x.sum()

    torch.func.grad(look)(x)
    torch.func.vmap(look)(x[None])
    torch.func.functionalize(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        look(torch.autograd.forward_ad.make_dual(x, x))
    with FakeTensorMode():
        look(torch.zeros(2))
    assert all(seen) and len(seen) >= 6


def test_subclasses_of_tensors(new: New) -> None:
    class Tagged(Tensor):
        pass

    class Counted(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return super().__torch_dispatch__(func, types, args, kwargs or {})

    for kind in (Tagged, Counted):  # as fastai's, and with operations of its own
        model, images = new().eval(), IMAGES.as_subclass(kind)
        assert focal_transformer.is_traced(images) == (kind is Counted)
        torch.testing.assert_close(logits(model, images).as_subclass(Tensor), logits(model))
        model.train()(images).sum().backward()


@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_an_empty_batch(new: New, backend: str) -> None:
    assert new(attention_backend=backend)(IMAGES[:0]).shape == (0, 5)


def test_stored_keys_of_another_type_and_wrong_ones() -> None:
    model, other = build(FAMILIES[1]).eval(), build(FAMILIES[1]).eval()
    other.load_state_dict({name: x.int() for name, x in model.named_buffers()}, strict=False, assign=True)
    assert torch.equal(logits(other), logits(model))
    own = dict(model.named_buffers())
    for change in (
        *(lambda x: x - 1, lambda x: x * 10**6, lambda x: x * 0.5, lambda x: x.flip(0), lambda x: x[:1]),
        *(lambda x: x[:, :1].expand_as(x), lambda x: x.to("meta")),
        lambda x: nn.Parameter(x - 1, requires_grad=False),
        lambda x: torch.quantize_per_tensor(x.float(), 1.0, 0, torch.qint32),
        *(lambda x: x.float().to_mkldnn(), lambda x: torch.nested.nested_tensor([*x.float()])),
    ):
        other = build(FAMILIES[1], seed=1).eval()
        other.load_state_dict(model.state_dict() | {name: change(x) for name, x in own.items()})
        torch.testing.assert_close(logits(other), logits(model))


def test_keys_of_another_model_and_of_memory_that_was_never_filled() -> None:
    model = build(FAMILIES[1], focal_topk=17).eval()
    for other in (build(FAMILIES[1]), build(FAMILIES[1], focal_topk=9)):
        with pytest.raises(RuntimeError, match="size mismatch.*topk_cloest_indice_0"):
            model.load_state_dict(other.state_dict())
    expected, state = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
    model.load_state_dict(state)
    assert torch.equal(logits(model), expected)


def test_averaged_copies() -> None:
    """Also where an average of stored keys, which are whole numbers, is cut to a smaller one."""
    model = build(FAMILIES[1]).eval()
    model.load_state_dict(small_models.other_ties(model), strict=False)
    for kind in (ModelEmaV2, ModelEmaV3):
        average = kind(model, decay=0.9999)
        for _ in range(5):
            average.update(model)
        torch.testing.assert_close(logits(average.module), logits(model))


@pytest.mark.parametrize("average", [lambda x: (x + x + x) / 3, lambda x: 0.3 * x + 0.7 * x, Tensor.float])
def test_averaged_state_dicts(average: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    """Of which stored keys become floats."""
    model, other, third = (build(FAMILIES[1], seed=seed).eval() for seed in range(3))
    model.load_state_dict(small_models.other_ties(model), strict=False)
    state = {name: average(x) for name, x in model.state_dict().items()}
    other.load_state_dict(state)
    torch.testing.assert_close(logits(other), logits(model))
    torch.save(state, tmp_path / "average.pth")
    models.load_checkpoint(third, tmp_path / "average.pth")
    torch.testing.assert_close(logits(third), logits(model))
    torch.testing.assert_close(torch.func.functional_call(other, state, (IMAGES,)), logits(model))


def test_stored_keys_that_a_call_brings_along() -> None:
    """Of another model, by functional_call: also inside a transform."""
    model, other = build(FAMILIES[1]).eval(), build(FAMILIES[1]).eval()
    other.load_state_dict(small_models.other_ties(other), strict=False)
    given, expected = {**dict(other.named_parameters()), **dict(other.named_buffers())}, logits(other)
    assert (logits(model) - expected).abs().max() > 1e-3

    def call(images: Tensor) -> Tensor:
        return torch.func.functional_call(model, given, (images,))

    for found in (torch.func.vjp(call, IMAGES)[0], torch.vmap(lambda x: call(x[None])[0])(IMAGES)):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)


def test_stored_keys_that_are_written_past_their_versions() -> None:
    """As collectives and teachers do."""
    model = build(FAMILIES[1]).eval()
    other, before = copy.deepcopy(model), logits(model)
    other.load_state_dict(small_models.other_ties(model), strict=False)
    for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
        mine.data.copy_(theirs)
    torch.testing.assert_close(logits(model), logits(other))
    assert not torch.equal(logits(model), before)


def test_a_copy_holds_nothing_of_what_its_model_read() -> None:
    model = build(FAMILIES[1]).eval()
    logits(model)
    other = pickle.loads(pickle.dumps(model))
    for layer in other.modules():
        assert not getattr(layer, "buffers_read", None)
    assert torch.equal(logits(other), logits(model))


def test_stored_keys_that_are_made_for_each_call() -> None:
    """Their memory is used again by those of the next call."""
    model, other = build(FAMILIES[1]).eval(), build(FAMILIES[1]).eval()
    choices = dict(model.named_buffers()), small_models.other_ties(model)
    for number in range(8):
        given = {name: keys.clone() for name, keys in choices[number % 2].items()}
        with torch.no_grad():
            found = torch.func.functional_call(model, given, (IMAGES,))
        other.load_state_dict(given, strict=False)
        torch.testing.assert_close(found, logits(other), rtol=1e-4, atol=1e-5)
        del given


@pytest.mark.parametrize("size", [(64, 64), (72, 40)], ids=str)
def test_every_pixel_reaches_a_shifted_focal_fast_model(size: tuple[int, int]) -> None:
    """Also where the map is padded: rolled, its tokens are still those that keys are chosen among."""
    model = build(FAMILIES[1], depths=(2, 1, 1), use_shift=True, focal_topk=1000).eval()
    tokens = torch.randn(1, size[0] // 4, size[1] // 4, 16, requires_grad=True)
    block = model.layers[0].blocks[1]
    assert block.attn.shift_size == 3
    out = block.attn(tokens, *block.pool_layers(tokens))
    (gradient,) = torch.autograd.grad(out[0, 0, 0].square().sum(), tokens)
    assert gradient.abs().sum(dim=-1).min() > 0
