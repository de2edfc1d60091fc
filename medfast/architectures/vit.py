"""The 3D ViT: every token attends to every token; it can leave hidden tokens out, and give what [CLS] looks at.

Source: Dosovitskiy et al. (arXiv 2010.11929) in MONAI's ViT, which it equals with the same weights; He et al., MAE
(arXiv 2111.06377) for ``encode_visible``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import medfast_kernels as mk
from medfast.types import Features, Key, Mask

from .blocks import (
    MLP,
    PatchEmbedding,
    add_branch,
    check_volume,
    draw_keep,
    hidden_tokens,
    hide_tokens,
    init_weights,
    key_for_batch,
    per_axis,
    run,
)


class Attention(nn.Module):
    """Self-attention of (b, rows, width). cls_out: the first row is [CLS], and what it attends to is given too."""

    def __init__(self, width: int, heads: int, qkv_bias: bool, cls_out: bool):
        super().__init__()
        self.heads, self.cls_out = heads, cls_out
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> (b, rows, width), and [CLS]'s attention (b, rows - 1), its mean over heads, or None."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(dim=2)
        first, attention = None, None
        if self.cls_out:
            first, attention = mk.class_attention(q[:, 0], k, v)
            q = q[:, 1:]
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2).flatten(2)
        if first is not None:
            out = torch.cat((first.unsqueeze(1), out), dim=1)
        return self.proj(out), attention

    def attention_weights(self, x: Tensor) -> Tensor:
        """(b, 1, heads, rows, rows), for gauges: all rows are one window."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unsqueeze(1)
        return mk.reference.window_attention_weights(qkv, window=(1, x.shape[1]))


class ViTBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x), each branch dropped for a whole sample with probability ``rate``.

    layer: number of the first of the two branches in the network. unread_norm: a LayerNorm that nothing reads, as
    MONAI's blocks hold one (``norm_cross_attn``): there for the sake of its state dict alone.
    """

    def __init__(self, attention: Attention, width: int, hidden: int, rate: float, layer: int, unread_norm: bool):
        super().__init__()
        self.rate, self.layer = rate, layer
        self.norm1 = nn.LayerNorm(width)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden)
        self.unread_norm = nn.LayerNorm(width) if unread_norm else None

    def forward(self, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor | None]:
        branch, attention = self.attn(self.norm1(x))
        x = add_branch(x, branch, draw_keep(self.rate, key, self.layer), self.rate)
        x = add_branch(x, self.mlp(self.norm2(x)), draw_keep(self.rate, key, self.layer + 1), self.rate)
        return x, attention


class ViT(nn.Module):
    """``medfast.types.Backbone`` and ``DropsTokens``. Without arguments: the ViT that SMART compares itself with.

    in_channels: of the volume. size: voxels per axis, one number or three, that the table of positions is made for; it
    is interpolated for other sizes. patch: voxels per axis of a token, one number or three, of which ``strides`` tells.
    embed, depth, heads, mlp_ratio: width, blocks, attention heads, hidden width of the MLPs. cls: a [CLS] token, zeros
    at first and without position, whose attention in the last block is ``Features.attention``. positions: "learned", or
    "sincos", fixed (sine and cosine of each axis in a sixth of the width each). drop_path: rate of the last block; it
    rises linearly from 0 at the first. taps: numbers, from 0, of the blocks whose outputs come, before the last map, in
    ``Features.extra["taps"]``, as UNETR reads them. unread_norms: each block holds a LayerNorm that nothing reads, as
    in MONAI, so that weights, names and counts are the same; it never gets a gradient. checkpoint: blocks are computed
    again in the backward pass instead of being kept.

    ``embed`` is also the width of ``fill``. Raises ValueError for settings that do not fit each other.
    """

    def __init__(
        self,
        in_channels: int = 1,
        size: int | Sequence[int] = 128,
        patch: int | Sequence[int] = 16,
        embed: int = 768,
        depth: int = 12,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        cls: bool = False,
        positions: str = "learned",
        drop_path: float = 0.1,
        taps: Sequence[int] | None = None,
        unread_norms: bool = False,
        checkpoint: bool = False,
    ):
        super().__init__()
        _check_settings(embed, depth, heads, positions, drop_path, taps)
        self.patch = per_axis(patch)
        self.in_channels, self.embed, self.taps, self.checkpoint = in_channels, embed, taps, checkpoint
        self.channels = (embed,)
        self.strides: tuple[Any, ...] = (self.patch[0] if len(set(self.patch)) == 1 else self.patch,)
        self.semantic_attention = 1 if cls else None

        self.patch_embed = PatchEmbedding(in_channels, embed, self.patch, norm=False)
        self.grid = tuple(-(-s // p) for s, p in zip(per_axis(size), self.patch, strict=True))
        self.cls = nn.Parameter(torch.zeros(1, 1, embed)) if cls else None
        self.blocks = nn.ModuleList(
            ViTBlock(
                Attention(embed, heads, qkv_bias, cls_out=cls and i == depth - 1),
                embed,
                int(mlp_ratio * embed),
                rate=drop_path * i / max(depth - 1, 1),
                layer=2 * i,
                unread_norm=unread_norms,
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed)
        self.apply(init_weights)
        if positions == "learned":
            self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, math.prod(self.grid), embed), std=0.02))
        else:
            self.register_buffer("position", sincos(self.grid, embed).flatten(0, 2)[None])

    def forward(
        self, volume: Tensor, mask: Mask | None = None, fill: Tensor | None = None, key: Key | None = None
    ) -> Features:
        """volume (b, in_channels, d, h, w) -> Features with one stage, the tokens after the last LayerNorm.

        mask: cells whose tokens become ``fill`` (embed,), which is needed then, before positions are added. key:
        addresses the drops of whole branches. Raises ValueError for volumes, masks and keys that do not fit.
        """
        x = hide_tokens(self._embed(volume), mask, fill)
        grid = x.shape[1:-1]
        x = x.flatten(1, 3) + self._positions(grid)  # fp32 under autocast, as the sums over branches are
        x, attention, tapped = self._blocks(x, key_for_batch(key, volume))
        first = 0 if self.cls is None else 1
        tokens = x[:, first:].unflatten(1, grid)
        summary = x[:, 0] if first else tokens.mean(dim=(1, 2, 3))
        maps = (*(y[:, first:].unflatten(1, grid) for y in tapped), tokens)
        extra = {} if self.taps is None else {"taps": maps}
        return Features((tokens,), summary, attention, extra)

    def encode_visible(self, volume: Tensor, mask: Mask, key: Key | None = None) -> Tensor:
        """-> (b, [1 +] visible, embed): [CLS] if there is one and the visible tokens after the last LayerNorm.

        Hidden tokens are dropped after the embedding: no block computes them.
        ValueError where the mask does not say ``visible`` (counts differ between samples), or its cells are coarser
        than the tokens and some are cut.
        """
        x = self._embed(volume)
        ids = _visible_tokens(mask, x)
        position = self._positions(x.shape[1:-1])[0]
        x = x.flatten(1, 3).to(torch.promote_types(x.dtype, position.dtype))
        return self._blocks(mk.drop_tokens(x, ids, position), key_for_batch(key, volume))[0]

    def _embed(self, volume: Tensor) -> Tensor:
        check_volume(volume, self.in_channels, self.patch)
        return self.patch_embed(volume)

    def _blocks(self, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """x (b, tokens, embed) -> the same after the last LayerNorm, [CLS] first, its attention, tapped outputs."""
        if self.cls is not None:
            x = torch.cat((self.cls.to(x.dtype).expand(len(x), -1, -1), x), dim=1)
        attention, tapped = None, []
        for i, block in enumerate(self.blocks):
            x, attention = run(block, x, key, recompute=self.checkpoint)
            if self.taps is not None and i in self.taps:
                tapped.append(x)
        return self.norm(x), attention, tapped

    def _positions(self, grid: Sequence[int]) -> Tensor:
        """(1, tokens, embed), interpolated linearly between token centres where the grid is not the table's."""
        if tuple(grid) == self.grid:
            return self.position
        table = self.position.unflatten(1, self.grid).movedim(-1, 1)
        table = F.interpolate(table, size=tuple(grid), mode="trilinear", align_corners=False)
        return table.flatten(2).transpose(1, 2)


def sincos(grid: Sequence[int], width: int, longest: float = 10_000.0) -> Tensor:
    """Fixed positions (*grid, width): sines, then cosines, of the second, the first and the third axis in turn.

    The order of the axes is MONAI's. width is a multiple of 6 (ValueError). longest: wave length over 2 pi of the
    slowest pair, in tokens.
    """
    if width % 6:
        raise ValueError(f"positions='sincos' needs a width that is a multiple of 6, got {width}")
    omega = longest ** -(torch.arange(width // 6) / (width // 6))
    angles = [torch.arange(length)[:, None] * omega for length in grid]
    waves = [torch.cat((a.sin(), a.cos()), dim=-1) for a in angles]
    d, h, w = grid
    return torch.cat(
        (
            waves[1][None, :, None].expand(d, h, w, -1),
            waves[0][:, None, None].expand(d, h, w, -1),
            waves[2][None, None].expand(d, h, w, -1),
        ),
        dim=-1,
    )


def _visible_tokens(mask: Mask, x: Tensor) -> Tensor:
    """Ascending ids (b, count) of the tokens of x (b, *grid, c) that lie in visible cells."""
    hidden = hidden_tokens(mask, x)
    if mask.visible is None:
        raise ValueError(
            "to leave hidden tokens out, all samples must hide equally many: this mask has visible=None; use a masker "
            "with a fixed ratio, or hide tokens with a fill"
        )
    tokens, cells = x.shape[1:-1], mask.where.shape[1:]
    if tuple(tokens) == tuple(cells):
        return mask.visible
    if any(t % c for t, c in zip(tokens, cells, strict=True)):
        raise ValueError(
            f"{tuple(cells)} cells cut {tuple(tokens)} tokens unevenly, so samples keep different numbers of them: use "
            "cells that divide the tokens, or one cell per token"
        )
    count = mask.visible.shape[1] * (hidden[0].numel() // mask.where[0].numel())
    return hidden.flatten(1).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def _check_settings(
    embed: int, depth: int, heads: int, positions: str, drop_path: float, taps: Sequence[int] | None
) -> None:
    if depth < 1 or heads < 1 or embed % heads:
        raise ValueError(f"heads must divide embed and depth be at least 1, got {heads=}, {embed=}, {depth=}")
    if positions not in ("learned", "sincos"):
        raise ValueError(f"positions must be one of 'learned', 'sincos', got {positions!r}")
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"drop_path is the last block's probability of being dropped, in [0, 1), got {drop_path}")
    if taps is not None and (list(taps) != sorted(set(taps)) or not all(0 <= i < depth for i in taps)):
        raise ValueError(f"taps are numbers of blocks, ascending, in 0..{depth - 1}, got {taps}")
