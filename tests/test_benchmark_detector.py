"""The tool that times detectors in training: on narrow ones, on the CPU."""

import csv
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs OpenMMLab's packages: make setup-openmmlab")
from tools.benchmarks import detector as tool  # noqa: E402

NARROW = {"Focal-T": {"embed_dim": 8}, "Swin-T": {"embed_dims": 8}}
WORDS = ["--size", "64", "90", "--batch-size", "1", "--rounds", "2", "--device", "cpu"]


@pytest.fixture
def narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool's configs with fewer blocks, channels and proposals."""
    for name, base in tool.DETECTORS.items():
        backbone = NARROW[name] | {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 4]}
        model = {
            "backbone": backbone,
            "neck": {"in_channels": [8, 16, 32, 64]},
            "roi_head": {"bbox_head": {"fc_out_channels": 32}},
            "train_cfg": {
                "rpn_proposal": {"nms_pre": 50, "max_per_img": 50},
                "rcnn": {"sampler": {"num": 16}},
            },
        }
        path = tmp_path / f"{name}.py"
        path.write_text(f"_base_ = {base!r}\nmodel = {model!r}\n")
        monkeypatch.setitem(tool.DETECTORS, name, str(path))


def test_table_of_two_detectors(narrow: None, tmp_path: Path) -> None:
    out = tmp_path / "results"
    assert tool.main([*WORDS, "--out", str(out), "--name", "try"]) == 0
    (path,) = out.glob("*_try.csv")
    with path.open() as file:
        focal, swin = csv.DictReader(file)
    assert (focal["backbone"], swin["backbone"]) == ("Focal-T", "Swin-T")
    assert float(swin["vs Swin-T"]) == 1 and focal["attention"] and not swin["attention"]
    for row in (focal, swin):
        assert float(row["img/s"]) > 0 and float(row["params M"]) > 1 and row["peak MiB"] == ""
        assert float(row["vs Swin-T lower"]) <= float(row["vs Swin-T"]) <= float(row["vs Swin-T upper"])
    assert "Mask R-CNN, 64 x 90, batch 1, fp32" in path.with_suffix(".md").read_text()


def test_sizes_that_change_against_one(narrow: None, tmp_path: Path) -> None:
    """Both rows are the same detector."""
    size = ["--size", "128", "352"]
    assert tool.main([*WORDS, "--multi-scale", "--rounds", "1", *size, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*_detector.csv")
    with path.open() as file:
        changing, fixed = csv.DictReader(file)
    assert (changing["backbone"], fixed["backbone"]) == (tool.CHANGING, tool.ONE_SIZE)
    assert changing["params M"] == fixed["params M"]
    assert float(fixed[f"vs {tool.ONE_SIZE}"]) == 1 != float(changing[f"vs {tool.ONE_SIZE}"])


def test_changing_sizes() -> None:
    """None twice, and in each round as many pixels as with the one size, padded."""
    sizes = tool.changing_sizes((320, 500), 6)
    assert len({*sizes}) == len(sizes) == 6 * tool.STEPS
    for i in range(0, len(sizes), tool.STEPS):
        assert sum(h * w for h, w in sizes[i : i + tool.STEPS]) == tool.STEPS * 320 * 512
    with pytest.raises(ValueError, match="with 10 changes .* got 128 x 128 with 1"):
        tool.changing_sizes((128, 128), 10)


def test_full_configs_are_the_same_detector_but_for_the_backbone() -> None:
    configs = [tool.read_base(base) for base in tool.DETECTORS.values()]
    for config in configs:
        assert config.model.pop("backbone").drop_path_rate == 0.2
        assert config.optim_wrapper.optimizer.type == "AdamW"
    assert configs[0].model == configs[1].model
