"""Stand-ins for code that is on no package index, with the layout and the quirks of the published files.

SMIT: The-Veeraraghavan-Lab/SMIT, models/Trans.py. Tokens (b, d * h * w, c); H, W, T are set on the blocks by the layer;
windows are neither clipped nor is their shift; zeros are padded after the norm; the crop happens only where one of the
first two axes was padded; windows are put back with the order of axes that took them out; one drop_path for both
branches; the layer returns (x, H, W, T, x_down, Wh, Ww, Wt).

Video-Swin: SwinTransformer/Video-Swin-Transformer, mmaction/models/backbones/swin_transformer.py. Maps (b, c, d, h, w)
between layers; windows are clipped to the map and lose their shift; the index is sliced; merging halves two axes only.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def regions(padded, window, shift):
    """(1, *padded, 1): what the cyclic shift brings together although it is apart, numbered."""
    index = torch.zeros(1, *padded, 1)
    for axis, (n, w, s) in enumerate(zip(padded, window, shift, strict=True), start=1):
        at = torch.arange(n).reshape([-1 if i == axis else 1 for i in range(5)])
        index = 3 * index + (at >= n - w).float() + (at >= n - s).float() * bool(s)
    return index


def partition(x, window):
    b, d, h, w, c = x.shape
    x = x.view(b, d // window[0], window[0], h // window[1], window[1], w // window[2], window[2], c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, math.prod(window), c)


def shift_mask(padded, window, shift):
    index = partition(regions(padded, window, shift), window)[..., 0]
    return torch.where(index[:, None] == index[:, :, None], 0.0, -100.0).double()


class Attention(nn.Module):
    def __init__(self, dim, window_size, num_heads, qkv_bias=True, attn_drop=0.0):
        super().__init__()
        self.dim, self.window_size, self.num_heads = dim, window_size, num_heads
        self.scale = (dim // num_heads) ** -0.5
        rows = math.prod(2 * w - 1 for w in window_size)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        at = torch.cartesian_prod(*map(torch.arange, window_size))
        offset = at[:, None] - at[None] + torch.tensor(window_size) - 1
        stride = torch.tensor([math.prod(2 * w - 1 for w in window_size[i + 1 :]) for i in range(3)])
        self.register_buffer("relative_position_index", (offset * stride).sum(-1))
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x, mask=None):
        windows, n, c = x.shape
        q, k, v = self.qkv(x).view(windows, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = (self.scale * q) @ k.mT
        scores = scores + self.relative_position_bias_table[self.relative_position_index[:n, :n]].permute(2, 0, 1)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask.unsqueeze(1)).flatten(0, 1)
        x = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(windows, n, c)))


class WindowAttention(Attention):
    """SMIT's name."""


class WindowAttention3D(Attention):
    """Video-Swin's name."""


class Mlp(nn.Sequential):
    def __init__(self, dim):
        super().__init__(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class SwinTransformerBlock(nn.Module):
    """SMIT's."""

    reverse_order = (0, 1, 3, 5, 2, 4, 6, 7)

    def __init__(self, dim, num_heads, window_size, shift_size, qkv_bias):
        super().__init__()
        self.window_size, self.shift_size = window_size, shift_size
        self.norm1, self.norm2, self.drop_path = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Identity()
        self.attn = WindowAttention(dim, window_size, num_heads, qkv_bias)
        self.mlp = Mlp(dim)
        self.H = self.W = self.T = None

    def forward(self, x, mask_matrix):
        b, _, c = x.shape
        shortcut, grid, window, shift = x, (self.H, self.W, self.T), self.window_size, self.shift_size
        x = self.norm1(x).view(b, *grid, c)
        pads = [-n % w for n, w in zip(grid, window, strict=True)]
        x = F.pad(x, (0, 0, 0, pads[2], 0, pads[1], 0, pads[0]))
        padded = x.shape[1:4]
        if min(shift) > 0:
            x = torch.roll(x, [-s for s in shift], (1, 2, 3))
        x = self.attn(partition(x, window), mask=mask_matrix if min(shift) > 0 else None)
        counts = [n // w for n, w in zip(padded, window, strict=True)]
        x = x.view(b, *counts, *window, c).permute(self.reverse_order).reshape(b, *padded, c)
        if min(shift) > 0:
            x = torch.roll(x, list(shift), (1, 2, 3))
        if pads[0] or pads[1]:
            x = x[:, : grid[0], : grid[1], : grid[2]].contiguous()
        x = shortcut + self.drop_path(x.view(b, -1, c))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SMITLayer(nn.Module):
    def __init__(self, dim, num_heads, window, qkv_bias, depth=2):
        super().__init__()
        self.window, self.shift = window, tuple(w // 2 for w in window)
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(dim, num_heads, window, self.shift if i % 2 else (0, 0, 0), qkv_bias)
            for i in range(depth)
        )
        self.norm, self.reduction = nn.LayerNorm(8 * dim), nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x, *grid):
        mask = shift_mask([n + -n % w for n, w in zip(grid, self.window, strict=True)], self.window, self.shift)
        for block in self.blocks:
            block.H, block.W, block.T = grid
            x = block(x, mask)
        y = x.view(len(x), *grid, -1)
        order = ("000", "100", "010", "001", "110", "011", "101", "111")
        y = torch.cat([y[:, int(i) :: 2, int(j) :: 2, int(k) :: 2] for i, j, k in order], -1).flatten(1, 3)
        return x, *grid, self.reduction(self.norm(y)), *[n // 2 for n in grid]


class SMIT(nn.Module):
    """(b, d, h, w, 2 * heads) -> the two stages before their merge, and the last after it."""

    def __init__(self, window=(2, 2, 2), heads=2, qkv_bias=True):
        super().__init__()
        self.layers = nn.ModuleList(SMITLayer(4 * heads * i, heads, window, qkv_bias) for i in (1, 2))

    def forward(self, x):
        grid, x, outs = x.shape[1:4], x.flatten(1, 3), []
        for layer in self.layers:
            out, *_, x, d, h, w = layer(x, *grid)
            outs, grid = [*outs, out], (d, h, w)
        return [*outs, x]


class SwinTransformerBlock3D(nn.Module):
    """Video-Swin's."""

    def __init__(self, dim, num_heads, window_size, shift_size, use_checkpoint=False, attn_drop=0.0):
        super().__init__()
        self.window_size, self.shift_size, self.use_checkpoint = window_size, shift_size, use_checkpoint
        self.norm1, self.norm2, self.drop_path = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Identity()
        self.attn = WindowAttention3D(dim, window_size, num_heads, attn_drop=attn_drop)
        self.mlp = Mlp(dim)

    def forward_part1(self, x, mask_matrix):
        b, *grid, c = x.shape
        window, shift = clipped(grid, self.window_size, self.shift_size)
        pads = [-n % w for n, w in zip(grid, window, strict=True)]
        x = F.pad(self.norm1(x), (0, 0, 0, pads[2], 0, pads[1], 0, pads[0]))
        padded = x.shape[1:4]
        if any(shift):
            x = torch.roll(x, [-s for s in shift], (1, 2, 3))
        x = self.attn(partition(x, window), mask=mask_matrix if any(shift) else None)
        counts = [n // w for n, w in zip(padded, window, strict=True)]
        x = x.view(b, *counts, *window, c).permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, *padded, c)
        if any(shift):
            x = torch.roll(x, list(shift), (1, 2, 3))
        return x[:, : grid[0], : grid[1], : grid[2]]

    def forward_part2(self, x):
        return self.drop_path(self.mlp(self.norm2(x)))

    def forward(self, x, mask_matrix):
        if self.use_checkpoint:
            x = x + self.drop_path(checkpoint(self.forward_part1, x, mask_matrix, use_reentrant=False))
            return x + checkpoint(self.forward_part2, x, use_reentrant=False)
        x = x + self.drop_path(self.forward_part1(x, mask_matrix))
        return x + self.forward_part2(x)


def clipped(grid, window, shift):
    small = [n <= w for n, w in zip(grid, window, strict=True)]
    window = tuple(n if s else w for n, w, s in zip(grid, window, small, strict=True))
    return window, tuple(0 if small else s for s, small in zip(shift, small, strict=True))


class BasicLayer(nn.Module):
    """Video-Swin's, with a merge that halves the last two axes."""

    def __init__(self, dim, num_heads, window_size, use_checkpoint=False, attn_drop=0.0):
        super().__init__()
        self.window_size, self.shift_size = window_size, tuple(w // 2 for w in window_size)
        self.blocks = nn.ModuleList(
            SwinTransformerBlock3D(dim, num_heads, window_size, shift, use_checkpoint, attn_drop)
            for shift in ((0, 0, 0), self.shift_size)
        )
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        x = x.movedim(1, -1)
        window, shift = clipped(x.shape[1:4], self.window_size, self.shift_size)
        mask = shift_mask([n + -n % w for n, w in zip(x.shape[1:4], window, strict=True)], window, shift)
        for block in self.blocks:
            x = block(x, mask)
        x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        parts = [x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1))).movedim(-1, 1)


class VideoSwin(nn.Sequential):
    """(b, 8, t, h, w) -> (b, 32, t, ceil(h / 4), ceil(w / 4))."""

    def __init__(self, window=(2, 3, 4), **options):
        super().__init__(BasicLayer(8, 2, window, **options), BasicLayer(16, 2, window, **options))
