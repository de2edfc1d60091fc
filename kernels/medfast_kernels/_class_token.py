"""Arguments of class attention, checked once for all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import floating, kind, number, wide


class Problem(NamedTuple):
    """One checked call: q (b, heads, dim), k and v (b, 1 + n, heads, dim) as given. dtype: what it is computed in."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    dtype: torch.dtype


def check(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Problem:
    """Refuse what no backend could mean."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not floating(x):
            raise TypeError(f"{name} must be a floating tensor, got {kind(x)}")
    if q.dim() != 3 or k.dim() != 4 or k.shape != v.shape or q.shape != (k.shape[0], *k.shape[2:]) or k.shape[1] < 2:
        raise ValueError(
            "q must be (b, heads, dim) and k, v (b, 1 + n, heads, dim) with n >= 1, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if q.shape[1] < 1 or q.shape[2] < 1:
        raise ValueError(f"q needs at least one head and channel, got {tuple(q.shape)}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    dtypes = {wide(x.dtype) for x in (q, k, v)}
    if len(dtypes) > 1:
        raise ValueError(f"q, k and v must all be fp64 or none, got {q.dtype}, {k.dtype} and {v.dtype}")
    if scale is not None:
        number("scale", scale)
    return Problem(q, k, v, q.shape[2] ** -0.5 if scale is None else float(scale), dtypes.pop())
