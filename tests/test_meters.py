"""Bad steps, moving average and meters: what is skipped, counted, averaged and told."""

import json
import math
from pathlib import Path

import pytest
import torch
from test_main import PLAIN, command, folder_of, make_run
from torch import nn

import engine
import main
import meters
from config import load_config
from control import Agreement
from data import build_loaders
from meters import TrainMeter
from models import build_model
from optimizer import build_optimizer


class Pixel(nn.Module):
    """Logits from the first pixel; remembers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images[:, :, 0, 0])


def batches_with(bad: set[int], count: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for step in range(count):
        images = torch.randn(8, 3, 2, 2, generator=generator)
        if step in bad:
            images[3] = math.nan
        batches.append((images, torch.randint(4, (8,), generator=generator)))
    return batches


def train(tmp_path: Path, bad: set[int], *opts: object) -> tuple[engine.Training, engine.Run]:
    torch.manual_seed(0)
    defaults = ["PRINT_FREQ", 3, "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.BASE_LR", 1.0]
    run = make_run(tmp_path, *defaults, *opts)
    training = engine.prepare(run, Pixel(), 6, soft_targets=False)
    engine.train_one_epoch(run, training, batches_with(bad))
    return training, run


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_bad_step_changes_nothing(
    name: str, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither weights nor moments, as if the batch were not there; the loss is that of the others."""
    if fused and name == "sgd":
        pytest.skip("not used here: its momentum would begin with memory that was never written")
    if fused:
        build = build_optimizer

        def build_fused(*given: object) -> torch.optim.Optimizer:
            optimizer = build(*given)
            for group in optimizer.param_groups:
                group["fused"], group["foreach"] = True, None
            return optimizer

        monkeypatch.setattr(engine, "build_optimizer", build_fused)
    training, run = train(tmp_path, {2, 5}, "TRAIN.OPTIMIZER.NAME", name)
    weights = [weight.detach().clone() for weight in training.state.model.parameters()]
    assert all(torch.isfinite(weight).all() for weight in weights)
    torch.manual_seed(0)
    again = engine.prepare(run, Pixel(), 6, soft_targets=False)
    for step, (images, targets) in enumerate(batches_with({2, 5})):
        again.state.position.updates = step
        if step not in (2, 5):
            again.criterion(again.net(images), targets).backward()
            engine.update(again, run.config.TRAIN.CLIP_GRAD)
    for ours, theirs in zip(weights, again.state.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert math.isfinite(training.state.meter.mean_loss)
    assert training.state.position.updates == 6


def test_bad_steps_in_a_row_end_the_run_with_a_dump(tmp_path: Path) -> None:
    opts = ("TRAIN.BAD_STEPS_MAX", 2, "TRAIN.OPTIMIZER.NAME", "sgd")
    train(tmp_path, {1, 3, 5}, *opts)
    assert not (tmp_path / engine.DUMP_NAME).exists()
    with pytest.raises(ValueError, match=r"epoch 1, step 3: expected a finite loss.*2 updates in a row"):
        train(tmp_path, {0, 2, 3}, *opts)  # over two logging intervals
    dump = json.loads((tmp_path / engine.DUMP_NAME).read_text())
    assert [(bad["step"], bad["grad_norm"], bad["batches"][0]["loss"]) for bad in dump["steps"]] == [
        (2, "nan", ["nan"]),
        (3, "nan", ["nan"]),
    ]
    assert dump["steps"][0]["lr"] > dump["steps"][1]["lr"] > 0


def test_the_dump_holds_every_batch_of_an_update(tmp_path: Path) -> None:
    """The bad one is the first of three, and the log line comes between them."""
    opts = ("TRAIN.BAD_STEPS_MAX", 1, "TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.ACCUMULATION_STEPS", 3)
    with pytest.raises(ValueError, match="epoch 1, step 6"):
        train(tmp_path, {3}, *opts, "PRINT_FREQ", 5)
    (bad,) = json.loads((tmp_path / engine.DUMP_NAME).read_text())["steps"]
    assert [batch["step"] for batch in bad["batches"]] == [3, 4, 5]
    assert [batch["loss"] == ["nan"] for batch in bad["batches"]] == [True, False, False]


def test_skipped_updates_of_the_scaler_are_counted(
    few_images: Path, nano_opts: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale that begins too large: halved until nothing overflows."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, init_scale=2.0**24, **k))
    opts = [*nano_opts, *PLAIN, "TRAIN.EPOCHS", 1, "PRINT_FREQ", 100]
    assert main.main(command(few_images, tmp_path, opts, "--amp-dtype", "fp16")) == 0
    record = json.loads((folder_of(tmp_path) / "metrics.jsonl").read_text().splitlines()[0])
    assert record["skipped"] > 0
    assert record["loss_scale"] == 2.0 ** (24 - record["skipped"])
    content = torch.load(folder_of(tmp_path) / "ckpt_epoch_0.pth", weights_only=True)
    assert content["scaler"]["scale"] == record["loss_scale"]


def test_the_average_is_evaluated_saved_and_can_be_evaluated_alone(
    few_images: Path, nano_opts: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opts = [*nano_opts, *PLAIN, "TRAIN.EMA.ENABLED", True, "TRAIN.EMA.DECAY", 0.5, "TRAIN.EPOCHS", 1]
    assert main.main(command(few_images, tmp_path, opts)) == 0
    record = json.loads((folder_of(tmp_path) / "metrics.jsonl").read_text().splitlines()[-1])
    path = folder_of(tmp_path) / "best.pth"
    content = torch.load(path, weights_only=True)
    assert content["max_accuracy"] == max(record["acc1"], record["acc1_ema"])
    assert all(tensor.is_floating_point() for tensor in content["model_ema"].values())
    assert not torch.equal(content["model_ema"]["head.weight"], content["model"]["head.weight"])
    flags = ["--eval", "--resume", str(path)]
    for value, key in ((True, "acc1_ema"), (False, "acc1")):
        plain = [*nano_opts, *PLAIN, "EVAL_EMA", value]
        assert main.main(command(few_images, tmp_path / "eval", plain, *flags)) == 0
        assert f"acc1 {record[key]:.3f}%" in capsys.readouterr().out
    del content["model_ema"]
    torch.save(content, tmp_path / "without.pth")
    flags = ["--eval", "--resume", str(tmp_path / "without.pth")]
    assert main.main(command(few_images, tmp_path / "eval", [*plain, "EVAL_EMA", True], *flags)) == 2
    assert "expected a checkpoint with a moving average" in capsys.readouterr().err


def test_the_average_is_timms(tmp_path: Path) -> None:
    training, _ = train(tmp_path, {1}, "TRAIN.EMA.ENABLED", True, "TRAIN.EMA.DECAY", 0.5)
    ema = training.state.ema
    assert ema is not None
    before = ema.module.head.weight.clone()
    ema.update(training.state.model, step=100)
    expected = before.lerp(training.state.model.head.weight, 0.5)
    torch.testing.assert_close(ema.module.head.weight, expected)


def collected(meter: TrainMeter, steps: range) -> None:
    for step in steps:
        meter.add_batch(step, torch.tensor(1.0 / (step + 3)), images=5)
        meter.add_update(step, torch.tensor(0.1 * step))


def test_meters_go_on_exactly() -> None:
    """Sums with a save in the middle of an interval are the same to the last digit."""
    whole, stopped, resumed = TrainMeter(3), TrainMeter(3), TrainMeter(3)
    collected(whole, range(7))
    collected(stopped, range(4))
    stopped.gather()
    resumed.restore(stopped.capture())
    collected(resumed, range(4, 7))
    ours, theirs = whole.read(), resumed.read()
    assert (ours.loss, ours.grad_norm, ours.skipped) == (theirs.loss, theirs.grad_norm, theirs.skipped)
    assert whole.mean_loss == resumed.mean_loss
    exact = math.fsum(5 * float(torch.tensor(1.0 / (step + 3))) for step in range(7)) / 35
    assert ours.loss == exact


def test_meters_count_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with different losses; a loss that is not finite on one of them is bad for both."""
    other = torch.tensor([[0.0, 5.0, 0.0, 3.0, 1.0], [1.0, 5.0, 1.0, math.inf, 1.0]], dtype=torch.float64)

    def gather(rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([rows, other if rows.ndim == 2 else rows + 2])

    monkeypatch.setattr(meters.utils, "gather_rows", gather)
    meter = TrainMeter(2)
    for step in range(2):
        meter.add_batch(step, torch.tensor(1.0), images=10)
        meter.add_update(step, torch.tensor(1.0))
    stats = meter.read()
    assert stats.loss == (10 + 15 + 10) / 25
    assert meter.replaced == 2
    assert [bad.losses for bad in meter.streak] == [[[1.0, math.inf]]]
    assert not meter.is_hopeless


def test_deterministic_training_is_the_same_twice(
    few_images: Path, nano_opts: list[object], tmp_path: Path
) -> None:
    """Two runs, workers included, with DETERMINISTIC; without and with workers."""
    records = []
    try:
        for number, workers in enumerate((2, 2, 0)):
            opts = [*nano_opts, "TRAIN.EPOCHS", 1, "DATA.NUM_WORKERS", workers, "PRINT_FREQ", 1]
            opts += ["MODEL.DROP_PATH_RATE", 0.3, "DETERMINISTIC", True]
            assert main.main(command(few_images, tmp_path / str(number), opts, "--seed", "5")) == 0
            lines = (folder_of(tmp_path / str(number)) / "metrics.jsonl").read_text().splitlines()
            times = ("img_per_s", "memory_mb", "minutes")
            records.append([{k: v for k, v in json.loads(line).items() if k not in times} for line in lines])
    finally:
        torch.use_deterministic_algorithms(False)
    assert records[0] == records[1] == records[2]


def test_models_and_loaders_of_a_seed(few_images: Path, nano_opts: list[object]) -> None:
    """Another seed means other weights and another order."""
    order, weights = [], []
    for seed in (1, 1, 2):
        config = load_config(None, [*nano_opts, "SEED", seed, "DATA.DATA_PATH", str(few_images)])
        engine.utils.seed_everything(config.SEED)
        weights.append(build_model(config).head.weight)
        order.append(list(build_loaders(config).train_sampler))
    assert order[0] == order[1] != order[2]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_one_process_agrees_with_itself() -> None:
    agreement = Agreement()
    assert agreement.poll(save=True).save
    assert not agreement.poll().save
    assert list(agreement.until_stopped([1, 2, 3])) == [1, 2, 3]
