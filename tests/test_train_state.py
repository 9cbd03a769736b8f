"""Training checkpoints: complete or absent, plain data, the newest whole one found, mismatches refused."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from yacs.config import CfgNode

import train_state
from config import load_config
from optimizer import build_optimizer
from train_state import Position, TrainState


def make_state(width: int = 4, opts: tuple[object, ...] = (), seed: int = 0) -> TrainState:
    """A small model after one update, so that the optimizer has moments."""
    torch.manual_seed(seed)
    config: CfgNode = load_config(None, list(opts))
    model = nn.Linear(3, width)
    optimizer = build_optimizer(config, model)
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    return TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), config)


def saved(folder: Path, state: TrainState, epoch: int = 0) -> Path:
    state.position = Position(epoch + 1, 0, 10 * (epoch + 1))
    train_state.save_epoch(state, folder, is_best=False)
    return folder / f"ckpt_epoch_{epoch}.pth"


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    state = make_state()
    state.max_accuracy = 12.5
    path = saved(tmp_path, state, epoch=4)
    other = make_state(seed=1)
    other.restore(path)
    assert torch.equal(other.model.weight, state.model.weight)
    assert (other.position, other.max_accuracy) == (Position(5, 0, 50), 12.5)
    old, new = state.optimizer.state_dict(), other.optimizer.state_dict()
    for index in old["state"]:
        for name, value in old["state"][index].items():
            assert torch.equal(new["state"][index][name], value)


def test_a_checkpoint_is_plain_data(tmp_path: Path) -> None:
    content = torch.load(saved(tmp_path, make_state()), weights_only=True)
    assert set(content) == set(train_state.KEYS)
    assert isinstance(content["config"], str)
    assert content["epoch"] == 0


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = saved(tmp_path, make_state())
    before = path.read_bytes()
    code = (
        "import os, signal, sys, torch, train_state; from pathlib import Path\n"
        "def half(state, file):\n"
        "    file.write(b'x' * 1000); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = half\n"
        "train_state.save({}, Path(sys.argv[1]))\n"
    )
    repo = Path(train_state.__file__).parent
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=repo, check=False)
    assert done.returncode == -9
    assert path.read_bytes() == before
    assert train_state.find_newest(tmp_path) == path
    saved(tmp_path, make_state(seed=3))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ckpt_epoch_0.pth"]


def test_a_failed_writer_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(state: object, file: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        train_state.save({}, tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_the_newest_whole_checkpoint_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    for epoch in (2, 9, 10):
        newest = saved(tmp_path, make_state(), epoch)
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        weight = make_state().model.weight.detach().numpy().tobytes()
        content[content.index(weight) + 1] ^= 255
    newest.write_bytes({"truncated": content[:-100], "flipped": content, "empty": b""}[damage])
    assert train_state.find_newest(tmp_path) == tmp_path / "ckpt_epoch_9.pth"
    assert "ckpt_epoch_10.pth is damaged" in caplog.text


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "ckpt_epoch_x.pth").write_text("")
    assert train_state.find_newest(tmp_path) is None
    assert not train_state.resume(make_state(), tmp_path)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_refused_not_run(tmp_path: Path, writer: str) -> None:
    path, target = tmp_path / "ckpt_epoch_0.pth", tmp_path / "exploded"
    content = {"model": {}, "optimizer": Bomb(target)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="ckpt_epoch_0"):
        make_state().restore(path)
    assert not target.exists()


def test_weights_alone_are_no_training_checkpoint(tmp_path: Path) -> None:
    torch.save({"model": make_state().model.state_dict()}, tmp_path / "release.pth")
    with pytest.raises(ValueError, match="--pretrained"):
        make_state().restore(tmp_path / "release.pth")


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, make_state(width=5))
    with pytest.raises(ValueError, match="weights of this model"):
        make_state().restore(path)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, make_state(opts=("TRAIN.OPTIMIZER.NAME", "sgd")))
    with pytest.raises(ValueError, match="TRAIN.OPTIMIZER.NAME 'adamw'"):
        make_state().restore(path)


def test_other_parameter_groups_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, make_state())
    state = make_state()
    state.model.bias.requires_grad_(False)
    state.optimizer = build_optimizer(state.config, state.model)
    with pytest.raises(ValueError, match="optimizer state"):
        state.restore(path)


def test_a_changed_recipe_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path, make_state())
    make_state(opts=("TRAIN.EPOCHS", 100)).restore(path)
    assert "TRAIN.EPOCHS 300" in caplog.text
    assert caplog.text.count("WARNING") == 1


@pytest.mark.parametrize("poisoned", ["weight", "moment"])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path, poisoned: str) -> None:
    state = make_state()
    moment = state.optimizer.state[state.model.weight]["exp_avg"]
    with torch.no_grad():
        (state.model.weight if poisoned == "weight" else moment)[0, 0] = float("inf")
    with pytest.raises(ValueError, match="finite"):
        saved(tmp_path, state)
    assert not list(tmp_path.iterdir())


def test_save_frequency_counts_epochs_and_keeps_the_last(tmp_path: Path) -> None:
    state = make_state(opts=("SAVE_FREQ", 3, "TRAIN.EPOCHS", 7, "TRAIN.WARMUP_EPOCHS", 0))
    for epoch in range(7):
        saved(tmp_path, state, epoch)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"ckpt_epoch_2.pth", "ckpt_epoch_5.pth", "ckpt_epoch_6.pth"}


def test_the_output_folder_wins_over_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older = saved(tmp_path / "elsewhere", make_state(), epoch=1)
    saved(tmp_path / "run", make_state(), epoch=3)
    state = make_state(opts=("MODEL.RESUME", str(older)))
    assert train_state.resume(state, tmp_path / "run")
    assert state.position.epoch == 4
    assert "instead of" in caplog.text
    state = make_state(opts=("MODEL.RESUME", str(older), "TRAIN.AUTO_RESUME", False))
    assert train_state.resume(state, tmp_path / "run")
    assert state.position.epoch == 2


def test_the_best_accuracy_survives(tmp_path: Path) -> None:
    state = make_state(opts=("SAVE_FREQ", 2))
    state.max_accuracy = 10.0
    saved(tmp_path, state, epoch=1)
    state.max_accuracy, state.position = 20.0, Position(3, 0, 0)
    train_state.save_epoch(state, tmp_path, is_best=True)
    again = make_state(opts=("SAVE_FREQ", 2))
    assert train_state.resume(again, tmp_path)
    assert (again.position.epoch, again.max_accuracy) == (2, 20.0)
