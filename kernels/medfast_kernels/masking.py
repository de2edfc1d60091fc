"""Masks from attention: hide what is attended most, show some of it again as hints.

AttMask (Kakogeorgiou et al., ECCV 2022, sec. 3.2), SMART's student mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._checks import one_of, with_samples, within
from .key import Key, philox_words
from .reference.random import random_ids

HINT_MODES = ("random", "top")
ORDERS = ("high", "low")


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
    """Hide the most attended tokens of every sample.

    attention: (b, n) floating. Hides the int(ratio * n) highest entries (``order="low"``: lowest), the lowest index
    first among equals; then of the top int(hint * n) shows again int(hint * hint_ratio * n) at random, each sample its
    own (``hint_mode="random"``), or all of them ("top"). hint_ratio: ratio if None. Counts are those of exact
    arithmetic: 0.29 of 100 is 29, though 0.29 * 100 < 29 in floating point. ``key`` draws the hints; its samples are 0,
    1, ... if it has none.

    ratio and hint_ratio may be (b,) floating tensors, one share per sample; 0 leaves a sample whole.

    Returns where (b, n) bool, True = hidden, and hidden and visible, (b, count) ascending int64 ids, or None and None
    if ratio or hint_ratio is a tensor, since counts then differ between samples.

    Raises ValueError for shares outside [0, 1], hints with order="low", hint > ratio, and, on a CPU, NaN in attention
    (on a GPU NaN ranks last); TypeError for what is no floating tensor.
    """
    _check(attention, ratio, hint, hint_ratio, hint_mode, order)
    batch, n = attention.shape
    attention = attention.detach()
    attention = within(attention, "attention", -math.inf, math.inf)
    ratio = within(ratio, "ratio", 0.0, 1.0)
    hint_ratio = within(hint_ratio, "hint_ratio", 0.0, 1.0)
    signed = attention if order == "high" else -attention
    ranked = torch.argsort(torch.where(signed.isnan(), -torch.inf, signed), dim=1, descending=True, stable=True)
    rank = torch.argsort(ranked, dim=1)  # rank[b, token]: 0 is hidden first
    where = rank < _count(n, ratio)
    top = int(_count(n, hint))
    share = ratio if hint_ratio is None else hint_ratio
    if top:
        where = where & ~torch.gather(_reopened(n, top, hint, hint_mode, share, key, attention), 1, rank)
    if isinstance(ratio, Tensor) or (isinstance(hint_ratio, Tensor) and top):
        return where, None, None
    shown = 0 if not top else top if hint_mode == "top" else int(_count(n, hint, share))
    hidden = int(_count(n, ratio)) - shown
    ids = torch.argsort(where.logical_not().to(torch.uint8), dim=1, stable=True)  # hidden first, both ascending
    return where, ids[:, :hidden], ids[:, hidden:]


def _reopened(n: int, top: int, hint: float, mode: str, share: float | Tensor, key: Key, like: Tensor) -> Tensor:
    """(b, n) bool over ranks: which of the ``top`` first are shown again."""
    ranks = torch.arange(n, device=like.device).expand(len(like), n)
    if mode == "top":
        return ranks < top
    key = with_samples(key, len(like), like.device)
    if isinstance(share, Tensor):
        lot = torch.argsort(torch.argsort(philox_words(key, top, device=like.device), dim=1, stable=True), dim=1)
        drawn = lot < _count(n, hint, share)
        return torch.cat((drawn, torch.zeros_like(ranks[:, top:], dtype=torch.bool)), dim=1)
    drawn = random_ids(top, int(_count(n, hint, share)), key=key, device=like.device)
    return torch.zeros_like(ranks, dtype=torch.bool).scatter(1, drawn, True)


def _count(n: int, *shares: float | Tensor) -> int | Tensor:
    """floor of the product of the shares and n; (b, 1) if one of them is a tensor.

    The slack is a few units of rounding of the type that the share came in: 0.29 stands for 29 / 100.
    """
    product: float | Tensor = float(n)
    eps = 2.0**-52
    for share in shares:
        if isinstance(share, Tensor):
            eps = max(eps, torch.finfo(share.dtype).eps)
            product = product * share.to(torch.float64).reshape(-1, 1)
        else:
            product = product * share
    slack = 2 * len(shares) * eps * n
    if isinstance(product, Tensor):
        return torch.floor(product + slack).clamp(max=n).to(torch.int64)
    return min(n, math.floor(product + slack))


def _check(attention, ratio, hint, hint_ratio, hint_mode: str, order: str) -> None:
    if not isinstance(attention, Tensor) or not attention.is_floating_point():
        raise TypeError(
            f"attention must be a floating tensor, got {getattr(attention, 'dtype', type(attention).__name__)}"
        )
    if attention.dim() != 2 or attention.shape[1] < 1:
        raise ValueError(f"attention must be (b, n) with n >= 1, got {tuple(attention.shape)}")
    one_of("hint_mode", hint_mode, HINT_MODES)
    one_of("order", order, ORDERS)
    for name, share in (("ratio", ratio), ("hint", hint), ("hint_ratio", hint_ratio)):
        if isinstance(share, Tensor) and name != "hint":
            if tuple(share.shape) != attention.shape[:1] or not share.is_floating_point():
                got = f"{share.dtype} {tuple(share.shape)}"
                raise ValueError(f"{name} must be a float or a floating ({len(attention)},) tensor, got {got}")
        elif share is not None and not isinstance(share, (int, float)):
            raise TypeError(f"{name} must be a float, got {type(share).__name__}")
    within(hint, "hint", 0.0, 1.0)
    if hint_ratio is not None and hint_mode == "top":
        raise ValueError('hint_ratio says how many of the top are drawn: it needs hint_mode="random", got "top"')
    if hint and order == "low":
        raise ValueError('hints show attended tokens again: they need order="high", got order="low"')
    if not isinstance(ratio, Tensor) and hint > ratio:
        raise ValueError(f"hint must be at most ratio, what is not hidden cannot be shown: got {hint} > {ratio}")
