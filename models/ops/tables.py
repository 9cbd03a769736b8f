"""What the attention operators share: one key for two of the same token, and second derivatives.

Legend: as in `focal_transformer`; M pairs of keys that are merged, K' keys of a window after merging.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..focal_transformer import AttentionIndex, plain_attention

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


def differentiable_gradients(
    qkv: Tensor, bias: Tensor, d_out: Tensor, index: AttentionIndex, scale: float
) -> tuple[Tensor | None, ...]:
    """Gradients of qkv and bias, of those that require one, by the plain operator, so that they can be
    differentiated once more."""
    out = plain_attention(qkv, index, bias, scale, fused=False)
    wanted = [x for x in (qkv, bias) if x.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, d_out, create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in (qkv, bias))


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
    differ = index.keys.index_select(1, first) != index.keys.index_select(1, second)
    if differ.any().cpu().numpy():  # not bool(), which torch.fx cannot trace
        first = second = first[:0]  # alike in the first window only
    kept = torch.ones(len(everywhere), dtype=torch.bool, device=place)
    kept[torch.cat([first, second])] = False
    single = kept.nonzero().flatten()
    merged = torch.cat([single, first])
    visible = None if index.visible is None else index.visible.index_select(-1, merged)
    return MergedKeys(index.keys.index_select(1, merged), visible, single, first, second)
