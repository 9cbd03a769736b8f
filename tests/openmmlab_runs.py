"""What the tests share that run detection's and segmentation's commands within their own process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO

SPLITS = ("train", "val", "test")
ONE_PROCESS = {  # over a config's options: images are read by the process that trains
    **{f"{split}_dataloader.num_workers": 0 for split in SPLITS},
    **{f"{split}_dataloader.persistent_workers": False for split in SPLITS},
}


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


def run_make(target: str, folder: Path, *variables: str) -> subprocess.CompletedProcess[str]:
    """A target of the Makefile with this interpreter and the demo in a folder."""
    command = [
        "make",
        "--no-print-directory",
        target,
        f"RUN={sys.executable}",
        "SETUP=",
        f"DEMO={folder}",
        *variables,
    ]
    return subprocess.run(
        command,
        cwd=REPO,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
