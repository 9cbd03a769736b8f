"""The configuration: shipped and original files, types, values, combinations, messages that help."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import REPO

from config import ATTENTION_BACKENDS, flatten, load_config

CONFIGS = sorted((REPO / "configs").glob("*.yaml"))
RELEASED = [path for path in CONFIGS if "large" not in path.stem and path.stem != "demo"]


def problems(cfg_file: Path | None = None, opts: list[object] | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(cfg_file, opts or [])
    return str(caught.value)


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_is_named_after_its_file(path: Path) -> None:
    config = load_config(path)
    assert config.is_frozen()
    assert path.stem == config.MODEL.NAME


def test_shipped_variants_hold_the_published_values() -> None:
    assert len(RELEASED) == 9
    size = {
        "tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24], 0.2),
        "small": (96, [2, 2, 18, 2], [3, 6, 12, 24], 0.3),
        "base": (128, [2, 2, 18, 2], [4, 8, 16, 32], 0.5),
    }
    for path in RELEASED:
        family, variant = path.stem.split("_")[:2]
        model = load_config(path).MODEL
        focal = model.FOCAL
        assert size[variant] == (focal.EMBED_DIM, focal.DEPTHS, focal.NUM_HEADS, model.DROP_PATH_RATE)
        assert family == model.TYPE
        assert ("useconv" in path.stem) == focal.USE_CONV_EMBED
        assert (focal.FOCAL_POOL, focal.WINDOW_SIZE, focal.FOCAL_TOPK) == ("fc", 7, 128)
        assert focal.FOCAL_LEVELS == [2, 2, 2, 2]
        assert focal.FOCAL_WINDOWS == [7, 5, 3, 1]
        assert focal.EXPAND_SIZES == [3, 3, 3, 3]


def test_files_without_inheritance_load_too(tmp_path: Path) -> None:
    """A file in the style of the original release: all keys in one file, as yaml and as json."""
    content = {
        "DATA": {"IMG_SIZE": 224, "CACHE_MODE": "full"},
        "MODEL": {
            "TYPE": "focalv2",
            "NAME": "anything",
            "DROP_PATH_RATE": 0.2,
            "SPEC": {"FREE": {"FORM": [1, 2]}},
            "FOCAL": {
                "EMBED_DIM": 96,
                "DEPTHS": [2, 2, 6, 2],
                "NUM_HEADS": [3, 6, 12, 24],
                "FOCAL_POOL": "fc",
                "FOCAL_LEVELS": [2, 2, 2, 2],
                "EXPAND_STAGES": [0, 1],
                "EXPAND_LAYER": "even",
                "QK_SCALE": None,
                "MLP_RATIO": 4,
            },
        },
        "TRAIN": {"OPTIMIZER": {"BETAS": [0.9, 0.95], "NAME": "AdamW"}},
        "AUG": {"CUTMIX_MINMAX": [0.2, 0.8]},
        "AMP_OPT_LEVEL": "O1",
    }
    for text in (yaml.safe_dump(content), json.dumps(content, indent=1)):
        config = load_config(write(tmp_path / "a.yaml", text))
        assert config.MODEL.FOCAL.QK_SCALE is None
        assert config.MODEL.FOCAL.MLP_RATIO == 4.0
        assert config.TRAIN.OPTIMIZER.BETAS == (0.9, 0.95)
        assert config.TRAIN.OPTIMIZER.NAME == "adamw"
        assert config.AUG.CUTMIX_MINMAX == [0.2, 0.8]


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("DATA.IMG_SIZE", "[64, 96]", [64, 96]),
        ("DATA.IMG_SIZE", 64, 64),
        ("MODEL.FOCAL.QK_SCALE", "None", None),
        ("MODEL.FOCAL.QK_SCALE", "0.3", 0.3),
        ("MODEL.FOCAL.QK_SCALE", "False", False),
        ("TRAIN.BASE_LR", "5e-4", 5e-4),
        ("TRAIN.CLIP_GRAD", 1, 1.0),
        ("TRAIN.AUTO_RESUME", "false", False),
        ("TRAIN.OPTIMIZER.BETAS", "0.9,0.95", (0.9, 0.95)),
        ("AUG.CUTMIX_MINMAX", "None", None),
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
        (["DATA.BATCH_SIZE", 0], ["DATA.BATCH_SIZE", "1 or more", "got 0"]),
        (["DATA.BATCH_SIZE", "many"], ["DATA.BATCH_SIZE", "an integer", "'many'"]),
        (["DATA.BATCH_SIZE", True], ["DATA.BATCH_SIZE", "an integer"]),
        (["DATA.BATCH_SIZE"], ["--opts", "KEY VALUE"]),
        (["DATA.IMG_SIZE", 31], ["DATA.IMG_SIZE", "32 or more"]),
        (["DATA.IMG_SIZE", [32, 32, 32]], ["DATA.IMG_SIZE", "[height, width]"]),
        (["DATA.NUM_WORKERS", -1], ["DATA.NUM_WORKERS"]),
        (["SAVE_KEEP", -1], ["SAVE_KEEP", "0 or more"]),
        (["SAVE_MINUTES", -0.5], ["SAVE_MINUTES", "0 or more"]),
        (["DIST_TIMEOUT_MINUTES", 0], ["DIST_TIMEOUT_MINUTES", "greater than 0"]),
        (["TRAIN.BAD_STEPS_MAX", 0], ["TRAIN.BAD_STEPS_MAX", "1 or more"]),
        (["TRAIN.EMA.DECAY", 0.99], ["TRAIN.EMA.DECAY", "TRAIN.EMA.ENABLED True along with it"]),
        (["EVAL_EMA", True], ["EVAL_EMA", "EVAL_MODE (--eval) along with it"]),
        (["DATA.DATASET", "cifar"], ["DATA.DATASET", "'imagenet'", "'folder'"]),
        (["DATA.ZIP_MODE", True, "DATA.DATASET", "imagenet22k"], ["DATA.ZIP_MODE", "imagenet22k"]),
        (["MODEL.TYPE", "swin"], ["MODEL.TYPE", "'focalv2'"]),
        (["MODEL.DROP_RATE", 1.0], ["MODEL.DROP_RATE", "[0, 1)"]),
        (["MODEL.ATTENTION_BACKEND", "magic"], ["MODEL.ATTENTION_BACKEND", "'plain'"]),
        (["MODEL.FOCAL.DEPTHS", [2, 2, 6]], ["NUM_HEADS", "expected 3 entries"]),
        (["MODEL.FOCAL.NUM_HEADS", [5, 6, 12, 24]], ["NUM_HEADS", "divisor", "stage 0"]),
        (
            ["MODEL.FOCAL.FOCAL_POOL", "fc", "MODEL.FOCAL.FOCAL_LEVELS", [2] * 4]
            + ["MODEL.FOCAL.FOCAL_WINDOWS", [7, 4, 3, 1]],
            ["FOCAL_WINDOWS", "odd", "stage 1", "3 or 5"],
        ),
        (["MODEL.TYPE", "focalv2", "MODEL.FOCAL.FOCAL_LEVELS", [2] * 4], ["FOCAL_LEVELS", "pooling"]),
        (
            ["MODEL.TYPE", "focalv2", "MODEL.FOCAL.FOCAL_POOL", "fc", "MODEL.FOCAL.FOCAL_LEVELS", [3] * 4],
            ["FOCAL_LEVELS", "1 or 2"],
        ),
        (["MODEL.FOCAL.FOCAL_LEVELS", [4, 1, 1, 1]], ["MODEL.FOCAL.FOCAL_LEVELS", "3 or less", "stage 0"]),
        (
            ["MODEL.FOCAL.EXPAND_SIZES", [3, 8, 3, 3]],
            ["MODEL.FOCAL.EXPAND_SIZES", "WINDOW_SIZE = 7", "got 8"],
        ),
        (["MODEL.FOCAL.QK_SCALE", 0], ["MODEL.FOCAL.QK_SCALE", "head_dim", "greater than 0"]),
        (["MODEL.FOCAL.QK_SCALE", "0"], ["MODEL.FOCAL.QK_SCALE", "greater than 0"]),
        (["DATA.IMG_SIZE", 32, "MODEL.FOCAL.PATCH_SIZE", 8], ["DATA.IMG_SIZE", "PATCH_SIZE 8", "stage 3"]),
        (
            ["DATA.IMG_SIZE", [224, 40], "MODEL.FOCAL.PATCH_SIZE", 96, "MODEL.FOCAL.USE_CONV_EMBED", True],
            ["DATA.IMG_SIZE", "PATCH_SIZE 96", "stage 0", "a side of 40"],
        ),
        (["DATA.CACHE_MODE", "full"], ["DATA.CACHE_MODE", "--zip"]),
        (["MODEL.FOCAL.LAYERSCALE_VALUE", 1e-5], ["LAYERSCALE_VALUE", "USE_LAYERSCALE"]),
        (["TRAIN.LR_SCHEDULER.DECAY_RATE", 0.5], ["DECAY_RATE", "TRAIN.LR_SCHEDULER.NAME step"]),
        (["TRAIN.OPTIMIZER.MOMENTUM", 0.5], ["MOMENTUM", "TRAIN.OPTIMIZER.NAME sgd"]),
        (["TRAIN.EPOCHS", 10], ["TRAIN.WARMUP_EPOCHS", "at most", "20"]),
        (["TRAIN.BASE_LR", "nan"], ["TRAIN.BASE_LR", "a number"]),
        (["TRAIN.OPTIMIZER.NAME", "lion"], ["TRAIN.OPTIMIZER.NAME", "'adamw'"]),
        (["AUG.SCALE", [1.0, 0.5]], ["AUG.SCALE", "[smaller, larger]"]),
        (["AUG.AUTO_AUGMENT", "random"], ["AUG.AUTO_AUGMENT", "rand-m9"]),
        (["MODEL.RESUME", "a", "MODEL.PRETRAINED", "b"], ["MODEL.PRETRAINED", "RESUME"]),
        (["MODEL.RESET_HEAD", True], ["MODEL.RESET_HEAD", "PRETRAINED"]),
        (["MODEL.HEAD_CLASS_MAP", "map.txt"], ["MODEL.HEAD_CLASS_MAP", "PRETRAINED"]),
        (
            ["MODEL.HEAD_CLASS_MAP", "a", "MODEL.PRETRAINED", "b", "MODEL.RESET_HEAD", True],
            ["MODEL.HEAD_CLASS_MAP", "without MODEL.RESET_HEAD"],
        ),
        (["TRAIN.FREEZE_STAGES", 5], ["TRAIN.FREEZE_STAGES", "at most 4"]),
        (["TRAIN.FREEZE_STAGES", -2], ["TRAIN.FREEZE_STAGES", "-1 or more"]),
        (["TRAIN.LAYER_DECAY", 0], ["TRAIN.LAYER_DECAY", "(0, 1]"]),
        (["TRAIN.LAYER_DECAY", 1.1], ["TRAIN.LAYER_DECAY", "(0, 1]"]),
        (["AMP_OPT_LEVEL", "O0", "AMP_DTYPE", "fp16"], ["AMP_DTYPE", "O0"]),
        (["EVAL_MODE", True], ["EVAL_MODE", "--resume"]),
        (["THROUGHPUT_MODE", True, "DEBUG_MODE", True], ["THROUGHPUT_MODE", "one mode"]),
        (["DEVICE", "tpu"], ["DEVICE", "cuda"]),
    ],
)
def test_each_mistake_is_named(opts: list[object], words: list[str]) -> None:
    text = problems(opts=opts)
    assert all(word in text for word in words), text
    assert "command line" in text or "default" in text or "--opts" in text


def test_even_focal_windows_are_fine_where_nothing_is_pooled() -> None:
    opts = ["MODEL.FOCAL.FOCAL_POOL", "fc", "MODEL.FOCAL.FOCAL_LEVELS", [2, 1, 2, 2]]
    load_config(
        None, [*opts, "MODEL.FOCAL.FOCAL_STAGES", [0, 1, 3], "MODEL.FOCAL.FOCAL_WINDOWS", [7, 4, 2, 1]]
    )


def test_even_focal_windows_are_fine_in_focalv2() -> None:
    """It does not use that key."""
    opts = ["MODEL.TYPE", "focalv2", "MODEL.FOCAL.FOCAL_POOL", "fc", "MODEL.FOCAL.FOCAL_LEVELS", [2] * 4]
    load_config(None, [*opts, "MODEL.FOCAL.FOCAL_WINDOWS", [8, 6, 4, 2], "MODEL.FOCAL.EXPAND_SIZES", [9] * 4])


def test_yaml_files_may_hold_values_for_what_is_switched_off(tmp_path: Path) -> None:
    content = {"DATA": {"CACHE_MODE": "full"}, "MODEL": {"FOCAL": {"LAYERSCALE_VALUE": 1e-5}}}
    assert load_config(write(tmp_path / "a.yaml", content)).DATA.CACHE_MODE == "full"


def test_all_problems_come_in_one_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {"DATA": {"BATCH_SIZE": "x"}, "MODLE": {}, "TRAIN": 3})
    text = problems(path, ["AUG.REPROB", 2, "SEED", -1])
    assert text.startswith("5 problem(s)")
    for words in ("DATA.BATCH_SIZE", "MODLE", "TRAIN: expected a section", "AUG.REPROB", "SEED"):
        assert words in text
    assert text.count(str(path)) == 4  # in the first line, too
    assert text.count("command line") == 2


def test_base_files_are_relative_and_merge_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "root.yaml", {"SEED": 1, "TAG": "root", "PRINT_FREQ": 7})
    write(tmp_path / "other.yaml", {"TAG": "other"})
    path = write(tmp_path / "sub/leaf.yaml", {"BASE": ["../root.yaml", "../other.yaml"], "SEED": 2})
    config = load_config(path, ["PRINT_FREQ", 9])
    assert (config.SEED, config.TAG, config.PRINT_FREQ) == (2, "other", 9)


def test_a_cycle_of_base_files_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", {"BASE": ["b.yaml"]})
    text = problems(write(tmp_path / "b.yaml", {"BASE": "a.yaml"}))
    assert "cycle" in text
    assert "a.yaml" in text


@pytest.mark.parametrize("content", ["a: [1", "- 1\n- 2", "x: !!python/object/apply:os.getcwd []", "\x00"])
def test_unreadable_yaml_is_one_clean_error(tmp_path: Path, content: str) -> None:
    assert "a.yaml" in problems(write(tmp_path / "a.yaml", content))


def test_a_missing_file_and_a_missing_base_are_named(tmp_path: Path) -> None:
    assert "no.yaml" in problems(tmp_path / "no.yaml")
    assert "named by BASE in" in problems(write(tmp_path / "a.yaml", {"BASE": ["no.yaml"]}))


def test_a_dumped_config_loads_to_the_same(tmp_path: Path) -> None:
    config = load_config(CONFIGS[-1], ["DATA.IMG_SIZE", [64, 96], "SEED", 5])
    again = load_config(write(tmp_path / "dump.yaml", config.dump()))
    assert flatten(again) == flatten(config)


def test_imagewoof_has_ten_classes_unless_told() -> None:
    assert load_config(None, ["DATA.DATASET", "imagewoof"]).MODEL.NUM_CLASSES == 10
    opts = ["DATA.DATASET", "imagewoof", "MODEL.NUM_CLASSES", 1000]
    assert load_config(None, opts).MODEL.NUM_CLASSES == 1000


def test_the_list_of_backends_is_the_models() -> None:
    import models  # noqa: F401  (its operators add themselves)
    from models.focal_transformer import BACKENDS

    assert {"auto", *BACKENDS} <= set(ATTENTION_BACKENDS)
