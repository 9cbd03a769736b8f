"""Weight decay groups, optimizers and learning rate schedules."""

import math

import pytest
import torch
from conftest import NANO_WORDS
from torch import nn

from config import load_config
from lr_scheduler import build_scheduler, scale_rates
from models import build_model
from optimizer import build_optimizer, parameter_groups


def rates(name: str, updates_per_epoch: int, *opts: object) -> list[float]:
    """The learning rate of every update of 10 epochs, the first two of which are the warm-up."""
    settings = ["TRAIN.LR_SCHEDULER.NAME", name, "TRAIN.EPOCHS", 10, "TRAIN.WARMUP_EPOCHS", 2]
    settings += ["TRAIN.BASE_LR", 1.0, "TRAIN.WARMUP_LR", 0.1, "TRAIN.MIN_LR", 0.01]
    config = load_config(None, [*settings, *opts])
    optimizer = build_optimizer(config, nn.Linear(2, 2))
    scheduler = build_scheduler(config, optimizer, updates_per_epoch)
    found = []
    for number in range(config.TRAIN.EPOCHS * updates_per_epoch):
        scheduler.step_update(number)
        found.append(optimizer.param_groups[0]["lr"])
    return found


AFTER_WARM_UP = {
    "cosine": [0.01 + 0.99 * (1 + math.cos(math.pi * number / 50)) / 2 for number in range(10, 50)],
    "linear": [1.0 - 0.99 * number / 40 for number in range(40)],
    "step": [1.0] * 10 + [0.1] * 20 + [0.01] * 10,
}


@pytest.mark.parametrize("name", AFTER_WARM_UP)
def test_schedules(name: str) -> None:
    """A linear warm-up, which may be all, then what the name says: the cosine of the whole run, a line, or
    steps."""
    found = rates(name, 5, "TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 4)
    assert found[:10] == pytest.approx([0.1 + 0.9 * number / 10 for number in range(10)])
    assert found[10:] == pytest.approx(AFTER_WARM_UP[name])
    all_warm_up = rates(name, 1, "TRAIN.WARMUP_EPOCHS", 10)
    assert all_warm_up == pytest.approx([0.1 + 0.9 * number / 10 for number in range(10)])


def test_rates_scale_with_the_images_of_an_update() -> None:
    config = load_config(None, ["DATA.BATCH_SIZE", 64, "TRAIN.ACCUMULATION_STEPS", 4, "TRAIN.BASE_LR", 1e-3])
    scaled = scale_rates(config, world_size=8)
    assert pytest.approx(1e-3 * 64 * 8 * 4 / 512) == scaled.TRAIN.BASE_LR
    assert pytest.approx(config.TRAIN.MIN_LR * 4) == scaled.TRAIN.MIN_LR
    assert config.TRAIN.BASE_LR == 1e-3


@pytest.mark.parametrize("kind", ["focal", "focalv2"])
def test_decay_groups_follow_the_recipe(kind: str) -> None:
    model = build_model(load_config(None, [*NANO_WORDS, "MODEL.TYPE", kind, "MODEL.FOCAL.APE", True]))
    frozen = model.head.bias
    frozen.requires_grad_(False)
    with_decay, without = parameter_groups(model, 0.05)
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.05, 0.0)
    exempt = {id(parameter) for parameter in without["params"]}
    decayed = {id(parameter) for parameter in with_decay["params"]}
    assert not exempt & decayed
    for name, parameter in model.named_parameters():
        if parameter is frozen:
            assert id(parameter) not in exempt | decayed
            continue
        is_exempt = parameter.ndim == 1 or "bias_table" in name or name == "absolute_pos_embed"
        assert (id(parameter) in exempt) == is_exempt, name
        assert (id(parameter) in decayed) != is_exempt, name


def test_a_frozen_model_is_an_error() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        parameter_groups(model, 0.1)


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_optimizers_take_their_settings(name: str, kind: type) -> None:
    config = load_config(None, ["TRAIN.OPTIMIZER.NAME", name, "TRAIN.BASE_LR", 0.3])
    optimizer = build_optimizer(config, nn.Linear(2, 2))
    assert isinstance(optimizer, kind)
    assert {group["lr"] for group in optimizer.param_groups} == {0.3}
    if name == "sgd":
        assert optimizer.param_groups[0]["nesterov"]
