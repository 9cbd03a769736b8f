"""tools/figures: pictures of figures/ come from it."""

import sys
from pathlib import Path

import pytest
from conftest import REPO
from PIL import Image

from tools.figures import __main__ as make_figures


@pytest.mark.parametrize("name", make_figures.KINDS)
def test_it_is_drawn_again(name: str, tmp_path: Path) -> None:
    text = (REPO / "figures" / "README.md").read_text(encoding="utf-8")
    assert f"python -m tools.figures {name} --out figures" in text
    assert make_figures.main([name, "--out", str(tmp_path)]) == 0
    drawn, there = (
        Image.open(folder / f"{name}.png").convert("RGB") for folder in (tmp_path, REPO / "figures")
    )
    assert drawn.size == there.size
    assert len(set(drawn.resize((50, 50)).getdata())) > 20  # not blank


def test_speed_shows_the_newest_table_with_all_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"{model},224,infer,eager,{{}},1.1,1.3" for model in make_figures.TIMED]
    head = "model,resolution,mode,compile,vs swin,ratio lower,ratio upper\n"
    for date, count, ratio in (("2026-01-01", 3, 1.21), ("2026-01-02", 3, 1.22), ("2026-01-03", 2, 1.23)):
        text = head + "\n".join(lines[:count]).format(*[ratio] * count)
        (tmp_path / f"{date}_cpu.csv").write_text(text)
    monkeypatch.setattr(make_figures, "REPO", tmp_path)
    monkeypatch.setattr(make_figures, "RESULTS", tmp_path)
    (axes,) = make_figures.draw_speed().axes
    assert [patch.get_height() for patch in axes.patches] == [1.22] * 3
    for path in tmp_path.glob("*"):
        path.unlink()
    assert make_figures.main(["speed", "--out", str(tmp_path)]) == 2


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert make_figures.main(["teaser"]) == 2
    assert "pip install -r requirements-dev.txt" in capsys.readouterr().err
