"""The configuration: shipped and original files, types, choices, contradictions, messages that help."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPO

from config import flatten, load_config
from models import build_model

CONFIGS = sorted((REPO / "configs").rglob("focal*.yaml")) + [REPO / "configs/demo.yaml"]


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_shipped_configs_load_as_do_their_dumps(tmp_path: Path) -> None:
    """Each is called like its file."""
    for path in CONFIGS:
        config = load_config(path, ["DATA.IMG_SIZE", [64, 96], "SEED", 5])
        assert config.is_frozen()
        assert path.stem == config.MODEL.NAME
        assert flatten(load_config(write(tmp_path / "dump.yaml", config.dump()))) == flatten(config)


def test_a_file_of_the_original_release_loads(tmp_path: Path) -> None:
    """All keys in one file, some of them without effect; as yaml and as json."""
    content = yaml.safe_load("""
        DATA: {IMG_SIZE: 224}
        MODEL:
            TYPE: focalv2
            SPEC: {FREE: {FORM: [1, 2]}}
            FOCAL:
                {FOCAL_POOL: fc, FOCAL_LEVELS: [2, 2, 2, 2], QK_SCALE: null, MLP_RATIO: 4,
                EXPAND_STAGES: [0, 1], FOCAL_WINDOWS: [8, 6, 4, 2], EXPAND_SIZES: [9, 9, 9, 9]}
        TRAIN: {OPTIMIZER: {BETAS: [0.9, 0.95], NAME: AdamW}}
        AUG: {CUTMIX_MINMAX: [0.2, 0.8]}
    """)
    for text in (yaml.safe_dump(content), json.dumps(content, indent=1)):
        config = load_config(write(tmp_path / "a.yaml", text))
        assert config.MODEL.FOCAL.MLP_RATIO == 4.0
        assert config.TRAIN.OPTIMIZER.BETAS == (0.9, 0.95)
        assert config.TRAIN.OPTIMIZER.NAME == "adamw"
    with torch.device("meta"):
        build_model(config)


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("DATA.IMG_SIZE", "[64, 96]", (64, 96)),
        ("MODEL.FOCAL.QK_SCALE", "None", None),
        ("MODEL.FOCAL.QK_SCALE", "0.3", 0.3),
        ("TRAIN.BASE_LR", "5e-4", 5e-4),
        ("TRAIN.CLIP_GRAD", 1, 1.0),
        ("TRAIN.AUTO_RESUME", "false", False),
        ("TRAIN.OPTIMIZER.BETAS", "0.9,0.95", (0.9, 0.95)),
        ("TAG", "007", "007"),
    ],
)
def test_options_from_the_command_line(key: str, given: object, expected: object) -> None:
    value = flatten(load_config(None, [key, given]))[key]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["DATA.BATCH_SZE", 8], ["DATA.BATCH_SZE", "did you mean DATA.BATCH_SIZE"]),
        (["DATA", 8], ["DATA: expected a section", "name one of its keys"]),
        (["DATA.BATCH_SIZE", 0], ["DATA.BATCH_SIZE", "1 or more", "got 0"]),
        (["DATA.BATCH_SIZE", "many"], ["DATA.BATCH_SIZE", "an integer", "'many'"]),
        (["DATA.BATCH_SIZE", True], ["DATA.BATCH_SIZE", "an integer"]),
        (["DATA.IMG_SIZE", [32, 32, 32]], ["DATA.IMG_SIZE", "an integer or two integers"]),
        (["DATA.DATASET", "cifar"], ["DATA.DATASET", "'imagenet'", "'folder'"]),
        (["TRAIN.BASE_LR", "nan"], ["TRAIN.BASE_LR", "a number"]),
        (["TRAIN.WEIGHT_DECAY", "1e999"], ["TRAIN.WEIGHT_DECAY", "a number", "(float)"]),
        (["TRAIN.BASE_LR", "1e300"], ["TRAIN.BASE_LR", "in (0, 1e6], got 1e+300"]),
        (["DATA.MEAN", [123.7, 116.3, 103.5]], ["DATA.MEAN", "[0, 1] for every entry"]),
    ],
)
def test_each_mistake_is_named(opts: list[object], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(None, opts)
    text = str(caught.value)
    assert text.startswith("1 problem(s)")
    assert all(word in text for word in ("command line", *words)), text


def test_all_problems_come_in_one_error(tmp_path: Path) -> None:
    content = {"DATA": {"BATCH_SIZE": "x"}, "MODLE": {"NAME": "a"}, "TRAIN": 3}
    path = write(tmp_path / "a.yaml", content)
    with pytest.raises(ValueError, match=r"^5 problem\(s\)") as caught:
        load_config(path, ["AUG.REPROB", 2, "SEED", -1])
    text = str(caught.value)
    for words in ("DATA.BATCH_SIZE", "MODLE", "TRAIN: expected a section", "AUG.REPROB", "SEED"):
        assert words in text
    assert text.count(f"{path}: ") == 3 and text.count("command line: ") == 2


def test_the_network_names_what_contradicts_by_config_keys() -> None:
    opts = ["MODEL.TYPE", "swin", "DATA.IMG_SIZE", [224, 31], "MODEL.FOCAL.NUM_HEADS", [1, 2]]
    with pytest.raises(ValueError, match="do not fit together") as caught:
        build_model(load_config(None, opts))
    for words in ("MODEL.TYPE must be", "DATA.IMG_SIZE must be", "MODEL.FOCAL.NUM_HEADS must be", "DEPTHS"):
        assert words in str(caught.value)


def test_base_files_are_relative_and_merge_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "root.yaml", {"SEED": 1, "TAG": "root", "PRINT_FREQ": 7})
    write(tmp_path / "other.yaml", {"TAG": "other"})
    path = write(tmp_path / "sub/leaf.yaml", {"BASE": ["../root.yaml", "../other.yaml"], "SEED": 2})
    config = load_config(path, ["PRINT_FREQ", 9])
    assert (config.SEED, config.TAG, config.PRINT_FREQ) == (2, "other", 9)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("SEED: 1\nTAG: a\nSEED: 2", "line 3: key SEED is given twice"),
        ("- 1\n- 2", "expected KEY: value lines"),
        ("BASE: no.yaml", "no.yaml: expected a yaml file (named by BASE in"),
        ("BASE: a.yaml", "BASE: expected no cycle"),
        ("TAG: !!python/object/apply:os.mkdir ['created']", "os.mkdir"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_clean_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.yaml", content)
    with pytest.raises(ValueError) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("created").exists()


def test_imagewoof_has_ten_classes_by_default() -> None:
    assert load_config(None, ["DATA.DATASET", "imagewoof"]).MODEL.NUM_CLASSES == 10
    opts = ["DATA.DATASET", "imagewoof", "MODEL.NUM_CLASSES", 1000]
    assert load_config(None, opts).MODEL.NUM_CLASSES == 1000


@pytest.mark.parametrize(
    ("key", "first", "then"),
    [
        ("DATA.IMG_SIZE", "[224, 192]", 384),
        ("AUG.CUTMIX_MINMAX", "[0.2, 0.8]", None),
        ("MODEL.FOCAL.QK_SCALE", 0.2, False),
        ("MODEL.FOCAL.FOCAL_STAGES", "[]", [0]),
    ],
)
def test_an_option_that_is_set_again_may_be_of_another_kind(key: str, first: Any, then: Any) -> None:
    assert flatten(load_config(opts=[key, first, key, then]))[key] == then
