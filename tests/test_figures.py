"""tools/figures: pictures of figures/ come from it."""

from pathlib import Path

from conftest import REPO
from PIL import Image

from tools.figures import __main__ as make_figures
from tools.figures.drawing import save


def test_the_teaser_is_drawn_again(tmp_path: Path) -> None:
    save(make_figures.draw_teaser(), tmp_path / "teaser.png")
    drawn, there = (
        Image.open(folder / "teaser.png").convert("RGB") for folder in (tmp_path, REPO / "figures")
    )
    assert drawn.size == there.size
    assert len(set(drawn.resize((50, 50)).getdata())) > 20  # not blank
