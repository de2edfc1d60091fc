"""Attention masks in plain PyTorch: the definition that every other backend is held to. Nothing waits for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from .._masking import Problem, check
from ..key import Key, philox_words


def attention_mask(
    attention: Tensor,
    ratio: float | Tensor,
    *,
    hint: float = 0.0,
    hint_mode: str = "random",
    order: str = "high",
    hint_ratio: float | Tensor | None = None,
    key: Key = Key(0),  # noqa: B008 - an immutable tuple
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``medfast_kernels.attention_mask`` in plain PyTorch, whatever backend is asked for."""
    return mask(
        check(attention, ratio, hint=hint, hint_mode=hint_mode, order=order, hint_ratio=hint_ratio, key=key)
    )  # fmt: skip


def mask(problem: Problem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """where, hidden and visible; the last two None where counts differ by sample."""
    attention = problem.attention
    if problem.nan_seen is not None:
        problem.nan_seen.logical_or_(attention.isnan().any())
    signed = -attention if problem.low else attention
    rank = _rank(torch.where(signed.isnan(), -torch.inf, signed), descending=True)
    where = rank < _column(problem.count)
    if problem.top:
        where = where & ~_shown(problem, rank < problem.top)
    if problem.hidden is None:
        return where, None, None
    ids = torch.argsort(where.logical_not().to(torch.uint8), dim=1, stable=True)  # hidden first, both ascending
    return where, ids[:, : problem.hidden], ids[:, problem.hidden :]


def _shown(problem: Problem, top: Tensor) -> Tensor:
    """(b, n) bool: which of the most attended tokens, ``top``, are shown again."""
    if problem.key is None:
        return top
    words = philox_words(problem.key, top.shape[1], device=top.device)
    return _rank(torch.where(top, words, 1 << 32)) < _column(problem.shown)  # no word is as large


def _rank(values: Tensor, descending: bool = False) -> Tensor:
    """(b, n) int64, the place of each entry in its sorted row, the lowest index first among equals."""
    return torch.argsort(torch.argsort(values, dim=1, descending=descending, stable=True), dim=1)


def _column(count: int | Tensor) -> int | Tensor:
    return count[:, None] if isinstance(count, Tensor) else count
