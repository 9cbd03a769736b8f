"""The demo data sets: valid for the tools that read them, the same bytes from the same seed, written once."""

import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.demo import WRITERS, DemoOptions, load_digit_splits, write_demo

pytest.importorskip("sklearn", reason="the demo data need scikit-learn")
pytest.importorskip("cv2", reason="the demo data need opencv")

OPTIONS = DemoOptions(train_scenes=12, val_scenes=5)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    assert write_demo(out, list(WRITERS), OPTIONS) == {kind: out / kind for kind in WRITERS}
    return out


def digests(folder: Path) -> dict[str, str]:
    """Checksum of every file under a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_splits_are_stratified_and_complete() -> None:
    splits = load_digit_splits(0)
    train, val = (np.bincount(splits[name].labels, minlength=10) for name in ("train", "val"))
    assert (train + val).sum() == 1797
    assert np.abs(val / (train + val) - 0.2).max() < 0.01
    held_out = {image.tobytes() for image in splits["val"].images}
    assert held_out.isdisjoint(image.tobytes() for image in splits["train"].images)


@pytest.mark.parametrize(("split", "count"), [("train", 12), ("val", 5)])
def test_detection_is_valid_coco(demo: Path, split: str, count: int) -> None:
    COCO = pytest.importorskip("pycocotools.coco").COCO  # noqa: N806
    coco = COCO(demo / "detection" / "annotations" / f"instances_{split}2017.json")
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == [str(d) for d in range(10)]
    assert len(coco.imgs) == count
    for entry in coco.imgs.values():
        with Image.open(demo / "detection" / f"{split}2017" / entry["file_name"]) as image:
            assert image.size == (entry["width"], entry["height"])
        annotations = coco.loadAnns(coco.getAnnIds(entry["id"]))
        masks = [coco.annToMask(annotation) for annotation in annotations]
        assert np.sum(masks, axis=0).max() == 1, "no digits, or they overlap"
        for annotation, mask in zip(annotations, masks, strict=True):
            assert abs(int(mask.sum()) - annotation["area"]) < 0.12 * annotation["area"]
            left, top, width, height = annotation["bbox"]
            assert mask[top : top + height, left : left + width].sum() == mask.sum()


def test_bytes_depend_on_the_seed_alone(demo: Path, tmp_path: Path) -> None:
    kinds = ["zip", "detection", "segmentation"]  # imagenet has the files of zip
    write_demo(tmp_path / "same", kinds, OPTIONS)
    write_demo(tmp_path / "other", kinds, DemoOptions(seed=1, train_scenes=12, val_scenes=5))
    for kind in kinds:
        assert digests(tmp_path / "same" / kind) == digests(demo / kind) != digests(tmp_path / "other" / kind)


def test_what_is_there_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for count, said in ((2, "written"), (3, "already there")):
            caplog.clear()
            folder = write_demo(tmp_path, ["detection"], DemoOptions(train_scenes=count, val_scenes=1))
            assert said in caplog.text
            content = (folder["detection"] / "annotations" / "instances_train2017.json").read_text()
            assert len(json.loads(content)["images"]) == 2
