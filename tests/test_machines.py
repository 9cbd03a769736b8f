"""Machines and files of users: systems without Unix's calls, other accelerators, `~`, odd names and images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import NANO, REPO

WORDS = [str(word) for pair in NANO.items() for word in pair]

# --- A system that is not Unix ------------------------------------------------------------------------------

NOT_UNIX = '''
"""What Windows lacks is missing here, and files behave as they do there; read at the start of each process."""
import builtins, multiprocessing, os, signal, sys, warnings
import filelock, psutil, torch  # may use what is removed

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP", "sigwaitinfo"):
    vars(signal).pop(name, None)
for name in [*(name for name in dir(os) if name.startswith("EX_")), "fork", "sysconf", "sched_getaffinity"]:
    vars(os).pop(name, None)
multiprocessing.set_start_method("spawn", force=True)
ours = "main|utils|config|logger|optimizer|data|models|training|classification|tools"
warnings.filterwarnings("error", category=EncodingWarning, module=rf"({ours})\\b")

def like_windows(function):
    def call(source, *rest, **options):
        held = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        if any(os.path.lexists(path) and os.path.realpath(path) == os.path.realpath(source) for path in held):
            raise PermissionError(13, "used by another process", source)
        if function is renamed and os.path.exists(rest[0]):
            raise FileExistsError(17, "exists", rest[0])
        return function(source, *rest, **options)
    return call

renamed, opened = os.rename, os.open
def open_file(path, *rest, **options):
    if sys._getframe(1).f_code.co_filename.startswith({REPO!r}) and os.path.isdir(path):
        raise PermissionError(13, "is a folder", path)
    return opened(path, *rest, **options)

if os.path.isdir("/proc/self/fd"):
    os.rename, os.replace, os.open = like_windows(os.rename), like_windows(os.replace), open_file
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
    """With worker processes that are spawned, a console in ASCII, and folders with names that are not UTF-8."""
    (tmp_path / "sitecustomize.py").write_text(NOT_UNIX.replace("{REPO!r}", repr(str(REPO))))
    (tmp_path / "steps.py").write_text(STEPS)
    odd = tmp_path / (os.fsdecode(b"caf\xe9") if sys.platform == "linux" else "café")
    odd.mkdir()
    (odd / "data").symlink_to(few_images)
    run = odd / "out/nano/default"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("of an earlier run\n")
    environment = {"PYTHONPATH": str(tmp_path), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    environment |= {"PYTHONWARNDEFAULTENCODING": "1", "OMP_NUM_THREADS": "1"}
    words = [str(tmp_path / "steps.py"), str(REPO), str(odd / "data"), str(odd / "out"), *WORDS]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, env=os.environ | environment, cwd=tmp_path, check=False
    )
    printed, errors = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, errors
    assert "Logging error" not in errors and "Traceback" not in errors
    assert "resumed" in printed and "were moved to" in printed
    for name in ("best.pth", "plot.png", "earlier_1/metrics.jsonl", "metrics.jsonl"):
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
