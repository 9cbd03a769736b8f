"""Models that have all parts of the released ones and few weights, and images for them."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import VARIANTS, FocalTransformer
from models.focal_transformer import FocalFastAttention, grid

SMALL: dict[str, Any] = {
    "img_size": 64,
    "num_classes": 5,
    "embed_dim": 8,
    "depths": [2, 1, 1, 1],
    "num_heads": [1, 2, 2, 4],
    "focal_pool": "fc",
    "focal_levels": [2, 2, 2, 2],
    "drop_path_rate": 0.0,
}
every_kind = pytest.mark.parametrize("kind", ["focal", "focalv2"])


def build(seed: int = 0, variant: str = "", **options: Any) -> FocalTransformer:
    """A small model in evaluation mode. Another seed makes other values of every parameter.

    Args:
        seed: of the parameters.
        variant: a key of VARIANTS, whose other options the model has; empty for the network's defaults.
        options: of FocalTransformer.
    """
    torch.manual_seed(seed)
    model = FocalTransformer(**{**VARIANTS.get(variant, {}), **SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # biases and norms, too
    return model


def other_ties(model: nn.Module) -> dict[str, Tensor]:
    """Stored keys of a Focal-fast model that are as near as its own: of equally near ones the last, not the
    first; by name."""
    choice = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, FocalFastAttention):
            continue
        (height, width), s = layer.train_resolution, layer.window_size
        windows = grid(-(-height // s), -(-width // s))
        maps = ((grid(height, width), windows * s + s // 2), (windows, windows))
        for key, (cells, centres) in zip(layer.key_buffers, maps, strict=False):
            distance = ((cells - centres[:, None]) ** 2).sum(-1)
            numbers = np.broadcast_to(np.arange(len(cells)), distance.shape)
            count = getattr(layer, key).shape[1]
            choice[f"{name}.{key}"] = torch.tensor(np.lexsort((-numbers, distance))[:, :count].copy())
    return choice


def image(*size: int, batch: int = 2, channels: int = 3) -> Tensor:
    """Random images, always the same."""
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def same(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same state, bit for bit."""
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
