"""Maskers: which cells of a volume are hidden. Exact counts, drawn from the batch's key and nothing else."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import medfast_kernels as mk
from medfast.types import Key, Mask

_ROUNDINGS = {"ceil": math.ceil, "floor": math.floor}


def _share(name: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is a share of all cells, in [0, 1], got {value}")
    return float(value)


def count_of(ratio: float, n: int, rounding: str = "ceil") -> int:
    """How many of n cells are ``ratio`` of them; a rounding error off a whole number is that number."""
    return _ROUNDINGS[rounding](round(ratio * n, 6))


def random_cells(cells: tuple[int, ...], count: int, key: Key) -> Mask:
    """``count`` distinct cells of each sample, uniformly; ``key`` with its role set."""
    n = math.prod(cells)
    hidden = mk.random_ids(n, count, key=key)
    where = torch.zeros(len(hidden), n, dtype=torch.bool, device=hidden.device).scatter(1, hidden, True)
    visible = where.to(torch.uint8).argsort(dim=1, stable=True)[:, : n - count]
    return Mask(where.unflatten(1, cells), hidden, visible)


class RandomMask:
    """``ratio`` of all cells, uniformly, each sample and view its own (SMIT: 152 of 216; rounded up).

    ratio: share hidden. rounding: "ceil" or "floor" of ratio times cells.
    """

    guided = False

    def __init__(self, ratio: float = 0.7, rounding: str = "ceil"):
        if rounding not in _ROUNDINGS:
            raise ValueError(f"rounding must be one of {sorted(_ROUNDINGS)}, got {rounding!r}")
        self.ratio, self.rounding = _share("ratio", ratio), rounding

    def __call__(self, cells: tuple[int, ...], key: Key, attention: Tensor | None = None) -> Mask:
        count = count_of(self.ratio, math.prod(cells), self.rounding)
        return random_cells(cells, count, key.at(mk.Role.MASK))


class AttentionMask:
    """The int(ratio n) most attended cells, some of them shown again as hints (SMART III.B, AttMask).

    hint: share of all cells whose best are hint candidates. hint_mode: "top" shows all int(hint n) of them (the
    paper's sentence: 307 of 512 stay hidden), "random" shows int(hint ratio n) of them at random (AttMask and the
    author's code: 323 of 512). order: "high", or "low" for the least attended (AttMask-Low), which takes no hints.
    """

    guided = True

    def __init__(self, ratio: float = 0.7, hint: float = 0.1, hint_mode: str = "top", order: str = "high"):
        self.ratio, self.hint = _share("ratio", ratio), _share("hint", hint)
        if hint > ratio:
            raise ValueError(f"hints are taken from the hidden cells: hint must be at most ratio = {ratio}, got {hint}")
        if hint_mode not in ("top", "random") or order not in ("high", "low"):
            raise ValueError(
                f'hint_mode must be "top" or "random" and order "high" or "low", got {hint_mode!r} and {order!r}'
            )
        if order == "low" and hint:
            raise ValueError('order="low" hides the least attended cells and takes no hints: set hint to 0')
        self.hint_mode, self.order = hint_mode, order

    def __call__(self, cells: tuple[int, ...], key: Key, attention: Tensor | None = None) -> Mask:
        if attention is None or attention.shape[1] != math.prod(cells):
            given = "none" if attention is None else f"{attention.shape[1]} values"
            raise ValueError(f"AttentionMask needs one attention value for each of the {cells} cells, got {given}")
        where, hidden, visible = mk.attention_mask(
            attention, self.ratio, hint=self.hint, hint_mode=self.hint_mode, order=self.order, key=key.at(mk.Role.HINTS)
        )
        return Mask(where.reshape(-1, *cells), hidden, visible)


def hidden_tokens(tokens: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """The hidden ones of (b, n, d) tokens, one token to a cell: (b, m, d) and their weights (b, m).

    Where a mask knows its ids only those tokens are gathered; else all tokens come back and the weights tell.
    """
    if mask.hidden is None:
        return tokens, mask.where.flatten(1).to(tokens.dtype)
    index = mask.hidden.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, index), torch.ones_like(mask.hidden, dtype=tokens.dtype)


def hidden_voxels(mask: Mask, stride: int, size: tuple[int, ...]) -> Tensor:
    """(b, *size) bool: every cell repeated over its ``stride`` voxels per axis, cut to ``size``."""
    where = mask.where
    for axis in range(len(size)):
        where = where.repeat_interleave(stride, dim=axis + 1)
    return where[(..., *(slice(0, length) for length in size))]
