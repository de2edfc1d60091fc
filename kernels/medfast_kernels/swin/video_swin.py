"""Video-Swin's layout and its copies, MONAI's SwinTransformer and SwinUNETR among them: both mergings, 2D and 3D.

Source: SwinTransformer/Video-Swin-Transformer, mmaction/models/backbones/swin_transformer.py;
Project-MONAI/MONAI, monai/networks/nets/swin_unetr.py (1.6.1), where blocks are the same under other names.
Window clipped to the map, index of a clipped window sliced, zeros padded after the norm and before QKV.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._swap import Layout, Parts, Swapped, TableAttention, arrangement, unfit_block


class Block(Swapped):
    """Norm and attention of a block on the un-rolled, un-partitioned map; the rest of the block stays theirs."""

    norm1: nn.Module
    attn: nn.Module
    window_size: Sequence[int]
    shift_size: Sequence[int]

    def forward_part1(self, x: Tensor, mask_matrix: Tensor | None = None) -> Tensor:
        return self.attn(self.norm1(x), self.window_size, self.shift_size, clip=True, bias_index="sliced")


def _plan(block: Any) -> Parts | str:
    """The block and its attention, or why they stay."""
    part = type(block).forward_part1
    if [*inspect.signature(part).parameters] != ["self", "x", "mask_matrix"]:
        return f"{type(block).__name__} has no forward_part1(x, mask_matrix), as Video-Swin and MONAI have it"
    reason = unfit_block(block)
    if reason is not None:
        return reason
    grid = [2 * w for w in block.window_size]
    tokens = torch.arange(math.prod(grid), dtype=torch.float32).reshape(1, *grid, 1)
    there = arrangement(block, lambda x: part(block, x, None), tokens)
    if there is None or not torch.equal(there, tokens):
        return f"{type(block).__name__} does not put its tokens back where they came from"
    return ("attn", TableAttention), ("", Block)


VIDEO_SWIN = Layout(frozenset({"SwinTransformerBlock", "SwinTransformerBlock3D"}), "", ("forward_part1",), _plan)
