"""Attention masks in CUDA C++: one launch for a batch, without waiting for the host."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import NAMESPACE
from .._dispatch import built_with_cuda
from .._masking import Problem
from ..key import address, signed


def unfit(problem: Problem) -> dict[str, str]:
    """For ``choose``: why there is no kernel for this call, if so."""
    return {"cuda": "it ranks in fp32, attention is torch.float64"} if problem.attention.dtype == torch.float64 else {}


def mask(problem: Problem, namespace: str = NAMESPACE) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """where, hidden and visible; the last two None where counts differ by sample."""
    attention, key = problem.attention, problem.key
    counts, count = _split(problem.count)
    shown_counts, shown = _split(problem.shown)
    where, hidden, visible = getattr(torch.ops, namespace).attention_mask_cuda(
        attention.float(), problem.nan_seen, counts, shown_counts,
        None if key is None else address(key, attention.device), count, problem.top, shown, problem.low,
        0 if key is None else signed(key.seed),
    )  # fmt: skip
    return (where, None, None) if problem.hidden is None else (where, hidden, visible)


def _split(count: int | Tensor) -> tuple[Tensor | None, int]:
    return (count, 0) if isinstance(count, Tensor) else (None, count)


def _fake(attention, nan_seen, counts, shown_counts, draw, count, top, shown, low, seed):
    batch, n = attention.shape
    same = counts is None and shown_counts is None
    return (
        attention.new_empty((batch, n), dtype=torch.bool),
        attention.new_empty((batch, count - shown if same else 0), dtype=torch.int64),
        attention.new_empty((batch, n - count + shown if same else 0), dtype=torch.int64),
    )


def register(namespace: str) -> None:
    """Fake implementation of the operator under torch.ops.``namespace``."""
    torch.library.register_fake(f"{namespace}::attention_mask_cuda", _fake)


if built_with_cuda():
    register(NAMESPACE)
