"""Training checkpoints: plain data, mismatches refused, what a resumed run knows."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from yacs.config import CfgNode

import storage
import train_state
import trainer
from checkpoints import Checkpoints
from config import load_config
from control import Agreement
from logger import Metrics
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


def checkpoints_of(folder: Path, state: TrainState) -> Checkpoints:
    return Checkpoints(state.config, folder, Agreement(), Metrics(None))


def saved(folder: Path, state: TrainState, epoch: int = 0) -> Path:
    """The file of a finished epoch, if it is due."""
    state.position = Position(epoch + 1, 0, 10 * (epoch + 1))
    checkpoints = checkpoints_of(folder, state)
    checkpoints.after_epoch(state)
    checkpoints.finish()
    return folder / f"ckpt_epoch_{epoch}.pth"


def save_best(folder: Path, state: TrainState) -> None:
    checkpoints = checkpoints_of(folder, state)
    checkpoints.save_best(state, state.max_accuracy)
    checkpoints.finish()


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
    assert set(content) == {*train_state.KEYS, "evaluated", "meters", "metrics_size", "run"}
    assert isinstance(content["config"], str)
    assert content["epoch"] == 0


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "ckpt_epoch_x.pth").write_text("")
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


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    content = torch.load(saved(tmp_path, make_state()), weights_only=True)
    content["format"] = 3
    torch.save(content, tmp_path / "later.pth")
    with pytest.raises(ValueError, match=r"later.pth: expected format 1 or 2, got 3"):
        make_state().restore(tmp_path / "later.pth")


def test_checkpoints_of_the_first_format_are_read(tmp_path: Path) -> None:
    content = torch.load(saved(tmp_path, make_state()), weights_only=True)
    for key in ("meters", "metrics_size", "run"):
        del content[key]
    for key in ("dealt", "order"):
        del content["position"][key]
    torch.save(content | {"format": 1}, tmp_path / "ckpt_epoch_0.pth")
    state = resumed(tmp_path)
    assert (state.position.epoch, state.position.updates, state.run) == (1, 10, 1)


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
    trainer.resume(state, checkpoint, folder, updates_per_epoch=10, order="", images=8)
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


def test_the_best_one_is_a_checkpoint_too(tmp_path: Path) -> None:
    """It is all there is when an epoch was not to be saved otherwise."""
    state = make_state(opts=("SAVE_FREQ", 2))
    state.max_accuracy, state.position = 20.0, Position(1, 0, 0)
    save_best(tmp_path, state)
    again = resumed(tmp_path, "SAVE_FREQ", 2)
    assert (again.position.epoch, again.max_accuracy) == (1, 20.0)


def test_the_best_accuracy_survives(tmp_path: Path) -> None:
    state = make_state(opts=("SAVE_FREQ", 2))
    state.max_accuracy, state.position = 20.0, Position(1, 0, 0)
    save_best(tmp_path, state)
    state.max_accuracy = 10.0
    numbered = saved(tmp_path, state, epoch=1)
    again = resumed(tmp_path, "SAVE_FREQ", 2)
    assert (again.position.epoch, again.max_accuracy) == (2, 20.0)
    again = resumed(tmp_path, "MODEL.RESUME", str(numbered), "TRAIN.AUTO_RESUME", False)
    assert again.max_accuracy == 20.0
    again = resumed(tmp_path / "new", "MODEL.RESUME", str(numbered))
    assert again.max_accuracy == 10.0


def go_on(folder: Path) -> tuple[TrainState, Checkpoints]:
    """A run that has gone on from what is found in the folder."""
    state = make_state()
    checkpoint = train_state.find_start(state.model, state.config, folder)
    assert checkpoint is not None
    checkpoints = checkpoints_of(folder, state)
    checkpoints.start(state, trainer.resume(state, checkpoint, folder, 10, "", 8))
    return state, checkpoints


def reach(checkpoints: Checkpoints, state: TrainState, accuracy: float) -> float:
    """Have an epoch evaluated; the accuracy that best.pth holds then."""
    state.max_accuracy = max(state.max_accuracy, accuracy)
    checkpoints.save_if_best(state, accuracy)
    checkpoints.saver.wait()
    return train_state.best_accuracy(checkpoints.output, state.run)


def test_a_refused_best_gives_way_to_the_next_that_can_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What counts is what lies on the disk, before and after a restart; the run says what it lacks."""
    saved(tmp_path, make_state(), epoch=0)
    state, checkpoints = go_on(tmp_path)
    assert reach(checkpoints, state, 10.0) == 10.0
    blocked = tmp_path / f".{storage.BEST_NAME}.tmp"
    blocked.mkdir()
    assert reach(checkpoints, state, 20.0) == 10.0
    assert "best.pth: expected to write a checkpoint" in caplog.text
    blocked.rmdir()
    assert reach(checkpoints, state, 9.0) == 10.0
    assert reach(checkpoints, state, 15.0) == 15.0
    saved(tmp_path, state, epoch=1)
    state, checkpoints = go_on(tmp_path)
    assert "holds 15.00%, not the best so far" in caplog.text
    assert state.max_accuracy == 20.0
    checkpoints.tell_of_best(state)
    assert "best.pth ends without the best weights: 20.00% was reached, it holds 15.00%" in caplog.text
    assert reach(checkpoints, state, 14.0) == 15.0
    assert reach(checkpoints, state, 20.5) == 20.5
    caplog.clear()
    checkpoints.tell_of_best(state)
    assert not caplog.text


def test_a_best_one_that_has_rotted_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, make_state(), epoch=0)
    state, checkpoints = go_on(tmp_path)
    assert reach(checkpoints, state, 20.0) == 20.0
    saved(tmp_path, state, epoch=1)
    best = tmp_path / storage.BEST_NAME
    best.write_bytes(best.read_bytes()[:-50])
    state, checkpoints = go_on(tmp_path)
    assert "holds 0.00%, not the best so far" in caplog.text
    assert reach(checkpoints, state, 1.0) == 1.0


def test_the_best_one_from_before_a_step_back_stays(tmp_path: Path) -> None:
    """Until it is beaten, also if the run that went back is started again."""
    state = make_state()
    state.run = 1
    numbered = saved(tmp_path, state, epoch=0)
    state.max_accuracy = 20.0
    save_best(tmp_path, state)
    again = resumed(tmp_path, "MODEL.RESUME", str(numbered), "TRAIN.AUTO_RESUME", False)
    assert (again.run, again.max_accuracy) == (2, 20.0)
    saved(tmp_path, again, epoch=1)
    state, checkpoints = go_on(tmp_path)
    assert (state.run, checkpoints.best_accuracy) == (2, 20.0)


def test_another_length_of_epochs_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, make_state(), epoch=3)
    resumed(tmp_path)
    assert "made" not in caplog.text
    state = make_state()
    checkpoint = train_state.find_start(state.model, state.config, tmp_path)
    trainer.resume(state, checkpoint, tmp_path, updates_per_epoch=7, order="", images=8)
    assert "made 40 updates in 4 epochs and 0 images, which are 28 here" in caplog.text
    assert state.position.updates == 28


def test_what_was_not_evaluated_says_so(tmp_path: Path) -> None:
    state = make_state()
    state.evaluated = False
    saved(tmp_path, state)
    assert not resumed(tmp_path).evaluated


def test_a_save_is_due_by_steps_and_by_minutes(tmp_path: Path) -> None:
    """At the first update at or after every third step; the last one of an epoch leaves it to the epoch's."""
    state = make_state(opts=("SAVE_STEPS", 3, "TRAIN.ACCUMULATION_STEPS", 2))
    checkpoints = checkpoints_of(tmp_path, state)
    checkpoints.start(state, best=0.0)
    for step in (2, 4, 6, 8, 10):
        state.position.step = step
        state.position.deal(1, 16)
        checkpoints.after_update(state, is_last=step == 10)
        checkpoints.finish()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"ckpt_epoch_0_step_4.pth", "ckpt_epoch_0_step_6.pth"}
    state = make_state(opts=("SAVE_MINUTES", 1e-9))
    checkpoints = checkpoints_of(tmp_path / "timed", state)
    state.position.step = 1
    state.position.deal(1, 8)
    checkpoints.after_update(state, is_last=False)
    checkpoints.finish()
    assert [path.name for path in (tmp_path / "timed").iterdir()] == ["ckpt_epoch_0_step_1.pth"]


def test_a_run_that_cannot_be_saved_ends_with_the_reason(tmp_path: Path) -> None:
    """The folder is a file: nothing can be written in it."""
    (tmp_path / "file").write_text("")
    state = make_state(opts=("SAVE_STEPS", 1, "SAVE_FAILURES_MAX", 2))
    checkpoints = checkpoints_of(tmp_path / "file", state)
    for step in (1, 2, 3):
        state.position.step = step
        state.position.deal(1, 8)
        if step == 3:
            with pytest.raises(ValueError, match="ckpt_epoch_0_step_2.pth: .* 2 in a row"):
                checkpoints.after_update(state, is_last=False)
        else:
            checkpoints.after_update(state, is_last=False)
        checkpoints.saver.wait()
    state = make_state()
    state.position.epoch = 1
    checkpoints = checkpoints_of(tmp_path / "file", state)
    checkpoints.after_epoch(state)
    with pytest.raises(ValueError, match="ckpt_epoch_0.pth: expected to write a checkpoint, got: "):
        checkpoints.finish()


def test_another_data_set_begins_the_epoch_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = make_state(opts=("SAVE_STEPS", 1))
    state.position = Position(2, 5, 25, [[1, 40]], "one order")
    checkpoints = checkpoints_of(tmp_path, state)
    checkpoints.save(state)
    checkpoints.finish()
    state = resumed(tmp_path, "SAVE_STEPS", 1)
    assert "inside an epoch of one order" in caplog.text
    assert (state.position.epoch, state.position.step, state.position.images) == (2, 0, 0)
    assert state.position.updates == 20
