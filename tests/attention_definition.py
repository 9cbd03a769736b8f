"""The definition of focal attention (paper, section 3.2, equation 3), in the plainest PyTorch."""

import torch
from torch import Tensor

from models.focal_transformer import AttentionIndex


def attend(qkv: Tensor, index: AttentionIndex, bias: Tensor, scale: float) -> Tensor:
    """As `plain_attention`, one window after the other; scores and softmax in float32 or wider."""
    s, heads, dim = index.window, *qkv.shape[3:]
    tokens = torch.arange(index.height * index.width).view(index.height // s, s, index.width // s, s)
    out = qkv.new_empty(len(qkv), index.height * index.width, heads, dim)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    for window, own in enumerate(tokens.transpose(1, 2).reshape(-1, s * s)):
        q = qkv[:, own, 0].transpose(1, 2)  # [B, N, Q, D]
        k, v = qkv[:, index.keys[window], 1:].permute(2, 0, 3, 1, 4)  # [B, N, K, D]
        scores = (scale * q).to(wide) @ k.to(wide).mT + bias[:, min(window, bias.shape[1] - 1)]
        if index.visible is not None:
            scores = scores.masked_fill(~index.visible[window], float("-inf"))
        out[:, own] = (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2)
    return out.flatten(2)
