"""The definition of focal attention, in the plainest PyTorch that computes it.

For every window: gather its K keys, add the bias, one softmax over all of them (paper section 3.2, equation
3). Scores and softmax are in float32 or wider whatever the input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .key_table import KeyTable, mask_absent, merge_windows, split_qkv, split_windows


def prepare_bias(bias: Tensor, table: KeyTable, dtype: torch.dtype) -> Tensor:
    """Bias [N, P or 1, Q, K] with absent keys at -inf, in float32 or wider."""
    return mask_absent(bias.to(torch.promote_types(dtype, torch.float32)), table.visible)


def attend(qkv: Tensor, table: KeyTable, bias: Tensor, scale: float) -> Tensor:
    """See `models.ops.focal_attention`; `bias` comes from `prepare_bias`."""
    q, k, v = split_qkv(qkv, table)
    windows = split_windows(q, table)
    keys = k[:, table.index].permute(0, 3, 1, 2, 4)  # [B, P, K, N, D] -> [B, N, P, K, D]
    values = v[:, table.index].permute(0, 3, 1, 2, 4)
    scores = (windows * scale).to(bias.dtype) @ keys.to(bias.dtype).transpose(-2, -1) + bias
    return merge_windows(scores.softmax(dim=-1).to(v.dtype) @ values, table)
