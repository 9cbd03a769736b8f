"""classification/predict.py: what main.py's evaluation finds, for any images, with names."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NANO
from PIL import Image

import main
from classification import predict
from config import load_config
from data import build_loaders

WORDS = [str(word) for pair in NANO.items() for word in pair]


@pytest.fixture(scope="module")
def run(few_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a model that was trained on a few digits, and knows some of them."""
    output = tmp_path_factory.mktemp("run")
    config = output / "own.yaml"
    config.write_text("DATA: {DATASET: folder}\nAUG: {MIXUP: 0.0, CUTMIX: 0.0, AUTO_AUGMENT: none}\n")
    data = ["--data-path", str(few_images), "--output", str(output), "--device", "cpu"]
    quick = ["DATA.BATCH_SIZE", "16", "TRAIN.BASE_LR", "0.05", "TRAIN.EPOCHS", "4", "DATA.DATASET", "folder"]
    assert main.main(["--cfg", str(config), *data, "--opts", *WORDS, *quick]) == 0
    return output / "nano" / "default"


def images_of(root: Path) -> list[Path]:
    return sorted((root / "val").rglob("*.png"))


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = predict.main([*map(str, words), "--device", "cpu"])
    return code, *capsys.readouterr()


def test_it_finds_what_evaluation_finds(
    run: Path, few_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same classes as the evaluation loader's batches give, whatever the batch size; names of folders."""
    code, out, _ = call(
        capsys, few_images / "val", "--resume", run / "best.pth", "--json", "--batch-size", "7"
    )
    assert code == 0
    found = json.loads(out)
    config = load_config(run / "config.yaml", ["EVAL_MODE", True, "MODEL.RESUME", str(run / "best.pth")])
    model = predict.load_trained(predict.parse(["x", "--resume", str(run / "best.pth"), "--device", "cpu"]))
    with torch.no_grad():
        logits = torch.cat([model.model(images) for images, *_ in build_loaders(config).val_loader])
    assert [entry["top"][0]["class"] for entry in found] == logits.argmax(dim=1).tolist()
    shares = torch.tensor([[one["probability"] for one in entry["top"]] for entry in found])
    torch.testing.assert_close(shares, logits.softmax(dim=1).topk(5).values, atol=1e-5, rtol=0)
    assert [entry["image"] for entry in found] == list(map(str, images_of(few_images)))
    assert all(one["name"] == str(one["class"]) for entry in found for one in entry["top"])  # digits
    right = sum(Path(entry["image"]).parent.name == entry["top"][0]["name"] for entry in found)
    assert right > 2 * len(found) / 10  # chance is a tenth


def test_bad_images_are_told_and_the_others_predicted(
    run: Path, few_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(images_of(few_images)[0], tmp_path / "b.png")
    Image.fromarray(np.full((50, 90), 7, dtype=np.uint8)).save(tmp_path / "d.jpg")  # gray, not square
    (tmp_path / "a.png").write_bytes(b"nothing")
    (tmp_path / "notes.txt").write_text("skipped in a folder")
    code, out, told = call(capsys, tmp_path, tmp_path / "none.png", "--resume", run / "best.pth")
    assert code == 1
    errors = told.splitlines()
    assert [re.search(r"([a-z]+\.\w+)", line)[1] for line in errors] == ["a.png", "none.png"]
    assert all(line.startswith("error: ") for line in errors)
    bad, *good = json.loads(call(capsys, tmp_path, "--resume", run / "best.pth", "--json")[1])
    assert "error" in bad
    assert [entry["image"] for entry in good] == [str(tmp_path / name) for name in ("b.png", "d.jpg")]
    table = [word for entry in good for word in (entry["image"], *entry["top"])]
    for line, entry in zip(out.splitlines(), table, strict=True):
        assert line == entry or f"{100 * entry['probability']:.1f} %  {entry['name']}" in line


def test_a_folder_that_cannot_be_entered(tmp_path: Path, close_folder: Callable[[Path], None]) -> None:
    """Its images would be missing."""
    close_folder(tmp_path / "closed")
    with pytest.raises(PermissionError, match="closed"):
        predict.find_images([str(tmp_path)])


def test_names_of_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def names(*opts: object, file: Path | None = None) -> list[str]:
        return predict.class_names(load_config(None, opts), file)

    assert names()[0].startswith("tench")
    assert len(names()) == 1000
    assert len(names("DATA.DATASET", "imagenet22k", "MODEL.NUM_CLASSES", 21841)) == 21841
    assert not caplog.records
    own = ("DATA.DATASET", "folder", "MODEL.NUM_CLASSES")
    assert names(*own, 2) == ["class 0", "class 1"]
    assert "--classes" in caplog.text
    for folder in ("n02086240", "other", ".hidden"):
        (tmp_path / "ILSVRC/Data/CLS-LOC/train" / folder).mkdir(parents=True)  # as Kaggle's ImageNet
    assert names(*own, 2, "DATA.DATA_PATH", str(tmp_path)) == ["Shih-Tzu", "other"]
    file = tmp_path / "names.txt"
    file.write_text("cat\ndog\n")
    assert names(*own, 2, file=file) == ["cat", "dog"]
    with pytest.raises(ValueError, match="expected 3 names, one per class, got 2"):
        names(*own, 3, file=file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.png"], "--cfg: expected a yaml file, as no --resume"),
        (["x.png", "--cfg", "configs/demo.yaml"], "--resume: expected a checkpoint, got none"),
        (["EMPTY", "--resume", "BEST"], "expected images"),
        (["x.png", "--resume", "WEIGHTS"], "holds no configuration"),
        (["x.png", "--resume", "BEST", "--opts", "MODEL.NUM_CLASSES", "7"], "head.weight"),
        (["x.png", "--resume", "BEST", "--classes", "nowhere.txt"], "--classes: expected a text file"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        call(capsys, "", "--resume", str(run / "best.pth"))  # an empty variable is not the current folder
    torch.save({"model": {}}, tmp_path / "weights.pth")
    known = {"EMPTY": tmp_path / "empty", "BEST": run / "best.pth", "WEIGHTS": tmp_path / "weights.pth"}
    code, out, told = call(capsys, *(known.get(word, word) for word in words))
    assert code == 2
    assert told.startswith("error: ")
    assert message in told
    assert out == ""
