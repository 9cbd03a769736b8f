"""tools/figures: every picture of figures/ comes from it, and shows all numbers."""

import re
from pathlib import Path

import pytest
from conftest import REPO
from PIL import Image

from tools import release_numbers as release
from tools.figures import __main__ as make_figures


def test_every_picture_has_its_command() -> None:
    pictures = {path.stem for path in (REPO / "figures").glob("*.png")}
    assert pictures == set(make_figures.KINDS)
    text = (REPO / "figures" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"-m tools\.figures (\w+) --out figures", text)) == pictures
    assert set(re.findall(r"!\[[^\]]+\]\((\w+)\.png\)", text)) == pictures


@pytest.mark.parametrize("name", list(make_figures.KINDS))
def test_it_draws_them_again(name: str, tmp_path: Path) -> None:
    assert make_figures.main([name, "--out", str(tmp_path)]) == 0
    drawn = Image.open(tmp_path / f"{name}.png").convert("RGB")
    assert len(set(drawn.resize((50, 50)).getdata())) > 20  # not blank


def test_all_rows_of_the_release_are_drawn() -> None:
    axes = make_figures.draw_release().axes[0]
    points = [tuple(point) for line in axes.lines for point in line.get_xydata().tolist()]
    assert sorted(points) == sorted((row.at_224, row.top1) for row in release.SPEEDS)


def test_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        make_figures.parse(["nonsense"])
    monkeypatch.setattr(make_figures, "RESULTS", tmp_path)
    assert make_figures.main(["speed", "--out", str(tmp_path)]) == 2
    assert "tools.benchmarks.models, got none" in capsys.readouterr().err
