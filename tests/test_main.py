"""The command line from end to end on a nano model: train, evaluate, time, fail cleanly."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import NANO, REPO

import main
import utils
from config import load_config
from logger import Metrics
from training import run as training_run
from training import run_dir
from training.loop import Run, evaluate
from utils import UserError

TINY = str(REPO / "configs/focal_tiny_patch4_window7_224.yaml")
PLAIN = [  # nothing random but the order and the crops of the images
    *["AUG.MIXUP", 0, "AUG.CUTMIX", 0, "AUG.COLOR_JITTER", 0, "AUG.AUTO_AUGMENT", "none", "AUG.REPROB", 0],
    *["AUG.HFLIP", 0, "TEST.CROP", False],
    *["TRAIN.BASE_LR", 0.02, "TRAIN.OPTIMIZER.NAME", "sgd", "PRINT_FREQ", 2],
]


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
    trained: Path,
    few_images: Path,
    nano_opts: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--eval", "--resume", str(folder_of(trained) / "ckpt_epoch_1.pth")]
    assert main.main(command(few_images, tmp_path, [*nano_opts, *PLAIN], *flags)) == 0
    last, printed = metrics_of(trained, "epoch")[1], capsys.readouterr().out
    assert f"43 images: acc1 {last['acc1']:.3f}%  acc5 {last['acc5']:.3f}%" in printed
    assert "evaluated 2/3 batches" in printed
    assert not (folder_of(tmp_path) / "config.yaml").exists()


def test_accumulation_equals_a_bigger_batch(
    trained: Path, few_images: Path, nano_opts: list[object], tmp_path: Path
) -> None:
    flags = ["--batch-size", "8", "--accumulation-steps", "2"]
    assert main.main(command(few_images, tmp_path, [*nano_opts, *PLAIN], *flags)) == 0
    assert difference(trained, tmp_path, epoch=1) < 1e-5
    losses = [metrics_of(output, "epoch")[1]["loss"] for output in (trained, tmp_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_mixed_precision_trains(few_images: Path, nano_opts: list[object], tmp_path: Path) -> None:
    """In bf16; test_meters.py trains in fp16."""
    opts = [*nano_opts, *PLAIN, "TRAIN.EPOCHS", 1]
    assert main.main(command(few_images, tmp_path, opts, "--amp-dtype", "bf16", "--use-checkpoint")) == 0
    assert metrics_of(tmp_path, "epoch")[0]["loss"] < 2.6
    assert not checkpoint(tmp_path, 0)["scaler"]


def test_an_evaluation_that_fails_loses_no_epoch(
    trained: Path,
    few_images: Path,
    nano_opts: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is repeated when the run continues, so that the best accuracy counts every epoch."""
    data = shutil.copytree(few_images, tmp_path / "data")
    broken = next((data / "val").glob("*/*.png"))
    content = broken.read_bytes()
    broken.write_bytes(b"damaged")
    output, opts = tmp_path / "out", [*nano_opts, *PLAIN, "DATA.NUM_WORKERS", 1]
    assert main.main(command(data, output, opts)) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {broken}: expected an image file that decodes")
    assert message.count("\n") == 1
    assert not checkpoint(output, 0)["evaluated"]
    assert not (folder_of(output) / "best.pth").exists()
    broken.write_bytes(content)
    assert main.main(command(data, output, opts)) == 0
    assert difference(trained, output, epoch=1) == 0.0
    for key in ("acc1", "loss", "max_accuracy"):
        ours, theirs = ([r[key] for r in metrics_of(folder, "epoch")] for folder in (output, trained))
        assert ours == theirs
    best = torch.load(folder_of(output) / "best.pth", weights_only=True)
    assert best["evaluated"]
    assert best["accuracy"] == max(record["acc1"] for record in metrics_of(trained, "epoch")) > 0


def test_the_average_is_evaluated_saved_and_can_be_evaluated_alone(
    trained: Path,
    few_images: Path,
    nano_opts: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    opts = [*nano_opts, *PLAIN, "TRAIN.EMA.ENABLED", True, "TRAIN.EMA.DECAY", 0.5, "TRAIN.EPOCHS", 1]
    assert main.main(command(few_images, tmp_path, opts)) == 0
    record, path = metrics_of(tmp_path, "epoch")[-1], folder_of(tmp_path) / "best.pth"
    content = torch.load(path, weights_only=True)
    assert content["max_accuracy"] == max(record["acc1"], record["acc1_ema"])
    assert all(tensor.is_floating_point() for tensor in content["model_ema"].values())
    assert not torch.equal(content["model_ema"]["head.weight"], content["model"]["head.weight"])
    for value, key in ((True, "acc1_ema"), (False, "acc1")):
        plain = [*nano_opts, *PLAIN, "EVAL_EMA", value]
        flags = ["--eval", "--resume", str(path)]
        assert main.main(command(few_images, tmp_path / "eval", plain, *flags)) == 0
        assert f"acc1 {record[key]:.3f}%" in capsys.readouterr().out
    flags = ["--eval", "--resume", str(folder_of(trained) / "best.pth")]
    assert main.main(command(few_images, tmp_path / "eval", [*plain, "EVAL_EMA", True], *flags)) == 2
    assert "expected a checkpoint with a moving average" in capsys.readouterr().err


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


def test_a_finished_run_is_not_trained_further(
    trained: Path,
    few_images: Path,
    nano_opts: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With fewer epochs than it has had, it is an error, and no file changes."""
    shutil.copytree(folder_of(trained), folder_of(tmp_path))
    opts = [*nano_opts, *PLAIN]
    before = (folder_of(tmp_path) / "config.yaml").read_bytes()
    assert main.main(command(few_images, tmp_path, [*opts, "TRAIN.EPOCHS", 1, "SAVE_KEEP", 1])) == 2
    assert "TRAIN.EPOCHS: expected at least 2, as many as" in capsys.readouterr().err
    assert (folder_of(tmp_path) / "config.yaml").read_bytes() == before
    assert main.main(command(few_images, tmp_path, opts)) == 0
    assert "has finished all 2 epochs (TRAIN.EPOCHS): nothing is left" in capsys.readouterr().out
    assert metrics_of(tmp_path, "train") == metrics_of(trained, "train")


def test_throughput_needs_no_data(nano_opts: list[object], tmp_path: Path) -> None:
    opts = [*nano_opts, "DATA.IMG_SIZE", [32, 64]]
    assert main.main(command(Path("/nowhere"), tmp_path, opts, "--throughput")) == 0
    result = json.loads((folder_of(tmp_path) / "throughput.json").read_text())
    assert result["images_per_second"] > 0
    assert result["image_size"] == [32, 64]
    assert len(result["backends"]) == 4


def test_debug_runs_two_steps_and_counts(
    nano_opts: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With deterministic algorithms alone: each of the model's has one."""
    monkeypatch.setenv("PT_OUTPUT_DIR", str(tmp_path / "elsewhere"))
    try:
        opts = [*nano_opts, "DETERMINISTIC", True]
        assert main.main(command(Path("/nowhere"), tmp_path, opts, "--debug")) == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    printed = capsys.readouterr().out
    assert "step 2/2" in printed
    assert "parameters" in printed
    assert folder_of(tmp_path / "elsewhere").is_dir()


# --- Mistakes and errors ------------------------------------------------------------------------------------


def test_weights_are_checked_before_the_data(
    trained: Path, nano_opts: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(folder_of(trained) / "best.pth")
    other = [*nano_opts, *PLAIN, "MODEL.NUM_CLASSES", 7]
    for flags, begin in (
        (["--pretrained", weights], "error: MODEL.PRETRAINED (--pretrained): "),
        (["--resume", weights], "error: MODEL.RESUME (--resume): "),
        (["--eval", "--resume", weights], "error: MODEL.RESUME (--resume): "),
        (["--eval", "--pretrained", weights], "error: MODEL.PRETRAINED (--pretrained): "),
    ):
        assert main.main(command(Path("/nowhere"), tmp_path, other, *flags)) == 2
        message = capsys.readouterr().err
        assert message.startswith(begin)
        assert "head.weight is [10, 128], expected [7, 128]" in message
        assert ("--opts MODEL.RESET_HEAD True" in message) == (flags[0] == "--pretrained")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--data-path", "/nowhere"], "/nowhere"),
        (["--eval"], "--resume or --pretrained"),
        (["--eval", "--resume", "/no/such.pth"], "/no/such.pth"),
        (["--pretrained", "/no/such.pth"], "MODEL.PRETRAINED (--pretrained): /no/such.pth"),
        (["--output", __file__], "OUTPUT (--output): expected a folder"),
        (["--cache-mode", "full"], "DATA.ZIP_MODE (--zip)"),
        (["--device", "cuda:99"], "DEVICE"),
        (["--device", "cuda:one"], "DEVICE"),
        (["--batch-size", "1000"], "BATCH_SIZE"),
        (["--throughput", "--debug"], "at most one mode"),
        (["--amp-opt-level", "O0", "--amp-dtype", "fp16"], "AMP_DTYPE: expected ''"),
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


@pytest.mark.parametrize(
    ("opts", "begin"),
    [
        (["DEBUG_MODE", True, "MODEL.RESUME", "a"], "THROUGHPUT_MODE and DEBUG_MODE: expected no weights"),
        (["MODEL.RESUME", "a", "MODEL.PRETRAINED", "b"], "MODEL.PRETRAINED: expected either this or"),
        (["EVAL_EMA", True], "EVAL_EMA: expected EVAL_MODE"),
        (["MODEL.RESET_HEAD", True], "MODEL.RESET_HEAD: expected training from MODEL.PRETRAINED"),
        (
            ["MODEL.HEAD_CLASS_MAP", "a", "MODEL.PRETRAINED", "b", "MODEL.RESET_HEAD", True],
            "MODEL.HEAD_CLASS_MAP: expected training from MODEL.PRETRAINED without MODEL.RESET_HEAD",
        ),
    ],
)
def test_weights_that_contradict_the_mode(opts: list[object], begin: str) -> None:
    with pytest.raises(UserError) as caught:
        training_run.check_weights(load_config(None, opts))
    assert str(caught.value).startswith(begin) and "\n" not in str(caught.value)


def test_only_mistakes_of_users_become_sentences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: object) -> None:
        raise error

    monkeypatch.setattr(main, "start", fail)
    for error in (UserError("a mistake"), PermissionError(13, "Permission denied", "x")):
        assert main.main(["--cfg", TINY]) == 2
        assert capsys.readouterr().err == f"error: {error}\n"
    for error in (ValueError("a bug"), RuntimeError("a bug"), KeyError("a bug")):
        with pytest.raises(type(error)):
            main.main(["--cfg", TINY])
    error = dist.DistStoreError("1/2 clients joined")
    assert main.main(["--cfg", TINY]) == 1
    assert capsys.readouterr().err.startswith("error: 1/2 clients joined\nerror: process")
    monkeypatch.setenv("RANK", "1")  # the other ranks have the same error
    assert main.main(["--cfg", TINY, "--seed", "-1"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", [["--cfg", TINY, "--bach-size", "3"], ["--cfg", TINY, "--thr"], []])
def test_unknown_or_missing_flags_are_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.read_config(arguments)
    assert caught.value.code == 2


def test_flags_win_over_opts_and_yaml_only_if_given() -> None:
    with pytest.raises(UserError, match="got 3 words: SEED 3 TAG; give"):
        main.read_config(["--cfg", TINY, "--zip", "--batch-size", "8", "--opts", "SEED", "3", "TAG"])
    config = main.read_config(["--cfg", TINY, "--opts", "DATA.BATCH_SIZE", "4", "TAG", "x", "--zip"])
    assert (config.DATA.BATCH_SIZE, config.TAG, config.DATA.ZIP_MODE) == (4, "x", True)
    words = ["--cfg", TINY, "--local_rank=1", "--batch-size", "8", "--opts", "DATA.BATCH_SIZE", "4"]
    assert main.read_config(words).DATA.BATCH_SIZE == 8


def test_a_configuration_that_cannot_be_written_is_reported(
    few_images: Path, nano_opts: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder_of(tmp_path) / "config.yaml").mkdir(parents=True)
    assert main.main(command(few_images, tmp_path, nano_opts)) == 2
    assert "config.yaml: expected to write the configuration, got: Is a directory" in capsys.readouterr().err


def test_a_second_run_in_a_folder_is_refused(
    few_images: Path, nano_opts: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing of the first one is touched."""
    folder = folder_of(tmp_path)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"kind": "tr')  # a line that is being written
    if not (child := os.fork()):
        with run_dir.lock(folder):
            (folder / "locked").touch()
            time.sleep(60)
    while not (folder / "locked").exists():
        time.sleep(0.01)
    assert main.main(command(few_images, tmp_path, [*nano_opts, "DIST_TIMEOUT_MINUTES", 0.01])) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {folder}: expected an output folder that no other run is writing to")
    assert f"process {child} on" in message
    assert (folder / "metrics.jsonl").read_text() == '{"kind": "tr'
    os.kill(child, 9)
    os.waitpid(child, 0)


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
    with pytest.raises(UserError, match="finite"):
        evaluate(run, model, [(torch.full((1, 3), torch.nan), torch.tensor([0]))])


def test_every_process_of_a_machine_needs_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"^DEVICE: .*'cuda:1'.*CUDA_VISIBLE_DEVICES"):
        utils.pick_device("cuda:1")
    assert utils.pick_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="below 2.*got 3"):
        utils.pick_device("cuda")
