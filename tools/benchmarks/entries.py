"""The models that can be compared: ours, timm's, and what a function builds.

Every model has 1000 classes, and is built for the resolution that it is measured at where its library allows
it. Ours and timm's have the same stochastic depth.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from config import load_config
from models import build_model
from utils import UserError

from .common import REPO

SIZES = ("tiny", "small", "base")
DROP_PATH = 0.2
CLASSES = 1000
FAMILIES: dict[str, dict[str, str]] = {  # family -> size -> configuration, or model of timm
    "focal": {size: f"focal_{size}_patch4_window7_224" for size in SIZES},
    "useconv": {size: f"focal_{size}_useconv_patch4_window7_224" for size in SIZES},
    "focalv2": {size: f"focalv2_{size}_useconv_patch4_window7_224" for size in SIZES},
    "swin": {size: f"swin_{size}_patch4_window7_224" for size in SIZES},
    "convnext": {size: f"convnext_{size}" for size in SIZES},
    "deit": {"tiny": "deit_small_patch16_224", "base": "deit_base_patch16_224"},  # by parameters and MACs
    "focalnet": {size: f"focalnet_{size}_srf" for size in SIZES},
}
OURS = ("focal", "useconv", "focalv2")
Source = str | Callable[..., nn.Module]  # a configuration, a model of timm, or f(num_classes=, img_size=)


@dataclass(frozen=True)
class Entry:
    """A model to compare."""

    label: str  # in the table
    source: Source
    size: str  # one of SIZES, or ''; models are compared with the baseline of their size
    backend: str = "auto"  # of attention


def entries(words: list[str]) -> list[Entry]:
    """The models that words stand for.

    Args:
        words: each a family ("swin", all sizes), family and size ("swin-tiny"), a file or name in configs/,
            or a model of timm; "focal-tiny:plain" names an attention backend.

    Raises:
        UserError: a word is none of them.
    """
    found: dict[str, Entry] = {}
    for word in words:
        model, _, backend = word.partition(":")
        family, _, size = model.rpartition("-")
        if model in FAMILIES:
            named = {f"{model}-{size}": (name, size) for size, name in FAMILIES[model].items()}
        elif size in FAMILIES.get(family, ()):
            named = {model: (FAMILIES[family][size], size)}
        elif config_file(model) or timm.is_model(model):
            named = {Path(model).stem: (model, next((size for size in SIZES if size in model), ""))}
        else:
            raise UserError(
                f"--models: expected a family ({', '.join(FAMILIES)}), family-size such as swin-tiny, a "
                f"configuration, or a model of timm, got {word!r}; choose among them"
            )
        for label, (name, size) in named.items():
            label += f":{backend}" * bool(backend)
            found[label] = Entry(label, name, size, backend or "auto")
    return list(found.values())


def config_file(name: str) -> Path | None:
    """The file of a configuration, by path or name; None if there is none."""
    paths = (Path(name), REPO / "configs" / f"{name}.yaml")
    return next((path for path in paths if path.is_file()), None)


def build(entry: Entry, resolution: int) -> nn.Module:
    """The model with random weights, on the default device.

    Raises:
        ValueError, RuntimeError, AssertionError: its library refuses the resolution.
    """
    options = {"num_classes": CLASSES, "img_size": resolution}
    if not isinstance(entry.source, str):
        return entry.source(**options)
    if path := config_file(entry.source):
        opts = ["MODEL.NUM_CLASSES", CLASSES, "MODEL.DROP_PATH_RATE", DROP_PATH]
        opts += ["DATA.IMG_SIZE", resolution, "MODEL.ATTENTION_BACKEND", entry.backend]
        return build_model(load_config(path, opts))
    options["drop_path_rate"] = DROP_PATH
    try:
        return timm.create_model(entry.source, **options)
    except TypeError as error:  # convolutional networks have no such option
        if "img_size" not in str(error):
            raise
        del options["img_size"]
        return timm.create_model(entry.source, **options)


@lru_cache
def multiply_adds(entry: Entry, resolution: int) -> int | None:
    """Of one image, counted on the meta device with the plain operator; None where that cannot run."""
    try:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = build(replace(entry, backend="plain"), resolution).eval()
            model(torch.empty(1, 3, resolution, resolution))
    except RuntimeError:
        return None
    return counter.get_total_flops() // 2


def attention_backends(model: nn.Module, dtype: torch.dtype) -> str | None:
    """The attention backends of a model for activations of a type, each one once; None if it is not ours."""
    list_them = getattr(model, "attention_backends", None)
    return None if list_them is None else " and ".join(dict.fromkeys(list_them(dtype)))
