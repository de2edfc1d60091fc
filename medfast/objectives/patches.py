"""Volumes as rows of patches and back: what a linear layer on tokens predicts, and what it is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

Stride = int | Sequence[int]


def per_axis(stride: Stride, axes: int) -> tuple[int, ...]:
    """Voxels of a patch along each axis. ValueError where there is not one number per axis."""
    found = (stride,) * axes if isinstance(stride, int) else tuple(stride)
    if len(found) != axes:
        raise ValueError(f"a patch of {found} voxels does not fit volumes of {axes} axes")
    return found


def to_patches(volume: Tensor, stride: Stride) -> Tensor:
    """(b, c, *size) -> (b, n, c * voxels of a patch), patches in raster order; zeros beyond the far ends."""
    sizes = volume.shape[2:]
    lengths = per_axis(stride, len(sizes))
    padding = [p for size, s in zip(reversed(sizes), reversed(lengths), strict=True) for p in (0, -size % s)]
    if any(padding):
        volume = F.pad(volume, padding)
    split = [n for size, s in zip(volume.shape[2:], lengths, strict=True) for n in (size // s, s)]
    axes = len(sizes)
    blocks = volume.reshape(*volume.shape[:2], *split)
    # (b, c, g1, s1, .., gn, sn) -> (b, g1..gn, c, s1..sn)
    order = [0, *(2 + 2 * i for i in range(axes)), 1, *(3 + 2 * i for i in range(axes))]
    return blocks.permute(order).flatten(1 + axes).flatten(1, axes)


def from_patches(patches: Tensor, stride: Stride, channels: int, size: Sequence[int]) -> Tensor:
    """The inverse: (b, *grid, channels * voxels of a patch) -> (b, channels, *size), cut at the far ends."""
    grid, axes = patches.shape[1:-1], len(size)
    lengths = per_axis(stride, axes)
    blocks = patches.unflatten(-1, (channels, *lengths))
    # (b, g1..gn, c, s1..sn) -> (b, c, g1, s1, .., gn, sn)
    order = [0, 1 + axes, *(axis for i in range(axes) for axis in (1 + i, 2 + axes + i))]
    whole = (g * s for g, s in zip(grid, lengths, strict=True))
    volume = blocks.permute(order).reshape(len(patches), channels, *whole)
    return volume[(..., *(slice(0, length) for length in size))]


def cell_sums(x: Tensor, stride: Stride) -> Tensor:
    """(b, *size) -> (b, n): the sum over the voxels of each cell, cells in raster order, the last ones cut."""
    axes = x.dim() - 1
    lengths = per_axis(stride, axes)
    padding = [p for size, s in zip(reversed(x.shape[1:]), reversed(lengths), strict=True) for p in (0, -size % s)]
    if any(padding):
        x = F.pad(x, padding)
    split = [n for size, s in zip(x.shape[1:], lengths, strict=True) for n in (size // s, s)]
    return x.reshape(len(x), *split).sum(dim=[2 + 2 * i for i in range(axes)]).flatten(1)


def voxels_of_patch(stride: Stride, axes: int = 3) -> int:
    return math.prod(per_axis(stride, axes))
