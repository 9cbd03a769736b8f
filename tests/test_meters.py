"""Skipped updates, the moving average, and seeds."""

import json
import math
from pathlib import Path

import pytest
import torch
from test_main import OPTS, PLAIN, command, folder_of, make_run
from test_train_state import make_state
from timm.utils import ModelEmaV3
from torch import nn

import main
import utils
from config import load_config
from data import build_loaders
from models import build_model
from optimizer import build_optimizer
from training import loop, state
from utils import UserError


def new_model() -> nn.Sequential:
    """Logits of images of two by two pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))


def batches_with(bad: set[int], count: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for step in range(count):
        images = torch.randn(8, 3, 2, 2, generator=generator)
        if step in bad:
            images[3] = math.nan
        batches.append((images, torch.randint(4, (8,), generator=generator)))
    return batches


def train(tmp_path: Path, bad: set[int], *opts: object) -> tuple[state.TrainState, loop.Run]:
    torch.manual_seed(0)
    defaults = ["PRINT_FREQ", 3, "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.BASE_LR", 1.0]
    run = make_run(tmp_path, *defaults, *opts)
    trained = state.build_train_state(
        run.config, new_model(), run.precision, run.device, 6, soft_targets=False
    )
    loop.train_one_epoch(run, trained, batches_with(bad))
    return trained, run


@pytest.mark.parametrize(("name", "fused"), [("adamw", False), ("adamw", True), ("sgd", False)])
def test_a_bad_step_changes_nothing(
    name: str, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments and their average are as if the batch were not there."""

    def build_fused(*given: object) -> torch.optim.Optimizer:
        optimizer = build_optimizer(*given)
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, None
        return optimizer

    if fused:
        monkeypatch.setattr(state, "build_optimizer", build_fused)
    opts = ("TRAIN.EMA.ENABLED", True, "TRAIN.EMA.DECAY", 0.5, "TRAIN.EMA.WARMUP", True)
    trained, run = train(tmp_path, {2, 5}, "TRAIN.OPTIMIZER.NAME", name, *opts)
    torch.manual_seed(0)
    again = state.build_train_state(run.config, new_model(), run.precision, run.device, 6, soft_targets=False)
    average = ModelEmaV3(again.model, 0.5, use_warmup=True)
    again.ema = None
    for step, (images, targets) in enumerate(batches_with({2, 5})):
        again.position.updates = step
        if step not in (2, 5):
            again.criterion(again.model(images), targets).backward()
            loop.update(again, run.config.TRAIN.CLIP_GRAD)
            average.update(again.model, step=step + 1)
    for ours, theirs in ((trained.model, again.model), (trained.ema.module, average.module)):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.isfinite(one).all()
            assert torch.equal(one, other)
    assert not torch.equal(trained.ema.module[1].weight, trained.model[1].weight)
    assert math.isfinite(trained.meter.mean_loss)
    assert trained.position.updates == 6


@pytest.mark.parametrize("clip", [0.0, 5.0])
@pytest.mark.parametrize(("scaled", "fused"), [(False, False), (True, False), (True, True)])
def test_finite_gradients_whose_norm_overflows_change_nothing(scaled: bool, fused: bool, clip: float) -> None:
    trained = make_state()
    trained.optimizer = torch.optim.AdamW(trained.model.parameters(), fused=fused)
    trained.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=scaled)
    seen = []
    for factor in (1.0, 1e30, 1.0):
        trained.scaler.scale(factor * trained.model(torch.ones(2, 3)).sum()).backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in trained.model.parameters())
        assert math.isfinite(loop.update(trained, clip)) == (factor == 1)
        moments = [moment for state in trained.optimizer.state.values() for moment in state.values()]
        seen.append([tensor.clone() for tensor in (*trained.model.parameters(), *moments)])
    assert all(map(torch.equal, seen[0], seen[1]))
    assert not any(map(torch.equal, seen[1], seen[2]))
    assert all(torch.isfinite(tensor).all() for tensor in seen[2])


@pytest.mark.parametrize("kind", ["focal", "focalv2"])
def test_the_average_copies_buffers_that_are_no_floats(kind: str) -> None:
    """Such as the keys that Focal-fast stores: averaged, they would be other keys."""
    trained = make_state()
    trained.model = build_model(load_config(opts=[*OPTS, "MODEL.TYPE", kind]))
    trained.model.register_buffer("mask", torch.tensor([True, False]))
    trained.ema = ModelEmaV3(trained.model, 0.9)
    trained.position.updates = 100
    with torch.no_grad():
        for tensor in trained.model.state_dict().values():
            tensor.copy_(~tensor if tensor.dtype == torch.bool else tensor + 1)
    loop.update_ema(trained, torch.tensor(True))
    averages = trained.ema.module.state_dict()
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, averages[name]) != tensor.is_floating_point(), name
    assert any(tensor.dtype == torch.int64 for tensor in averages.values()) == (kind == "focalv2")


def test_skipped_updates_in_a_row_end_the_run(tmp_path: Path) -> None:
    opts = ("TRAIN.BAD_STEPS_MAX", 2, "TRAIN.OPTIMIZER.NAME", "sgd")
    train(tmp_path, {1, 3, 5}, *opts)
    message = r"epoch 1: expected finite grad.*4 updates in a row.*up to step 6.*another --tag"
    for source in ("", f" and --resume {tmp_path}/best.pth"):
        with pytest.raises(UserError, match=f"{message}{source}, with a lower"):
            train(tmp_path, {0, 2, 3, 4, 5}, *opts, "TRAIN.BAD_STEPS_MAX", 4)  # over two log lines
        (tmp_path / "best.pth").touch()


def test_skipped_updates_of_the_scaler_are_counted(
    few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale that begins too large: halved until nothing overflows."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, init_scale=2.0**24, **k))
    opts = [*OPTS, *PLAIN, "TRAIN.EPOCHS", 1, "PRINT_FREQ", 100]
    assert main.main(command(few_images, tmp_path, opts, "--amp-dtype", "fp16")) == 0
    record = json.loads((folder_of(tmp_path) / "metrics.jsonl").read_text().splitlines()[0])
    assert record["skipped"] > 0
    assert record["steps_per_epoch"] == record["step"] + 1  # the last of the epoch
    assert record["loss_scale"] == 2.0 ** (24 - record["skipped"])
    content = torch.load(folder_of(tmp_path) / "ckpt_epoch_0.pth", weights_only=True)
    assert content["scaler"]["scale"] == record["loss_scale"]


def test_another_seed_means_other_weights_and_another_order(few_images: Path) -> None:
    order, weights = [], []
    for seed in (1, 1, 2):
        config = load_config(None, [*OPTS, "SEED", seed, "DATA.DATA_PATH", str(few_images)])
        utils.seed_everything(config.SEED)
        weights.append(build_model(config).head.weight)
        order.append(list(build_loaders(config).train_sampler))
    assert order[0] == order[1] != order[2]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
