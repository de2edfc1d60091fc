"""Draws from the one generator (see ``key``): uniform and normal numbers, distinct token ids, stochastic depth."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .key import Key, philox_words

_UNIT24 = 2.0**-24


def random_uniform(shape: tuple[int, ...] | int, *, key: Key, device: torch.device | None = None) -> Tensor:
    """(b, *shape) fp32 in [0, 1): the top 24 bits of each word. The same bits on every backend."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    words = philox_words(key, math.prod(shape), device=device)
    return ((words >> 8).to(torch.float32) * _UNIT24).reshape(len(words), *shape)


def random_normal(shape: tuple[int, ...] | int, *, key: Key, device: torch.device | None = None) -> Tensor:
    """(b, *shape) fp32 standard normal numbers (Box-Muller on words 2i and 2i + 1); backends agree within 1e-6."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count = math.prod(shape)
    words = philox_words(key, count + count % 2, device=device)
    unit = (words >> 8).to(torch.float32) * _UNIT24
    radius = torch.sqrt(-2.0 * torch.log(unit[:, 0::2] + _UNIT24))  # (0, 1]: log never sees zero
    angle = 2.0 * math.pi * unit[:, 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.reshape(len(words), -1)[:, :count].reshape(len(words), *shape)


def random_ids(n: int, count: int, *, key: Key, device: torch.device | None = None) -> Tensor:
    """(b, count) int64, ascending, distinct ids in [0, n): those with the smallest words, lowest first among equals."""
    if not 0 <= count <= n:
        raise ValueError(f"count must be in [0, n] = [0, {n}], got {count}")
    words = philox_words(key, n, device=device)
    order = torch.argsort(words, dim=1, stable=True)
    return order[:, :count].sort(dim=1).values


def random_keep(rate: float, *, key: Key, device: torch.device | None = None) -> Tensor:
    """(b,) bool for stochastic depth, False with probability ``rate``."""
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate is the probability of dropping, in [0, 1], got {rate}")
    return random_uniform(1, key=key, device=device)[:, 0] >= rate
