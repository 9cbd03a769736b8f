"""What users put on top of the model, each with the tool itself: both families behave as any PyTorch model.

A small model of both families at 64 pixels, in which every part of the released ones occurs.
"""

import copy
import threading
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import models
from models import focal_transformer
from models.focal_transformer import FocalAttention, FocalFastAttention

FAMILIES = ("focal_tiny_patch4_window7_224", "focalv2_tiny_useconv_patch4_window7_224")
NANO: dict[str, Any] = {
    "img_size": 64,
    "embed_dim": 16,
    "depths": (2, 1, 1, 1),
    "num_heads": (1, 1, 2, 2),
    "num_classes": 5,
    "drop_path_rate": 0.0,
}
New = Callable[..., models.FocalTransformer]
since_2_7 = pytest.mark.skipif(
    torch.__version__ < "2.7",
    reason="PyTorch 2.6 shards on GPUs alone, and strict exports look like torch.compile",
)
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
OTHER_BATCH = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=FAMILIES, ids=["focal", "focal-fast"])
def new(request: pytest.FixtureRequest) -> New:
    """Makes a small model of one family; the same weights every time, unless a seed is given."""

    def make(seed: int = 0, **options: Any) -> models.FocalTransformer:
        torch.manual_seed(seed)
        model = timm.create_model(request.param, **{**NANO, **options})
        for name, parameter in model.named_parameters():
            if "bias_table" in name or name.startswith("head"):
                nn.init.normal_(parameter, std=0.5)  # so that no part of the model can go unnoticed
        return model

    return make


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that compute something themselves."""
    containers = (nn.ModuleList, nn.ParameterList)
    return {
        name: module
        for name, module in model.named_modules()
        if not [*module.children()] and not isinstance(module, containers)
    }


def logits(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return model(images)


# --- 1: tracing leaves nothing behind -----------------------------------------------------------------------


def test_after_an_export_tensors_are_real(new: New) -> None:
    images = torch.randn(1, 3, 96, 64)
    torch.export.export(new().eval(), (images,))
    model = new()
    out = model(images)
    out.sum().backward()
    assert type(out) is Tensor and all(type(p.grad) is Tensor for p in model.parameters())


def test_building_and_running_under_fake_tensors(new: New) -> None:
    with FakeTensorMode():
        new(img_size=96)(torch.randn(1, 3, 96, 128)).sum().backward()
    model, images = new(img_size=96), torch.randn(1, 3, 96, 128)
    out = model(images)
    out.sum().backward()
    assert type(out) is Tensor and all(type(p.grad) is Tensor for p in model.parameters())


def test_an_export_that_fails_leaves_nothing_behind(new: New) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = new().eval()

        def forward(self, x: Tensor) -> Tensor:
            x = self.model(x)
            return x if float(x.sum()) > 0 else -x  # looks at a value

    with pytest.raises(Exception):  # noqa: B017
        torch.export.export(Broken(), (torch.randn(1, 3, 64, 96),))
    assert type(logits(new(), torch.randn(1, 3, 64, 96))) is Tensor


# --- 2: evaluation follows the weights ----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["data", "no_grad", "swap"])
def test_a_momentum_teacher_in_evaluation_mode(new: New, how: str) -> None:
    """Its weights are written past autograd between two forwards; every way counts."""
    teacher, student = new().eval(), new(seed=1).eval()
    before = logits(teacher)
    for mine, its in zip(teacher.parameters(), student.parameters(), strict=True):
        if how == "data":
            mine.data.mul_(0.0).add_(its.data)
        elif how == "no_grad":
            with torch.no_grad():
                mine.lerp_(its, 1.0)
        else:
            mine.data = its.data.clone()
    torch.testing.assert_close(logits(teacher), logits(student))
    assert not torch.allclose(logits(teacher), before)


# --- 3, 9: every module is called, and what replaces it counts ----------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_hooks_of_every_module_are_called(new: New, train: bool) -> None:
    model, calls = new(drop_path_rate=0.2, drop_rate=0.1).train(train), Counter()
    for name, module in leaves(model).items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    model(IMAGES)
    assert {name for name in leaves(model) if not calls[name]} == set()


def test_no_parameter_is_read_by_anyone_but_its_module(new: New) -> None:
    """A module that is replaced by one that answers zeros leaves no trace of its parameters."""
    for name, module in leaves(new()).items():
        if not [*module.parameters()]:
            continue
        results = []
        for seed in (0, 1):  # other weights in the module that is replaced
            model = new().eval()
            with torch.no_grad():
                for parameter in model.get_submodule(name).parameters():
                    nn.init.normal_(parameter, std=1.0 + seed)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, Silent(model.get_submodule(name)))
            results.append(logits(model))
        assert torch.equal(*results), name


class Silent(nn.Module):
    """What a module makes, times zero: a stand-in without its attributes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = [module]  # not a submodule

    def forward(self, *inputs: Any) -> Tensor:
        return torch.zeros_like(self.inner[0](*inputs))


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


def test_layers_keep_the_contract_of_their_class(new: New) -> None:
    """Tools walk over plain layers: a Linear takes [..., in_features], a Conv2d [B, C, H, W]."""
    shapes: dict[str, tuple[int, ...]] = {}
    model = new()
    for name, module in leaves(model).items():
        assert type(module).__module__.startswith(("torch.nn.", "timm.layers.")), name
        module.register_forward_pre_hook(lambda _, x, name=name: shapes.update({name: x[0].shape}))
    logits(model)
    for name, module in leaves(model).items():
        if isinstance(module, nn.Linear):
            assert shapes[name][-1] == module.in_features, name
        if isinstance(module, nn.Conv2d):
            assert len(shapes[name]) == 4 and shapes[name][1] == module.in_channels, name


# --- 4: parameters are plain --------------------------------------------------------------------------------


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


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@since_2_7
@pytest.mark.parametrize("unit", ["blocks", "stages"])
def test_fully_sharded(new: New, unit: str, one_process: None) -> None:
    """FSDP2, by blocks or by stages: the same logits and gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, model = new(), new()
    mesh = init_device_mesh("cpu", (1,))
    for stage in model.layers:
        for module in stage.blocks if unit == "blocks" else [stage]:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for x in (plain, model):
        x(IMAGES).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, msg=name)
    torch.testing.assert_close(logits(model), logits(plain))


# --- 5: threads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[(64, 64)] * 4, [(64, 64), (96, 64), (64, 96), (80, 112)]], ids=str)
def test_four_threads_on_one_model(new: New, sizes: list[tuple[int, int]]) -> None:
    images = [torch.randn(1, 3, *size) for size in sizes]
    model, wrong = new().eval(), []
    expected = [logits(new().eval(), x) for x in images]
    start = threading.Barrier(4)

    def serve(first: int) -> None:
        try:
            start.wait()
            for step in range(40):
                number = (first + step) % 4
                if not torch.allclose(logits(model, images[number]), expected[number], atol=1e-5):
                    wrong.append(number)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_threads_leave_pytorchs_choice_of_kernels_alone(new: New, backend: str) -> None:
    """It is global to the process."""

    def kernels() -> list[bool]:
        cuda = torch.backends.cuda
        return [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()]

    before, model = kernels(), new(attention_backend=backend)

    def work(train: bool) -> None:
        for _ in range(20):
            with torch.set_grad_enabled(train):
                model(IMAGES[:1])

    threads = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kernels() == before


def test_a_default_device_changes_nothing(new: New) -> None:
    """Where a user's factories make tensors is no matter of the model's tables."""
    model, images = new(), torch.randn(1, 3, 128, 64)
    with torch.device("meta"):
        out = model(images)
        out.sum().backward()
    assert out.device.type == "cpu"
    torch.testing.assert_close(new()(images), out)


# --- 6, 20: quantised and half-precision layers -------------------------------------------------------------


def test_quantize_dynamic(new: New) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(new().eval(), {nn.Linear})
    quantised = [m for m in model.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(quantised) == sum(isinstance(m, nn.Linear) for m in new().modules())
    difference = (logits(model) - logits(new().eval())).abs().max()
    assert 0 < difference < 0.1 * logits(new().eval()).abs().max()


class PackedLinear(nn.Module):
    """A layer whose weight has no shape of its own, as those of 8 and 4 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().flatten().view(torch.uint8), requires_grad=False)
        self.bias, self.shape = linear.bias, linear.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.view(torch.float32).view(self.shape), self.bias)


def test_layers_with_packed_weights(new: New) -> None:
    model = new().eval()
    expected = logits(model)
    for name, module in leaves(model).items():
        if isinstance(module, nn.Linear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, PackedLinear(module))
    torch.testing.assert_close(logits(model), expected)
    model(IMAGES).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(new: New, dtype: torch.dtype) -> None:
    exact = logits(new().eval())
    model = new().eval().to(dtype)
    out = logits(model, IMAGES.to(dtype))
    assert out.dtype == dtype and (out - exact).abs().max() < 0.1 * exact.abs().max()
    with torch.autocast("cpu", dtype):
        model = new().eval()
        model(IMAGES).sum().backward()
        assert (logits(model) - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


# --- 7: exporters, by their plain calls ---------------------------------------------------------------------


@pytest.mark.parametrize("strict", [pytest.param(True, marks=since_2_7), False])
def test_torch_export_with_any_batch(new: New, strict: bool) -> None:
    model = new().eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=shapes, strict=strict)
    assert not any("cpu_attention" in str(node.target) for node in program.graph.nodes)
    for images in (IMAGES, OTHER_BATCH):
        torch.testing.assert_close(program.module()(images), logits(model, images))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(new: New, dynamo: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = new().eval(), str(tmp_path / "model.onnx")
    shapes: dict[str, Any] = {"dynamic_axes": {"images": {0: "batch"}}}
    if dynamo:
        shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=64)},)}
    torch.onnx.export(model, (IMAGES,), path, dynamo=dynamo, verbose=False, input_names=["images"], **shapes)
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


# --- 8: counting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "plain"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_flops(variant: str, backend: str) -> None:
    """Of a whole model at 224, evaluated and trained (backward: twice as many, and scores once again)."""
    model = timm.create_model(variant, num_classes=10, attention_backend=backend)
    expected = {FAMILIES[0]: 9.9e9, FAMILIES[1]: 10.2e9}[variant]
    with FlopCounterMode(display=False) as counter:
        logits(model, torch.randn(1, 3, 224, 224))
    assert abs(counter.get_total_flops() / expected - 1) < 0.01
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 224, 224)).sum().backward()
    assert 2.85 < counter.get_total_flops() / expected < 3.1


# --- 10, 11: derivatives of all kinds -----------------------------------------------------------------------


def test_gradient_penalty(new: New) -> None:
    """A second derivative, the same as that of the plain operator."""
    gradients = []
    for backend in ("auto", "plain"):
        model, images = new(attention_backend=backend).double(), IMAGES.double().requires_grad_()
        (gradient,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
        gradient.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert len(gradients[-1]) >= len([*model.parameters()]) - 1  # the classifier's bias has none
    torch.testing.assert_close(*gradients)


def test_gradient_penalty_of_a_frozen_model(new: New) -> None:
    model, images = new().requires_grad_(False), IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
    gradient.square().sum().backward()
    assert images.grad is not None and images.grad.any()


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
    for name, p in model.named_parameters():
        torch.testing.assert_close(total[name], p.grad, msg=name)
        torch.testing.assert_close(per_image[name].sum(0), p.grad, msg=name)
    direction, step = torch.randn_like(images), 1e-6
    _, tangent = torch.func.jvp(lambda x: out(weights, x), (images,), (direction,))
    numeric = (logits(model, images + step * direction) - logits(model, images - step * direction)) / (
        2 * step
    )
    torch.testing.assert_close(tangent, numeric, rtol=1e-5, atol=1e-6)
    moves = {name: torch.randn_like(w) for name, w in weights.items()}
    _, tangent = torch.func.jvp(lambda w: out(w, images), (weights,), (moves,))
    ahead, behind = ({n: w + s * moves[n] for n, w in weights.items()} for s in (step, -step))
    numeric = (out(ahead, images) - out(behind, images)) / (2 * step)
    torch.testing.assert_close(tangent, numeric, rtol=1e-3, atol=1e-5)


# --- 12: symbolic traces ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ape", [True, False])
def test_torchvisions_feature_extractor(new: New, ape: bool) -> None:
    model = new(ape=ape).eval()
    extractor = create_feature_extractor(model, ["layers.0.blocks.1", "layers.1.blocks.0", "norm"])
    assert torch.fx.symbolic_trace(model)(IMAGES).shape == (2, 5)
    for images in (IMAGES, torch.randn(1, 3, 96, 128)):  # any size
        with torch.no_grad():
            found = extractor(images)
            maps = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
            torch.testing.assert_close(found["layers.0.blocks.1"], maps[0])
            torch.testing.assert_close(found["layers.1.blocks.0"], maps[1])
            torch.testing.assert_close(found["norm"], model.forward_features(images))
    extractor.train()(IMAGES)["norm"].sum().backward()


# --- 13, 14: checkpoints of other tools (test_users_checkpoints.py has the rest) ----------------------------


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module._orig_mod.", "backbone.", "encoder.", "module.backbone."]
)
def test_checkpoints_with_prefixes_and_objects(new: New, prefix: str, tmp_path: Path) -> None:
    model, other = new(), torch.compile(new(seed=1))
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "args": Namespace(lr=1.0), "folder": tmp_path}, tmp_path / "w.pth")
    models.load_checkpoint(other, tmp_path / "w.pth")
    assert torch.equal(logits(other._orig_mod.eval()), logits(model.eval()))


@pytest.mark.parametrize("channels", [1, 4])
def test_other_input_channels_as_timm_adapts_them(new: New, channels: int, tmp_path: Path) -> None:
    torch.save(new().state_dict(), tmp_path / "w.pth")
    other = new(seed=1, in_chans=channels).eval()
    report = models.load_checkpoint(other, tmp_path / "w.pth", resize=True)
    assert report.adapted == ["patch_embed.proj.weight"]
    twin = new().eval()
    twin.patch_embed.proj.weight.data = adapt_input_conv(channels, twin.patch_embed.proj.weight.data)
    images = torch.randn(2, channels, 64, 64)
    twin.in_chans = channels
    assert torch.equal(logits(other, images), logits(twin, images))


# --- The laws behind the rows -------------------------------------------------------------------------------


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


def test_the_same_answer_while_others_trace(new: New) -> None:
    """What is cached depends on integers alone: a forward after each kind of trace gives the same bits."""
    model = new().eval()
    expected = logits(model)
    torch.export.export(copy.deepcopy(model), (IMAGES,))
    torch.func.vmap(lambda x: model(x[None]))(IMAGES)
    with torch.inference_mode():
        model(IMAGES)
    assert torch.equal(logits(model), expected)
    model.train()(IMAGES).sum().backward()


def fast_layers(model: nn.Module) -> list[FocalFastAttention]:
    return [m for m in model.modules() if isinstance(m, FocalFastAttention)]


def fast(**options: Any) -> models.FocalTransformer:
    torch.manual_seed(0)
    return timm.create_model(FAMILIES[1], **{**NANO, **options}).eval()


@pytest.mark.parametrize("way", ["eager", "compiled", "traced"])
def test_stored_keys_that_are_written_to_count(way: str) -> None:
    """As by the broadcast of DistributedDataParallel, which only one process has loaded a file for."""
    model, expected = fast(), fast()
    expected.load_state_dict({name: x.flip(0) for name, x in expected.named_buffers()}, strict=False)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.copy_(buffer.flip(0).clone())
    run = {"eager": lambda m: m, "compiled": lambda m: torch.compile(m, backend="eager")}.get(
        way, lambda m: torch.jit.trace(m, IMAGES, check_trace=False)
    )
    torch.testing.assert_close(logits(run(model)), logits(expected))
    assert not torch.allclose(logits(model), logits(fast()))


def test_stored_keys_of_another_type_and_wrong_ones() -> None:
    model = fast()
    small = {name: x.int() for name, x in model.named_buffers()}
    other = fast()
    other.load_state_dict(small, strict=False, assign=True)
    assert torch.equal(logits(other), logits(model))
    for wrong in (-1, 10**6):
        state = {name: torch.full_like(x, wrong) for name, x in model.named_buffers()}
        with pytest.raises(ValueError, match="stored nearest fine tokens run from"):
            fast().load_state_dict(state, strict=False)


@pytest.mark.parametrize("size", [(64, 64), (72, 40)], ids=str)
def test_every_pixel_reaches_a_shifted_focal_fast_model(size: tuple[int, int]) -> None:
    """Also where the map is padded: rolled, its tokens are still those that keys are chosen among."""
    model = fast(use_shift=True, focal_topk=1000)
    tokens = torch.randn(1, size[0] // 4, size[1] // 4, 16, requires_grad=True)
    attention = model.layers[0].blocks[1].attn
    assert attention.shift_size == 3
    out = attention(tokens, model.layers[0].blocks[1].pool_layers)
    (gradient,) = torch.autograd.grad(out[0, 0, 0].square().sum(), tokens)
    assert gradient.abs().sum(dim=-1).min() > 0


@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_an_empty_batch(new: New, backend: str) -> None:
    assert new(attention_backend=backend)(IMAGES[:0]).shape == (0, 5)


def test_the_attention_classes_differ_in_keys_and_bias_alone(new: New) -> None:
    found = {type(m) for m in new().modules() if isinstance(m, FocalAttention)}
    assert found in ({FocalAttention}, {FocalFastAttention})
    assert FocalFastAttention.forward is FocalAttention.forward
