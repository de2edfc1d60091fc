"""timm's Swin and Swin V2, which roll the map before they pad it.

Source: huggingface/pytorch-image-models, timm/models/swin_transformer.py and swin_transformer_v2.py (1.0.31).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._swap import TABLE_ANATOMY, Attention, Layout, Parts, Swapped, TableAttention, strange, unfit_attention

BLOCK_ANATOMY = {"norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"}
COSINE_ANATOMY = {
    "logit_scale", "cpb_mlp", "qkv", "attn_drop", "proj", "proj_drop", "softmax", "relative_coords_table",
}  # fmt: skip
BIASES = {"q_bias", "k_bias", "v_bias"}


class Block(Swapped):
    """Attention of a block on the un-rolled, un-partitioned map. Window and shift are effective already, as built."""

    attn: nn.Module
    window_size: Sequence[int]
    shift_size: Sequence[int]

    def _attn(self, x: Tensor) -> Tensor:
        """x (b, h, w, c) -> the same shape.

        The operator pads before it rolls. Where an axis is shifted and does not divide, theirs is had by making its
        padded, rolled map out of place: roll, pad, roll back, and the other way round afterwards.
        """
        grid, window, shift = x.shape[1:3], self.window_size, self.shift_size
        pads = [-n % w if s else 0 for n, w, s in zip(grid, window, shift, strict=True)]
        if not any(pads):
            return self.attn(x, window, shift, clip=False)
        rolls = [s if p else 0 for s, p in zip(shift, pads, strict=True)]
        x = F.pad(torch.roll(x, [-r for r in rolls], (1, 2)), (0, 0, 0, pads[1], 0, pads[0]))
        out = self.attn(torch.roll(x, rolls, (1, 2)), window, shift, clip=False)
        out = torch.roll(out, [-r for r in rolls], (1, 2))[:, : grid[0], : grid[1]]
        return torch.roll(out, rolls, (1, 2))


class CosineAttention(Attention):
    """Swin V2's attention on the map: cosine, a scale per head, and a table that an MLP makes of log-spaced offsets."""

    logit_scale: Tensor
    cpb_mlp: nn.Module
    relative_coords_table: Tensor
    q_bias: Tensor | None
    k_bias: Tensor
    v_bias: Tensor
    proj_drop: nn.Module

    def forward(self, x: Tensor, window: Sequence[int], shift: Sequence[int], clip: bool) -> Tensor:
        bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        out = self.attend(
            x, bias, continuous_table(self.cpb_mlp, self.relative_coords_table), window=tuple(window),
            shift=tuple(shift), scale=clamped_scale(self.logit_scale), cosine=True, clip=clip,
        )  # fmt: skip
        return self.proj_drop(out)


def continuous_table(mlp: nn.Module, offsets: Tensor) -> Tensor:
    """Table (rows, heads) of Swin V2, 16 sigmoid(MLP(offsets)) (Liu et al., CVPR 2022, section 3.3)."""
    return 16 * torch.sigmoid(mlp(offsets).flatten(0, -2))


def clamped_scale(logarithm: Tensor) -> Tensor:
    """(heads, 1, 1) -> (heads,), at most 100."""
    return logarithm.clamp(max=math.log(100.0)).exp().flatten()


def _plan(block: Any) -> Parts | str:
    reason = strange(block, BLOCK_ANATOMY) or unfit_attention(block.attn, TABLE_ANATOMY)
    return reason or (("attn", TableAttention), ("", Block))


def _plan_cosine(block: Any) -> Parts | str:
    biases = BIASES if getattr(block.attn, "q_bias", None) is not None else set()
    reason = strange(block, BLOCK_ANATOMY) or unfit_attention(block.attn, COSINE_ANATOMY | biases)
    return reason or (("attn", CosineAttention), ("", Block))


TIMM = (
    Layout(frozenset({"SwinTransformerBlock"}), "timm.models.swin_transformer", ("_attn",), _plan),
    Layout(frozenset({"SwinTransformerV2Block"}), "timm.models.swin_transformer_v2", ("_attn",), _plan_cosine),
)
