"""Parts of nnFormer: convolutional embedding, down- and up-sampling, windowed cross-attention to a skip.

Source: Zhou et al., nnFormer (arXiv 2109.03201, IEEE TIP 2023) with its public code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import medfast_kernels as mk
from medfast.types import Key
from medfast_kernels.modules import WindowAttention

from .blocks import MLP, add_branch, draw_keep
from .swin import SwinBlock
from .unet_blocks import Conv, Up

GROWTH = 2  # of the width from a stage to the next, and of the stride on every axis
BIAS_INDICES = ("geometric", "legacy")


class ConvPair(nn.Module):
    """3^3 convolution of ``stride``, GELU, LayerNorm, 3^3 convolution, and, unless ``last``, GELU and LayerNorm."""

    def __init__(self, width: int, out: int, stride: Sequence[int], last: bool):
        super().__init__()
        self.conv1, self.norm1 = Conv(width, out, 3, bias=True, stride=stride), nn.LayerNorm(out)
        self.conv2 = Conv(out, out, 3, bias=True)
        self.norm2 = None if last else nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.norm1(F.gelu(self.conv1(x))))
        return x if self.norm2 is None else self.norm2(F.gelu(x))


class ConvEmbedding(nn.Module):
    """(b, c, d, h, w) -> (b, *ceil(size / patch), width): two pairs of convolutions that halve axes, and a LayerNorm.

    patch: 1, 2 or 4 voxels per axis. The first pair halves every axis of 2 or 4, the second every axis of 4.
    """

    def __init__(self, channels: int, width: int, patch: Sequence[int]):
        super().__init__()
        if any(p not in (1, 2, 4) for p in patch) or width % 2:
            raise ValueError(f"patch must be 1, 2 or 4 voxels per axis and embed even, got {tuple(patch)} and {width}")
        self.patch = tuple(patch)
        self.first = ConvPair(channels, width // 2, [min(p, 2) for p in patch], last=False)
        self.second = ConvPair(width // 2, width, [p // min(p, 2) for p in patch], last=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, volume: Tensor) -> Tensor:
        sizes = zip(reversed(volume.shape[2:]), reversed(self.patch), strict=True)
        padding = [p for size, patch in sizes for p in (0, -size % patch)]
        if any(padding):
            volume = F.pad(volume, padding)
        return self.norm(self.second(self.first(volume.movedim(1, -1))))


class ConvDown(nn.Module):
    """(b, *grid, width) -> (b, *ceil(grid / 2), 2 width): GELU, LayerNorm, 3^3 convolution of stride 2."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.reduction = Conv(width, GROWTH * width, 3, bias=True, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(F.gelu(x)))


class ConvExpand(nn.Module):
    """(b, *grid, 2 width) -> (b, *(2 grid), width): LayerNorm, transposed convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(GROWTH * width)
        self.up = Up(GROWTH * width, width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.norm(x))


def legacy_rows(window: int) -> Tensor:
    """Which row of its bias table the public code reads for each offset, ((2 * window - 1)**3,) int64.

    The row of an offset should be a base-(2w - 1) number; there the first digit counts 3w - 1 rows instead of
    (2w - 1)^2, so that offsets share rows.
    """
    digit = torch.arange(2 * window - 1)
    rows = digit[:, None, None] * (3 * window - 1) + digit[:, None] * (2 * window - 1) + digit
    return rows.flatten()


class LegacyWindowAttention(WindowAttention):
    """``WindowAttention`` that reads its bias table as nnFormer's public code does, see ``legacy_rows``."""

    rows: Tensor

    def __init__(self, width: int, heads: int, window: int, shift: int, qkv_bias: bool):
        super().__init__(width, heads, window, shift, qkv_bias=qkv_bias)
        self.register_buffer("rows", legacy_rows(window), persistent=False)

    def bias_table(self) -> Tensor:
        return self.relative_position_bias_table[self.rows]


def attention(width: int, heads: int, window: int, shift: int, qkv_bias: bool, bias_index: str) -> WindowAttention:
    """Self-attention in windows; bias_index: name in ``BIAS_INDICES``."""
    if bias_index == "legacy":
        return LegacyWindowAttention(width, heads, window, shift, qkv_bias)
    return WindowAttention(width, heads, window, shift, qkv_bias=qkv_bias)


class SkipAttention(nn.Module):
    """Windowed attention of one map to another of the same shape, (b, *grid, width): queries are not projected.

    Pad tokens hold the bias of keys and values, what padding before the projection gives them.
    """

    rows: Tensor | None

    def __init__(self, width: int, heads: int, window: int, qkv_bias: bool, bias_index: str):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide the width, got {heads} heads for width {width}")
        self.heads, self.window = heads, window
        self.kv = nn.Linear(width, 2 * width, bias=qkv_bias)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 3, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("rows", legacy_rows(window) if bias_index == "legacy" else None, persistent=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        bias, table = self.kv.bias, self.relative_position_bias_table
        kv = self.kv(skip)
        qkv = torch.cat((x.to(kv.dtype), kv), dim=-1).unflatten(-1, (3, self.heads, -1))
        pad = None if bias is None else F.pad(bias, (x.shape[-1], 0)).view(3, self.heads, -1)
        rows = table if self.rows is None else table[self.rows]
        return self.proj(mk.window_attention(qkv, rows, window=self.window, pad_value=pad))


class SkipBlock(nn.Module):
    """An up-sampled map x and a skip -> x + skip + attention(LN x to LN skip), then + MLP(LN). One LN serves both.

    rate, layer: as in ``SwinBlock``.
    """

    def __init__(
        self, width: int, heads: int, window: int, mlp_ratio: float, qkv_bias: bool, bias_index: str, rate: float,
        layer: int,
    ):  # fmt: skip
        super().__init__()
        self.rate, self.layer = rate, layer
        self.norm1 = nn.LayerNorm(width)
        self.attn = SkipAttention(width, heads, window, qkv_bias, bias_index)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(mlp_ratio * width))

    def forward(self, x: Tensor, skip: Tensor, key: Key | None) -> Tensor:
        branch = self.attn(self.norm1(x), self.norm1(skip))
        x = add_branch(x + skip, branch, draw_keep(self.rate, key, self.layer), self.rate)
        return add_branch(x, self.mlp(self.norm2(x)), draw_keep(self.rate, key, self.layer + 1), self.rate)


class DecoderStage(nn.Module):
    """A coarse map and the skip of its finer neighbour -> (b, *grid of the skip, width).

    The first block attends from the up-sampled map to the skip; the next are ordinary blocks, all shifted. ``rates``
    and ``layer``: of the drops of each block, and the number of the first.
    """

    def __init__(
        self, width: int, heads: int, window: int, mlp_ratio: float, qkv_bias: bool, bias_index: str,
        rates: Sequence[float], layer: int,
    ):  # fmt: skip
        super().__init__()
        self.expand = ConvExpand(width)
        first = SkipBlock(width, heads, window, mlp_ratio, qkv_bias, bias_index, rates[0], layer)
        later = [
            SwinBlock(
                attention(width, heads, window, window // 2, qkv_bias, bias_index),
                width, mlp_ratio, rate, layer=layer + 2 * i,
            )
            for i, rate in enumerate(rates[1:], start=1)
        ]  # fmt: skip
        self.blocks = nn.ModuleList([first, *later])

    def forward(self, x: Tensor, skip: Tensor, key: Key | None) -> Tensor:
        d, h, w = skip.shape[1:-1]
        x = self.blocks[0](self.expand(x)[:, :d, :h, :w], skip, key)
        for block in self.blocks[1:]:
            x = block(x, key)
        return x
