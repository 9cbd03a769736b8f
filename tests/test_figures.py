"""tools/figures: pictures of figures/ come from it."""

import sys
from pathlib import Path

import pytest
from conftest import REPO
from PIL import Image

from tools.figures import __main__ as make_figures


def test_the_teaser_is_drawn_again(tmp_path: Path) -> None:
    assert make_figures.main(["--out", str(tmp_path)]) == 0
    drawn, there = (
        Image.open(folder / "teaser.png").convert("RGB") for folder in (tmp_path, REPO / "figures")
    )
    assert drawn.size == there.size
    assert len(set(drawn.resize((50, 50)).getdata())) > 20  # not blank


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert make_figures.main([]) == 2
    assert "pip install -r requirements-dev.txt" in capsys.readouterr().err
