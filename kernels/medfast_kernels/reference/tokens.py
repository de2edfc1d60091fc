"""Dropping and restoring tokens in plain PyTorch: the definition that every other backend is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import wide
from .._tokens import Drop, Restore, check_drop, check_restore


def drop_tokens(x: Tensor, ids: Tensor, position: Tensor | None = None) -> Tensor:
    """``medfast_kernels.drop_tokens`` in plain PyTorch, whatever backend is asked for."""
    return drop(check_drop(x, ids, position))


def restore_tokens(y: Tensor, ids: Tensor, n: int, fill: Tensor) -> Tensor:
    """``medfast_kernels.restore_tokens`` in plain PyTorch, whatever backend is asked for."""
    return restore(check_restore(y, ids, n, fill))


def drop(problem: Drop) -> Tensor:
    x, ids, position = problem
    if position is not None:
        x = (x.to(wide(x.dtype)) + position.to(wide(x.dtype))).to(x.dtype)
    return torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[2]))


def restore(problem: Restore) -> Tensor:
    y, ids, n, fill = problem
    places = fill.to(wide(y.dtype)).expand(y.shape[0], n, y.shape[2]).to(y.dtype)
    return places.scatter(1, ids[..., None].expand(-1, -1, y.shape[2]), y)
