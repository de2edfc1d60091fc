"""SMIT's Swin, and the TransMorph it comes from: tokens as (b, d * h * w, c), windows padded and never clipped.

Source: The-Veeraraghavan-Lab/SMIT, models/Trans.py; SMIT-HeartSubSeg, models/smit.py; winwinJJiang's
SMIT_SMART_re_Pretraining, swin_models/TransMorph.py. All of them put windows back with the order of axes that took them
out, which is not its inverse: tokens change places in every block. Weights were trained with that, so it is kept.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._swap import Layout, Parts, Swapped, TableAttention, arrangement, unfit_block


def scrambled(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """x (b, *grid, c), whole windows, in place order -> where the published window_reverse puts it."""
    order = (0, 1, 3, 5, 2, 4, 6, 7)
    sizes = [size for n, w in zip(x.shape[1:4], window, strict=True) for size in (n // w, w)]
    turned = torch.roll(x, [-s for s in shift], (1, 2, 3)) if any(shift) else x
    windows = turned.reshape(len(x), *sizes, x.shape[-1]).permute(order)  # (b, *counts, *window, c)
    turned = windows.permute(order).reshape(x.shape)
    return torch.roll(turned, list(shift), (1, 2, 3)) if any(shift) else turned


class Block(Swapped):
    """A whole block on the un-rolled, un-partitioned map, tokens in place order."""

    norm1: nn.Module
    attn: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop_path: nn.Module
    window_size: Sequence[int]
    shift_size: Sequence[int]
    H: int
    W: int
    T: int

    def forward(self, x: Tensor, mask_matrix: Tensor | None = None) -> Tensor:
        """x (b, H * W * T, c) -> the same shape. H, W and T are set by the layer, before the call, as theirs are."""
        out = self._attend(self.norm1(x).unflatten(1, (self.H, self.W, self.T)))
        x = x + self.drop_path(out.flatten(1, 3))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        return self.attn(x, self.window_size, _shift(self), clip=False)


class ScramblingBlock(Block):
    """The same with tokens where the published code puts them, pad tokens among them."""

    def _attend(self, x: Tensor) -> Tensor:
        grid, window, shift = x.shape[1:4], self.window_size, _shift(self)
        padding = [p for n, w in zip(reversed(grid), reversed(window), strict=True) for p in (0, -n % w)]
        x = F.pad(x, (0, 0, *padding)) if any(padding) else x
        x = scrambled(self.attn(x, window, shift, clip=False), window, shift)
        return x[:, : grid[0], : grid[1], : grid[2]]


def _shift(block: Any) -> tuple[int, ...]:
    """Theirs is off where one axis has none."""
    return tuple(block.shift_size) if min(block.shift_size) > 0 else (0, 0, 0)


def _order(block: Any) -> type | None:
    """The behaviour that puts tokens where the block's own forward puts them, None if neither does."""
    kept = block.H, block.W, block.T
    block.H, block.W, block.T = grid = [2 * w for w in block.window_size]
    tokens = torch.arange(math.prod(grid), dtype=torch.float64).reshape(1, -1, 1)
    try:
        out = arrangement(block, lambda x: type(block).forward(block, x, None), tokens)
    finally:
        block.H, block.W, block.T = kept
    if out is None:
        return None
    moved = out / 2 - tokens  # x + moved from the attention, and as much again from the echoing MLP
    there = scrambled(tokens.reshape(1, *grid, 1), block.window_size, _shift(block)).reshape(tokens.shape)
    return Block if torch.equal(moved, tokens) else ScramblingBlock if torch.equal(moved, there) else None


def _plan(block: Any) -> Parts | str:
    """The block and its attention, or why they stay."""
    if [*inspect.signature(type(block).forward).parameters] != ["self", "x", "mask_matrix"]:
        return f"{type(block).__name__} has no forward(x, mask_matrix), as SMIT has it"
    reason = unfit_block(block)
    if reason is not None:
        return reason
    order = _order(block)
    if order is None:
        return f"{type(block).__name__} puts its tokens neither back in place nor where SMIT's code puts them"
    return ("attn", TableAttention), ("", order)


SMIT = Layout(frozenset({"SwinTransformerBlock"}), "", ("H", "W", "T"), _plan)
