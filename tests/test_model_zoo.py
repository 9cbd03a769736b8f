"""MODEL_ZOO.md: its tables are what tools/model_zoo.py writes now, and quote what the configs quote."""

import ast
import importlib
import re

import pytest
from conftest import REPO

from tools import model_zoo
from tools import release_numbers as release

PAGE = model_zoo.PAGE.read_text(encoding="utf-8")
ROWS = {
    "configs/{}.yaml": release.CLASSIFIERS,
    "detection/configs/{}.py": release.DETECTORS,
    "segmentation/configs/{}.py": release.SEGMENTERS,
}


def test_the_tables_are_what_the_tool_writes() -> None:
    """Recounts the classifiers, and reads the newest tables of detectors and segmenters."""
    emptied = re.sub(r"^\|.*\n", "", PAGE, flags=re.MULTILINE)
    assert model_zoo.with_tables(emptied) == PAGE, "python -m tools.model_zoo"
    for task in ("detection", "segmentation"):
        assert model_zoo.newest(task).name in PAGE


def test_every_row_of_the_release_has_a_config() -> None:
    for pattern, rows in ROWS.items():
        for row in rows:
            assert (REPO / pattern.format(row.config)).is_file(), row.config
            assert f"({pattern.format(row.config)})" in PAGE
    listed = {row.config for row in release.CLASSIFIERS}
    assert listed == {path.stem for path in REPO.glob("configs/focal*_224.yaml")}
    assert [len(rows) for rows in ROWS.values()] == [10, 18, 4]


def test_configs_report_the_same() -> None:
    """A config quotes the same numbers as the page; those it does not have, the page has not."""
    keys = {"params_m", "flops_g", "box_ap", "mask_ap", "miou", "miou_ms"}
    for pattern, rows in [*ROWS.items()][1:]:
        for row in rows:
            body = ast.parse((REPO / pattern.format(row.config)).read_text(encoding="utf-8")).body
            (call,) = (node.value for node in body if ast.unparse(node).startswith("reported = "))
            quoted = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
            assert quoted == {
                key: value for key, value in row._asdict().items() if key in keys and value is not None
            }


def test_a_model_that_was_not_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "CLASSIFIERS", ())
    monkeypatch.setattr(release, "SEGMENTERS", (release.SEGMENTERS[0]._replace(config="new"),))
    assert model_zoo.main([]) == 2
    assert "python -m segmentation.flops" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "package", "config"),
    [
        ("detection", "mmdet", "retinanet_focal-tiny_fpn_1x_coco"),
        ("segmentation", "mmseg", "upernet_focal-tiny_8xb2-160k_ade20k-512x512"),
    ],
)
def test_counted_columns_are_what_counting_gives(task: str, package: str, config: str) -> None:
    """At full size."""
    pytest.importorskip(package, reason=f"{package} is not installed")
    from openmmlab.runner import read_config

    counting = getattr(importlib.import_module(f"{task}.flops"), task.upper())
    found = read_config(str(counting.configs / f"{config}.py"))
    params, backbone_macs, head_macs = counting.count(found.model, counting.image_size(found))
    macs = backbone_macs + head_macs
    assert model_zoo.counted(task)[config] == (f"{params / 1e6:.1f}", f"{macs / 1e9:.0f}")
