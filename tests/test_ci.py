"""The workflow of .github: it runs the oldest PyTorch and timm of the requirements, and names what exists."""

import re
import subprocess
from itertools import takewhile
from pathlib import Path

import pytest
import yaml
from conftest import REPO

WORKFLOW = (REPO / ".github/workflows/ci.yml").read_text(encoding="utf-8")


def lower_bounds(path: Path) -> dict[str, str]:
    """Package and version of each line `name>=version`."""
    return dict(re.findall(r"^([\w-]+)[>=]=([\d.]+)", path.read_text(encoding="utf-8"), re.MULTILINE))


def test_oldest_versions_are_the_bounds() -> None:
    """2.6 in the requirements is 2.6.0 of the releases. What a bound claims to have been tried is tried."""
    bounds, pinned = lower_bounds(REPO / "requirements.txt"), lower_bounds(REPO / ".github/oldest.txt")
    bounds |= lower_bounds(REPO / "requirements-dev.txt")
    text = (REPO / "requirements.txt").read_text(encoding="utf-8")
    tried = re.findall(r"^([\w-]+)\S+ +# .*the oldest release that was tried", text, re.MULTILINE)
    assert {"timm", "safetensors"} <= {*tried}
    assert {"torch", "torchvision", "triton", *tried} <= set(pinned)
    for name, version in pinned.items():
        assert version.removesuffix(".0") == bounds[name].removesuffix(".0"), name


@pytest.mark.parametrize("job", ["oldest", "newest", "other-systems"])
def test_jobs(job: str) -> None:
    steps = yaml.safe_load(WORKFLOW)["jobs"][job]["steps"]
    commands = "\n".join(step.get("run", "") for step in steps)
    for ignored in re.findall(r"--ignore(?:-glob)?='?(tests/[\w*.]+)", commands):
        assert list(REPO.glob(ignored)), f"{ignored} is gone"
    for file in re.findall(r" (tests/\w+\.py)", commands):
        assert (REPO / file).is_file(), f"{file} is gone"
    for line in re.findall(r"^make .*", commands, re.MULTILINE):
        targets = takewhile(lambda word: "=" not in word, line.split()[1:])
        dry = subprocess.run(["make", "-n", *targets], cwd=REPO, capture_output=True, text=True, check=False)
        assert dry.returncode == 0, dry.stderr


def test_what_needs_openmmlab_is_left_out_of_the_oldest() -> None:
    """Files that import its packages at their top, directly or through ours, and do not skip themselves."""
    for path in (REPO / "tests").glob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        if re.search(
            r"^(from|import) (openmmlab|mmengine|mmdet|mmseg|mmcv|detection|segmentation)\b", text, re.M
        ):
            patterns = re.findall(r"--ignore(?:-glob)?='?(tests/[\w*.]+)", WORKFLOW)
            assert any(path.match(pattern) for pattern in patterns), path.name
