"""The backbone's adapter for MMDetection and MMSegmentation, and the front over mmengine's Runner."""

import errno
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from mmengine.runner import save_checkpoint
from small_models import SMALL, image
from torch import Tensor, nn

from models import FocalTransformer
from openmmlab import flops, runner
from openmmlab.focal_backbone import FocalBackbone
from utils import UserError

NANO = {**SMALL, "window_size": 4, "focal_windows": [3, 3, 3, 1], "expand_sizes": [2, 2, 2, 2]}
del NANO["num_classes"]
VARIANTS = {
    "focal": {"kind": "focal"},
    "focal_conv": {"kind": "focal", "use_conv_embed": True, "ape": True},
    "fast": {"kind": "focalv2"},
    "fast_conv": {"kind": "focalv2", "use_conv_embed": True, "use_layerscale": True},
}
TASKS = ("detection", "segmentation")


def build(**options: Any) -> FocalBackbone:
    torch.manual_seed(0)
    return MODELS.build(dict(type="FocalBackbone", **NANO | options))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a sum over all maps in which every element counts differently; None is left out."""
    model.zero_grad()
    sum((m.float() * torch.linspace(-1, 1, m.numel()).view(m.shape)).sum() for m in model(x)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --- Maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [[0, 1, 2, 3], [1, 2]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_are_the_classifiers_normalised(variant: str, stages: list[int]) -> None:
    """At an odd size; later stages are not built, and every parameter has a gradient."""
    backbone = build(**VARIANTS[variant], out_indices=stages)
    assert len(backbone.layers) == stages[-1] + 1
    x = image(75, 101)
    assert gradients(backbone, x).keys() == dict(backbone.named_parameters()).keys()
    norms = [getattr(backbone, f"norm{stage}") for stage in stages]
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    classifier = FocalTransformer(**NANO | VARIANTS[variant], num_classes=5)
    classifier.load_state_dict(backbone.state_dict(), strict=False)
    maps = backbone.eval()(x)
    plain = classifier.eval().forward_intermediates(x, stages, intermediates_only=True)
    assert isinstance(maps, tuple)
    for stage, norm, got, bare in zip(stages, norms, maps, plain, strict=True):
        assert got.shape == bare.shape and got.shape[1] == 8 * 2**stage
        torch.testing.assert_close(got, norm(bare.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_narrow_images_are_padded() -> None:
    """As segmenters get them, which do not pad to a multiple of 32."""
    backbone = build(out_indices=[0, 3]).eval()
    for height, width in ((27, 160), (64, 9), (1, 1)):
        images = torch.randn(2, 3, height, width)
        maps = backbone(images)
        sides = [-(-side // stride) for stride in (4, 32) for side in (height, width)]
        assert [side for m in maps for side in m.shape[2:]] == sides
        padded = backbone(nn.functional.pad(images, (0, max(0, 32 - width), 0, max(0, 32 - height))))
        for small, whole in zip(maps, padded, strict=True):
            assert torch.equal(small, whole[..., : small.shape[2], : small.shape[3]])


@pytest.mark.parametrize("shape", [(2, 3, 0, 64), (3, 20, 20), (64,)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    """By its own shape."""
    with pytest.raises(ValueError, match="0 x 64" if len(shape) == 4 else str([*shape]).strip("[]")):
        build()(torch.randn(shape))


def test_torch_fx_traces_it() -> None:
    backbone, images = build(out_indices=[1, 3]).eval(), torch.randn(2, 3, 20, 64)
    traced = torch.fx.symbolic_trace(backbone)
    torch.testing.assert_close(traced(images), backbone(images))


def test_a_variant_is_a_released_model_that_options_override() -> None:
    with torch.device("meta"):
        backbone = MODELS.build(
            dict(type="FocalBackbone", variant="focal_small_patch4_window7_224", focal_windows=[9, 7, 5, 3])
        )
    assert [len(layer.blocks) for layer in backbone.layers] == [2, 2, 18, 2]
    assert backbone.options["focal_windows"] == [9, 7, 5, 3]
    with pytest.raises(UserError, match="variant: expected one of focal_tiny.*, got 'focal_tiny'"):
        MODELS.build(dict(type="FocalBackbone", variant="focal_tiny"))


# --- Frozen stages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", range(-1, 5))
def test_frozen_stages_stay_and_are_not_random(frozen: int) -> None:
    backbone = build(frozen_stages=frozen, drop_rate=0.5, drop_path_rate=0.5, ape=True).train()
    stems = () if frozen < 0 else ("patch_embed", "absolute_pos_embed")
    still = (*stems, *(f"{part}{i}." for i in range(frozen) for part in ("layers.", "norm")))
    trained = {n for n, _ in backbone.named_parameters() if not still or not n.startswith(still)}
    assert {n for n, p in backbone.named_parameters() if p.requires_grad} == trained
    if frozen < 4:
        assert gradients(backbone, image(64, 64)).keys() == trained
    first, second = backbone(image(64, 64, batch=8)), backbone(image(64, 64, batch=8))
    same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    assert same == [i < frozen for i in range(4)]


# --- Checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_classifiers_weights_and_stored_keys_are_loaded(name: str, tmp_path: Path) -> None:
    classifier = FocalTransformer(**NANO | VARIANTS[name], num_classes=7)
    keys = {key: value.flip(1) for key, value in classifier.named_buffers()}
    classifier.load_state_dict(keys, strict=False)
    torch.save(classifier.state_dict(), tmp_path / "own.pth")
    checkpoint = dict(type="Pretrained", checkpoint=str(tmp_path / "own.pth"))
    backbone = build(**VARIANTS[name], init_cfg=checkpoint)
    backbone.init_weights()
    given, state = classifier.state_dict(), backbone.state_dict()
    assert {*given} - {*state} == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    for key in given.keys() & state.keys():
        assert torch.equal(given[key], state[key]), key


def test_a_detectors_weights_are_loaded(tmp_path: Path) -> None:
    """Of a file as MMEngine writes it, with its logs."""
    trained, buffer = build(), HistoryBuffer([0.5, 0.25], [1, 1])
    state = {f"backbone.{name}": value for name, value in trained.state_dict().items()}
    logs = {"log_scalars": {"train/loss": buffer}, "runtime_info": {"lr": np.float64(0.1)}}
    path = tmp_path / "epoch_2.pth"
    torch.save({"meta": {}, "state_dict": state | {"neck.weight": torch.ones(1)}, "message_hub": logs}, path)
    for outputs in ((0, 1, 2, 3), (0, 2)):
        backbone = build(out_indices=outputs, init_cfg=dict(type="Pretrained", checkpoint=str(path)))
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.zero_()
        backbone.init_weights()
        for name, value in backbone.state_dict().items():
            assert torch.equal(value, trained.state_dict()[name]), name
    wrapped = {f"module._backbone.{name}": value for name, value in trained.state_dict().items()}
    torch.save(wrapped | {"teacher.backbone.norm0.weight": torch.ones(8)}, path)
    backbone.init_weights()
    torch.save({"model": build(out_indices=[0, 1]).state_dict()}, path)
    with pytest.raises(UserError, match=r"expected a backbone with the output 2, got .* outputs \[0, 1\]"):
        backbone.init_weights()


def test_loading_is_logged_and_refuses_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where pooled levels reach farther, their tables are resized."""
    said: list[str] = []
    monkeypatch.setattr("openmmlab.focal_backbone.print_log", lambda text, logger: said.append(text))
    path = tmp_path / "own.pth"
    state = FocalTransformer(**NANO, num_classes=7).state_dict()
    torch.save({"model": state, "epoch": 3}, path)

    def load(**options: Any) -> dict[str, Tensor]:
        backbone = build(**options, init_cfg=dict(type="Pretrained", checkpoint=str(path)))
        backbone.init_weights()
        return backbone.state_dict()

    found = load(out_indices=[3])
    assert all(torch.equal(value, state[key]) for key, value in found.items() if "norm3" not in key)
    assert said.pop() == (
        f"{path}: loaded; not used here: head.bias, head.weight, norm.bias, norm.weight; "
        "new: norm3.bias, norm3.weight; resized: nothing"
    )
    wide = {"focal_windows": [5, 5, 3, 1]}
    loaded, fresh = load(**wide), build(**wide).state_dict()
    wider = {key for key in state.keys() & loaded.keys() if loaded[key].shape != state[key].shape}
    assert wider and all("table_to_windows" in key and key in said[0] for key in wider)
    assert not any(torch.equal(loaded[key], fresh[key]) for key in wider)
    with pytest.raises(ValueError, match="of another shape"):
        load(embed_dim=16)
    path.unlink()
    with pytest.raises(UserError, match="own.pth"):
        load()


# --- Options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 50, "norm_cfg": {}}, r"takes no depth, norm_cfg.*ResNet.*_delete_=True"),
        ({"pretrained": "x"}, r"takes no pretrained.*model=dict\(pretrained=None\)"),
        ({"out_indices": [2, 1]}, "out_indices must ascend within 0 to 3"),
        ({"out_indices": [0, 1], "frozen_stages": 3}, "frozen_stages must be -1 to 2, got 3"),
        ({"init_cfg": {"type": "Kaiming"}}, "expected init_cfg=dict"),
        ({"focal_levels": [2]}, "focal_levels must be a whole number"),
    ],
    ids=str,
)
def test_options_that_cannot_be_followed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**options)


# --- The front ----------------------------------------------------------------------------------------------

OPTIM = "optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))\n"
AMP = "optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', optimizer=dict(type='SGD', lr=0.1))\n"
MISSING = "custom_imports = dict(imports=['no_such_package'], allow_failed_imports=False)"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OPTIM)
    return "own.py"


def read(*words: str) -> Any:
    return runner.training_config(runner.parse_train(words))


def test_flags_come_over_the_config(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = read(own, "--cfg-options", "optim_wrapper.optimizer.lr=0.5", "train_cfg.a=[1,2]")
    assert (config.optim_wrapper.optimizer.lr, config.train_cfg.a) == (0.5, [1, 2])
    assert (config.work_dir, config.launcher) == ("work_dirs/own", "none")
    assert read(own, "--work-dir", "w").work_dir == "w"
    sgd = {"type": "SGD", "lr": 0.1}
    assert read(own, "--amp").optim_wrapper == dict(
        type="AmpOptimWrapper", loss_scale="dynamic", optimizer=sgd
    )
    Path("amp.py").write_text(AMP)
    assert read("amp.py").optim_wrapper == dict(type="AmpOptimWrapper", dtype="bfloat16", optimizer=sgd)
    assert read("amp.py", "--no-amp").optim_wrapper == dict(type="OptimWrapper", optimizer=sgd)
    Path("plain.py").write_text(OPTIM.replace("type='OptimWrapper', ", ""))
    assert read("plain.py").optim_wrapper == read("plain.py", "--no-amp").optim_wrapper == {"optimizer": sgd}
    Path("two.py").write_text("optim_wrapper = dict(constructor='Own')")
    assert read("two.py").optim_wrapper == {"constructor": "Own"}
    Path("own.pth").touch()
    assert read(own, "--resume", "own.pth").load_from == "own.pth"
    backbone = read(own, "--pretrained", "own.pth", "--cfg-options", "model.backbone.depth=2").model.backbone
    assert backbone == {"depth": 2, "init_cfg": {"type": "Pretrained", "checkpoint": "own.pth"}}
    assert read(own, "--launcher", "slurm", "--local_rank", "1").launcher == "slurm"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert read(own).launcher == "pytorch"
    assert read(own, "--launcher", "none").launcher == "none"


def test_what_training_continues_from(own: str) -> None:
    """The newest checkpoint, also in a folder that was moved; a first start begins as without --resume."""
    Path("coco.pth").touch()
    for options in ([], ["--cfg-options", "load_from=coco.pth"]):
        first = read(own, "--resume", *options)
        assert (first.resume, first.load_from) == (False, "coco.pth" if options else None)
    folder = Path("work_dirs/own")
    folder.mkdir(parents=True)
    (folder / "last_checkpoint").write_text("/elsewhere/own/epoch_3.pth")
    with pytest.raises(UserError, match="names /elsewhere/own/epoch_3.pth, which is not there"):
        read(own, "--resume")
    (folder / "epoch_3.pth").touch()
    for options in ([], ["--cfg-options", "load_from=coco.pth"]):
        again = read(own, "--resume", *options)
        assert (again.resume, again.load_from) == (True, str(folder / "epoch_3.pth"))


def test_processes_without_gpus(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """BatchNorm over all processes exists on GPUs only: on CPUs, each normalises by its own images."""
    head = "model = dict(decode_head=[dict(norm_cfg=dict(type='SyncBN'))])\n"
    Path(own).write_text(f"{OPTIM}{head}sync_bn = 'torch'\nfind_unused_parameters = True\n")
    for gpu, launcher, kept, norm in (
        (True, "pytorch", {"sync_bn"}, "SyncBN"),
        (False, "none", {"sync_bn"}, "SyncBN"),
        (False, "pytorch", {"model_wrapper_cfg"}, "BN"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        config = read(own, "--launcher", launcher)
        assert {"sync_bn", "model_wrapper_cfg"} & {*config.to_dict()} == kept
        assert config.model.decode_head[0].norm_cfg.type == norm
    assert config.model_wrapper_cfg.find_unused_parameters


@pytest.mark.parametrize(
    ("text", "command", "message"),
    [
        (AMP, "train own.py", "mixed precision needs a GPU, and there is none here: add --no-amp"),
        (OPTIM, "train own.py --auto-scale-lr", "has no auto_scale_lr.base_batch_size"),
        (
            OPTIM,
            "train own.py --pretrained gone.pth",
            "gone.pth: expected a file with the checkpoint of",
        ),
        (OPTIM, "train gone.py", "gone.py: expected a file with the config, got no file; check the path"),
        (OPTIM, "test own.py gone.pth", "gone.pth: expected a file with the checkpoint"),
        (OPTIM, "test own.py own.py --tta", "has no tta_model and tta_pipeline"),
        ("model = dict(", "train own.py", "was never closed"),
        (MISSING, "train own.py", "no_such_package"),
        ("_base_ = 'gone.py'", "train own.py", "gone.py"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the messages are those of a machine without GPU")
def test_mistakes_are_told_without_a_traceback(
    text: str, command: str, message: str, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(own).write_text(text)
    name, *arguments = command.split()
    assert getattr(runner, name)(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


@pytest.mark.parametrize("group", [False, True])
def test_a_process_that_fails_alone_is_heard(
    group: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before there is a process group, all of a machine fail alike, and the first one tells."""

    def fail() -> None:
        if group:
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        raise UserError("something in one image")

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("FOCAL_TRACEBACK", raising=False)
    assert runner.run_command(fail) == 2
    assert ("error: something in one image" in capsys.readouterr().err) == group


def test_a_mistake_is_exit_status_2_where_the_console_is_on_a_full_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys.stderr, "write", full)
    assert runner.test(["gone.py", "gone.pth"]) == 2


def test_a_full_disk_leaves_the_checkpoint_that_was_there(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """mmengine's own backend writes over it."""
    runner.import_mmengine()
    file = tmp_path / "epoch_1.pth"
    save_checkpoint({"state_dict": {"weight": torch.ones(10)}}, str(file))
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="epoch_1.pth"):
        save_checkpoint({"state_dict": {"weight": torch.zeros(10_000)}}, str(file))
    assert torch.load(file)["state_dict"]["weight"].eq(1).all()
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("script", [f"{t}/{n}.py" for t in TASKS for n in ("train", "test", "predict")])
def test_scripts_run_without_an_installation(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From any folder: they make this repository importable by themselves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(REPO)])
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(f"{REPO}/{script}", run_name="__main__")
    assert sys.path[0] == str(REPO) and "--help" in capsys.readouterr().out


def test_without_the_packages_it_says_what_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mmengine", "mmengine.config"):
        monkeypatch.setitem(sys.modules, name, None)
    for command in (lambda: runner.train([]), lambda: flops.main(["x.py"])):
        assert command() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: OpenMMLab's packages are not installed")
        assert line.endswith("run `make setup-openmmlab`")
