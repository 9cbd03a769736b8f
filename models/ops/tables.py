"""What the attention operators share: keys that stand twice, and caches of what follows from index tables.

Legend: as in `focal_transformer`; K' keys of a window after merging.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..focal_transformer import AttentionIndex

T = TypeVar("T")

NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0])
"""Of PyTorch operators: the name of this package, since a copy of it elsewhere registers its own ones."""


@dataclass(frozen=True, eq=False)
class MergedKeys:
    """Keys of an index, where of two columns that are the same token in every window one is left.

    Two copies of a key with biases a and b weigh exp(z + a) + exp(z + b) in the softmax, as one copy with
    bias logaddexp(a, b) does: merging them is exact.
    """

    keys: Tensor  # int64 [P, K']
    visible: Tensor | None  # bool [P, 1 or Q, K']
    single: Tensor  # [K - 2M] columns that stay as they are
    first: Tensor  # [M] first column of each pair
    second: Tensor  # [M] second column


def merge_bias(merged: MergedKeys, bias: Tensor) -> Tensor:
    """Bias of the merged keys: [..., K] -> [..., K']."""
    if len(merged.first) == 0:
        return bias
    pair = torch.logaddexp(bias.index_select(-1, merged.first), bias.index_select(-1, merged.second))
    return torch.cat([bias.index_select(-1, merged.single), pair], dim=-1)


def merge_duplicates(index: AttentionIndex) -> MergedKeys:
    """Find the columns of `index` that hold the same token in every window and are visible to every query."""
    everywhere = np.ones(index.keys.shape[1], dtype=bool)
    if index.visible is not None:
        everywhere = index.visible.all(dim=0).all(dim=0).cpu().numpy()
    columns = np.flatnonzero(everywhere)
    first_window = index.keys[0].cpu().numpy()[columns]
    order = np.argsort(first_window, kind="stable")
    same = np.flatnonzero(first_window[order][1:] == first_window[order][:-1])
    same = same[np.diff(same, prepend=-2) > 1]  # of three copies two are merged
    place = index.keys.device
    first, second = (torch.from_numpy(columns[order[at]]).to(place) for at in (same, same + 1))
    if len(same) and not torch.equal(*(index.keys.index_select(1, x) for x in (first, second))):
        first = second = first[:0]  # alike in the first window only
    kept = torch.ones(len(everywhere), dtype=torch.bool, device=place)
    kept[torch.cat([first, second])] = False
    single = kept.nonzero().flatten()
    if len(first) == 0:
        return MergedKeys(index.keys, index.visible, single, first, second)
    merged = torch.cat([single, first])
    visible = None if index.visible is None else index.visible.index_select(-1, merged)
    return MergedKeys(index.keys.index_select(1, merged), visible, single, first, second)


class _ByIdentity:
    """Hash a tensor by its storage, as a key of lru_cache; holds it, so that its address stays taken."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self._key == other._key


def cached_by_tables(most: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Cache the last `most` results of a function of numbers and of index tables, which nobody writes to."""

    def decorate(build: Callable[..., T]) -> Callable[..., T]:
        @lru_cache(maxsize=most)
        def cached(*arguments: Any) -> T:
            return build(*(x.tensor if isinstance(x, _ByIdentity) else x for x in arguments))

        @wraps(build)
        def get(*arguments: Any) -> T:
            return cached(*(_ByIdentity(x) if isinstance(x, Tensor) else x for x in arguments))

        get.cache_info = cached.cache_info  # type: ignore[attr-defined]
        return get

    return decorate
