"""Arguments of window attention, checked once for all backends, and the geometry that follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_beside, check_device, floating, kind, number, one_of, switch, with_samples
from .key import Key

PADS = ("bias", "mask")
BIAS_INDICES = ("geometric", "sliced")


class Problem(NamedTuple):
    """One checked call: tensors as given, geometry per grid axis.

    window: effective, after clipping; full: as passed, which the bias table is made for; padded: the grid in whole
    windows; shift: effective. scale: a float, or (heads,). key: with samples filled in, None without dropout.
    """

    qkv: Tensor
    bias: Tensor | None
    grid: tuple[int, ...]
    window: tuple[int, ...]
    full: tuple[int, ...]
    shift: tuple[int, ...]
    padded: tuple[int, ...]
    scale: float | Tensor
    cosine: bool
    pad: str
    pad_value: Tensor | None
    bias_index: str
    dropout: float
    keep: Tensor | None
    key: Key | None

    @property
    def counts(self) -> tuple[int, ...]:
        """Windows per axis."""
        return tuple(p // w for p, w in zip(self.padded, self.window, strict=True))

    @property
    def tokens(self) -> int:
        """N, tokens of one window."""
        return math.prod(self.window)


def check(
    qkv: Tensor,
    bias: Tensor | None,
    *,
    window: int | Sequence[int],
    shift: int | Sequence[int],
    scale: float | Tensor | None,
    cosine: bool,
    pad: str,
    pad_value: Tensor | None,
    clip: bool,
    bias_index: str,
    dropout: float,
    keep: Tensor | None,
    key: Key | None,
) -> Problem:
    """Refuse what no backend could mean, then work out windows, padding and shift."""
    if not isinstance(qkv, Tensor):
        raise TypeError(f"qkv must be a tensor, got {type(qkv).__name__}")
    if not floating(qkv):
        raise TypeError(f"qkv must be a floating tensor, got {kind(qkv)}")
    if qkv.dim() not in (6, 7) or qkv.shape[-3] != 3:
        raise ValueError(f"qkv must be (b, *grid, 3, heads, dim) with a grid of 2 or 3 axes, got {tuple(qkv.shape)}")
    batch, grid, (heads, dim) = qkv.shape[0], tuple(qkv.shape[1:-3]), qkv.shape[-2:]
    if min(grid) < 1 or heads < 1 or dim < 1:
        raise ValueError(f"qkv needs at least one token, head and channel, got {tuple(qkv.shape)}")
    one_of("pad", pad, PADS)
    one_of("bias_index", bias_index, BIAS_INDICES)
    full = _per_axis("window", window, len(grid), least=1)
    shift = _per_axis("shift", shift, len(grid), least=0)
    if any(s >= w for s, w in zip(shift, full, strict=True)):
        raise ValueError(f"shift must be smaller than the window on every axis, got shift {shift}, window {full}")
    clipped = tuple(clip and g <= w for g, w in zip(grid, full, strict=True))
    effective = tuple(g if c else w for g, w, c in zip(grid, full, clipped, strict=True))
    shift = tuple(0 if c else s for s, c in zip(shift, clipped, strict=True))
    padded = tuple(-(-g // w) * w for g, w in zip(grid, effective, strict=True))
    _check_bias(bias, heads, full, math.prod(effective), qkv)
    if pad_value is not None:
        check_beside("pad_value", pad_value, (3, heads, dim), qkv, "qkv")
    number("dropout", dropout)
    switch("cosine", cosine)
    switch("clip", clip)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if keep is not None and (not isinstance(keep, Tensor) or keep.dtype != torch.bool):
        raise TypeError(f"keep must be a (b,) bool tensor, got {kind(keep)}")
    if keep is not None and tuple(keep.shape) != (batch,):
        raise ValueError(f"keep must be (b,) = ({batch},), got {tuple(keep.shape)}")
    if keep is not None:
        check_device("keep", keep, qkv, "qkv")
    return Problem(
        qkv, bias, grid, effective, full, shift, padded, _scale(scale, cosine, qkv), bool(cosine), pad,
        pad_value, bias_index, float(dropout), keep, with_samples(key, batch, qkv.device) if dropout else None,
    )  # fmt: skip


def _per_axis(name: str, value: int | Sequence[int], axes: int, least: int) -> tuple[int, ...]:
    if not isinstance(value, (int, Sequence)) or isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be an int, or a sequence with one for each grid axis ({axes}), got {value!r}")
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes:
        raise ValueError(f"{name} must be an int or have one entry per grid axis ({axes}), got {values}")
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise TypeError(f"{name} must hold ints, got {values}")
    if any(v < least for v in values):
        raise ValueError(f"{name} must be at least {least} on every axis, got {values}")
    return values


def _scale(scale: float | Tensor | None, cosine: bool, qkv: Tensor) -> float | Tensor:
    if scale is None:
        return 1.0 if cosine else qkv.shape[-1] ** -0.5
    if isinstance(scale, Tensor):
        check_beside("scale", scale, (qkv.shape[-2],), qkv, "qkv")
        return scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be None, a float or a (heads,) tensor, got {scale!r}")
    number("scale", scale)
    return float(scale)


def _check_bias(bias: Tensor | None, heads: int, full: tuple[int, ...], tokens: int, qkv: Tensor) -> None:
    if bias is None:
        return
    rows = math.prod([2 * w - 1 for w in full])
    if not floating(bias):
        raise TypeError(f"bias must be None or a floating tensor, got {kind(bias)}")
    if tuple(bias.shape) not in ((rows, heads), (heads, tokens, tokens)):
        raise ValueError(
            f"bias must be a table ({rows}, {heads}) = (prod(2 * window - 1), heads) or dense "
            f"({heads}, {tokens}, {tokens}) = (heads, N, N), got {tuple(bias.shape)}"
        )
    check_beside("bias", bias, tuple(bias.shape), qkv, "qkv")


def bias_rows(problem: Problem, device: torch.device) -> Tensor:
    """(N, N) int64, the row of the bias table for query i and key j of a window."""
    shape = problem.window if problem.bias_index == "geometric" else problem.full
    token = torch.arange(problem.tokens, device=device)
    rows = torch.zeros(problem.tokens, problem.tokens, dtype=torch.int64, device=device)
    for axis, w in enumerate(problem.full):
        at = token // math.prod(shape[axis + 1 :]) % shape[axis]
        rows = rows * (2 * w - 1) + (at[:, None] - at[None, :] + w - 1)
    return rows
