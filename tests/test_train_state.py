"""The state of training: what does not fit is refused, what differs is reported."""

from pathlib import Path

import pytest
import torch
from torch import nn

from config import load_config
from lr_scheduler import build_scheduler
from models import read_checkpoint
from optimizer import build_optimizer
from training.checkpoints import write_checkpoint
from training.run import resume
from training.state import Position, TrainState, check_checkpoint
from utils import UserError


def make_state(width: int = 4, opts: tuple[object, ...] = (), seed: int = 0) -> TrainState:
    """A small model after one update, so that the optimizer has moments."""
    torch.manual_seed(seed)
    config = load_config(None, list(opts))
    model = nn.Linear(3, width)
    optimizer = build_optimizer(config, model)
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    return TrainState(
        config=config,
        model=model,
        ddp_model=model,
        criterion=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, 10),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        steps_per_epoch=10,
    )


def saved(folder: Path, state: TrainState) -> Path:
    path = folder / "a.pth"
    write_checkpoint(state.state_dict(), path)
    return path


def load(state: TrainState, path: Path) -> TrainState:
    content = read_checkpoint(path)
    check_checkpoint(content, str(path), state.model, state.config)
    state.load_state_dict(content, str(path))
    return state


def test_what_is_no_training_checkpoint_is_refused(tmp_path: Path) -> None:
    content, state = make_state().state_dict(), make_state(seed=1)
    before = state.model.weight.clone()
    wrong = {"--pretrained": {"model": content["model"]}}
    wrong["model_ema"] = content | {"model_ema": {"weight": torch.ones(2)}}
    for words, changed in wrong.items():
        torch.save(changed, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=rf"(?s)a\.pth.*{words}"):
            load(state, tmp_path / "a.pth")
    assert torch.equal(state.model.weight, before)


def test_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.pth does not fit[^$]*weight is \[5, 3\], expected \[4, 3\]"):
        load(make_state(), saved(tmp_path, make_state(width=5)))
    with pytest.raises(UserError, match="TRAIN.OPTIMIZER.NAME 'adamw'"):
        load(make_state(), saved(tmp_path, make_state(opts=("TRAIN.OPTIMIZER.NAME", "sgd"))))
    state = make_state()
    state.model.bias.requires_grad_(False)
    state.optimizer = build_optimizer(state.config, state.model)
    with pytest.raises(UserError, match="optimizer state"):
        load(state, saved(tmp_path, make_state()))


def test_this_runs_options_win_and_differences_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opts = ("TRAIN.WEIGHT_DECAY", 0.3, "TRAIN.OPTIMIZER.EPS", 1e-6, "TRAIN.OPTIMIZER.BETAS", (0.8, 0.9))
    state = make_state(opts=opts, seed=1)
    for group in state.optimizer.param_groups:
        group["initial_lr"] = 0.25
    load(state, saved(tmp_path, make_state()))
    assert [group["weight_decay"] for group in state.optimizer.param_groups] == [0.3, 0.0]
    for group in state.optimizer.param_groups:
        assert (group["eps"], group["betas"], group["initial_lr"]) == (1e-6, (0.8, 0.9), 0.25)
    assert "a.pth continues with TRAIN.OPTIMIZER.BETAS [0.8, 0.9] instead of [0.9, 0.999], " in caplog.text
    assert caplog.text.count("instead of") == 3


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

    state = load(make(now), saved(tmp_path, make(was)))
    assert state.optimizer.param_groups[0]["fused"] is now
    steps = [moments["step"] for moments in state.optimizer.state.values()]
    assert {step.device.type for step in steps} == {device if now else "cpu"}
    state.optimizer.step()
    assert {int(step) for step in steps} == {2}


def resumed(position: Position) -> TrainState:
    state = make_state()
    content = state.state_dict() | {"position": vars(position)}
    resume(state, content, "a.pth", "an order")
    return state


def test_a_changed_length_of_epochs_goes_on_by_images(caplog: pytest.LogCaptureFixture) -> None:
    """make_state has epochs of 10 updates, of 128 images each."""
    assert resumed(Position(4, 0, 40)).position.updates == 40
    assert resumed(Position(2, 5, 25, 640, "an order")).position.updates == 25
    assert "WARNING" not in caplog.text
    assert resumed(Position(4, 0, 28)).position.updates == 40
    assert resumed(Position(1, 5, 99, 640, "an order")).position == Position(1, 5, 15, 640, "an order")
    assert "number of processes: 99 updates, where this run makes 15; it continues" in caplog.text


def test_another_order_of_the_images_begins_the_epoch_again(caplog: pytest.LogCaptureFixture) -> None:
    state = resumed(Position(2, 5, 25, 640, "one order"))
    assert "inside an epoch of one order" in caplog.text
    assert state.position == Position(2, 0, 20, 0, "one order")
