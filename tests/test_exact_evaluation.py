"""Evaluation by any number of processes: the same images, hits and loss, to the last digit."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO
from test_main import command

import main

COUNTS = (1, 7, 13)  # validation images; no multiples of what the processes take at once
BATCH = 4
PROGRAM = """
import json, sys
import main, utils
from engine import evaluate

def noted(*arguments):
    result = evaluate(*arguments)
    if utils.is_main_process():
        print("RESULT", json.dumps({name: value.hex() for name, value in result.items()}), flush=True)
    return result

main.evaluate = noted
for arguments in json.loads(sys.argv[1]):
    main.start(main.read_config(arguments))
utils.close_distributed()
"""


@pytest.fixture(scope="module")
def sets(few_images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Validation sets of so many images, by their number; every class has a folder."""
    root = tmp_path_factory.mktemp("sets")
    images = sorted((few_images / "val").glob("*/*.png"))
    for count in COUNTS:
        for label in {image.parent.name for image in images}:
            (root / str(count) / "val" / label).mkdir(parents=True)
        for image in images[:: len(images) // count][:count]:
            shutil.copy(image, root / str(count) / "val" / image.parent.name)
    return {count: write_maps(root / str(count)) for count in COUNTS}


def write_maps(root: Path) -> Path:
    """A map of the images, as classes without images are an error in folders."""
    labels = sorted(folder.name for folder in (root / "val").iterdir())
    lines = [
        f"{path.relative_to(root)}\t{labels.index(path.parent.name)}"
        for path in (root / "val").glob("*/*.png")
    ]
    (root / "ILSVRC2011fall_whole_map_val.txt").write_text("\n".join(sorted(lines)))
    return root


@pytest.fixture(scope="module")
def weights(few_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that get some images right and some wrong."""
    import torch
    from conftest import NANO

    from config import load_config
    from models import build_model

    torch.manual_seed(0)
    model = build_model(load_config(opts=[word for pair in NANO.items() for word in pair]))
    path = tmp_path_factory.mktemp("weights") / "nano.pth"
    torch.save(model.state_dict(), path)
    return path


def eval_command(data: Path, output: Path, weights: Path, opts: list[object]) -> list[str]:
    flags = ["--dataset", "imagenet22k", "--batch-size", str(BATCH), "--eval", "--resume", str(weights)]
    return command(data, output, opts, *flags)


def launch(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ]
    return subprocess.run(
        [*launcher, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture
def opts(nano_opts: list[object]) -> list[object]:
    return [*nano_opts, "TEST.CROP", False]


def test_any_number_of_processes_gives_the_same_digits(
    sets: dict[int, Path], weights: Path, opts: list[object], tmp_path: Path
) -> None:
    program = tmp_path / "evaluate.py"
    program.write_text(PROGRAM)
    results = {}
    for processes in (1, 2, 3):
        output = tmp_path / str(processes)
        commands = [eval_command(data, output, weights, opts) for data in sets.values()]
        done = launch(processes, str(program), json.dumps(commands))
        assert done.returncode == 0, done.stderr
        texts = re.findall(r"(\d+ images: acc1 .*)", done.stdout)
        exact = [json.loads(line) for line in re.findall(r"^RESULT (.*)$", done.stdout, re.MULTILINE)]
        assert [int(text.split()[0]) for text in texts] == list(COUNTS)
        results[processes] = texts, exact
    for processes in (2, 3):
        assert results[processes][0] == results[1][0]
        for ours, theirs in zip(results[processes][1], results[1][1], strict=True):
            assert (ours["acc1"], ours["acc5"]) == (theirs["acc1"], theirs["acc5"])
            loss = float.fromhex(theirs["loss"])
            assert float.fromhex(ours["loss"]) == pytest.approx(loss, rel=1e-15, abs=0)
    hits = {float.fromhex(result["acc5"]) for result in results[1][1]}
    assert len(hits) > 1, "weights that are always right or wrong would show nothing"


def test_the_command_line_says_the_same(
    sets: dict[int, Path], weights: Path, opts: list[object], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """main.py itself, under the launcher and without it."""
    arguments = eval_command(sets[7], tmp_path / "two", weights, opts)
    done = launch(2, str(REPO / "main.py"), *arguments)
    assert done.returncode == 0, done.stderr
    assert main.main(eval_command(sets[7], tmp_path / "one", weights, opts)) == 0
    texts = [re.search(r"7 images: acc1 .*", text)[0] for text in (done.stdout, capsys.readouterr().out)]
    assert texts[0] == texts[1]
