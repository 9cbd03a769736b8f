"""Two real processes over gloo: they train like one, evaluate exactly, stop and fail together."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, VAL_IMAGES
from test_main import OPTS, PLAIN, checkpoint, command, difference, folder_of, metrics_of
from test_resume import RANDOM, assert_same_end

import main
from config import load_config
from models import build_model
from training.loop import evaluate

PROGRAM = """
import json, os, shutil, signal, sys
sys.path.insert(0, sys.argv[1])
import main, utils
from torch._dynamo.utils import counters
from training.checkpoints import Checkpoints
from training.preemption import StopRequested

evaluate = main.evaluate
def noted(*arguments):
    result = evaluate(*arguments)
    if utils.is_main_process():
        noted = {name: value.hex() for name, value in result.items()}
        print("RESULT", json.dumps(noted | {"graphs": counters["stats"]["unique_graphs"]}), flush=True)
    return result
main.evaluate = noted

after_update = Checkpoints.after_update
def signalled(self, state, is_last):
    if self.folder.parts[-3] == "stopped" and state.position.updates == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
    after_update(self, state, is_last)
Checkpoints.after_update = signalled

commands = json.loads(sys.argv[2])
for arguments in commands[:-1]:
    try:
        main.start(main.read_config(arguments))
    except StopRequested:
        if utils.is_main_process():
            folder = arguments[arguments.index("--output") + 1]
            shutil.copytree(folder, folder + "_then")
    except utils.UserError as error:
        os.write(1, f"REFUSED {error}\\n".encode())  # at once, as the other rank writes, too
main.exit_process(main.main(commands[-1]))
"""
TRAIN = [*OPTS, *PLAIN, "TRAIN.ACCUMULATION_STEPS", 2]
WORKER = ["TRAIN.EPOCHS", 1, "DATA.NUM_WORKERS", 1]
STOPPED = [*OPTS, *RANDOM, "SAVE_STEPS", 0, "TRAIN.ACCUMULATION_STEPS", 1]
FROZEN = [*OPTS, *PLAIN, "TRAIN.FREEZE_STAGES", 2, "TRAIN.LAYER_DECAY", 0.8]
FROZEN += ["TRAIN.EMA.ENABLED", True, "TRAIN.EMA.DECAY", 0.5]
ONE_BLOCK = [  # as little as possible to compile
    *["MODEL.FOCAL.DEPTHS", [1], "MODEL.FOCAL.NUM_HEADS", [1], "MODEL.FOCAL.FOCAL_LEVELS", [1]],
    *["MODEL.FOCAL.FOCAL_WINDOWS", [7], "MODEL.FOCAL.EXPAND_SIZES", [3], "MODEL.ATTENTION_BACKEND", "plain"],
]
COMPILED = [("not_compiled",), ("compiled", "--compile")]


@pytest.fixture(scope="module")
def launched(few_images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder in which two ranks ran many commands, the last one in vain; their output and errors."""
    root = tmp_path_factory.mktemp("launched")
    torch.manual_seed(0)
    torch.save(build_model(load_config(opts=OPTS)).state_dict(), root / "nano.pth")
    damaged = {split: shutil.copytree(few_images, root / f"damaged_{split}") for split in ("train", "val")}
    for folder in (damaged["train"] / "train").iterdir():
        next(folder.iterdir()).write_bytes(b"damaged")
    second_image(damaged["val"]).write_bytes(b"damaged")
    copies = [shutil.copytree(few_images, root / f"copy_{rank}") for rank in (0, 1)]
    next(copies[1].glob("train/*/*.png")).unlink()
    weights, eight = str(root / "nano.pth"), ["--batch-size", "8"]
    commands = [
        command(root / "copy_$RANK", root / "copies", TRAIN, *eight),
        evaluation(few_images, root),
        command(few_images, root / "two", TRAIN, *eight),
        command(damaged["train"], root / "damaged", [*TRAIN, *WORKER], *eight),
        command(few_images, root / "whole", STOPPED, *eight),
        command(few_images, root / "stopped", STOPPED, *eight),
        command(few_images, root / "stopped", STOPPED, *eight),
        command(few_images, root / "frozen", [*FROZEN, "TRAIN.EPOCHS", 1], "--pretrained", weights),
        *(command(root, root / name, [*OPTS, *ONE_BLOCK], "--debug", *flags) for name, *flags in COMPILED),
        command(damaged["val"], root / "eval", OPTS, "--eval", "--resume", weights),
    ]
    (root / "program.py").write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(root / "program.py"), str(REPO), json.dumps(commands)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    logs = [folder_of(root / name) / "log_rank0.txt" for name, *_ in COMPILED]
    assert all(log.exists() and "images: acc1" in log.read_text() for log in logs), done.stderr[-3000:]
    return root, done.stdout, done.stderr


def results_in(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in re.findall(r"^RESULT (.*)$", printed, re.MULTILINE)]


def second_image(data: Path) -> Path:
    """The first one that the second rank evaluates."""
    return sorted((data / "val").glob("*/*.png"))[1]


def evaluation(data: Path, root: Path) -> list[str]:
    flags = ["--batch-size", "4", "--eval", "--resume", str(root / "nano.pth")]
    return command(data, root / "eval", [*OPTS, "TEST.CROP", False], *flags)


def test_two_ranks_evaluate_to_the_digits_of_one(
    launched: tuple[Path, str, str], few_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, printed, errors = launched
    alone = []
    monkeypatch.setattr(main, "evaluate", lambda *given: alone.append(evaluate(*given)))
    assert main.main(evaluation(few_images, root)) == 0
    assert re.findall(r"(\d+) images: acc1", printed)[0] == str(VAL_IMAGES), errors
    (ours,), theirs = alone, results_in(printed)[0]
    assert [ours["acc1"].hex(), ours["acc5"].hex()] == [theirs["acc1"], theirs["acc5"]]
    assert ours["loss"] == pytest.approx(float.fromhex(theirs["loss"]), rel=1e-15, abs=0)
    assert 0 < ours["acc5"] < 100, "always right or wrong would show nothing"


def test_two_ranks_equal_one_with_the_double_batch(
    launched: tuple[Path, str, str], few_images: Path, tmp_path: Path
) -> None:
    """With accumulation, so that gradients are averaged at some steps only."""
    two = launched[0] / "two"
    assert main.main(command(few_images, tmp_path, TRAIN)) == 0
    assert difference(tmp_path, two, epoch=1) < 1e-5
    for kind in ("train", "epoch"):
        for ours, theirs in zip(metrics_of(tmp_path, kind), metrics_of(two, kind), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            assert ours.get("acc1") == theirs.get("acc1")
            assert ours.get("lr") == theirs.get("lr")
            assert ours.get("grad_norm", 0) == pytest.approx(theirs.get("grad_norm", 0), rel=1e-3)


def test_different_data_are_refused_by_all(launched: tuple[Path, str, str]) -> None:
    counts = f"130 and {VAL_IMAGES} in process 0, but 129 and {VAL_IMAGES} in process 1"
    assert len(re.findall(rf"REFUSED DATA.DATA_PATH: expected the same .* {counts}; copy", launched[1])) == 2


def test_damaged_images_of_any_rank_are_counted(launched: tuple[Path, str, str]) -> None:
    output = launched[0] / "damaged"
    logs = [(folder_of(output) / f"log_rank{rank}.txt").read_text() for rank in (0, 1)]
    counts = [log.count("replaced an image that does not decode") for log in logs]
    assert min(counts) > 0
    assert metrics_of(output, "epoch")[0]["undecodable"] == sum(counts)


def test_an_error_of_one_rank_ends_all_with_one_sentence(launched: tuple[Path, str, str]) -> None:
    root, _, errors = launched
    second = second_image(root / "damaged_val")
    assert "exitcode  : 2 " in errors
    assert errors.count(f"error: {second}: expected an image file that decodes") == 1
    assert 'main.py", line' not in errors


def test_a_signal_to_one_of_two_ranks_stops_both_at_the_same_step(
    launched: tuple[Path, str, str], few_images: Path, tmp_path: Path
) -> None:
    """The next start ends like a run that was never stopped; one process continues from there, too."""
    root = launched[0]
    saved = list(folder_of(root / "stopped_then").glob("*.pth"))
    assert [path.name for path in saved] == ["ckpt_epoch_0_step_3.pth"]
    for rank in (0, 1):
        log = (folder_of(root / "stopped") / f"log_rank{rank}.txt").read_text()
        assert "stopped by a signal after 0 epochs and 3 steps" in log
    assert_same_end(root / "whole", root / "stopped")
    flags = ["--batch-size", "8", "--resume", str(saved[0])]
    assert main.main(command(few_images, tmp_path, [*STOPPED, "TRAIN.EPOCHS", 1], *flags)) == 0
    log = (folder_of(tmp_path) / "log_rank0.txt").read_text()
    assert "continues with the images that the epoch has not seen" in log
    assert torch.load(saved[0], weights_only=True)["position"]["samples_seen"] == 48
    assert metrics_of(tmp_path, "train")[-1]["step"] + 1 == 48 // 8 + (130 - 48) // 8


def test_two_ranks_train_what_is_not_frozen(launched: tuple[Path, str, str], few_images: Path) -> None:
    """Frozen weights stay, the others learn; the checkpoint and the average hold all; the run goes on."""
    root, printed, _ = launched
    assert "weights are not trained" in printed
    flags = ["--pretrained", str(root / "nano.pth")]
    assert main.main(command(few_images, root / "frozen", FROZEN, *flags)) == 0  # the second epoch
    before = torch.load(root / "nano.pth", weights_only=True)
    for key in ("model", "model_ema"):
        after = checkpoint(root / "frozen", 1)[key]
        same = {name for name in after if torch.equal(after[name], before[name])}
        frozen = ("patch_embed.", "layers.0.", "layers.1.")
        assert same >= {name for name in after if name.startswith(frozen)}
        assert not {name for name in same if name.startswith(("layers.3.", "norm.", "head."))}
    assert checkpoint(root / "frozen", 1)["model"].keys() == before.keys()


def test_a_compiled_model_trains_and_evaluates(launched: tuple[Path, str, str]) -> None:
    """As one that is not."""
    plain, ours = results_in(launched[1])[-2:]
    assert plain["graphs"] == 0 < ours["graphs"]
    assert float.fromhex(ours["loss"]) == pytest.approx(float.fromhex(plain["loss"]), rel=1e-5)
