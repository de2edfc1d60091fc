"""Dual attention in 2D: over tokens and over channels, both linear in the number of tokens, and its feed-forward.

Sources: Azad et al., DAE-Former (arXiv 2212.13504) with its public code; efficient attention: Shen et al., WACV 2021
(arXiv 1812.01243); transpose attention: Ali et al., XCiT, NeurIPS 2021 (arXiv 2106.09681); the feed-forward with a
depthwise convolution: MISSFormer (arXiv 2109.07162). Maps are channels-last, (b, h, w, c).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNEL_HEADS = 8
MLP_RATIO = 4


class Pointwise(nn.Conv2d):
    """1^2 convolution of a channels-last map, as a matrix product."""

    def __init__(self, width: int, out: int):
        super().__init__(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


def efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k (b, n, c), v (b, n, d) -> (b, n, d): k softmaxed over tokens, q over channels, k'v (c, d) first.

    No (n, n) matrix is ever made, so cost and memory are linear in n. Shen et al., eq. 4.
    """
    context = k.softmax(dim=1).transpose(1, 2).to(v.dtype) @ v
    return q.softmax(dim=-1).to(v.dtype) @ context


class EfficientAttention(nn.Module):
    """(b, h, w, width) -> the same shape; one head, no 1/sqrt(d)."""

    def __init__(self, width: int):
        super().__init__()
        self.queries, self.keys, self.values = (Pointwise(width, width) for _ in range(3))
        self.reprojection = Pointwise(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x).flatten(1, 2) for project in (self.queries, self.keys, self.values))
        return self.reprojection(efficient_attention(q, k, v).unflatten(1, x.shape[1:3]))


class ChannelAttention(nn.Module):
    """Channels attend to channels, head by head: softmax(q k' * temperature), q and k of unit length over tokens."""

    def __init__(self, width: int, heads: int = CHANNEL_HEADS):
        super().__init__()
        if width % heads:
            raise ValueError(f"widths must be multiples of {heads}, the heads of channel attention, got {width}")
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 4, 1)  # (b, heads, channels of a head, n)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
        out = (scores * self.temperature).softmax(dim=-1).to(v.dtype) @ v
        return self.proj(out.permute(0, 3, 1, 2).flatten(2).unflatten(1, x.shape[1:3]))


class MixMLP(nn.Module):
    """Linear to ``hidden``, 3^2 depthwise convolution beside a shortcut, LayerNorm, GELU, linear back.

    unread: holds two LayerNorms that nothing reads, as the public code does, for its state dict alone.
    """

    def __init__(self, width: int, hidden: int, unread: bool):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm1 = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.unread = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2)) if unread else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self.dwconv(x.movedim(-1, 1)).movedim(1, -1) + x
        return self.fc2(F.gelu(self.norm1(x)))


class DualBlock(nn.Module):
    """Attention over tokens, feed-forward, attention over channels, feed-forward, each x + f(LN x)."""

    def __init__(self, width: int, unread: bool):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), EfficientAttention(width)
        self.norm2, self.mlp1 = nn.LayerNorm(width), MixMLP(width, MLP_RATIO * width, unread)
        self.norm3, self.channel_attn = nn.LayerNorm(width), ChannelAttention(width)
        self.norm4, self.mlp2 = nn.LayerNorm(width), MixMLP(width, MLP_RATIO * width, unread)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp1(self.norm2(x))
        x = x + self.channel_attn(self.norm3(x))
        return x + self.mlp2(self.norm4(x))


class SkipCrossAttention(nn.Module):
    """An up-sampled map and a skip, (b, h, w, width) both -> (b, h, w, 2 width).

    Keys and queries are the skip, values the up-sampled map, none projected; both maps side by side are added, then a
    feed-forward. One LayerNorm serves both maps.
    """

    def __init__(self, width: int, unread: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.reprojection, self.norm = Pointwise(width, 2 * width), nn.LayerNorm(2 * width)
        self.norm2, self.mlp = nn.LayerNorm(2 * width), MixMLP(2 * width, MLP_RATIO * width, unread)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        value, key = (self.norm1(y).flatten(1, 2) for y in (x, skip))
        read = efficient_attention(key, key, value).unflatten(1, x.shape[1:3])
        x = torch.cat((x, skip), dim=-1) + self.norm(self.reprojection(read))
        return x + self.mlp(self.norm2(x))
