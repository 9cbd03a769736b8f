"""The models that tools/benchmark.py compares: ours, timm's, and those of transformers where it is installed.

Every model gets the same stochastic depth and 1000 classes, and is built for the resolution that it is
measured at where its library lets it.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import benchmark_common as common
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from yacs.config import CfgNode

from config import load_config
from models import build_model, count_params_and_macs

SIZES = ("tiny", "small", "base")
DROP_PATH = 0.2
CLASSES = 1000
CONFIGS = common.REPO / "configs"

FAMILIES: dict[str, dict[str, str]] = {  # family -> size -> configuration or model of its library
    "focal": {size: f"focal_{size}_patch4_window7_224" for size in SIZES},
    "useconv": {size: f"focal_{size}_useconv_patch4_window7_224" for size in SIZES},
    "focalv2": {size: f"focalv2_{size}_useconv_patch4_window7_224" for size in SIZES},
    "swin": {size: f"swin_{size}_patch4_window7_224" for size in SIZES},
    "convnext": {size: f"convnext_{size}" for size in SIZES},
    "deit": {"tiny": "deit_small_patch16_224", "base": "deit_base_patch16_224"},  # by parameters and MACs
    "focalnet": {size: f"focalnet_{size}_srf" for size in SIZES},
    "pvt_v2": {"tiny": "pvt_v2_b2", "small": "pvt_v2_b3", "base": "pvt_v2_b5"},
    "davit": {size: f"davit_{size}" for size in SIZES},
    "cvt": {"tiny": "cvt-13", "small": "cvt-21"},
    "pvt": {"tiny": "pvt-small", "small": "pvt-medium", "base": "pvt-large"},
}
OURS = ("focal", "useconv", "focalv2")
TRANSFORMERS = {  # model -> blocks per stage; all else as the library's default
    "cvt-13": [1, 2, 10],
    "cvt-21": [1, 4, 16],
    "pvt-small": [3, 4, 6, 3],
    "pvt-medium": [3, 4, 18, 3],
    "pvt-large": [3, 8, 27, 3],
}


@dataclass(frozen=True)
class Entry:
    """A model to compare: `label` names it in the table, `size` says what it is compared with."""

    label: str
    name: str
    size: str  # one of SIZES, or ''


def entries(words: list[str]) -> list[Entry]:
    """The models that words stand for.

    Args:
        words: each a family ("swin", all sizes), family and size ("swin-tiny"), a file or name in configs/,
            or a model of timm.

    Raises:
        ValueError: a word is none of them.
    """
    found: dict[str, Entry] = {}
    for word in words:
        family, _, size = word.rpartition("-")
        if word in FAMILIES:
            new = [Entry(f"{word}-{size}", name, size) for size, name in FAMILIES[word].items()]
        elif size in FAMILIES.get(family, ()):
            new = [Entry(word, FAMILIES[family][size], size)]
        elif _config_file(word) or timm.is_model(word):
            new = [Entry(Path(word).stem, word, next((size for size in SIZES if size in word), ""))]
        else:
            raise ValueError(
                f"--models: expected a family ({', '.join(FAMILIES)}), family-size such as swin-tiny, a "
                f"configuration, or a model of timm, got {word!r}; choose among them"
            )
        found |= {entry.label: entry for entry in new}
    return list(found.values())


def _config_file(name: str) -> Path | None:
    return next((path for path in (Path(name), CONFIGS / f"{name}.yaml") if path.is_file()), None)


def why_missing(entry: Entry) -> str | None:
    """Why a model cannot be had here; None if it can."""
    if entry.name in TRANSFORMERS and importlib.util.find_spec("transformers") is None:
        return "skipped: transformers is not installed"
    return None


def build(entry: Entry, resolution: int) -> nn.Module:
    """The model with fresh weights, on the default device.

    Raises:
        ValueError, RuntimeError, AssertionError: as its library refuses the resolution.
    """
    path = _config_file(entry.name)
    if path is not None:
        return build_model(_load(path, resolution))
    if entry.name in TRANSFORMERS:
        return _from_transformers(entry.name, resolution)
    return _from_timm(entry.name, resolution)


def _load(path: Path, resolution: int) -> CfgNode:
    options = {"DATA.IMG_SIZE": resolution, "MODEL.NUM_CLASSES": CLASSES, "MODEL.DROP_PATH_RATE": DROP_PATH}
    return load_config(path, [word for pair in options.items() for word in pair])


def _from_timm(name: str, resolution: int) -> nn.Module:
    options = {"num_classes": CLASSES, "drop_path_rate": DROP_PATH}
    for more in ({"img_size": resolution}, {}):  # some need it, some do not know it
        try:
            return timm.create_model(name, **options, **more)
        except TypeError as error:
            if not more or "img_size" not in str(error):
                raise
    raise AssertionError


class _Logits(nn.Module):
    """A classifier of transformers that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).logits


def _from_transformers(name: str, resolution: int) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{name} needs transformers: pip install transformers") from error
    blocks = TRANSFORMERS[name]
    if name.startswith("cvt"):
        config = transformers.CvtConfig(
            depth=blocks, drop_path_rate=[0.0, 0.0, DROP_PATH], num_labels=CLASSES
        )
        return _Logits(transformers.CvtForImageClassification(config))
    config = transformers.PvtConfig(
        depths=blocks, drop_path_rate=DROP_PATH, num_labels=CLASSES, image_size=resolution
    )
    return _Logits(transformers.PvtForImageClassification(config))


@lru_cache
def costs(entry: Entry, resolution: int) -> tuple[int | None, int | None]:
    """Parameters, and multiply-accumulates of one image; None where they cannot be counted.

    Counted on the meta device, where no kernel hides its products.
    """
    path = _config_file(entry.name)
    if path is not None:
        with torch.device("meta"):
            return count_params_and_macs(_load(path, resolution))
    try:
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            model = build(entry, resolution).eval()
            model(torch.empty(1, 3, resolution, resolution))
    except (RuntimeError, ValueError, AssertionError, NotImplementedError):
        return None, None
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def attention_backends(model: nn.Module, dtype: torch.dtype) -> str | None:
    """What ours use at each stage, named once if all are the same; None for the others.

    Args:
        model: on its device.
        dtype: of the activations.
    """
    list_them: Callable[[torch.dtype], list[str]] | None = getattr(model, "attention_backends", None)
    if list_them is None:
        return None
    names = list_them(dtype)
    return names[0] if len(set(names)) == 1 else "/".join(names)
