"""Arguments of dropping and restoring tokens, checked once for all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import INTEGER, reads_values


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


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are made in: fp32 for 16 bits."""
    return torch.promote_types(dtype, torch.float32)


def check_drop(x: Tensor, ids: Tensor, position: Tensor | None) -> Drop:
    _rows("x", x, "(b, n, d)")
    _same("ids", ids, x, "x")
    if position is not None:
        _beside("position", position, (x.shape[1], x.shape[2]), x, "x")
    return Drop(x, _ids(ids, x.shape[0], None, x.shape[1]), position)


def check_restore(y: Tensor, ids: Tensor, n: int, fill: Tensor) -> Restore:
    _rows("y", y, "(b, count, d)")
    if not isinstance(n, INTEGER) or isinstance(n, bool):
        raise TypeError(f"n must be an int, the number of tokens of a sample, got {type(n).__name__}")
    if n < y.shape[1]:
        raise ValueError(f"n must be at least the {y.shape[1]} tokens that are kept, got {n}")
    _same("ids", ids, y, "y")
    _beside("fill", fill, (y.shape[2],), y, "y")
    return Restore(y, _ids(ids, y.shape[0], y.shape[1], n), n, fill)


def _rows(name: str, x: Tensor, shape: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() != 3:
        raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")


def _same(name: str, value: Tensor, x: Tensor, of: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of {of}, {x.device}, got {value.device}")


def _beside(name: str, value: Tensor, shape: tuple[int, ...], x: Tensor, of: str) -> None:
    _same(name, value, x, of)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if wide(value.dtype) != wide(x.dtype):
        raise ValueError(
            f"{name} must be {x.dtype} as {of} is, or fp32 where {of} has 16 bits, or 16 bits where {of} is fp32; "
            f"got {value.dtype}"
        )


def _ids(ids: Tensor, batch: int, count: int | None, n: int) -> Tensor:
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if ids.dim() != 2 or ids.shape[0] != batch or (count is not None and ids.shape[1] != count):
        expected = f"({batch}, {'count' if count is None else count})"
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
