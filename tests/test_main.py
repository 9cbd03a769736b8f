"""The command line from end to end on a nano model: train, evaluate, time, fail cleanly."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import NANO_WORDS as OPTS
from conftest import REPO

import main
import utils
from config import load_config
from data.workers import limit_workers
from logger import Metrics
from tools import convert_checkpoint
from training.loop import Run, evaluate
from utils import UserError

TINY = str(REPO / "configs/focal_tiny_patch4_window7_224.yaml")
PLAIN = [  # nothing random but the order and the crops of the images
    *["AUG.MIXUP", 0, "AUG.CUTMIX", 0, "AUG.COLOR_JITTER", 0, "AUG.AUTO_AUGMENT", "none", "AUG.REPROB", 0],
    *["AUG.HFLIP", 0, "TEST.CROP", False],
    *["TRAIN.BASE_LR", 0.02, "TRAIN.OPTIMIZER.NAME", "sgd", "PRINT_FREQ", 2],
]
NOWHERE = Path("/nowhere")
Call = Callable[..., tuple[int, str, str]]


def command(data: Path, output: Path, opts: list[object], *flags: str) -> list[str]:
    words = ["--cfg", TINY, "--dataset", "folder", "--data-path", str(data), "--output", str(output)]
    return [*words, "--batch-size", "16", "--device", "cpu", *flags, "--opts", *map(str, opts)]


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


def make_run(output: Path, *opts: object) -> Run:
    precision = utils.Precision(torch.float32)
    return Run(load_config(None, opts), torch.device("cpu"), precision, output, Metrics(None))


@pytest.fixture(scope="module")
def trained(few_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of two plain epochs."""
    output = tmp_path_factory.mktemp("trained")
    assert main.main(command(few_images, output, [*OPTS, *PLAIN])) == 0
    return output


@pytest.fixture
def call(few_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """main.py on the few images, plain, with more flags: exit status, output, errors."""

    def run(*flags: object, opts: tuple = (), data: Path = few_images, output: Path = tmp_path):
        words = command(data, output, [*OPTS, *PLAIN, *opts], *map(str, flags))
        return main.main(words), *capsys.readouterr()

    return run


def test_training_writes_everything(trained: Path) -> None:
    for name in ("config.yaml", "log_rank0.txt", "metrics.jsonl", "best.pth", "ckpt_epoch_1.pth"):
        assert (folder_of(trained) / name).exists()
    steps, epochs = metrics_of(trained, "train"), metrics_of(trained, "epoch")
    places = [(record["epoch"], record["step"]) for record in steps]
    assert places == [(epoch, step) for epoch in (0, 1) for step in (1, 3, 5, 7)]
    assert set(steps[0]) >= {"loss", "lr", "grad_norm", "img_per_s", "memory_mb"}
    assert epochs[1]["loss"] < epochs[0]["loss"]
    assert epochs[1]["max_accuracy"] == max(record["acc1"] for record in epochs)


def test_evaluation_repeats_the_accuracy_of_training(trained: Path, call: Call, tmp_path: Path) -> None:
    code, printed, _ = call("--eval", "--resume", folder_of(trained) / "ckpt_epoch_1.pth")
    last = metrics_of(trained, "epoch")[1]
    assert code == 0
    assert f"43 images: acc1 {last['acc1']:.3f}%  acc5 {last['acc5']:.3f}%" in printed
    assert "evaluated 2/3 batches" in printed
    assert not (folder_of(tmp_path) / "config.yaml").exists()


def test_the_config_of_a_fine_tuned_run_serves_all_modes(trained: Path, call: Call, tmp_path: Path) -> None:
    best = folder_of(trained) / "best.pth"
    assert call("--pretrained", best, opts=("MODEL.RESET_HEAD", True, "TRAIN.EPOCHS", 1))[0] == 0
    words = ["--cfg", str(folder_of(tmp_path) / "config.yaml")]
    assert main.main([*words, "--throughput"]) == 0
    assert main.main([*words, "--eval", "--resume", str(folder_of(tmp_path) / "best.pth")]) == 0


def test_accumulation_equals_a_bigger_batch(trained: Path, call: Call, tmp_path: Path) -> None:
    assert call("--batch-size", "8", "--accumulation-steps", "2")[0] == 0
    assert difference(trained, tmp_path, epoch=1) < 1e-5
    losses = [metrics_of(output, "epoch")[1]["loss"] for output in (trained, tmp_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_evaluation_that_fails_loses_no_epoch(
    trained: Path, few_images: Path, call: Call, tmp_path: Path
) -> None:
    """It is repeated when the run continues, so that the best accuracy counts every epoch."""
    data = shutil.copytree(few_images, tmp_path / "data")
    broken = next((data / "val").glob("*/*.png"))
    content = broken.read_bytes()
    broken.write_bytes(b"damaged")
    code, _, message = call(opts=("DATA.NUM_WORKERS", 1), data=data)
    assert code == 2
    assert message.startswith(f"error: {broken}: expected an image file that decodes")
    assert not checkpoint(tmp_path, 0)["evaluated"]
    broken.write_bytes(content)
    assert call(data=data)[0] == 0
    assert difference(trained, tmp_path, epoch=1) == 0.0
    for key in ("acc1", "loss", "max_accuracy"):
        ours, theirs = ([r[key] for r in metrics_of(folder, "epoch")] for folder in (tmp_path, trained))
        assert ours == theirs
    best = torch.load(folder_of(tmp_path) / "best.pth", weights_only=True)
    assert best["accuracy"] == max(record["acc1"] for record in metrics_of(trained, "epoch")) > 0


def test_the_average_is_evaluated_saved_and_can_be_evaluated_alone(call: Call, tmp_path: Path) -> None:
    assert call(opts=("TRAIN.EMA.ENABLED", True, "TRAIN.EMA.DECAY", 0.5, "TRAIN.EPOCHS", 1))[0] == 0
    record, path = metrics_of(tmp_path, "epoch")[-1], folder_of(tmp_path) / "best.pth"
    content = torch.load(path, weights_only=True)
    assert content["max_accuracy"] == max(record["acc1"], record["acc1_ema"])
    assert not torch.equal(content["model_ema"]["head.weight"], content["model"]["head.weight"])
    average = tmp_path / "average.pth"
    convert_checkpoint.convert(path, average, "model_ema")
    for weights, key in ((average, "acc1_ema"), (path, "acc1")):
        assert f"acc1 {record[key]:.3f}%" in call("--eval", "--resume", weights)[1]


def test_fine_tuning_starts_from_weights(trained: Path, call: Call, tmp_path: Path) -> None:
    weights, once = folder_of(trained) / "ckpt_epoch_1.pth", ("TRAIN.EPOCHS", 1)
    assert call("--pretrained", weights, opts=once)[0] == 0
    assert metrics_of(tmp_path, "epoch")[0]["loss"] < metrics_of(trained, "epoch")[0]["loss"]
    assert call("--pretrained", weights, "--tag", "new", opts=(*once, "MODEL.RESET_HEAD", True))[0] == 0
    release = tmp_path / "release.pth"
    torch.save({"model": torch.load(weights, weights_only=True)["model"]}, release)
    code, _, message = call("--resume", release, "--tag", "b")
    assert code == 2 and "--pretrained" in message
    assert call("--resume", release, "--tag", "b", "--eval")[0] == 0


def test_a_finished_run_is_not_trained_further(
    trained: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer epochs than it has had, it is an error, and no file changes. A start reads two files."""
    shutil.copytree(folder_of(trained), folder_of(tmp_path))
    before = (folder_of(tmp_path) / "config.yaml").read_bytes()
    code, _, message = call(opts=("TRAIN.EPOCHS", 1, "SAVE_KEEP", 1))
    assert code == 2 and "TRAIN.EPOCHS: expected at least 2, as many as" in message
    assert (folder_of(tmp_path) / "config.yaml").read_bytes() == before
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda file, **how: (read.append(file.name), load(file, **how))[1])
    code, printed, _ = call()
    assert 0 < len(read) <= 2  # the newest, and best.pth, which may be the same
    assert code == 0 and "has finished all 2 epochs (TRAIN.EPOCHS): nothing is left" in printed
    assert metrics_of(tmp_path, "train") == metrics_of(trained, "train")


def test_throughput_needs_no_data(call: Call, tmp_path: Path) -> None:
    assert call("--throughput", data=NOWHERE, opts=("DATA.IMG_SIZE", [32, 64]))[0] == 0
    result = json.loads((folder_of(tmp_path) / "throughput.json").read_text())
    assert result["images_per_second"] > 0
    assert result["image_size"] == [32, 64]
    assert len(result["backends"]) == 4


def test_debug_runs_two_steps_and_counts(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With deterministic algorithms alone: each of the model's has one, and a run repeats exactly."""
    monkeypatch.setenv("PT_OUTPUT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which would stay
    losses = []
    try:
        for _ in range(2):
            code, printed, _ = call("--debug", data=NOWHERE, opts=("DETERMINISTIC", True))
            losses.append(re.findall(r"loss [\d.]+", printed))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert code == 0 and "step 2/2" in printed and "parameters" in printed
    assert losses[0] == losses[1] != []
    assert folder_of(tmp_path / "elsewhere").is_dir()


# --- Mistakes and errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--pretrained"], ["--eval", "--resume"]], ids=" ".join)
def test_weights_are_checked_before_the_data(flags: list[str], trained: Path, call: Call) -> None:
    weights = folder_of(trained) / "best.pth"
    code, _, message = call(*flags, weights, data=NOWHERE, opts=("MODEL.NUM_CLASSES", 7))
    assert code == 2 and f"({flags[-1]}): " in message
    assert "head.weight is [10, 128], expected [7, 128]" in message
    assert "MODEL.RESET_HEAD" in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--data-path /nowhere", "/nowhere"),
        ("--eval", "--resume or --pretrained"),
        ("--pretrained /no/such.pth", "MODEL.PRETRAINED (--pretrained): /no/such.pth"),
        (f"--output {__file__}", "OUTPUT (--output): expected a folder"),
        ("--device cuda:99", "DEVICE"),
        ("--throughput --debug", "at most one mode"),
        ("--resume a.pth --pretrained b.pth", "MODEL.PRETRAINED: expected either this or"),
        ("--amp-opt-level O0 --amp-dtype fp16", "AMP_DTYPE: expected ''"),
        ("--opts TRAIN.WARMUP_EPOCHS 20", "TRAIN.WARMUP_EPOCHS: expected at most TRAIN.EPOCHS = 2, got 20"),
        ("--opts MODEL.RESET_HEAD True", "MODEL.RESET_HEAD: expected MODEL.PRETRAINED"),
    ],
)
def test_mistakes_are_explained(flags: str, words: str, call: Call) -> None:
    flags, _, opts = flags.partition("--opts")
    code, _, message = call(*flags.split(), opts=tuple(opts.split()))
    assert code == 2 and words in message and len(message.splitlines()) == 1


def test_only_mistakes_of_users_become_sentences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: object) -> None:
        raise error

    monkeypatch.setattr(main, "start", fail)
    for error in (UserError("a mistake"), PermissionError(13, "Permission denied", "x")):
        assert main.main(["--cfg", TINY]) == 2
        assert capsys.readouterr().err == f"error: {error}\n"
    for error in (ValueError("a bug"), KeyError("a bug")):
        with pytest.raises(type(error)):
            main.main(["--cfg", TINY])
    with pytest.raises(ValueError, match="a bug"):
        utils.run_command(lambda: int("a bug"))  # of the other commands

    def disconnect() -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    assert utils.run_command(disconnect) == 2
    assert "Connection refused (FOCAL_TRACEBACK=1 shows where)" in capsys.readouterr().err
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        main.main(["--cfg", TINY])
    assert "interrupted" in capsys.readouterr().err
    error = dist.DistStoreError("1/2 clients joined")
    assert main.main(["--cfg", TINY]) == 1
    assert capsys.readouterr().err.startswith("error: 1/2 clients joined\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_console_on_a_full_disk_changes_no_exit_status(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    words = [sys.executable, "main.py", *command(tmp_path, tmp_path, OPTS, "--debug")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, cwd=REPO, env=environment, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert "acc1" in (folder_of(tmp_path) / "log_rank0.txt").read_text()


def test_a_mistake_is_said_once_on_each_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of torchrun; without it, a mistake before the processes form a group may be that of one alone."""
    for launcher in ("torchrun", "another"):
        if launcher == "torchrun":
            monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        else:
            monkeypatch.delenv("LOCAL_WORLD_SIZE")
        for local_rank in ("0", "1"):
            monkeypatch.setenv("LOCAL_RANK", local_rank)
            assert main.main(["--cfg", TINY, "--seed", "-1"]) == 2
            assert ("SEED" in capsys.readouterr().err) == (launcher == "another" or local_rank == "0")


def test_flags_win_over_opts_and_yaml_only_if_given() -> None:
    for wrong in (["--cfg", TINY, "--bach-size", "3"], ["--cfg", TINY, "--thr"], []):
        with pytest.raises(SystemExit):
            main.read_config(wrong)
    with pytest.raises(UserError, match="got 3 words: SEED 3 TAG; give"):
        main.read_config(["--cfg", TINY, "--zip", "--batch-size", "8", "--opts", "SEED", "3", "TAG"])
    config = main.read_config(["--cfg", TINY, "--opts", "DATA.BATCH_SIZE", "4", "TAG", "x", "--zip"])
    assert (config.DATA.BATCH_SIZE, config.TAG, config.DATA.ZIP_MODE) == (4, "x", True)
    words = ["--cfg", TINY, "--local_rank=1", "--batch-size", "8", "--opts", "DATA.BATCH_SIZE", "4"]
    assert main.read_config(words).DATA.BATCH_SIZE == 8
    config = main.read_config(
        ["--cfg", TINY, "--opts", "SEED", "3", "TAG", "x", "--zip", "--opts", "SEED", "4"]
    )
    assert (config.SEED, config.TAG) == (4, "x")


# --- Parts --------------------------------------------------------------------------------------------------


def test_a_model_sees_one_batch_size_in_evaluation(tmp_path: Path) -> None:
    """A smaller last batch would be compiled again, and rounded otherwise."""
    sizes = []

    class Spy(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            sizes.append(len(images))
            return images.mean(dim=(2, 3))

    torch.manual_seed(0)
    batches = [(torch.randn(count, 3, 4, 4), torch.randint(3, (count,))) for count in (5, 5, 2)]
    result = evaluate(make_run(tmp_path), Spy(), batches)
    assert sizes == [5, 5, 5]
    whole = [tuple(map(torch.cat, zip(*batches, strict=True)))]
    assert result == evaluate(make_run(tmp_path), Spy(), whole)


def test_top5_of_fewer_than_five_classes(tmp_path: Path) -> None:
    run, model = make_run(tmp_path), torch.nn.Identity()
    batches = [(torch.eye(3), torch.tensor([0, 1, 0])), (torch.eye(3)[:1], torch.tensor([2]))]
    result = evaluate(run, model, batches)
    assert (result["acc1"], result["acc5"]) == (50.0, 100.0)
    with pytest.raises(UserError, match="finite outputs.*another --tag"):
        evaluate(run, model, [(torch.full((1, 3), torch.nan), torch.tensor([0]))])


def test_every_process_of_a_machine_needs_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"^DEVICE \(--device\): .*'cuda:1'.*CUDA_VISIBLE_DEVICES"):
        utils.pick_device("cuda:1")
    assert utils.pick_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="below 2.*got 3"):
        utils.pick_device("cuda")


def test_numbers_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script may set them from variables that are empty."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    utils.init_distributed(utils.pick_device("cpu"), 1.0)
    assert not utils.in_group() and limit_workers(0) == 0
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE: expected a number in the environment, got 'two'"):
        utils.init_distributed(torch.device("cpu"), 1.0)
