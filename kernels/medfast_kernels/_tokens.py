"""Arguments of dropping and restoring tokens, checked once for all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import INTEGER, check_beside, check_device, floating, kind, reads_values


class Drop(NamedTuple):
    """One checked call: x (b, n, d), ids (b, count) int64, distinct in [0, n), position (n, d) or None."""

    x: Tensor
    ids: Tensor
    position: Tensor | None


class Restore(NamedTuple):
    """One checked call: y (b, count, d), ids (b, count) int64, distinct in [0, n), fill (d,)."""

    y: Tensor
    ids: Tensor
    n: int
    fill: Tensor


def check_drop(x: Tensor, ids: Tensor, position: Tensor | None) -> Drop:
    _rows("x", x, "(b, n, d)")
    if position is not None:
        check_beside("position", position, (x.shape[1], x.shape[2]), x, "x")
    return Drop(x, _ids(ids, None, x.shape[1], x, "x"), position)


def check_restore(y: Tensor, ids: Tensor, n: int, fill: Tensor) -> Restore:
    _rows("y", y, "(b, count, d)")
    if not isinstance(n, INTEGER) or isinstance(n, bool):
        raise TypeError(f"n must be an int, the number of tokens of a sample, got {type(n).__name__}")
    if n < y.shape[1]:
        raise ValueError(f"n must be at least the {y.shape[1]} tokens that are kept, got {n}")
    check_beside("fill", fill, (y.shape[2],), y, "y")
    return Restore(y, _ids(ids, y.shape[1], n, y, "y"), n, fill)


def _rows(name: str, x: Tensor, shape: str) -> None:
    if not floating(x):
        raise TypeError(f"{name} must be a floating tensor, got {kind(x)}")
    if x.dim() != 3:
        raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")


def _ids(ids: Tensor, count: int | None, n: int, x: Tensor, of: str) -> Tensor:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise TypeError(f"ids must be an int64 tensor, got {kind(ids)}")
    check_device("ids", ids, x, of)
    if ids.dim() != 2 or ids.shape[0] != len(x) or (count is not None and ids.shape[1] != count):
        expected = f"({len(x)}, {'count' if count is None else count})"
        raise ValueError(f"ids must be (b, count) = {expected}, got {tuple(ids.shape)}")
    if ids.shape[1] > n:
        raise ValueError(f"ids must be distinct in [0, {n}), got {ids.shape[1]} of them")
    if ids.device.type != "cpu":  # elsewhere the answer would cost a synchronisation
        return ids
    return _distinct(ids, n)


@reads_values("distinct_ids(Tensor ids, int n) -> Tensor")
def _distinct(ids: Tensor, n: int) -> None:
    if ids.numel() == 0:
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= n:
        raise ValueError(f"ids must be in [0, n) = [0, {n}), got {low} to {high}")
    ascending = ids.shape[1] == 1 or bool((ids[:, 1:] > ids[:, :-1]).all())  # what masks and draws give
    if ascending:
        return
    seen = torch.zeros(ids.shape[0], n, dtype=torch.bool).scatter_(1, ids, True)
    if int(seen.sum()) != ids.numel():
        raise ValueError(f"ids must be distinct in every row: {ids.numel() - int(seen.sum())} are repeated")
