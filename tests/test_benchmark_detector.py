"""The tool that times a detector in training: on a narrow one, on the CPU."""

from pathlib import Path

import pytest
from conftest import csv_rows

pytest.importorskip("mmdet", reason="needs OpenMMLab's packages: make setup-openmmlab")
from tools.benchmarks import detector as tool  # noqa: E402


@pytest.fixture
def narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool's config with fewer blocks, channels and proposals."""
    model = {
        "backbone": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 4]},
        "neck": {"in_channels": [8, 16, 32, 64]},
        "roi_head": {"bbox_head": {"fc_out_channels": 32}},
        "train_cfg": {"rpn_proposal": {"nms_pre": 50, "max_per_img": 50}},
    }
    path = tmp_path / "narrow.py"
    path.write_text(f"_base_ = {str(tool.CONFIG)!r}\nmodel = {model!r}\n")
    monkeypatch.setattr(tool, "CONFIG", path)


def test_sizes_that_change_against_one(narrow: None, tmp_path: Path) -> None:
    out = tmp_path / "results"
    words = ["--size", "128", "352", "--batch-size", "1", "--rounds", "1", "--device", "cpu"]
    assert tool.main([*words, "--out", str(out), "--name", "try"]) == 0
    changing, fixed = csv_rows(out, "_try")
    assert (changing["images"], fixed["images"]) == (tool.CHANGING, tool.ONE_SIZE)
    assert float(fixed["vs one size"]) == 1 != float(changing["vs one size"]) > 0
    for row in (changing, fixed):
        assert float(row["img/s"]) > 0 and row["attention"]
    assert "128 x 352, batch 1, fp32" in next(out.glob("*_try.md")).read_text()


def test_changing_sizes() -> None:
    """None twice, and in each round as many pixels as with the one size, padded."""
    sizes = tool.changing_sizes((320, 500), 6)
    assert len({*sizes}) == len(sizes) == 6 * tool.STEPS
    for i in range(0, len(sizes), tool.STEPS):
        assert sum(h * w for h, w in sizes[i : i + tool.STEPS]) == tool.STEPS * 320 * 512
    with pytest.raises(ValueError, match="with 10 changes .* got 128 x 128 with 1"):
        tool.changing_sizes((128, 128), 10)
