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
    assert set(content) == {*train_state.KEYS, "evaluated"}
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
    state = make_state()
    assert train_state.find_start(state.model, state.config, tmp_path) is None


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
    state = make_state()
    before = state.model.weight.clone()
    with pytest.raises(
        ValueError, match=r"ckpt_epoch_0.pth does not fit[^$]*weight is \[5, 3\], expected \[4, 3\]"
    ):
        state.restore(path)
    assert torch.equal(state.model.weight, before)


def test_a_checkpoint_inside_an_epoch_is_refused(tmp_path: Path) -> None:
    content = torch.load(saved(tmp_path, make_state()), weights_only=True)
    content["position"]["step"] = 7
    torch.save(content, tmp_path / "inside.pth")
    with pytest.raises(ValueError, match=r"inside.pth: expected .* between epochs, got .* step 7"):
        make_state().restore(tmp_path / "inside.pth")


def test_this_runs_optimizer_options_win(tmp_path: Path) -> None:
    """Of the checkpoint come the moments alone; the log says 'going on with' this run's options."""
    path = saved(tmp_path, make_state())
    opts = ("TRAIN.WEIGHT_DECAY", 0.3, "TRAIN.OPTIMIZER.EPS", 1e-6, "TRAIN.OPTIMIZER.BETAS", (0.8, 0.9))
    state = make_state(opts=opts, seed=1)
    for group in state.optimizer.param_groups:
        group["initial_lr"] = 0.25
    state.restore(path)
    assert [group["weight_decay"] for group in state.optimizer.param_groups] == [0.3, 0.0]
    for group in state.optimizer.param_groups:
        assert (group["eps"], group["betas"], group["initial_lr"]) == (1e-6, (0.8, 0.9), 0.25)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("was", "now"), [(False, True), (True, False)])
def test_fused_and_plain_adamw_read_each_others_checkpoints(
    tmp_path: Path, was: bool, now: bool, device: str
) -> None:
    """A fused AdamW fails on step counters that are not where its parameters are."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")

    def make(fused: bool) -> TrainState:
        state = make_state()
        state.model.to(device)
        state.optimizer = torch.optim.AdamW(state.model.parameters(), fused=fused)
        state.model(torch.ones(2, 3, device=device)).sum().backward()
        state.optimizer.step()
        return state

    path = saved(tmp_path, make(was))
    state = make(now)
    state.restore(path)
    assert state.optimizer.param_groups[0]["fused"] is now
    steps = [moments["step"] for moments in state.optimizer.state.values()]
    assert {step.device.type for step in steps} == {device if now else "cpu"}
    state.optimizer.step()
    assert {int(step) for step in steps} == {2}


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


def resumed(folder: Path, *opts: object) -> TrainState:
    """A fresh state that has gone on from what is found in the folder."""
    state = make_state(opts=opts)
    checkpoint = train_state.find_start(state.model, state.config, folder)
    assert checkpoint is not None
    train_state.resume(state, checkpoint, folder, updates_per_epoch=10)
    return state


def test_the_output_folder_wins_over_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older = saved(tmp_path / "elsewhere", make_state(), epoch=1)
    saved(tmp_path / "run", make_state(), epoch=3)
    assert resumed(tmp_path / "run", "MODEL.RESUME", str(older)).position.epoch == 4
    assert "instead of" in caplog.text
    state = resumed(tmp_path / "run", "MODEL.RESUME", str(older), "TRAIN.AUTO_RESUME", False)
    assert state.position.epoch == 2


def test_mistakes_name_the_key(tmp_path: Path) -> None:
    other = saved(tmp_path / "run", make_state(width=5))
    state = make_state(opts=("MODEL.RESUME", str(other)))
    with pytest.raises(ValueError, match=r"^TRAIN.AUTO_RESUME .*--tag.*does not fit"):
        train_state.find_start(state.model, state.config, tmp_path / "run")
    with pytest.raises(ValueError, match=r"^MODEL.RESUME \(--resume\): .*does not fit"):
        train_state.find_start(state.model, state.config, tmp_path / "new")
    state = make_state(opts=("MODEL.RESUME", "/no/such.pth"))
    with pytest.raises(FileNotFoundError, match=r"^MODEL.RESUME \(--resume\): /no/such.pth"):
        train_state.find_start(state.model, state.config, tmp_path / "new")


def touch(path: Path, seconds: int) -> None:
    os.utime(path, (seconds, seconds))


def test_the_newest_is_the_one_written_last(tmp_path: Path) -> None:
    """A fresh run in the folder of a longer one continues itself."""
    touch(saved(tmp_path, make_state(), epoch=9), 1000)
    fresh = saved(tmp_path, make_state(), epoch=0)
    touch(fresh, 2000)
    assert train_state.find_newest(tmp_path) == fresh
    touch(fresh, 1000)
    assert train_state.find_newest(tmp_path) == tmp_path / "ckpt_epoch_9.pth"


def test_the_best_one_is_a_checkpoint_too(tmp_path: Path) -> None:
    """It is all there is when an epoch was not to be saved otherwise."""
    state = make_state(opts=("SAVE_FREQ", 2))
    state.max_accuracy, state.position = 20.0, Position(1, 0, 0)
    train_state.save_epoch(state, tmp_path, is_best=True)
    again = resumed(tmp_path, "SAVE_FREQ", 2)
    assert (again.position.epoch, again.max_accuracy) == (1, 20.0)


def test_the_best_accuracy_survives(tmp_path: Path) -> None:
    state = make_state(opts=("SAVE_FREQ", 2))
    state.max_accuracy, state.position = 20.0, Position(1, 0, 0)
    train_state.save_epoch(state, tmp_path, is_best=True)
    state.max_accuracy = 10.0
    numbered = saved(tmp_path, state, epoch=1)
    again = resumed(tmp_path, "SAVE_FREQ", 2)
    assert (again.position.epoch, again.max_accuracy) == (2, 20.0)
    again = resumed(tmp_path, "MODEL.RESUME", str(numbered), "TRAIN.AUTO_RESUME", False)
    assert again.max_accuracy == 20.0
    again = resumed(tmp_path / "new", "MODEL.RESUME", str(numbered))
    assert again.max_accuracy == 10.0


def test_another_length_of_epochs_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, make_state(), epoch=3)
    resumed(tmp_path)
    assert "made" not in caplog.text
    state = make_state()
    checkpoint = train_state.find_start(state.model, state.config, tmp_path)
    train_state.resume(state, checkpoint, tmp_path, updates_per_epoch=7)
    assert "made 40 updates in 4 epochs, which are 28 here" in caplog.text
    assert state.position.updates == 28


def test_what_was_not_evaluated_says_so(tmp_path: Path) -> None:
    state = make_state()
    state.evaluated = False
    saved(tmp_path, state)
    assert not resumed(tmp_path).evaluated
