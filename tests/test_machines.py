"""Machines and files of users: systems that are not Unix, other accelerators, `~`, odd names and images."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import NANO_WORDS, REPO
from pictures import encoded
from PIL import Image

import main
from classification import export, predict
from config import load_config
from data import build_loaders
from data.folder import scan_class_folders
from data.images import decode_rgb
from data.transforms import Recipe, train_transform, with_decoder
from data.workers import limit_workers
from tools import convert_checkpoint
from utils import expand_path

WORDS = [str(word) for word in NANO_WORDS]

# --- A system that is not Unix ------------------------------------------------------------------------------

NOT_UNIX = '''
"""What Windows lacks is missing here; read at the start of each process."""
import multiprocessing, os, signal, sys, warnings
import filelock, psutil  # may use what is removed

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP", "sigwaitinfo"):
    vars(signal).pop(name, None)
for name in [*(name for name in dir(os) if name.startswith("EX_")), "fork", "sysconf", "sched_getaffinity"]:
    vars(os).pop(name, None)
multiprocessing.set_start_method("spawn", force=True)
ours = "main|utils|config|logger|optimizer|data|models|training|classification|tools"
warnings.filterwarnings("error", category=EncodingWarning, module=rf"({ours})\\b")
'''
STEPS = """
import json, sys
sys.path.insert(0, sys.argv[1])

if __name__ == "__main__":
    import main
    from classification import export, predict
    from tools import plot_run
    data, output, *opts = sys.argv[2:]
    run = f"{output}/nano/default"
    cfg = ["--cfg", f"{sys.argv[1]}/configs/focal_tiny_patch4_window7_224.yaml", "--dataset", "folder"]
    flags = [*cfg, "--data-path", data, "--output", output, "--batch-size", "64", "--opts", *opts]
    for words in (
        ["TRAIN.EPOCHS", "1", "DATA.NUM_WORKERS", "1"],
        ["TRAIN.EPOCHS", "2"],
        ["EVAL_MODE", "True", "MODEL.RESUME", f"{run}/best.pth"],
    ):
        assert main.main([*flags, *words]) == 0, words
    assert predict.main([f"{data}/val", "--resume", f"{run}/best.pth"]) == 0
    assert export.main(["--resume", f"{run}/best.pth", "--out", "exported", "--formats", "torchscript"]) == 0
    assert plot_run.main([run]) == 0
    assert main.main([*flags, "MODEL.RESUME", f"{data}/nowhere.pth", "TAG", "other"]) == 2
"""


def test_every_command_runs_on_a_system_that_is_not_unix(few_images: Path, tmp_path: Path) -> None:
    """With spawned worker processes, a console in ASCII, and a folder whose name is not UTF-8.

    Elsewhere without what Windows lacks; how files behave there is tested on Windows alone.
    """
    (tmp_path / "sitecustomize.py").write_text(NOT_UNIX)
    (tmp_path / "steps.py").write_text(STEPS)
    odd = tmp_path / (os.fsdecode(b"caf\xe9") if sys.platform == "linux" else "café")
    odd.mkdir()
    shutil.copytree(few_images, odd / "data")
    run = odd / "out/nano/default"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("of a killed run\n")
    environment = {"PYTHONPATH": str(tmp_path), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    environment |= {"PYTHONWARNDEFAULTENCODING": "1", "OMP_NUM_THREADS": "1"}
    words = [str(tmp_path / "steps.py"), str(REPO), str(odd / "data"), str(odd / "out"), *WORDS]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, env=os.environ | environment, cwd=tmp_path, check=False
    )
    printed, errors = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, errors
    assert "Logging error" not in errors and "Traceback" not in errors
    assert "resumed" in printed
    for name in ("best.pth", "plot.png", "metrics.jsonl"):
        assert (run / name).is_file()


# --- Another accelerator ------------------------------------------------------------------------------------

DEVICE_STEPS = """
import sys
sys.path[:0] = sys.argv[1:3]
import stand_in_device
import main
from classification import predict
data, output, *opts = sys.argv[3:]
words = ["--cfg", f"{sys.argv[1]}/configs/focal_tiny_patch4_window7_224.yaml", "--dataset", "folder"]
words += ["--data-path", data, "--output", output, "--batch-size", "64", "--opts", *opts, "TAG"]
for tag, more in {"cpu": ["DEVICE", "cpu"], "other": []}.items():
    assert main.main([*words, tag, *more]) == 0
weights = f"{output}/nano/other/best.pth"
assert main.main([*words, "evaluated", "MODEL.RESUME", weights, "EVAL_MODE", "True"]) == 0
assert predict.main([f"{data}/val", "--resume", weights]) == 0
assert main.main([*words, "bad", "DEVICE", "cuda"]) == 2
assert main.main([*words, "bad", "DEVICE", "standin:1"]) == 2
"""


@pytest.mark.skipif(not hasattr(torch._C, "_acc"), reason="this PyTorch takes no device from Python")
def test_a_device_that_only_pytorch_knows(few_images: Path, tmp_path: Path) -> None:
    """It is the default where it is, and trains to the same bits as the CPU, which computes for it."""
    (tmp_path / "steps.py").write_text(DEVICE_STEPS)
    opts = [*WORDS, "TRAIN.EPOCHS", "1", "MODEL.ATTENTION_BACKEND", "plain"]
    opts += ["DATA.PIN_MEMORY", "False"]
    words = [tmp_path / "steps.py", REPO, REPO / "tests", few_images, tmp_path / "out", *opts]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("1 process(es) on standin:0, fp32") == 2
    ours, theirs = (
        torch.load(tmp_path / f"out/nano/{tag}/ckpt_epoch_0.pth", weights_only=True)
        for tag in ("other", "cpu")
    )
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    for text in ("PyTorch finds here (standin or cpu), got 'cuda'", "below 1"):
        assert text in done.stderr


# --- Paths --------------------------------------------------------------------------------------------------


def test_home_and_variables_are_replaced_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path / "there"))
    monkeypatch.setenv("PT_OUTPUT_DIR", "~/runs")
    (tmp_path / "base.yaml").write_text("{OUTPUT: ~/other, DATA: {DATA_PATH: '${WHERE}/data'}}")
    (tmp_path / "own.yaml").write_text("{BASE: [~/base.yaml], MODEL: {RESUME: $WHERE/map}}")
    words = ["--cfg", "~/own.yaml", "--pretrained", "$WHERE/a.pth"]
    config = main.read_config(words)
    there = str(tmp_path / "there")
    assert (str(tmp_path / "runs"), f"{there}/data") == (config.OUTPUT, config.DATA.DATA_PATH)
    assert (f"{there}/a.pth", f"{there}/map") == (config.MODEL.PRETRAINED, config.MODEL.RESUME)
    monkeypatch.delenv("PT_OUTPUT_DIR")
    assert main.main([*words, "--output", "$NOWHERE/x"]) == 2
    assert "OUTPUT: $NOWHERE/x: expected a path whose variables are set" in capsys.readouterr().err
    for path in ("https://host/$WEIGHTS.pth", "plain", "a~b", ""):
        assert expand_path(path) == path
    commands: dict[Callable[[list[str]], Any], list[str]] = {
        predict.parse: ["~/a.png", "--resume", "$WHERE/b.pth", "--cfg", "~/c", "--classes", "~/d"],
        export.parse: ["--resume", "~/a.pth", "--out", "$WHERE/out", "--cfg", "~/c"],
    }
    for parse, given in commands.items():
        assert str(tmp_path) in str(parse(given)) and not {"~", "$"} & set(str(parse(given)))
    assert convert_checkpoint.main(["~/a.pth", "$WHERE/b.pth"]) == 2
    assert f"{tmp_path}/a.pth" in capsys.readouterr().err


# --- Images -------------------------------------------------------------------------------------------------


def test_class_folders_take_what_pillow_opens_and_say_what_they_leave_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture = Image.new("RGB", (48, 40), (200, 30, 40))
    kinds = {"a.GIF": "GIF", "b.jfif": "JPEG", "c.tga": "TGA", "d.jp2": "JPEG2000", "e.ico": "ICO"}
    kinds |= {"f.avif": "AVIF"} if ".avif" in Image.registered_extensions() else {}
    folder = tmp_path / "only"
    folder.mkdir()
    for name, kind in kinds.items():
        (folder / name).write_bytes(encoded(picture, kind))
    for name in ("x.eps", "y.txt", "z.txt", ".hidden"):
        (folder / name).touch()
    source = scan_class_folders(tmp_path, ["only"])
    assert [Path(source.name(index)).name for index in range(len(source))] == sorted(kinds)
    assert "3 files are not taken for images and left out: 2 with .txt, 1 with .eps" in caplog.text
    for index in range(len(source)):
        red, green, blue = np.asarray(decode_rgb(source.read(index), source.name(index)))[20, 20].tolist()
        assert red > 180 and green < 60 and blue < 70
    assert [Path(path).name for path in predict.find_images([str(folder)])] == sorted(kinds)


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        ("float32", [0.5, 1, np.inf, np.nan, -np.inf], [128, 255, 255, 0, 0]),
        ("float32", [0, 0.4, 128, 254, 255], [0, 0, 128, 254, 255]),
        ("float32", [0, 257, 514, 60000], [0, 1, 2, 233]),
        ("int32", [-1, 10**9, 2 * 10**9], [0, 128, 255]),
        ("uint16", [0, 255, 256, 4095], [0, 0, 1, 15]),
    ],
)
def test_gray_of_any_range_is_scaled(dtype: str, values: list[float], expected: list[int]) -> None:
    gray = decode_rgb(encoded(Image.fromarray(np.array([values], dtype)), "TIFF"), "a.tiff")
    assert np.asarray(gray)[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("decoder", ["pil", "opencv"])
def test_photographs_are_turned_if_wanted(decoder: str) -> None:
    ramp = np.arange(80, dtype=np.uint8)[None, :, None] * np.ones((60, 1, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray(ramp), "JPEG", exif=exif, quality=100)
    recipe = Recipe(auto_augment="none", color_jitter=0.0, reprob=0.0, hflip=0.0, scale=(1, 1), ratio=(1, 1))
    transform = train_transform((64, 64), 3, [0.0] * 3, [1.0] * 3, "bilinear", recipe)
    for upright in (False, True):
        decode, rest = with_decoder(decoder, transform, upright)
        image = rest(decode(content, "a.jpg"))[0] * 255
        across, down = image[:, -1].mean() - image[:, 0].mean(), image[-1].mean() - image[0].mean()
        assert (down if upright else across) > 40 and abs(across if upright else down) < 2
    assert decode_rgb(content, "a.jpg", upright=True).size == (60, 80)


# --- Fewer surprises ----------------------------------------------------------------------------------------


def test_no_more_workers_than_cores(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, few_images: Path
) -> None:
    affinities = {os.getpid(): range(6), os.getppid(): range(6)}
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: affinities[self.pid], raising=False)
    assert [limit_workers(count) for count in (0, 4, 6)] == [0, 4, 6]
    assert not caplog.records
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    opts = [*WORDS, "DATA.DATA_PATH", str(few_images), "DATA.BATCH_SIZE", "8", "DATA.NUM_WORKERS", "8"]
    loaders = build_loaders(load_config(None, opts))
    assert loaders.train_loader.num_workers == loaders.val_loader.num_workers == 1
    assert caplog.text.count("DATA.NUM_WORKERS: 8 is more than this machine has cores (6") == 1
    affinities[os.getppid()] = range(24)  # a launcher has bound this process to its share
    assert limit_workers(6) == 6


def test_without_arguments_a_whole_command_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main([])
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("  python main.py"))
    assert main.read_config(line.split()[2:]).DATA.DATA_PATH == "imagenet"
