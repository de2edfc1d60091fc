"""torchvision's Swin, Swin V2 and Swin3D: one module holds attention, padding and shift.

Source: pytorch/vision, torchvision/models/swin_transformer.py and models/video/swin_transformer.py (0.28).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._swap import Attention, Layout, Parts, unfit_attention
from .timm import clamped_scale, continuous_table


class _Attention(Attention):
    window_size: Sequence[int]
    shift_size: Sequence[int]
    dropout: float
    training: bool

    def _attend(self, x: Tensor, qkv_bias: Tensor | None, table: Tensor, **geometry: Any) -> Tensor:
        out = self.attend(x, qkv_bias, table, window=tuple(self.window_size), **geometry)
        return F.dropout(out, self.dropout, self.training)

    def _shift(self, x: Tensor) -> tuple[int, ...]:
        """2D pads small maps to a whole window rather than clip the window, and drops the shift of such an axis."""
        sizes = zip(x.shape[1:-1], self.window_size, self.shift_size, strict=True)
        return tuple(0 if n <= w else s for n, w, s in sizes)


class Attention2d(_Attention):
    """Swin."""

    relative_position_bias_table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x (b, h, w, c) -> the same shape."""
        return self._attend(x, self.qkv.bias, self.relative_position_bias_table, shift=self._shift(x), clip=False)


class Attention3d(_Attention):
    """Swin3D (Video-Swin): windows clipped to the map, sliced index."""

    relative_position_bias_table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x (b, t, h, w, c) -> the same shape."""
        table, shift = self.relative_position_bias_table, tuple(self.shift_size)
        return self._attend(x, self.qkv.bias, table, shift=shift, bias_index="sliced")


class CosineAttention2d(_Attention):
    """Swin V2. Keys have no bias: the middle third of the parameter is there and is not used, as in theirs."""

    logit_scale: Tensor
    cpb_mlp: nn.Module
    relative_coords_table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x (b, h, w, c) -> the same shape."""
        bias = self.qkv.bias
        if bias is not None:
            q, k, v = bias.chunk(3)
            bias = torch.cat((q, torch.zeros_like(k), v))
        table, scale = continuous_table(self.cpb_mlp, self.relative_coords_table), clamped_scale(self.logit_scale)
        return self._attend(x, bias, table, shift=self._shift(x), scale=scale, cosine=True, clip=False)


def _layout(name: str, behaviour: type, anatomy: set[str]) -> Layout:
    def plan(attention: Any) -> Parts | str:
        reason = unfit_attention(attention, {"qkv", "proj", *anatomy}, dropout=attention.attention_dropout)
        return reason or (("", behaviour),)

    return Layout(frozenset({name}), "torchvision.models", ("attention_dropout", "dropout"), plan)


TORCHVISION = (
    _layout("ShiftedWindowAttention", Attention2d, {"relative_position_bias_table"}),
    _layout("ShiftedWindowAttentionV2", CosineAttention2d, {"logit_scale", "cpb_mlp", "relative_coords_table"}),
    _layout("ShiftedWindowAttention3d", Attention3d, {"relative_position_bias_table"}),
)
