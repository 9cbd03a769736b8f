"""The command line from end to end on a nano model: train, stop, resume, evaluate, fail cleanly."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO

import engine
import logger
import main
import utils
from config import load_config
from logger import Metrics

TINY = str(REPO / "configs/focal_tiny_patch4_window7_224.yaml")
PLAIN = [  # nothing random but the order and the crops of the images
    *["AUG.MIXUP", 0, "AUG.CUTMIX", 0, "AUG.COLOR_JITTER", 0, "AUG.AUTO_AUGMENT", "none", "AUG.REPROB", 0],
    *["AUG.HFLIP", 0, "TEST.CROP", False],
    *["TRAIN.BASE_LR", 0.02, "TRAIN.OPTIMIZER.NAME", "sgd", "PRINT_FREQ", 2],
]


def command(data: Path, output: Path, opts: list[object], *flags: str) -> list[str]:
    words = ["--cfg", TINY, "--dataset", "folder", "--data-path", str(data), "--output", str(output)]
    return [*words, "--batch-size", "16", "--device", "cpu", *flags, "--opts", *map(str, opts)]


def run_process(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPO / "main.py"), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def folder_of(output: Path) -> Path:
    return output / "nano" / "default"


def metrics_of(output: Path, kind: str) -> list[dict[str, float]]:
    lines = (folder_of(output) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def checkpoint(output: Path, epoch: int) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(folder_of(output) / f"ckpt_epoch_{epoch}.pth", weights_only=True)


def difference(left: Path, right: Path, epoch: int) -> float:
    """The largest difference between two runs' weights."""
    ours, theirs = checkpoint(left, epoch)["model"], checkpoint(right, epoch)["model"]
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.fixture(scope="module")
def trained(few_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of two plain epochs."""
    from conftest import NANO

    output = tmp_path_factory.mktemp("trained")
    opts = [word for pair in NANO.items() for word in pair]
    assert main.main(command(few_images, output, [*opts, *PLAIN])) == 0
    return output


def test_training_writes_everything(trained: Path) -> None:
    folder = folder_of(trained)
    for name in ("config.yaml", "log_rank0.txt", "metrics.jsonl", "best.pth", "ckpt_epoch_1.pth"):
        assert (folder / name).exists()
    steps = metrics_of(trained, "train")
    assert [(record["epoch"], record["step"]) for record in steps] == [
        (epoch, step) for epoch in (0, 1) for step in (1, 3, 5, 7)
    ]
    assert set(steps[0]) >= {"loss", "lr", "grad_norm", "img_per_s", "memory_mb"}
    epochs = metrics_of(trained, "epoch")
    assert epochs[1]["loss"] < epochs[0]["loss"]
    assert epochs[1]["max_accuracy"] == max(record["acc1"] for record in epochs)


def test_evaluation_repeats_the_accuracy_of_training(
    trained: Path, few_images: Path, nano_opts: list[object], tmp_path: Path
) -> None:
    weights = str(folder_of(trained) / "ckpt_epoch_1.pth")
    flags = ["--eval", "--resume", weights]
    done = run_process(command(few_images, tmp_path, [*nano_opts, *PLAIN], *flags))
    assert done.returncode == 0, done.stderr
    last = metrics_of(trained, "epoch")[1]
    assert f"43 images: acc1 {last['acc1']:.3f}%  acc5 {last['acc5']:.3f}%" in done.stdout
    assert not (folder_of(tmp_path) / "config.yaml").exists()


@pytest.mark.parametrize("kind", ["focal", "focalv2"])
def test_a_stopped_run_goes_on_as_if_it_had_not(
    kind: str, few_images: Path, nano_opts: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every random part on: augmentation, Mixup, drop path, AdamW."""
    opts = [
        *nano_opts,
        "MODEL.TYPE",
        kind,
        "MODEL.DROP_PATH_RATE",
        0.3,
        "MODEL.DROP_RATE",
        0.1,
        "PRINT_FREQ",
        4,
    ]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main.main(command(few_images, whole, opts)) == 0

    def interrupt(*args: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        train = main.train_one_epoch
        patch.setattr(
            main,
            "train_one_epoch",
            lambda *args: (interrupt if args[1].state.position.epoch else train)(*args),
        )
        with pytest.raises(KeyboardInterrupt):
            main.main(command(few_images, stopped, opts))
    with (folder_of(stopped) / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "epo')  # as a killed process may leave it
    assert main.main(command(few_images, stopped, opts)) == 0
    assert difference(whole, stopped, epoch=1) == 0.0
    for kind_of_line in ("train", "epoch"):
        for one, other in zip(
            metrics_of(whole, kind_of_line), metrics_of(stopped, kind_of_line), strict=True
        ):
            assert one["loss"] == other["loss"]
    assert checkpoint(whole, 1)["max_accuracy"] == checkpoint(stopped, 1)["max_accuracy"]


def test_accumulation_equals_a_bigger_batch(
    trained: Path, few_images: Path, nano_opts: list[object], tmp_path: Path
) -> None:
    flags = ["--batch-size", "8", "--accumulation-steps", "2"]
    assert main.main(command(few_images, tmp_path, [*nano_opts, *PLAIN], *flags)) == 0
    assert difference(trained, tmp_path, epoch=1) < 1e-5
    assert metrics_of(tmp_path, "epoch")[1]["loss"] == pytest.approx(
        metrics_of(trained, "epoch")[1]["loss"], rel=1e-4
    )


def test_a_ragged_accumulation_group_makes_an_update(
    few_images: Path, nano_opts: list[object], tmp_path: Path
) -> None:
    """8 batches in groups of 3: 3 updates per epoch."""
    opts = [*nano_opts, *PLAIN, "TRAIN.OPTIMIZER.NAME", "adamw"]
    assert main.main(command(few_images, tmp_path, opts, "--accumulation-steps", "3")) == 0
    state = checkpoint(tmp_path, 1)
    assert state["position"]["updates"] == 6
    assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {6}


@pytest.mark.parametrize("flags", [["--amp-dtype", "bf16"], ["--amp-dtype", "fp16", "--use-checkpoint"]])
def test_mixed_precision_trains(
    flags: list[str], few_images: Path, nano_opts: list[object], tmp_path: Path
) -> None:
    opts = [*nano_opts, *PLAIN, "TRAIN.EPOCHS", 1]
    assert main.main(command(few_images, tmp_path, opts, *flags)) == 0
    assert metrics_of(tmp_path, "epoch")[0]["loss"] < 2.6
    assert bool(checkpoint(tmp_path, 0)["scaler"]) == ("fp16" in flags)


def test_a_loss_that_is_not_finite_stops_the_run(
    few_images: Path, nano_opts: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(command(few_images, tmp_path, [*nano_opts, *PLAIN, "TRAIN.EPOCHS", 1])) == 0
    opts = [*nano_opts, *PLAIN, "TRAIN.BASE_LR", 1e30, "TRAIN.CLIP_GRAD", 0, "TRAIN.BAD_STEPS_MAX", 3]
    assert main.main(command(few_images, tmp_path, opts)) == 2
    message = capsys.readouterr().err
    assert "epoch 2, step " in message
    assert "3 updates in a row" in message
    assert "learning rate " in message
    assert "best.pth" in message or "ckpt_epoch_0.pth" in message
    assert not (folder_of(tmp_path) / "ckpt_epoch_1.pth").exists()
    dump = json.loads((folder_of(tmp_path) / "bad_steps.json").read_text())
    assert [bad["step"] for bad in dump["steps"]] == list(
        range(dump["steps"][0]["step"], dump["steps"][0]["step"] + 3)
    )
    assert dump["checkpoint"] in message
    assert {len(batch["images"][0]) for bad in dump["steps"] for batch in bad["batches"]} == {16}
    assert any("nan" in (bad["grad_norm"], *bad["batches"][0]["loss"]) for bad in dump["steps"])


def test_the_bad_step_is_told_with_its_own_learning_rate(
    few_images: Path, nano_opts: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 2 of 8 in a warm-up from 1e20 to 1e30, reported after step 4."""
    opts = [*nano_opts, *PLAIN, "TRAIN.WARMUP_LR", 1e20, "TRAIN.BASE_LR", 1e30, "TRAIN.WARMUP_EPOCHS", 2]
    opts += ["TRAIN.CLIP_GRAD", 0, "PRINT_FREQ", 4, "TRAIN.BAD_STEPS_MAX", 1]
    assert main.main(command(few_images, tmp_path, opts)) == 2
    message = capsys.readouterr().err
    step = int(message.split("step ")[1].split(":")[0])
    assert step < 4
    rate = (1e20 + (1e30 - 1e20) * (step - 1) / 16) * 16 / 512
    assert f"learning rate {rate:.3e}" in message
    assert "no checkpoint yet. Start anew" in message
    assert "o on from" not in message


def test_an_evaluation_that_fails_loses_no_epoch(
    trained: Path,
    few_images: Path,
    nano_opts: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is made up for when the run goes on, so that the best accuracy counts every epoch."""
    data = shutil.copytree(few_images, tmp_path / "data")
    broken = next((data / "val").glob("*/*.png"))
    content = broken.read_bytes()
    broken.write_bytes(b"damaged")
    output, opts = tmp_path / "out", [*nano_opts, *PLAIN, "DATA.NUM_WORKERS", 1]
    assert main.main(command(data, output, opts)) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {broken}: expected an image file that decodes")
    assert message.count("\n") == 1
    assert "BytesIO" not in message
    assert checkpoint(output, 0)["max_accuracy"] == 0.0
    assert not (folder_of(output) / "best.pth").exists()
    broken.write_bytes(content)
    assert main.main(command(data, output, opts)) == 0
    assert difference(trained, output, epoch=1) == 0.0
    best = torch.load(folder_of(output) / "best.pth", weights_only=True)
    records = metrics_of(trained, "epoch")
    assert best["max_accuracy"] == max(record["acc1"] for record in records)
    assert records[0]["acc1"] > 0
    assert best["evaluated"]
    ours = metrics_of(output, "epoch")
    assert [record["acc1"] for record in ours] == [record["acc1"] for record in records]
    assert [record["loss"] for record in ours] == [record["loss"] for record in records]


def test_weights_are_checked_before_the_data(
    trained: Path,
    nano_opts: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = str(folder_of(trained) / "best.pth")
    nowhere, other = Path("/nowhere"), [*nano_opts, *PLAIN, "MODEL.NUM_CLASSES", 7]
    for flags, begin in (
        (["--pretrained", weights], "error: MODEL.PRETRAINED (--pretrained): "),
        (["--resume", weights], "error: MODEL.RESUME (--resume): "),
        (["--eval", "--resume", weights], "error: MODEL.RESUME (--resume): "),
        (["--eval", "--pretrained", weights], "error: MODEL.PRETRAINED (--pretrained): "),
    ):
        assert main.main(command(nowhere, tmp_path, other, *flags)) == 2
        message = capsys.readouterr().err
        assert message.startswith(begin)
        assert "head.weight is [10, 128], expected [7, 128]" in message
        assert ("--opts MODEL.RESET_HEAD True" in message) == (flags[0] == "--pretrained")


def test_fine_tuning_starts_from_weights(
    trained: Path,
    few_images: Path,
    nano_opts: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = str(folder_of(trained) / "ckpt_epoch_1.pth")
    opts = [*nano_opts, *PLAIN, "TRAIN.EPOCHS", 1]
    assert main.main(command(few_images, tmp_path / "a", opts, "--pretrained", weights)) == 0
    tuned = metrics_of(tmp_path / "a", "epoch")[0]["loss"]
    assert tuned < metrics_of(trained, "epoch")[0]["loss"]
    fresh_head = [*opts, "MODEL.RESET_HEAD", True]
    assert main.main(command(few_images, tmp_path / "c", fresh_head, "--pretrained", weights)) == 0
    torch.save({"model": torch.load(weights, weights_only=True)["model"]}, tmp_path / "release.pth")
    release = str(tmp_path / "release.pth")
    assert main.main(command(few_images, tmp_path / "b", opts, "--resume", release)) == 2
    assert "--pretrained" in capsys.readouterr().err
    assert main.main(command(few_images, tmp_path / "b", opts, "--resume", release, "--eval")) == 0


def test_throughput_needs_no_data(nano_opts: list[object], tmp_path: Path) -> None:
    opts = [*nano_opts, "DATA.IMG_SIZE", [32, 64]]
    assert main.main(command(Path("/nowhere"), tmp_path, opts, "--throughput")) == 0
    result = json.loads((folder_of(tmp_path) / "throughput.json").read_text())
    assert result["images_per_second"] > 0
    assert result["image_size"] == [32, 64]
    assert len(result["backends"]) == 4


def test_debug_runs_two_steps_and_counts(nano_opts: list[object], tmp_path: Path) -> None:
    arguments = command(Path("/nowhere"), tmp_path, nano_opts, "--debug")
    done = run_process(arguments, PT_OUTPUT_DIR=str(tmp_path / "elsewhere"))
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert "parameters" in done.stdout
    assert folder_of(tmp_path / "elsewhere").is_dir()


def test_mistakes_end_in_one_message(few_images: Path, nano_opts: list[object], tmp_path: Path) -> None:
    done = run_process(command(few_images, tmp_path, nano_opts, "--eval"))
    assert done.returncode == 2
    assert "--resume or --pretrained" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--data-path", "/nowhere"], "/nowhere"),
        (["--eval", "--resume", "/no/such.pth"], "/no/such.pth"),
        (["--pretrained", "/no/such.pth"], "MODEL.PRETRAINED (--pretrained): /no/such.pth"),
        (["--output", __file__], "OUTPUT (--output): expected a folder"),
        (["--cache-mode", "full"], "DATA.ZIP_MODE (--zip)"),
        (["--device", "cuda:99"], "DEVICE"),
        (["--batch-size", "1000"], "BATCH_SIZE"),
    ],
)
def test_mistakes_are_explained(
    flags: list[str],
    word: str,
    few_images: Path,
    nano_opts: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.main(command(few_images, tmp_path, nano_opts, *flags)) == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "x"), ImportError("no tensors")])
def test_other_mistakes_end_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: object) -> None:
        raise error

    monkeypatch.setattr(main, "start", fail)
    assert main.main(["--cfg", TINY]) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_only_the_first_process_tells_what_all_have_met(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main.main(["--cfg", TINY, "--seed", "-1"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", [["--cfg", TINY, "--bach-size", "3"], ["--cfg", TINY, "--thr"], []])
def test_unknown_or_missing_flags_are_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.read_config(arguments)
    assert caught.value.code == 2


def test_an_odd_number_of_words_is_shown_as_typed() -> None:
    with pytest.raises(ValueError, match="got 3 words: SEED 3 TAG; give"):
        main.read_config(["--cfg", TINY, "--zip", "--batch-size", "8", "--opts", "SEED", "3", "TAG"])


def test_flags_win_over_opts_and_yaml_only_if_given() -> None:
    config = main.read_config(["--cfg", TINY, "--opts", "DATA.BATCH_SIZE", "4", "TAG", "x", "--zip"])
    assert (config.DATA.BATCH_SIZE, config.TAG, config.DATA.ZIP_MODE) == (4, "x", True)
    config = main.read_config(
        ["--cfg", TINY, "--local_rank=1", "--batch-size", "8", "--opts", "DATA.BATCH_SIZE", "4"]
    )
    assert config.DATA.BATCH_SIZE == 8


def make_run(output: Path, *opts: object) -> engine.Run:
    precision = utils.Precision(torch.float32)
    return engine.Run(load_config(None, opts), torch.device("cpu"), precision, output, Metrics(None))


def test_a_model_sees_one_batch_size_in_evaluation(tmp_path: Path) -> None:
    """A smaller last batch would be compiled anew, and rounded otherwise."""
    sizes = []

    class Spy(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            sizes.append(len(images))
            return images.mean(dim=(2, 3))

    torch.manual_seed(0)
    batches = [(torch.randn(count, 3, 4, 4), torch.randint(3, (count,))) for count in (5, 5, 2)]
    result = engine.evaluate(make_run(tmp_path), Spy(), batches)
    assert sizes == [5, 5, 5]
    assert result == engine.evaluate(
        make_run(tmp_path), Spy(), [tuple(map(torch.cat, zip(*batches, strict=True)))]
    )


def test_several_processes_cannot_share_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^DEVICE: .*'cuda:1'.*CUDA_VISIBLE_DEVICES"):
        utils.pick_device("cuda:1")
    assert utils.pick_device("cpu").type == "cpu"


def test_every_process_of_a_machine_with_too_few_cards_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="below 2.*got 3"):
        utils.pick_device("cuda")


def test_log_lines_go_above_a_progress_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tqdm = pytest.importorskip("tqdm")
    written = []
    monkeypatch.setattr(tqdm.tqdm, "write", staticmethod(lambda text, file: written.append(text)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logger.create_logger(tmp_path)
    for number in logger.progress([1, 2], "some work", show=True):
        logging.getLogger("main").info(f"line {number}")
    logging.getLogger("main").info("line 3")
    assert [text[-6:] for text in written] == ["line 1", "line 2"]
    printed = capsys.readouterr().out
    assert "line 3" in printed
    assert "line 1" not in printed


def test_top5_of_fewer_than_five_classes(tmp_path: Path) -> None:
    class Echo(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images

    run = make_run(tmp_path)
    batches = [(torch.eye(3), torch.tensor([0, 1, 0])), (torch.eye(3)[:1], torch.tensor([2]))]
    result = engine.evaluate(run, Echo(), batches)
    assert (result["acc1"], result["acc5"]) == (50.0, 100.0)
    with pytest.raises(ValueError, match="finite"):
        engine.evaluate(run, Echo(), [(torch.full((1, 3), torch.nan), torch.tensor([0]))])
