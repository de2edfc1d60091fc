"""Arguments of attention masks, checked once for all backends, and the counts that follow from them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_device, floating, kind, number, one_of, with_samples, within
from .key import Key

HINT_MODES = ("random", "top")
ORDERS = ("high", "low")
_NAN_SEEN: dict[torch.device, Tensor] = {}


class Problem(NamedTuple):
    """One checked call.

    attention: (b, n), detached. low: the lowest are hidden, not the highest. count: how many are hidden before hints;
    top: how many of the most attended may be shown again; shown: how many of those are. count and shown are ints, or
    (b,) int64 where they differ by sample. key: draws which of them, with samples filled in; None where all are (or
    none). nan_seen: 0-dim bool to set if there is a NaN, which ranks last; None on a CPU, where NaN has been refused.
    """

    attention: Tensor
    low: bool
    count: int | Tensor
    top: int
    shown: int | Tensor
    key: Key | None
    nan_seen: Tensor | None

    @property
    def hidden(self) -> int | None:
        """Hidden tokens of each sample; None where samples differ."""
        if isinstance(self.count, Tensor) or isinstance(self.shown, Tensor):
            return None
        return self.count - self.shown


def nan_seen(device: torch.device | str) -> Tensor:
    """0-dim bool on ``device``: True once ``attention_mask`` met a NaN there.

    A GPU is not waited for, so NaN is noted here and not raised: read it where the host waits anyway, with a log line,
    and clear it with ``.zero_()``. On a CPU NaN is an error and this stays False.
    """
    device = torch.empty(0, device=device).device  # "cuda" names the current one
    if device not in _NAN_SEEN:
        _NAN_SEEN[device] = torch.zeros((), dtype=torch.bool, device=device)
    return _NAN_SEEN[device]


def check(
    attention: Tensor,
    ratio: float | Tensor,
    *,
    hint: float = 0.0,
    hint_mode: str = "random",
    order: str = "high",
    hint_ratio: float | Tensor | None = None,
    key: Key = Key(0),  # noqa: B008 - an immutable tuple
) -> Problem:
    """Refuse what no backend could mean, then work out the counts."""
    if not floating(attention):
        raise TypeError(f"attention must be a floating tensor, got {kind(attention)}")
    if attention.dim() != 2 or attention.shape[1] < 1:
        raise ValueError(f"attention must be (b, n) with n >= 1, got {tuple(attention.shape)}")
    one_of("hint_mode", hint_mode, HINT_MODES)
    one_of("order", order, ORDERS)
    _check_shares(attention, ratio, hint, hint_ratio, hint_mode, order)
    batch, n = attention.shape
    attention = within(attention.detach(), "attention", -math.inf, math.inf)
    ratio = within(ratio, "ratio", 0.0, 1.0)
    hint_ratio = within(hint_ratio, "hint_ratio", 0.0, 1.0)
    flag = None if attention.device.type == "cpu" else nan_seen(attention.device)
    count, top = _count(n, ratio), int(_count(n, hint))
    if not top or hint_mode == "top":
        return Problem(attention, order == "low", count, top, top, None, flag)
    shown = _count(n, hint, ratio if hint_ratio is None else hint_ratio)
    return Problem(attention, False, count, top, shown, with_samples(key, batch, attention.device), flag)


def _count(n: int, *shares: float | Tensor) -> int | Tensor:
    """floor of the product of the shares and n; (b,) int64 if one of them is a tensor.

    The slack is a few units of rounding of the type that the share came in: 0.29 stands for 29 / 100.
    """
    product: float | Tensor = float(n)
    eps = 2.0**-52
    for share in shares:
        if isinstance(share, Tensor):
            eps = max(eps, torch.finfo(share.dtype).eps)
            product = product * share.to(torch.float64)
        else:
            product = product * share
    slack = 2 * len(shares) * eps * n
    if isinstance(product, Tensor):
        return torch.floor(product + slack).clamp(max=n).to(torch.int64)
    return min(n, math.floor(product + slack))


def _check_shares(attention, ratio, hint, hint_ratio, hint_mode: str, order: str) -> None:
    for name, share in (("ratio", ratio), ("hint", hint), ("hint_ratio", hint_ratio)):
        if isinstance(share, Tensor) and name != "hint":
            if tuple(share.shape) != attention.shape[:1] or not floating(share):
                got = f"{share.dtype} {tuple(share.shape)}"
                raise ValueError(f"{name} must be a float or a floating ({len(attention)},) tensor, got {got}")
            if share.dtype not in (torch.float32, torch.float64):  # 16 bits do not tell 0.7 n from its neighbours
                raise TypeError(f"{name} must be a float, or a tensor of fp32 or fp64, got {share.dtype}")
            check_device(name, share, attention, "attention")
        elif not (share is None and name == "hint_ratio"):
            number(name, share)
    within(hint, "hint", 0.0, 1.0)
    if hint_ratio is not None and hint_mode == "top":
        raise ValueError('hint_ratio says how many of the top are drawn: it needs hint_mode="random", got "top"')
    if hint and order == "low":
        raise ValueError('hints show attended tokens again: they need order="high", got order="low"')
    if not isinstance(ratio, Tensor) and hint > ratio:
        raise ValueError(f"hint must be at most ratio, what is not hidden cannot be shown: got {hint} > {ratio}")
