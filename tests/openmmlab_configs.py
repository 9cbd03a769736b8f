"""What the tests of detectors' and segmenters' configs share."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from conftest import REPO
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS

SMALL = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 4], "drop_path_rate": 0.0}
"""No stochastic depth: a block that happens to be dropped would get no gradient."""


def variant_of(name: str) -> str:
    """'mask-rcnn_focal-tiny_fpn_1x_coco' -> 'focal_tiny_patch4_window7_224'."""
    return f"{name.split('_')[1].replace('-', '_')}_patch4_window7_224"


def quoted_in_zoo(config: str) -> int | None:
    """Millions of parameters that MODEL_ZOO.md quotes for a config, named by its path; None if none are."""
    (row,) = (line for line in (REPO / "MODEL_ZOO.md").read_text().splitlines() if f"]({config}) |" in line)
    found = re.search(r"\| [\d.]+ \((\d+)\) \|", row)
    return int(found[1]) if found else None


def edit(node: Any, change: Callable[[str, Any], Any]) -> Any:
    """A copy of nested dicts and lists with every value replaced by `change(key, value)`."""
    if isinstance(node, dict):
        return ConfigDict({key: change(key, edit(value, change)) for key, value in node.items()})
    return type(node)(edit(item, change) for item in node) if isinstance(node, list | tuple) else node


def batch(dataset: Any, numbers: tuple[int, ...]) -> dict[str, list[Any]]:
    """Items of a data set as a loader collates them."""
    items = [dataset[number] for number in numbers]
    return {key: [item[key] for item in items] for key in ("inputs", "data_samples")}


def dataset_of(loader: Mapping[str, Any], change: Callable[[str, Any], Any] | None = None, **own: Any) -> Any:
    """The data set of a loader's config with other options, and with its pipeline or a changed one."""
    options = {**loader["dataset"], **own}
    if change:
        options["pipeline"] = edit(options["pipeline"], change)
    return DATASETS.build(options)


def check_gradients(
    model: torch.nn.Module, data: dict[str, list[Any]], may_be_zero: str | tuple[str, ...] = ()
) -> dict[str, Any]:
    """A step of training reaches every parameter, but for names that begin so; returns the losses."""
    model.zero_grad()
    losses = model.train()(**model.data_preprocessor(data, training=True), mode="loss")
    loss, _ = model.parse_losses(losses)
    loss.backward()
    assert torch.isfinite(loss)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.any() or key.startswith(may_be_zero), f"{key}: its gradient is zero"
    return losses


def check_backbone(config: Config, name: str, **others: Any) -> None:
    """The variant that the config is named after, with the wide windows of the recipe and `others`."""
    expected = {
        "type": "FocalBackbone",
        "variant": variant_of(name),
        "focal_windows": [15, 13, 9, 7],
        **others,
    }
    backbone = config.model.backbone.to_dict()
    assert {*backbone} - {*expected} <= {"out_indices", "with_cp"}, "something is left of the base's"
    assert {**backbone, **expected} == backbone


def check_weight_decay(model: torch.nn.Module, groups: list[dict[str, Any]], rate: float) -> None:
    """None for norms, bias tables and the position embedding; `rate` for all the rest."""
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    modules = [module for module in model.modules() if "Norm" in type(module).__name__]
    norms = {id(p) for module in modules for p in module.parameters(recurse=False)}
    exempt = model.backbone.no_weight_decay()
    assert norms
    for key, parameter in model.named_parameters():
        free = id(parameter) in norms or key.removeprefix("backbone.") in exempt
        assert decay[id(parameter)] == (0.0 if free else rate), key
