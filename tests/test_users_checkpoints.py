"""Checkpoints as other tools write them: objects beside the weights, prefixes, wrappers, larger models."""

import datetime
import logging
import pathlib
import warnings
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NANO_WORDS, REPO
from small_models import build, every_kind, image, same
from test_checkpoint import edited
from test_checkpoint import saved as stored
from timm.models import adapt_input_conv
from timm.utils import CheckpointSaver
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import main
from config import load_config
from models import build_model, load_checkpoint, read_checkpoint
from models.checkpoint import STEM


def saved(content: object, folder: Path) -> Path:
    torch.save(content, folder / "w.pth")
    return folder / "w.pth"


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


# --- Objects beside the weights -----------------------------------------------------------------------------


def test_threads_read_checkpoints(tmp_path: Path) -> None:
    """What PyTorch may build is a list of the whole process."""
    path = saved({"args": Namespace(lr=1), "model": {"w": torch.ones(1)}}, tmp_path)
    with ThreadPoolExecutor(4) as threads:
        assert all("model" in found for found in threads.map(read_checkpoint, [path] * 200))


def test_weights_without_stored_keys_load(tmp_path: Path) -> None:
    """As of averages, which have parameters alone."""
    model, fresh = build(kind="focalv2"), build(kind="focalv2", seed=1)
    path = saved({"state_dict": dict(model.named_parameters())}, tmp_path)
    assert load_checkpoint(fresh, path).kept and same(fresh, model)


@every_kind
def test_wrapped_blocks_load_and_their_files_are_read(kind: str, tmp_path: Path) -> None:
    """Compiled ones have names of their own, checkpointed ones in the tree of modules alone."""
    model, fresh, larger = build(kind=kind), build(kind=kind, seed=1), build(kind=kind, seed=2, img_size=96)
    for net in (model, fresh):
        for stage in net.layers:
            stage.blocks = nn.ModuleList(torch.compile(block) for block in stage.blocks)
    path = saved({"module": model.state_dict()}, tmp_path)  # as DeepSpeed's
    assert any("._orig_mod." in key for key in read_checkpoint(path)["module"])
    load_checkpoint(fresh, path)
    assert same(fresh, model)
    for stage in larger.layers:
        stage.blocks = nn.ModuleList(checkpoint_wrapper(block) for block in stage.blocks)
    report = load_checkpoint(larger, path, resize=True)
    assert bool(report.kept) == (kind == "focalv2")
    assert torch.equal(larger.norm.weight, model.norm.weight)


def test_keys_of_another_input_size_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And no averages."""
    caplog.set_level("INFO", "models.checkpoint")
    path = saved(build(kind="focalv2", img_size=64).state_dict(), tmp_path)
    load_checkpoint(build(kind="focalv2", img_size=96), path, resize=True)
    assert caplog.text.count("nearest") == 1
    with torch.device("meta"):
        load_checkpoint(build(kind="focalv2", img_size=96), path, resize=True)


@every_kind
def test_a_checkpoint_of_timms_saver(kind: str, tmp_path: Path) -> None:
    """It holds the arguments of the command line under "args", and an average that is not used."""
    model, average = build(kind=kind), build(kind=kind, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = Namespace(model="focal", lr=0.1, data_dir=Path("/data"), mean=(0.5, 0.5), std=np.float64(0.2))
    saver = CheckpointSaver(model, optimizer, args, model_ema=average, checkpoint_dir=str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saver.save_checkpoint(0, metric=np.float64(71.5))
    path = tmp_path / "last.pth.tar"
    content = read_checkpoint(path)
    assert content["metric"] == 71.5 and content["args"].data_dir == pathlib.PurePosixPath("/data")
    assert content["args"].lr == 0.1 and content["args"].std == 0.2
    fresh = build(kind=kind, seed=2)
    load_checkpoint(fresh, path)
    assert same(fresh, model) and not same(fresh, average)


VALUES = {
    "float64": np.float64(0.1),
    "float16": np.float16(0.1),
    "int64": np.int64(-3),
    "bool": np.bool_(True),
    "text": np.str_("focal é"),
    "big endian": np.dtype(">f8").type(2.5),
    "path": Path("/some/where"),
    "pure windows path": pathlib.PureWindowsPath("C:/a/b"),
    "date": datetime.date(2026, 11, 29),
    "time": datetime.datetime(2026, 11, 29, 12, 30, 5, 7),
    "duration": datetime.timedelta(days=2, seconds=3),
    "namespace": Namespace(a=1, b=[2, "c"], d=Namespace(e=None)),
}


@pytest.mark.parametrize("legacy", [True, False])
def test_harmless_objects_come_back(legacy: bool, tmp_path: Path) -> None:
    torch.save(VALUES, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    content = read_checkpoint(tmp_path / "w.pth")
    for name, value in VALUES.items():
        found = content[name]
        assert found == value, name
        assert type(found) is type(value) or isinstance(found, pathlib.PurePath), name


def test_paths_of_other_systems_and_pythons(tmp_path: Path) -> None:
    path = Path("a/b")
    here = f"{type(path).__module__}\n{type(path).__name__}\n".encode()
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
            there = f"{module}\n{name}\n".encode()
            (tmp_path / "w.pth").write_bytes(edited(stored({"path": path}), here, there))
            kind = pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath
            assert read_checkpoint(tmp_path / "w.pth") == {"path": kind("a/b")}


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpy_scalars_of_both_releases(module: bytes, tmp_path: Path) -> None:
    content = stored({"metric": np.float64(2.5)})
    here = b"numpy._core.multiarray" if b"numpy._core." in content else b"numpy.core.multiarray"
    (tmp_path / "w.pth").write_bytes(edited(content, here, module))
    assert read_checkpoint(tmp_path / "w.pth") == {"metric": 2.5}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_other_pickle_protocols(protocol: int, tmp_path: Path) -> None:
    """PyTorch reads the last two only by executing what they hold, so they are refused."""
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pth", pickle_protocol=protocol)
    if protocol < 4:
        assert torch.equal(read_checkpoint(tmp_path / "w.pth")["w"], torch.ones(2))
    else:
        with pytest.raises(ValueError, match=r"w\.pth: .* other than 2 .*save\(\.\.\., pickle_protocol=2\)"):
            read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("code", ["O", "object", "V8", "i8,O"])
def test_scalars_of_other_kinds_make_no_objects(code: str, tmp_path: Path) -> None:
    """numpy's own function would take the bytes for a pointer or an object."""
    text = b"X\x02\x00\x00\x00f8"
    other = b"X" + len(code).to_bytes(4, "little") + code.encode()
    (tmp_path / "w.pth").write_bytes(edited(stored({"value": np.float64(2.5)}), text, other))
    if code == "V8":
        assert bytes(read_checkpoint(tmp_path / "w.pth")["value"]) == np.float64(2.5).tobytes()
    else:
        with pytest.raises(ValueError, match=r"w\.pth: not a checkpoint, or damaged"):
            read_checkpoint(tmp_path / "w.pth")


# --- Names --------------------------------------------------------------------------------------------------

PREFIXES = [
    *("module.", "_orig_mod.", "backbone.", "encoder.", "model.", "net.", "timm_model.", "_backbone."),
    *("module._orig_mod.", "_orig_mod.module.", "module._orig_mod.backbone.", "backbone.module._orig_mod."),
    *("model.backbone.", "_orig_mod.model.module.encoder."),
]


@every_kind
def test_prefixes_are_removed(kind: str, tmp_path: Path) -> None:
    model, fresh = build(kind=kind), build(kind=kind, seed=1)
    for prefix in PREFIXES:
        fresh.load_state_dict({name: torch.zeros_like(value) for name, value in fresh.state_dict().items()})
        report = load_checkpoint(fresh, saved({"state_dict": prefixed(model.state_dict(), prefix)}, tmp_path))
        assert same(fresh, model) and report.left_out == [], prefix


@pytest.mark.parametrize("container", [None, "model", "state_dict", "model_state_dict"])
def test_the_backbone_of_a_larger_model(container: str | None, tmp_path: Path, caplog) -> None:
    """What is beside it is left out, and told; others may have names of this model's under theirs."""
    model, fresh = build(kind="focalv2"), build(kind="focalv2", seed=1)
    beside = ["neck.lateral.weight", "decode_head.conv.bias", "encoder.norm.weight", "backbone_ema.norm.bias"]
    state = prefixed(model.state_dict(), "backbone.") | {key: torch.zeros(2) for key in beside}
    path = saved({container: state, "meta": {"epoch": 3}} if container else state, tmp_path)
    with caplog.at_level(logging.WARNING):
        report = load_checkpoint(fresh, path)
    assert same(fresh, model)
    assert report.left_out == sorted(beside)
    assert "parts of a larger model are left out: 4: backbone_ema.norm.bias" in caplog.text


def test_weights_of_several_models_are_refused(tmp_path: Path) -> None:
    state = build(kind="focal").state_dict()
    for prefix, second in (("", "module."), ("_orig_mod.", "module."), ("backbone.", "")):
        path = saved(prefixed(state, prefix) | {second + STEM: torch.zeros(2)}, tmp_path)
        with pytest.raises(ValueError, match=rf"the weights of one model, found several.*: .*{STEM}"):
            load_checkpoint(build(kind="focal"), path)


def test_what_else_has_a_prefix_stays_an_error(tmp_path: Path) -> None:
    """Beside names without one it belongs to no larger model."""
    model = build(kind="focal")
    state = model.state_dict() | {"encoder.extra": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"1 unexpected: encoder\.extra"):
        load_checkpoint(model, saved(state, tmp_path))


# --- Wrappers -----------------------------------------------------------------------------------------------


WRAPPERS = {
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "compiled, distributed": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model)),
    "distributed, compiled": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_load_and_their_files_are_read(wrapper: str, tmp_path: Path, one_process) -> None:
    model, fresh = build(kind="focalv2"), build(kind="focalv2", seed=1)
    smaller = build(kind="focalv2", seed=2, img_size=96, num_classes=7)
    wrapped = WRAPPERS[wrapper](fresh)
    path = saved({"model": WRAPPERS[wrapper](model).state_dict()}, tmp_path)
    assert not any(key.startswith("patch_embed") for key in read_checkpoint(path)["model"])
    load_checkpoint(wrapped, path)
    assert same(fresh, model)
    report = load_checkpoint(WRAPPERS[wrapper](smaller), path, reset_head=True, resize=True)
    assert report.reset == ["head.bias", "head.weight"]
    assert report.kept
    assert torch.equal(smaller.norm.weight, model.norm.weight)


# --- Input channels -----------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize(("channels", "conv"), [(1, True), (9, False)])
def test_the_first_convolution_takes_other_channels(
    kind: str, channels: int, conv: bool, tmp_path: Path, caplog
) -> None:
    """As timm adapts it; a grey image gives what it gave as RGB."""
    model = build(kind=kind, use_conv_embed=conv)
    path = saved(model.state_dict(), tmp_path)
    other = build(kind=kind, seed=1, use_conv_embed=conv, in_chans=channels)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"IN_CHANS.*\(resize(?s:.*)patch_embed.proj.weight is"):
        load_checkpoint(other, path)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    with caplog.at_level(logging.WARNING):
        report = load_checkpoint(other, path, resize=True)
    assert report.adapted == [STEM] and f"adapted to the model's number: 1: {STEM}" in caplog.text
    given = model.state_dict()
    expected = given | {STEM: adapt_input_conv(channels, given[STEM])}
    assert all(torch.equal(value, expected[key]) for key, value in other.state_dict().items())
    if channels == 1:
        grey = image(64, 64, channels=1)
        with torch.no_grad():
            torch.testing.assert_close(other(grey), model(grey.expand(-1, 3, -1, -1)))


def test_other_channels_than_three_are_not_adapted(tmp_path: Path) -> None:
    path = saved(build(kind="focal", in_chans=4).state_dict(), tmp_path)
    model = build(kind="focal", seed=1)
    for resize in (False, True):
        with pytest.raises(ValueError, match=r"3 input channels to another(?s:.*)patch_embed.proj.weight is"):
            load_checkpoint(model, path, resize=resize)


def test_training_adapts_and_evaluation_does_not(
    few_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluation measures the weights as they are."""
    yaml = str(REPO / "configs/focal_tiny_patch4_window7_224.yaml")
    path = str(saved({"model": build_model(load_config(yaml, NANO_WORDS)).state_dict()}, tmp_path))
    command = ["--cfg", yaml, "--dataset", "folder", "--data-path", str(few_images), "--device", "cpu"]
    command += ["--output", str(tmp_path / "out"), "--batch-size", "64"]
    opts = ["--opts", *map(str, NANO_WORDS), "MODEL.FOCAL.IN_CHANS", "1", "TRAIN.EPOCHS", "1"]
    for flag in ("--pretrained", "--resume"):
        assert main.main([*command, "--eval", flag, path, *opts]) == 2
        assert f"{STEM} is" in capsys.readouterr().err
    assert main.main([*command, "--pretrained", path, *opts]) == 0
    assert f"adapted to the model's number: 1: {STEM}" in capsys.readouterr().out
