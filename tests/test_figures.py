"""tools/make_figures.py: every picture of figures/ comes from it, and it draws what it says."""

import re
import sys
from pathlib import Path

import pytest
from conftest import REPO
from PIL import Image

sys.path.insert(0, str(REPO / "tools"))
import make_figures
import release_numbers as release

LARGEST = 300_000  # bytes


def test_every_picture_has_its_command() -> None:
    pictures = {path.stem for path in (REPO / "figures").glob("*.png")}
    assert pictures == set(make_figures.KINDS)
    text = (REPO / "figures" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"make_figures\.py (\w+) --out figures", text)) == pictures
    assert set(re.findall(r"!\[[^\]]+\]\((\w+)\.png\)", text)) == pictures
    for path in (REPO / "figures").glob("*.png"):
        assert path.stat().st_size < LARGEST


@pytest.mark.parametrize("name", list(make_figures.KINDS))
def test_it_draws_them_again(name: str, tmp_path: Path) -> None:
    """As large as those that are there."""
    assert make_figures.main([name, "--out", str(tmp_path)]) == 0
    drawn, kept = Image.open(tmp_path / f"{name}.png"), Image.open(REPO / "figures" / f"{name}.png")
    assert drawn.width == kept.width
    assert len(set(drawn.convert("RGB").resize((50, 50)).getdata())) > 20  # not blank


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
    assert "tools/benchmark.py, got none" in capsys.readouterr().err
