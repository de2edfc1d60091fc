"""Draws from the one generator (see ``key``): its words, uniform and normal numbers, distinct ids, stochastic depth.

On ``device``, that of key.sample if None; b = len(key.sample). All raise ValueError for a key without samples and for
values out of range, TypeError for other kinds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._cpp import random as cpp
from ._dispatch import choose
from ._random import check_count, check_ids, check_rate, check_shape, device_of
from ._triton import random as triton
from .key import Key
from .reference import random as reference


def philox_words(key: Key, count: int, *, device: torch.device | None = None) -> Tensor:
    """The first ``count`` 32-bit numbers of each sample's draw, (b, count) int64 in [0, 2**32)."""
    check_count("count", count)
    run = {"reference": reference.philox_words, "cpp": cpp.philox_words, "triton": triton.philox_words}
    return run[choose("philox_words", device_of(key, device))](key, count, device=device)


def random_uniform(shape: tuple[int, ...] | int, *, key: Key, device: torch.device | None = None) -> Tensor:
    """(b, *shape) fp32 in [0, 1): the top 24 bits of each word. The same bits on every backend."""
    shape = check_shape(shape)
    run = {"reference": reference.random_uniform, "cpp": cpp.random_uniform, "triton": triton.random_uniform}
    return run[choose("random_uniform", device_of(key, device))](shape, key=key, device=device)


def random_normal(shape: tuple[int, ...] | int, *, key: Key, device: torch.device | None = None) -> Tensor:
    """(b, *shape) fp32 standard normal numbers (Box-Muller on words 2i and 2i + 1); backends agree within 1e-6."""
    shape = check_shape(shape)
    run = {"reference": reference.random_normal, "cpp": cpp.random_normal, "triton": triton.random_normal}
    return run[choose("random_normal", device_of(key, device))](shape, key=key, device=device)


def random_ids(n: int, count: int, *, key: Key, device: torch.device | None = None) -> Tensor:
    """(b, count) int64, ascending, distinct ids in [0, n): those with the smallest words, lowest first among equals."""
    check_ids(n, count)
    run = {"reference": reference.random_ids, "cpp": cpp.random_ids, "triton": triton.random_ids}
    return run[choose("random_ids", device_of(key, device))](n, count, key=key, device=device)


def random_keep(rate: float, *, key: Key, device: torch.device | None = None) -> Tensor:
    """(b,) bool for stochastic depth, False with probability ``rate``: where the sample's uniform number reaches it."""
    check_rate(rate)
    run = {"reference": reference.random_keep, "cpp": cpp.random_keep, "triton": triton.random_keep}
    return run[choose("random_keep", device_of(key, device))](rate, key=key, device=device)
