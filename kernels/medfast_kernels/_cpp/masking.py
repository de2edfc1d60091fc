"""Attention masks in C++ as a torch operator: fake implementation, and the way there from a checked call."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import NAMESPACE, wide
from .._masking import Problem
from ..key import address, signed
from .registration import register

_OPERATORS = getattr(torch.ops, NAMESPACE)


def mask(problem: Problem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """where, hidden and visible; the last two None where counts differ by sample."""
    attention, low, count, top, shown, key, _ = problem
    attention = attention.to(wide(attention.dtype))  # 16 bits keep their order and ties
    draw = None if key is None else address(key, attention.device)
    counts, count = (count, 0) if isinstance(count, Tensor) else (None, count)
    shown_counts, shown = (shown, 0) if isinstance(shown, Tensor) else (None, shown)
    where, hidden, visible = _OPERATORS.attention_mask(
        attention, low, count, counts, top, shown, shown_counts, draw, 0 if key is None else signed(key.seed)
    )
    return (where, None, None) if problem.hidden is None else (where, hidden, visible)


def _fake(attention, low, count, counts, top, shown, shown_counts, draw, seed):
    batch, n = attention.shape
    alike = counts is None and shown_counts is None
    return (
        attention.new_empty((batch, n), dtype=torch.bool),
        attention.new_empty((batch, count - shown if alike else 0), dtype=torch.int64),
        attention.new_empty((batch, n - count + shown if alike else 0), dtype=torch.int64),
    )


register("attention_mask", _fake, fp32=True)
