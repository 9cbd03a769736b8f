"""Training checkpoints whose parts are not what they should be end in a sentence that names the file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_state import make_state, resumed, save_best, saved

import content_check
import train_state

Content = dict[str, Any]
NESTED: dict[str, Callable[[Content], Any]] = {
    "position.step is text": lambda content: content["position"].update(step="x"),
    "position.epoch is a float": lambda content: content["position"].update(epoch=1.5),
    "position.epoch is below zero": lambda content: content["position"].update(epoch=-1),
    "position.updates is beyond all": lambda content: content["position"].update(updates=2**70),
    "position.updates is missing": lambda content: content["position"].pop("updates"),
    "position has an unknown part": lambda content: content["position"].update(tempo=1),
    "position.dealt is flat": lambda content: content["position"].update(dealt=[1, 40]),
    "position.dealt to no process": lambda content: content["position"].update(dealt=[[0, 40]]),
    "position.dealt to too many": lambda content: content["position"].update(dealt=[[2**40, 40]]),
    "position.order is a number": lambda content: content["position"].update(order=3),
    "meters.loss_sum is text": lambda content: content["meters"].update(loss_sum="1"),
    "meters.image_sum is nan": lambda content: content["meters"].update(image_sum=float("nan")),
    "meters.gathered is flat": lambda content: content["meters"].update(gathered=[torch.zeros(5)]),
    "meters.gathered is narrow": lambda content: content["meters"].update(gathered=[torch.zeros(1, 2, 4)]),
    "meters.streak has no losses": lambda content: content["meters"].update(
        streak=[{"step": 1, "number": 2, "grad_norm": 3.0}]
    ),
    "meters.replaced is missing": lambda content: content["meters"].pop("replaced"),
    "optimizer.state is a list": lambda content: content["optimizer"].update(state=[]),
    "optimizer.state of a parameter is text": lambda content: content["optimizer"]["state"].update({0: "x"}),
    "a moment is missing": lambda content: content["optimizer"]["state"][0].pop("exp_avg"),
    "param_groups has no params": lambda content: content["optimizer"]["param_groups"][0].pop("params"),
    "a weight is text": lambda content: content["model"].update(weight="x"),
    "an average is of another shape": lambda content: content.update(model_ema={"weight": torch.zeros(2)}),
    "an average is nan": lambda content: content.update(
        model_ema={"weight": content["model"]["weight"] + float("nan")}
    ),
    "config is no yaml": lambda content: content.update(config="a: [1"),
    "config is a list": lambda content: content.update(config="[1, 2]"),
    "config has a date": lambda content: content.update(config="SEED: 2020-01-01"),
    "config has aliases": lambda content: content.update(config="a: &a [1]\nb: *a"),
    "scaler has one part": lambda content: content.update(scaler={"scale": 1.0}),
    "scaler has no scale": lambda content: content.update(
        scaler=torch.amp.GradScaler("cpu").state_dict() | {"scale": 0.0}
    ),
}
WRONG = {
    "none": None,
    "text": "x",
    "list": [1],
    "nan": float("nan"),
    "below zero": -1,
    "tensor": torch.ones(2),
}


def refused(content: Content, folder: Path) -> None:
    path = folder / "wrong.pth"
    torch.save(content, path)
    state = make_state(seed=1)
    before = state.model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"wrong\.pth"):
        state.restore(path)
    assert torch.equal(state.model.weight, before)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("good"), make_state())


def test_what_is_written_here_is_accepted(good: Path) -> None:
    content = torch.load(good, weights_only=True)
    assert content.keys() >= content_check.PARTS.keys() - {"model_ema"}
    content_check.check_content(content, "file")
    scaler = torch.amp.GradScaler("cpu")
    content_check.check_content(content | {"scaler": scaler.state_dict()}, "file")


@pytest.mark.parametrize("name", NESTED)
def test_a_wrong_part_of_a_part_is_refused(name: str, good: Path, tmp_path: Path) -> None:
    content = torch.load(good, weights_only=True)
    NESTED[name](content)
    refused(content, tmp_path)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", [*content_check.PARTS, "format"])
def test_a_part_of_another_type_is_refused(name: str, wrong: str, good: Path, tmp_path: Path) -> None:
    if (name, wrong) in {("max_accuracy", "below zero"), ("config", "text")}:
        wrong = "none"
    content = torch.load(good, weights_only=True)
    refused(content | {name: WRONG[wrong]}, tmp_path)


@pytest.mark.parametrize("wrong", [None, "x", [1]])
def test_a_best_file_of_another_kind_counts_for_nothing(wrong: Any, tmp_path: Path) -> None:
    saved(tmp_path, make_state(), epoch=1)
    content = torch.load(tmp_path / "ckpt_epoch_1.pth", weights_only=True)
    torch.save(content | {"max_accuracy": wrong}, tmp_path / "best.pth")
    assert train_state.best_accuracy(tmp_path, 0) == 0.0


def test_going_back_to_an_older_file_is_a_run_of_its_own(tmp_path: Path) -> None:
    """Else the files after it, which were to be left behind, would be the newest ones."""
    state = make_state()
    state.run = 1
    paths = [saved(tmp_path, state, epoch) for epoch in range(4)]
    again = resumed(tmp_path, "MODEL.RESUME", str(paths[1]), "TRAIN.AUTO_RESUME", False)
    assert (again.position.epoch, again.run) == (2, 2)
    save_best(tmp_path, again)
    assert resumed(tmp_path).position.epoch == 2
