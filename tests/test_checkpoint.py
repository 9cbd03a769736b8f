"""Loading weights: the original's files, ours, other models', damaged and hostile ones."""

import io
import logging
import os
import pickle
import re
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import safetensors.torch
import torch
from golden_files import normal

from config import load_config
from models import build_model, load_checkpoint, read_checkpoint
from models.safetensors_file import write_safetensors

FOLDER = Path(__file__).parent / "checkpoints"
OFFICIAL = ["official_v1_nano", "official_v2_nano"]


def config_of(name: str, *opts: object):
    return load_config(FOLDER / f"{name}.yaml", opts)


@pytest.fixture(params=OFFICIAL)
def official(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_originals_files_give_the_originals_logits(official, tmp_path) -> None:
    """Under any name of the file."""
    path = tmp_path / "anything.bin"
    path.write_bytes((FOLDER / f"{official}.pth").read_bytes())
    model = build_model(config_of(official)).eval()
    report = load_checkpoint(model, path)
    assert not report.reset and not report.kept
    expected = np.load(FOLDER / f"{official}_expected.npz")
    image = torch.from_numpy(normal(str(expected["input_salt"]) + "input", (2, 3, 224, 224))).float()
    with torch.no_grad():
        logits = model(image)
    assert (logits - torch.from_numpy(expected["logits"])).abs().max() < 1e-5


def test_a_new_head_only_on_request(official, caplog) -> None:
    model = build_model(config_of(official, "MODEL.NUM_CLASSES", 3))
    head, first = model.head.weight.clone(), model.patch_embed.proj.weight.clone()
    with pytest.raises(ValueError, match=r"reset_head(?s:.*)head.bias is \[10\], expected \[3\]"):
        load_checkpoint(model, FOLDER / f"{official}.pth")
    assert torch.equal(model.patch_embed.proj.weight, first), "half a checkpoint was loaded"
    with caplog.at_level(logging.WARNING):
        report = load_checkpoint(model, FOLDER / f"{official}.pth", reset_head=True)
    assert report.reset == ["head.bias", "head.weight"] and "head.weight" in caplog.text
    assert torch.equal(model.head.weight, head) and not torch.equal(model.patch_embed.proj.weight, first)


def edited(content: bytes, old: bytes, new: bytes) -> bytes:
    """A file of torch.save with other instructions, and checksums that fit."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(changed, "w") as target:
        for record in source.infolist():
            data = source.read(record)
            if record.filename.endswith("data.pkl"):
                assert old in data
                data = data.replace(old, new)
            target.writestr(record, data)
    return changed.getvalue()


def saved(content: object, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def flipped(content: bytes, start: bytes) -> bytes:
    """With a wrong bit where `start` stands."""
    place = content.index(start)
    return content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]


ZIP, LEGACY = (saved({"w": torch.arange(8.0)}, legacy) for legacy in (False, True))
SHAPE, HUGE_SHAPE = b"K\x08\x85", pickle.dumps(2**60, 2)[2:-1] + b"\x85"  # instructions for [8] and [2**60]
NO_CHECKPOINTS = {
    "empty": b"",
    "text": b"not a checkpoint",
    "zip cut in half": ZIP[: len(ZIP) // 2],
    "zip cut at its end": ZIP[:-1],
    "legacy cut in half": LEGACY[: len(LEGACY) // 2],
    "legacy cut at its end": LEGACY[:-1],
    "a bit of a weight": flipped(ZIP, np.arange(8, dtype="<f4").tobytes()),
    "a bit of the instructions": flipped(ZIP, b"_rebuild_tensor"),
    "huge shape": edited(ZIP, SHAPE, HUGE_SHAPE),
    "empty.safetensors": b"",
    "cut.safetensors": safetensors.torch.save({"w": torch.arange(8.0)})[:-5],
    "pickle.safetensors": ZIP,
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_one_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / ("w" + (Path(name).suffix or ".pth"))
    path.write_bytes(NO_CHECKPOINTS[name])
    with pytest.raises(
        ValueError, match=rf"{path}: not a (checkpoint|safetensors file), or damaged"
    ) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


class Call:
    """Unpickles into a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


PROGRAMS: dict[str, Callable[[Path], Call]] = {
    "os.system": lambda flag: Call(os.system, f"touch {flag}"),
    "exec": lambda flag: Call(exec, f"open({str(flag)!r}, 'w')"),
    "subprocess": lambda flag: Call(subprocess.getoutput, f"touch {flag}"),
    "torch.load": lambda flag: Call(torch.load, str(flag)),
    "method of a path": lambda flag: Call(Path.touch, flag),
    "numpy": lambda flag: Call(np.save, str(flag), 1.0),
}


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_refused(name: str, form: str, tmp_path: Path) -> None:
    flag, path = tmp_path / "executed.npy", tmp_path / "bomb.pth"
    content = {"config": PROGRAMS[name](flag)}
    path.write_bytes(pickle.dumps(content, 2) if form == "bare" else saved(content, form == "legacy"))
    refusal = r"bomb\.pth: refused, because reading it would execute code \([\w.]+\)"
    with pytest.raises(ValueError, match=refusal):
        read_checkpoint(path)
    assert not flag.exists()


@pytest.mark.filterwarnings("ignore:.*TorchScript")
def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program.pt")
    with pytest.raises(ValueError, match=r"program\.pt: refused, .*execute code \(a TorchScript program\)"):
        read_checkpoint(tmp_path / "program.pt")


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema"])
def test_averaged_weights_are_not_dropped_in_silence(key: str, tmp_path: Path, caplog) -> None:
    model = build_model(config_of("official_v1_nano"))
    torch.save({"model": model.state_dict(), key: model.state_dict()}, tmp_path / "best.pth")
    load_checkpoint(model, tmp_path / "best.pth")
    assert f"averaged weights are not used; python -m tools.convert_checkpoint --weights {key}" in caplog.text


def test_files_without_weights(tmp_path) -> None:
    path = tmp_path / "none.pth"
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="no tensors: epoch"):
        load_checkpoint(build_model(config_of("official_v1_nano")), path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match=r"none\.pth: expected a dict of tensors, found Tensor"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="expected a checkpoint file, but it is a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing\.pth: .* it is not there"):
        read_checkpoint(tmp_path / "missing.pth")


HEAD = "head.weight"
ODD_WEIGHTS = {
    "nan": (HEAD, lambda value: value * float("nan"), "1 with nan or inf: head.weight"),
    "whole numbers": (HEAD, torch.Tensor.long, "1 of another kind: head.weight"),
    "sparse": (HEAD, torch.Tensor.to_sparse, "1 of another kind: head.weight"),
    "without values": (HEAD, lambda value: value.to("meta"), "1 of another kind: head.weight"),
    "huge by strides": (HEAD, lambda x: x[:1, :1].expand(2**20, 2**20), "1 of another shape: head.weight"),
    "text": (HEAD, str, "no tensors: head.weight"),
}


@pytest.mark.parametrize("name", ODD_WEIGHTS)
def test_odd_weights_are_refused_and_nothing_is_loaded(name: str, tmp_path) -> None:
    key, change, reason = ODD_WEIGHTS[name]
    model = build_model(config_of("official_v2_nano"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value + 1 if value.is_floating_point() else value for key, value in before.items()}
    torch.save(state | {key: change(before[key])}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=rf"(?s)odd\.pth.*{reason}"):
        load_checkpoint(model, tmp_path / "odd.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- Addresses ----------------------------------------------------------------------------------------------


class Answers(BaseHTTPRequestHandler):
    """Serves `files` by path; under /cut/ half of what is announced, under /slow/ after a moment."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        _, how, name = self.path.split("/")
        content = self.files.get(f"{how}/{name}", self.files.get(name))
        if content is None:
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            time.sleep(0.5 * (how == "slow"))
            self.wfile.write(content[: len(content) // 2] if how == "cut" else content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the console."""


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[str]:
    """The address of a server of this machine, and an empty cache."""
    monkeypatch.setattr(Answers, "files", {})
    monkeypatch.setattr(Answers, "asked", [])
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
        thread.join()


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("hub/checkpoints/[!.]*"))


def test_addresses_of_one_name_are_told_apart(server, tmp_path) -> None:
    """Both are fetched, once."""
    for name in ("first", "second"):
        write_safetensors({name: torch.ones(1)}, tmp_path / name)
        Answers.files[f"{name}/model.safetensors"] = (tmp_path / name).read_bytes()
    for _ in range(2):
        for name in ("first", "second"):
            assert [*read_checkpoint(f"{server}/{name}/model.safetensors")] == [name]
    assert Answers.asked == ["/first/model.safetensors", "/second/model.safetensors"]
    assert all(re.fullmatch(r"model-[0-9a-f]{8}\.safetensors", name) for name in kept(tmp_path))


def test_processes_of_a_machine_download_an_address_once(server, tmp_path) -> None:
    write_safetensors({"weight": torch.ones(1)}, tmp_path / "file")
    Answers.files["w.safetensors"] = (tmp_path / "file").read_bytes()
    with ThreadPoolExecutor(4) as pool:  # threads lock each other out as processes do
        contents = [*pool.map(read_checkpoint, [f"{server}/slow/w.safetensors"] * 4)]
    assert [[*content] for content in contents] == [["weight"]] * 4
    (name,) = kept(tmp_path)
    lock = tmp_path / f"hub/checkpoints/.{name}.lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()  # as where nobody may write, no lock is needed to read
    assert [*read_checkpoint(f"{server}/slow/w.safetensors")] == ["weight"]
    assert Answers.asked == ["/slow/w.safetensors"]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("cut/w.pth", r"downloaded to .*/hub/.*: not a checkpoint, or damaged.* The download is removed"),
        ("page/w.pth", r"downloaded to .*/hub/.*: not a checkpoint, or damaged.* The download is removed"),
        ("none/x.pth", r"could not be downloaded \(HTTP Error 404.*pass a local file"),
    ],
)
def test_what_cannot_be_downloaded_or_read_is_not_kept(address, reason, server, tmp_path) -> None:
    Answers.files["w.pth"] = (FOLDER / "official_v1_nano.pth").read_bytes()
    Answers.files["page/w.pth"] = b"<html>log in first</html>"
    with pytest.raises(ValueError, match=rf"{address}.* {reason}"):
        read_checkpoint(f"{server}/{address}")
    assert kept(tmp_path) == []
    assert "model" in read_checkpoint(f"{server}/whole/w.pth")
