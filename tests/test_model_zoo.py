"""MODEL_ZOO.md: it is what tools/model_zoo.py writes now, and quotes what the configs quote."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

from tools import model_zoo
from tools import release_numbers as release

PAGE = (REPO / "MODEL_ZOO.md").read_text(encoding="utf-8")


def reported(config: Path) -> dict[str, float]:
    """What a config of detection/ or segmentation/ says that the release reports."""
    for node in ast.parse(config.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "reported":
            return {word.arg: ast.literal_eval(word.value) for word in node.value.keywords}
    return {}


def test_the_page_is_what_the_tool_writes() -> None:
    """Recounts the classifiers, and reads the newest tables of detectors and segmenters."""
    assert model_zoo.page() == PAGE, "python -m tools.model_zoo --write"


def test_every_row_of_the_release_has_a_config() -> None:
    folders = {
        "configs/{}.yaml": release.CLASSIFIERS,
        "detection/configs/{}.py": release.DETECTORS,
        "segmentation/configs/{}.py": release.SEGMENTERS,
    }
    for pattern, rows in folders.items():
        names = [row.config for row in rows]
        assert len(set(names)) == len(names)
        for name in names:
            assert (REPO / pattern.format(name)).is_file(), name
            assert f"({pattern.format(name)})" in PAGE
    listed = {row.config for row in release.CLASSIFIERS}
    assert listed == {path.stem for path in REPO.glob("configs/focal*_224.yaml")}
    assert (len(release.CLASSIFIERS), len(release.DETECTORS), len(release.SEGMENTERS)) == (10, 18, 4)


def test_tables_are_narrow() -> None:
    """At most 8 columns, and short cells where links show their text alone; text lies below the tables."""
    prose = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", PAGE)
    tables = re.findall(r"(?:^\|.*\|\n)+", prose, re.MULTILINE)
    assert len(tables) == 4
    for line in "".join(tables).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) <= 8, line
        assert max(map(len, cells)) <= 40, line


def test_every_method_is_credited() -> None:
    methods = {method for row in release.DETECTORS for method in row.method.split(" + ")} | {"UPerNet"}
    assert [name for name in methods if f"[{name}](https://arxiv.org/abs/" not in PAGE] == []


def test_pretraining_is_the_releases() -> None:
    """ImageNet-22K stands where the release says it, in the row of one segmenter; none is made up."""
    assert {row.pretraining for row in release.DETECTORS if row.backbone != "Focal-L"} == {"ImageNet-1K"}
    assert {row.pretraining for row in release.DETECTORS if row.backbone == "Focal-L"} == {None}
    lines = [line for line in PAGE.splitlines() if "22K" in line]
    assert len(lines) == 1 and "upernet_focal-large" in lines[0]


@pytest.mark.parametrize("row", [*release.DETECTORS, *release.SEGMENTERS], ids=lambda row: row.config)
def test_configs_report_the_same(row: release.Detector | release.Segmenter) -> None:
    """A config quotes the same numbers as the page; those it does not have, the page has not."""
    folder = "detection" if isinstance(row, release.Detector) else "segmentation"
    quoted = reported(REPO / folder / "configs" / f"{row.config}.py")
    keys = {"params_m", "flops_g", "box_ap", "mask_ap", "miou", "miou_ms"}
    values = {key: value for key, value in row._asdict().items() if key in keys and value is not None}
    assert quoted == values


def test_throughput_agrees_with_accuracy() -> None:
    """What the release says twice of a model, in two tables, it says alike."""
    sizes = {"T": "Tiny", "S": "Small", "B": "Base"}
    speeds = {row.model: row for row in release.SPEEDS}
    compared = 0
    for row in release.CLASSIFIERS:
        match = re.fullmatch(r"(Focal|Focal-fast)-([TSB])(, conv)?", row.model)
        speed = match and speeds.get(f"{match[1]}-{sizes[match[2]]}{match[3] or ''}")
        if speed:
            assert (speed.top1, speed.flops_g, speed.at_224) == (row.top1, row.flops_g, row.images_per_s)
            compared += 1
    assert compared == 6


def test_counted_tables(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    table.write_text("text\n\n| Config | Params (M) | old | MACs (G) | old |\n|---|---:|---:|---:|---:|\n")
    assert model_zoo.counted(table) == {}
    with table.open("a") as file:
        file.write("| a | 1.5 | 2 | 30 | |\n")
    assert model_zoo.counted(table) == {"a": ("1.5", "30")}
    table.write_text("| Config | other |\n")
    with pytest.raises(ValueError, match="expected a table with the columns"):
        model_zoo.counted(table)


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_zoo, "RESULTS", REPO / "figures")
    assert model_zoo.main([]) == 2
    assert "detection_models.md, got none" in capsys.readouterr().err


@pytest.mark.parametrize(("task", "package"), [("detection", "mmdet"), ("segmentation", "mmseg")])
def test_counted_columns_are_what_counting_gives(task: str, package: str, tmp_path: Path) -> None:
    """One config of each method, at full size."""
    pytest.importorskip(package, reason=f"{package} is not installed")
    table = tmp_path / "table.md"
    rows = model_zoo.counted(model_zoo.newest(f"{task}_models"))
    few = {name.partition("_")[0]: name for name in sorted(rows)}.values()
    paths = [f"{task}/configs/{name}.py" for name in few]
    command = [sys.executable, "-m", f"{task}.count", *paths, "--out", str(table)]
    subprocess.run(command, cwd=REPO, check=True, capture_output=True)
    assert model_zoo.counted(table) == {name: rows[name] for name in few}
