"""Real processes over gloo: they train like one, evaluate exactly, stop and fail together."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import NANO, REPO
from test_main import ONE_BLOCK, PLAIN, command, difference, folder_of, metrics_of
from test_resume import RANDOM, SIGNALLED, assert_same_end, torchrun

import main
from config import load_config
from models import build_model
from training.preemption import EXIT_STOPPED

COUNTS = (1, 7, 13)  # validation images; no multiples of what the ranks take at once
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import main, utils
evaluate = main.evaluate
def noted(*arguments):
    result = evaluate(*arguments)
    if utils.is_main_process():
        print("RESULT", json.dumps({name: value.hex() for name, value in result.items()}), flush=True)
    return result
main.evaluate = noted
for arguments in json.loads(sys.argv[2]):
    main.start(main.read_config(arguments))
utils.close_distributed()
"""
OPTS = [word for pair in NANO.items() for word in pair]
TRAIN = [*OPTS, *PLAIN, "TRAIN.ACCUMULATION_STEPS", 2]
WORKER = ["TRAIN.EPOCHS", 1, "DATA.NUM_WORKERS", 1]
STOPPED = [*OPTS, *RANDOM, "SAVE_STEPS", 0, "TRAIN.ACCUMULATION_STEPS", 1]


def write_set(images: list[Path], count: int, root: Path) -> Path:
    """A validation set of so many images, with a map: folders would need images of every class."""
    labels = sorted({image.parent.name for image in images})
    lines = []
    for image in images[:: len(images) // count][:count]:
        (root / "val" / image.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, root / "val" / image.parent.name)
        lines.append(f"val/{image.parent.name}/{image.name}\t{labels.index(image.parent.name)}")
    (root / "ILSVRC2011fall_whole_map_val.txt").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def launched(few_images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """A folder of runs, and by number of ranks what was printed.

    1, 2 and 3 ranks evaluate three sets. 2 ranks also train: plainly, with damaged images, and all random.
    """
    root = tmp_path_factory.mktemp("launched")
    torch.manual_seed(0)
    weights = root / "nano.pth"
    torch.save(build_model(load_config(opts=OPTS)).state_dict(), weights)
    images = sorted((few_images / "val").glob("*/*.png"))
    flags = ["--dataset", "imagenet22k", "--batch-size", "4", "--eval", "--resume", str(weights)]
    plain = [*OPTS, "TEST.CROP", False]
    sets = [write_set(images, count, root / str(count)) for count in COUNTS]
    commands = [command(data, root / "eval", plain, *flags) for data in sets]
    damaged = shutil.copytree(few_images, root / "damaged_data")
    for folder in (damaged / "train").iterdir():
        next(folder.iterdir()).write_bytes(b"damaged")
    more = [
        command(few_images, root / "two", TRAIN, "--batch-size", "8"),
        command(damaged, root / "damaged", [*TRAIN, *WORKER], "--batch-size", "8"),
        command(few_images, root / "whole", STOPPED, "--batch-size", "8"),
    ]
    program, printed = root / "program.py", {}
    program.write_text(PROGRAM)
    for ranks in (1, 2, 3):
        words = json.dumps(commands + (more if ranks == 2 else []))
        done = torchrun(ranks, str(program), str(REPO), words)
        assert done.returncode == 0, done.stderr
        printed[ranks] = done.stdout
    return root, printed


def test_any_number_of_ranks_evaluates_to_the_same_digits(launched: tuple[Path, dict[int, str]]) -> None:
    results = {}
    for ranks, text in launched[1].items():
        lines = re.findall(r"(\d+ images: acc1 .*)", text)[: len(COUNTS)]
        assert [int(line.split()[0]) for line in lines] == list(COUNTS)
        exact = [json.loads(line) for line in re.findall(r"^RESULT (.*)$", text, re.MULTILINE)]
        results[ranks] = lines, exact
    for ranks in (2, 3):
        assert results[ranks][0] == results[1][0]
        for ours, theirs in zip(results[ranks][1], results[1][1], strict=True):
            assert (ours["acc1"], ours["acc5"]) == (theirs["acc1"], theirs["acc5"])
            loss = float.fromhex(theirs["loss"])
            assert float.fromhex(ours["loss"]) == pytest.approx(loss, rel=1e-15, abs=0)
    hits = {result["acc5"] for result in results[1][1]}
    assert len(hits) > 1, "weights that are always right or wrong would show nothing"


def test_two_ranks_equal_one_with_the_double_batch(
    launched: tuple[Path, dict[int, str]], few_images: Path, tmp_path: Path
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


def test_damaged_images_of_any_rank_are_counted(launched: tuple[Path, dict[int, str]]) -> None:
    output = launched[0] / "damaged"
    logs = [(folder_of(output) / f"log_rank{rank}.txt").read_text() for rank in (0, 1)]
    counts = [log.count("replaced an image that does not decode") for log in logs]
    assert min(counts) > 0
    assert metrics_of(output, "epoch")[0]["undecodable"] == sum(counts)


def test_an_error_of_one_rank_ends_all_with_one_sentence(
    launched: tuple[Path, dict[int, str]], few_images: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(few_images, tmp_path / "data")
    second = sorted((data / "val").glob("*/*.png"))[1]  # the second rank evaluates every other image
    second.write_bytes(b"damaged")
    weights = str(folder_of(launched[0] / "two") / "ckpt_epoch_1.pth")
    words = command(data, tmp_path, TRAIN, "--eval", "--resume", weights)
    done = torchrun(2, str(REPO / "main.py"), *words)
    assert "exitcode  : 2 " in done.stderr
    assert done.stderr.count(f"error: {second}: expected an image file that decodes") == 1
    assert 'main.py", line' not in done.stderr


def test_a_signal_to_one_of_two_ranks_stops_both_at_the_same_step(
    launched: tuple[Path, dict[int, str]], few_images: Path, tmp_path: Path
) -> None:
    """The next start ends like a run that was never stopped; one process continues from there, too."""
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    words = command(few_images, tmp_path / "stopped", STOPPED, "--batch-size", "8")
    done = torchrun(2, str(tmp_path / "signalled.py"), str(REPO), *words)
    assert f"exitcode  : {EXIT_STOPPED} " in done.stderr
    saved = list(folder_of(tmp_path / "stopped").glob("*.pth"))
    assert [path.name for path in saved] == ["ckpt_epoch_0_step_3.pth"]
    for rank in (0, 1):
        log = (folder_of(tmp_path / "stopped") / f"log_rank{rank}.txt").read_text()
        assert "stopped by a signal after 0 epochs and 3 steps" in log
    inside = shutil.copy(saved[0], tmp_path / "inside.pth")
    done = torchrun(2, str(REPO / "main.py"), *words)
    assert done.returncode == 0, done.stderr
    assert_same_end(launched[0] / "whole", tmp_path / "stopped")
    flags = ["--batch-size", "8", "--resume", str(inside)]
    assert main.main(command(few_images, tmp_path / "one", [*STOPPED, "TRAIN.EPOCHS", 1], *flags)) == 0
    log = (folder_of(tmp_path / "one") / "log_rank0.txt").read_text()
    assert "continues with the images that the epoch has not seen" in log
    assert torch.load(inside, weights_only=True)["position"]["samples_seen"] == 48
    assert metrics_of(tmp_path / "one", "train")[-1]["step"] + 1 == 48 // 8 + (130 - 48) // 8


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_compiled_model_trains_and_evaluates(ranks: int, tmp_path: Path) -> None:
    words = command(tmp_path, tmp_path, [*OPTS, *ONE_BLOCK], "--debug", "--compile")
    done = torchrun(ranks, str(REPO / "main.py"), *words)
    assert done.returncode == 0, done.stderr
    assert "step 2/2  loss" in done.stdout
