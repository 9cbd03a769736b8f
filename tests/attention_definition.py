"""The definition of focal attention (paper, section 3.2, equation 3), in the plainest PyTorch, and inputs."""

from collections.abc import Callable

import torch
from torch import Tensor

from models.focal_transformer import AttentionIndex, Request

CPU = torch.device("cpu")
Attend = Callable[[Tensor, AttentionIndex, Tensor, float], Tensor]


def request(
    backend: str, dtype: torch.dtype = torch.float32, head_dim: int = 32, device: torch.device = CPU
) -> Request:
    """For two heads, in training."""
    return Request(backend, device, dtype, 2, head_dim, True)


def defined_attention(qkv: Tensor, index: AttentionIndex, bias: Tensor, scale: float) -> Tensor:
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


class Problem:
    """Random inputs of one index, and what an operator makes of them."""

    def __init__(
        self, index: AttentionIndex, head_dim: int, dtype: torch.dtype, heads: int = 2, batch: int = 1
    ) -> None:
        torch.manual_seed(0)
        self.index, self.dtype, self.scale = index, dtype, head_dim**-0.5
        windows, keys = index.keys.shape
        self.tokens = index.height * index.width
        self.qkv = torch.randn(batch, index.tokens, 3, heads, head_dim).to(dtype)
        groups = windows if index.bias_by_window else 1
        # Rounded as the kernels take it, in `dtype` and divided by the scale.
        bias = torch.randn(heads, groups, index.window**2, keys) / self.scale / 2
        self.bias = bias.to(dtype).float() * self.scale
        self.cotangent = torch.randn(batch, self.tokens, heads * head_dim).to(dtype)

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Queries, keys and values; bias. Leaves that need gradients."""
        qkv = self.qkv.detach().to(dtype, copy=True).requires_grad_()
        # Focal-fast's MLPs make a bias of `dtype`, Focal's tables are float32.
        wide = dtype if self.bias.shape[1] > 1 else torch.promote_types(dtype, torch.float32)
        return qkv, self.bias.to(wide, copy=True).requires_grad_()

    def run(self, attend: Attend, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Output and gradients of queries, keys, values and bias."""
        dtype = dtype or self.dtype
        qkv, bias = self.inputs(dtype)
        out = attend(qkv, self.index, bias, self.scale)
        out.backward(self.cotangent.to(dtype))
        return [out.detach(), *qkv.grad.unbind(2), bias.grad]

    def errors(self, attend: Attend) -> list[float]:
        """Error of each result against float64, relative to its norm."""
        pairs = zip(self.run(attend), self.run(defined_attention, torch.float64), strict=True)
        return [float((x.double() - y).norm() / y.norm()) for x, y in pairs]

    def check_as_exact(self, attend: Attend) -> None:
        """Check that errors are at most twice those of the definition in the same precision."""
        errors, allowed = self.errors(attend), self.errors(defined_attention)
        assert all(mine <= 2 * its for mine, its in zip(errors, allowed, strict=True)), (errors, allowed)
