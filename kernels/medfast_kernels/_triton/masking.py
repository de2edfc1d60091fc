"""Attention masks as one Triton operator: one launch for a batch, without waiting for the host."""

from __future__ import annotations

import torch
from torch import Tensor

from .._masking import Problem
from ..key import address, signed
from .random import tile, warps
from .registration import operator


def mask(problem: Problem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """where, hidden and visible; the last two None where counts differ by sample."""
    attention, key = problem.attention, problem.key
    hints = "none" if not problem.top else "top" if key is None else "random"
    counts, count = _split(problem.count)
    shown_counts, shown = _split(problem.shown)
    where, hidden, visible = _mask(
        attention, problem.nan_seen, counts, shown_counts, None if key is None else address(key, attention.device),
        count, problem.top, shown, hints, problem.low, 0 if key is None else signed(key.seed),
    )  # fmt: skip
    return (where, None, None) if problem.hidden is None else (where, hidden, visible)


def _split(count: int | Tensor) -> tuple[Tensor | None, int]:
    return (count, 0) if isinstance(count, Tensor) else (None, count)


def _launch(
    attention: Tensor, nan_seen: Tensor | None, counts: Tensor | None, shown_counts: Tensor | None,
    counter: Tensor | None, count: int, top: int, shown: int, hints: str, low: bool, seed: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from . import masking_kernels as kernels

    out = _fake(attention, nan_seen, counts, shown_counts, counter, count, top, shown, hints, low, seed)
    batch, n = attention.shape
    if not out[0].numel():
        return out
    attention = attention if attention.stride(1) == 1 else attention.contiguous()
    codes, words = (attention.new_empty((batch, size), dtype=torch.int32) for size in (n, top))
    kernels.mask[(batch,)](
        attention, *out, nan_seen, codes, words, counts, shown_counts, counter, seed, attention.stride(0), n, count,
        top, shown, low, hints, tile(n), num_warps=warps(n),
    )  # fmt: skip
    return out


def _fake(attention, nan_seen, counts, shown_counts, counter, count, top, shown, hints, low, seed):
    batch, n = attention.shape
    same = counts is None and shown_counts is None
    return (
        attention.new_empty((batch, n), dtype=torch.bool),
        attention.new_empty((batch, count - shown if same else 0), dtype=torch.int64),
        attention.new_empty((batch, n - count + shown if same else 0), dtype=torch.int64),
    )


_mask = operator(
    "attention_mask_triton",
    "(Tensor attention, Tensor(a!)? nan_seen, Tensor? counts, Tensor? shown_counts, Tensor? counter, SymInt count, "
    "SymInt top, SymInt shown, str hints, bool low, int seed) -> (Tensor, Tensor, Tensor)",
    _launch,
    _fake,
)
