"""What the tests share that run detection's and segmentation's commands within their own process."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO

SPLITS = ("train", "val", "test")
ONE_PROCESS: dict[str, Any] = {  # over a config's options: the process that trains reads the images
    "randomness.seed": 1,
    **{f"{split}_dataloader.num_workers": 0 for split in SPLITS},
    **{f"{split}_dataloader.persistent_workers": False for split in SPLITS},
}
FIGURES = ("coco/", "aAcc", "mAcc", "mIoU")
STAND_IN = """
import json, pathlib, shutil, sys
commands, folders = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
with commands.open("a") as file:
    file.write(json.dumps(sys.argv[3:]) + "\\n")
if "--work-dir" in sys.argv:
    work_dir = pathlib.Path(sys.argv[sys.argv.index("--work-dir") + 1])
    shutil.copytree(folders[work_dir.name], work_dir)
"""


@contextmanager
def in_scope(package: str) -> Iterator[None]:
    """mmdet's or mmseg's registries, and at the end those that were before: Runners leave theirs behind.

    Configs are written in long lines meanwhile. Breaking them prettily, ten times in a run, would be most of
    what a small run takes; the commands that tests start as processes do it.
    """
    from mmengine.registry import DefaultScope
    from yapf.yapflib import yapf_api

    with pytest.MonkeyPatch.context() as patch, DefaultScope.overwrite_default_scope(package):
        patch.setattr(yapf_api, "FormatCode", lambda text, **style: (text, True))
        yield


def scalars(work_dir: Path) -> list[dict[str, Any]]:
    """What the newest run in a folder logged."""
    newest = max(work_dir.glob("*/vis_data/scalars.json"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(line) for line in newest.read_text().splitlines()]


def evaluated(lines: list[dict[str, Any]]) -> dict[str, float]:
    """What the last evaluation of a log found: box and mask AP, or accuracies and IoU."""
    found = [{k: v for k, v in line.items() if k.startswith(FIGURES)} for line in lines]
    return [figures for figures in found if figures][-1]


def report_of(work_dir: Path) -> dict[str, float]:
    """What the only evaluation in a folder found."""
    (report,) = work_dir.glob("*/*.json")
    return json.loads(report.read_text())


def make_demo(
    task: str, root: Path, runs: Mapping[str, Path], *variables: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """`make demo-TASK` on the scenes in a folder, and the commands that it ran.

    They are not carried out: `runs` has, by the name of a work dir, a finished run that is copied there.
    """
    (root / "commands").unlink(missing_ok=True)
    (root / "stand_in.py").write_text(STAND_IN)
    folders = json.dumps({name: str(folder) for name, folder in runs.items()}, separators=(",", ":"))
    run = f"{sys.executable} {root}/stand_in.py {root}/commands '{folders}'"
    command = ["make", "--no-print-directory", f"demo-{task}", f"RUN={run}", "SETUP=", f"DEMO={root}"]
    done = subprocess.run(
        [*command, *variables], cwd=REPO, capture_output=True, text=True, check=False, timeout=120
    )
    return done, [json.loads(line) for line in (root / "commands").read_text().splitlines()]
