"""The released models as backbones, for the configs of detection and segmentation."""

from typing import Any

from models.registry import VARIANTS


def backbone(name: str) -> dict[str, Any]:
    """The config of a variant's `FocalBackbone`, without the drop path rate, which each task chooses."""
    options = {key: value for key, value in VARIANTS[name].items() if key != "drop_path_rate"}
    return {"type": "FocalBackbone", **options}
