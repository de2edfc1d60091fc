"""Maskers: which cells of a volume are hidden. Exact counts, drawn from the batch's key and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import medfast_kernels as mk
from medfast.objectives.patches import Stride, per_axis
from medfast.types import Key, Mask, Masker

_ROUNDINGS = {"ceil": math.ceil, "floor": math.floor}


def share(name: str, value: float) -> float:
    """``value`` as a float, or ValueError where it is no share."""
    if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is a share, in [0, 1], got {value!r}")
    return float(value)


def ratio_range(ratio: float | Sequence[float]) -> tuple[float, float]:
    """Lowest and highest share of hidden cells of a ratio that is a number or [low, high], checked."""
    low, high = (ratio, ratio) if isinstance(ratio, int | float) else ratio
    if share("ratio", low) > share("ratio", high):
        raise ValueError(f"ratio is a number or [low, high] with low <= high, got {ratio!r}")
    return float(low), float(high)


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
    even = True

    def __init__(self, ratio: float = 0.7, rounding: str = "ceil"):
        if rounding not in _ROUNDINGS:
            raise ValueError(f"rounding must be one of {sorted(_ROUNDINGS)}, got {rounding!r}")
        self.ratio, self.rounding = share("ratio", ratio), rounding

    def __call__(self, cells: tuple[int, ...], key: Key, attention: Tensor | None = None) -> Mask:
        count = count_of(self.ratio, math.prod(cells), self.rounding)
        return random_cells(cells, count, key.at(mk.Role.MASK))


class AttentionMask:
    """The int(ratio n) most attended cells, some of them shown again as hints (SMART III.B, AttMask).

    ratio: share of cells, or [low, high], from which every step draws one for its whole batch. masked: probability that
    a sample is masked at all, its own coin for each view (AttMask: ratio [.1, .5], masked .5). hint: share of all cells
    whose best are hint candidates. hint_mode: "top" shows all int(hint n) of them (the paper's sentence: 307 of 512
    stay hidden), "random" shows int(hint ratio' n) of them at random (AttMask and the author's code: 323 of 512);
    ratio' is the ratio, or, where that is drawn, a draw of its own. order: "high", or "low" for the least attended
    (AttMask-Low), which takes no hints.
    """

    guided = True

    def __init__(
        self,
        ratio: float | tuple[float, float] = 0.7,
        hint: float = 0.1,
        hint_mode: str = "top",
        order: str = "high",
        masked: float = 1.0,
    ):
        self.low, self.high = ratio_range(ratio)
        self.hint, self.masked = share("hint", hint), share("masked", masked)
        if hint > self.low:
            raise ValueError(f"hints are taken from the hidden cells: hint must be at most ratio = {ratio}, got {hint}")
        if hint_mode not in ("top", "random") or order not in ("high", "low"):
            raise ValueError(
                f'hint_mode must be "top" or "random" and order "high" or "low", got {hint_mode!r} and {order!r}'
            )
        if order == "low" and hint:
            raise ValueError('order="low" hides the least attended cells and takes no hints: set hint to 0')
        self.hint_mode, self.order = hint_mode, order

    @property
    def even(self) -> bool:
        """Whether all samples hide equally many cells, so that a mask knows its ids."""
        return self.low == self.high and self.masked == 1.0

    def __call__(self, cells: tuple[int, ...], key: Key, attention: Tensor | None = None) -> Mask:
        if attention is None or attention.shape[1] != math.prod(cells):
            given = "none" if attention is None else f"{attention.shape[1]} values"
            raise ValueError(f"AttentionMask needs one attention value for each of the {cells} cells, got {given}")
        ratio, hint_ratio = (self.low, None) if self.even else self._drawn(key, attention)
        where, hidden, visible = mk.attention_mask(
            attention, ratio, hint=self.hint, hint_mode=self.hint_mode, order=self.order, hint_ratio=hint_ratio,
            key=key.at(mk.Role.HINTS),
        )  # fmt: skip
        return Mask(where.reshape(-1, *cells), hidden, visible)

    def _drawn(self, key: Key, attention: Tensor) -> tuple[Tensor, Tensor | None]:
        """Each sample's share of hidden cells, 0 where it is left whole, and the share of its hints, (b,) both."""
        b, device = len(attention), attention.device
        # one address for all samples, views and ranks: the step's own two numbers
        step = Key(key.seed, key.step, torch.zeros(1, dtype=torch.int64, device=device)).at(mk.Role.MASK, layer=1)
        drawn = self.low + (self.high - self.low) * mk.random_uniform(2, key=step, device=device)[0].double()
        coin = mk.random_uniform(1, key=key.at(mk.Role.MASK, layer=2), device=device)[:, 0]
        ratio = drawn[0].expand(b) * (coin < self.masked)
        return ratio, drawn[1].expand(b) if self.hint and self.hint_mode == "random" else None


def hidden_tokens(tokens: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """The hidden ones of (b, n, d) tokens, one token to a cell: (b, m, d) and their weights (b, m).

    Where a mask knows its ids only those tokens are gathered; else all tokens come back and the weights tell.
    """
    if mask.hidden is None:
        return tokens, mask.where.flatten(1).to(tokens.dtype)
    index = mask.hidden.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, index), torch.ones_like(mask.hidden, dtype=tokens.dtype)


def hidden_rows(tokens: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """The hidden ones of (b, n, d) tokens as (rows, d), and of which of the b each is, (rows,). Waits for it."""
    picked, weight = hidden_tokens(tokens, mask)
    known = weight.bool()
    return picked[known], known.nonzero()[:, 0]


def drawn_ahead(mask: Masker, cells: tuple[int, ...]) -> dict[str, Callable[[Key], Tensor]]:
    """``Objective.ahead`` of an objective with this masker: masks whose counts only their draw knows are drawn on the
    host by the data pipeline, as ``targets["mask"]``. {} for others, and for those that attention guides."""
    if getattr(mask, "even", True) or getattr(mask, "guided", False):
        return {}
    return {"mask": lambda key: mask(cells, key).where}


def with_ids(mask: Mask) -> Mask:
    """The mask with the ids that ``where`` implies. Waits for the device: for validation and reports, not for training.

    ValueError where samples hide different numbers of cells.
    """
    if mask.hidden is not None and mask.visible is not None:
        return mask
    counts = mask.where.flatten(1).sum(dim=1).tolist()
    if len(set(counts)) != 1:
        raise ValueError(f"all samples must hide equally many cells here, these hide {counts}")
    order = mask.where.flatten(1).to(torch.uint8).argsort(dim=1, stable=True)
    kept = order.shape[1] - counts[0]
    return Mask(mask.where, order[:, kept:], order[:, :kept])


def hidden_voxels(mask: Mask, stride: Stride, size: tuple[int, ...]) -> Tensor:
    """(b, *size) bool: every cell repeated over its ``stride`` voxels per axis, cut to ``size``."""
    where = mask.where
    for axis, repeats in enumerate(per_axis(stride, len(size)), start=1):
        where = where.repeat_interleave(repeats, dim=axis)
    return where[(..., *(slice(0, length) for length in size))]
