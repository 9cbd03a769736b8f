"""MODEL_ZOO.md: every config has its row, and counted numbers are what the code counts."""

import re

import pytest
from conftest import REPO

from config import load_config
from models import count_params_and_macs

LINK = re.compile(r"\]\(([\w/.-]+)\) \|")
NUMBER = re.compile(r"\| ([\d.]+)(?: \([\d.]+\))?(?= \|)")  # in brackets what is quoted


def counted() -> dict[str, tuple[str, ...]]:
    """Parameters (M) and multiply-adds (G) by config."""
    lines = (REPO / "MODEL_ZOO.md").read_text(encoding="utf-8").splitlines()
    rows = {link[1]: line for line in lines if (link := LINK.search(line))}
    return {config: tuple(NUMBER.findall(line)[:2]) for config, line in rows.items()}


ROWS = counted()


def test_every_config_has_its_row() -> None:
    patterns = ("configs/focal*_224.yaml", "detection/configs/*_coco.py", "segmentation/configs/upernet_*.py")
    configs = {str(path.relative_to(REPO)) for pattern in patterns for path in REPO.glob(pattern)}
    assert configs == {*ROWS} and len(configs) == 10 + 18 + 4


@pytest.mark.parametrize("config", [config for config in ROWS if config.endswith(".yaml")])
def test_counts_of_classifiers(config: str) -> None:
    params, macs = count_params_and_macs(load_config(REPO / config))
    assert ROWS[config] == (f"{params / 1e6:.1f}", f"{macs / 1e9:.2f}")


@pytest.mark.parametrize(
    ("package", "config"),
    [
        ("mmdet", "detection/configs/retinanet_focal-tiny_fpn_1x_coco.py"),
        ("mmseg", "segmentation/configs/upernet_focal-tiny_8xb2-160k_ade20k-512x512.py"),
    ],
)
def test_counts_of_detectors_and_segmenters(package: str, config: str) -> None:
    """At full size."""
    pytest.importorskip(package, reason=f"{package} is not installed")
    from openmmlab.flops import count, image_size
    from openmmlab.runner import read_config

    found = read_config(str(REPO / config))
    params, macs, _ = count(found, image_size(found))
    assert ROWS[config] == (f"{params / 1e6:.1f}", f"{macs / 1e9:.0f}")
