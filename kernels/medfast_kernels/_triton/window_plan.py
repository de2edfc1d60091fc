"""What a launch of window attention is made of, worked out from a checked call: geometry, variant, size of the grid."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

_MOST_32 = 2**31 - 1  # elements of a sample that 32-bit offsets reach
Axes = tuple[int, ...]  # z, y, x; a 2D grid has one slice


class Geometry(NamedTuple):
    """Numbers that a kernel takes at run time.

    limit: where tokens begin that others of their window must not see; counts: windows; tokens: of one sample.
    """

    grid: Axes
    padded: Axes
    shift: Axes
    limit: Axes
    counts: Axes
    tokens: int


class Mode(NamedTuple):
    """What a kernel is compiled for.

    width: dim rounded up to what a matrix product takes, tile: likewise of the tokens of a window (or of a part of it);
    wide: offsets within a sample need 64 bits; dense: qkv is contiguous; live: pads hold pad_value; masked: pads are
    not seen; scales: scale is a tensor; drop: attention dropout; choosy: keep is given.
    """

    heads: int
    dim: int
    width: int
    window: Axes
    tokens: int
    tile: int
    wide: bool
    dense: bool
    shifted: bool
    padded: bool
    live: bool
    masked: bool
    biased: bool
    scales: bool
    cosine: bool
    drop: bool
    choosy: bool
    compute: Any

    @property
    def tiles(self) -> int:
        """Per axis of a window's scores."""
        return -(-self.tokens // self.tile)


def three(values: tuple[int, ...], first: int) -> Axes:
    return (first,) * (3 - len(values)) + tuple(values)


def geometry_of(grid: Axes, window: Axes, shift: Axes, live_pads: bool) -> Geometry:
    grid, window, shift = three(grid, 1), three(window, 1), three(shift, 0)
    counts = tuple(-(-g // w) for g, w in zip(grid, window, strict=True))
    padded = tuple(n * w for n, w in zip(counts, window, strict=True))
    return Geometry(grid, padded, shift, padded if live_pads else grid, counts, math.prod(grid))


def round_up(n: int) -> int:
    """To a power of two, 16 at least: what a matrix product takes."""
    return max(16, 1 << (n - 1).bit_length())


def mode_of(
    qkv: Tensor, window: Axes, geometry: Geometry, *, live_pads: bool, pad_value: bool, bias: bool, scales: bool,
    cosine: bool, drop: bool, keep: bool, compute: Any, largest: int,
) -> Mode:  # fmt: skip
    heads, dim = qkv.shape[-2:]
    tokens = math.prod(window)
    padded = geometry.padded != geometry.grid
    extent = sum((size - 1) * abs(stride) for size, stride in zip(qkv.shape[1:], qkv.stride()[1:], strict=True))
    extent = max(extent, 3 * heads * dim * math.prod(geometry.padded))
    return Mode(
        heads, dim, round_up(dim), three(window, 1), tokens, min(round_up(tokens), largest), extent > _MOST_32,
        qkv.is_contiguous(), any(geometry.shift), padded, padded and live_pads and pad_value, padded and not live_pads,
        bias, scales, cosine, drop, keep, compute,
    )  # fmt: skip
