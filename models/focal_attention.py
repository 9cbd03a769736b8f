"""Focal self-attention: fine tokens nearby and coarse ones far away in one softmax (paper section 3.2).

One layer serves Focal and Focal-fast; the key selection given to it makes the difference. Departures from the
original: queries, keys and values of fine and pooled tokens come from one projection; nothing is gathered
before the operator; the bias is built once per forward and kept in evaluation.

Legend: B batch, H W rows and columns of the map, Hp Wp of the padded map, T = Hp*Wp fine tokens, S = T +
pooled tokens, C channels, N heads, D = C/N.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import linear
from .geometry import padded_size
from .key_selection import NearestKeys, RingPooledKeys, SelectedKeys
from .layers import TensorCache, pooled_tokens
from .ops import backend_module, check_backend, resolve_backend


class FocalAttention(nn.Module):
    """Attention of every token to the keys that its window selects.

    Args:
        dim: channels C.
        num_heads: heads N; must divide C.
        selection: which keys a window sees and which bias they get.
        qkv_bias: bias of the query, key and value projection.
        qk_scale: factor of the scores; None for D**-0.5.
        proj_drop: dropout after the output projection.
        backend: one of `models.ops.BACKEND_CHOICES`.
        shift_size: roll the map up and left by this many tokens before attention, and back after it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        selection: RingPooledKeys | NearestKeys,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        backend: str = "auto",
        shift_size: int = 0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.selection = selection
        self.shift_size = shift_size
        self.backend = check_backend(backend)
        selection.register(self, num_heads, dim // num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.bias_cache: TensorCache[Tensor] = TensorCache()
        selection.refresh(self)
        self.register_load_state_dict_post_hook(_after_loading)

    def train(self, mode: bool = True) -> FocalAttention:
        """Switch mode; what was cached for evaluation is dropped, so weights written through `.data`
        count."""
        self.bias_cache.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FocalAttention:
        """Move or convert (`to`, `half`, ...), and the tables that derive from buffers with it."""
        super()._apply(fn, recurse)
        self.selection.refresh(self)
        return self

    def forward(self, x: Tensor, pools: nn.ModuleList) -> Tensor:
        """Attend over a map.

        Args:
            x: normalised map, [B, H, W, C]; any size, zero-padded here to whole windows. Padding serves as
                keys.
            pools: one pooling module per pooled level of the selection.

        Returns:
            [B, H, W, C].
        """
        height, width = int(x.shape[1]), int(x.shape[2])  # torch.jit.trace hands out tensors
        padded = padded_size(height, width, self.selection.window_size)
        if padded != (height, width):  # padding by nothing would copy the map
            x = F.pad(x, (0, 0, 0, padded[1] - width, 0, padded[0] - height))
        x = torch.roll(x, (-self.shift_size, -self.shift_size), dims=(1, 2)) if self.shift_size else x
        pooled = pooled_tokens(x, pools, self.selection.window_size)
        return self.attend(torch.cat([x.flatten(1, 2), *pooled], dim=1), (height, width))

    def attend(self, tokens: Tensor, map_size: tuple[int, int]) -> Tensor:
        """Attend over the tokens of a map.

        Args:
            tokens: [B, S, C]: T fine ones, those of the normalised map after padding and shift, then the
                pooled ones of each level, all row-major.
            map_size: rows and columns of the map, H and W.

        Returns:
            [B, H, W, C].
        """
        height, width = map_size
        qkv = linear.run(self.qkv, tokens).unflatten(-1, (3, self.num_heads, -1))  # [B, S, 3, N, D]
        keys = self.selection.keys(self, height, width, tokens.device)
        backend = self.resolved_backend(qkv.dtype)
        bias = self._prepared_bias(keys, backend, qkv.dtype, map_size)
        x = backend_module(backend).attend(qkv, keys.table, bias, self.scale)  # [B, T, C]

        x = x.unflatten(1, padded_size(height, width, self.selection.window_size))
        x = torch.roll(x, (self.shift_size, self.shift_size), dims=(1, 2)) if self.shift_size else x
        return self.proj_drop(linear.run(self.proj, x[:, :height, :width]))

    def resolved_backend(self, dtype: torch.dtype) -> str:
        """Name of the backend that runs for queries, keys and values of `dtype` where the layer is now."""
        weight = self.proj.weight
        head_dim = weight.shape[0] // self.num_heads
        return resolve_backend(self.backend, weight.device, dtype, head_dim, self.selection.window_size)

    def _prepared_bias(
        self, keys: SelectedKeys, backend: str, dtype: torch.dtype, map_size: tuple[int, int]
    ) -> Tensor:
        """The bias in the form that the backend wants; kept between forwards that cannot train."""

        def build() -> Tensor:
            return backend_module(backend).prepare_bias(self.selection.bias(self, keys), keys.table, dtype)

        if torch.compiler.is_compiling():
            return build()
        if self.training or torch.is_grad_enabled():
            self.bias_cache.clear()  # an optimizer may follow
            return build()
        sources = tuple(t for key, t in self.state_dict().items() if not key.startswith(("qkv.", "proj.")))
        return self.bias_cache.get(sources, (backend, dtype, map_size), build)


def _after_loading(layer: FocalAttention, _: object) -> None:
    layer.selection.refresh(layer, strict=True)
