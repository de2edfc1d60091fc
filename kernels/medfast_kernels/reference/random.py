"""Draws in plain PyTorch: the definition. ``words`` gives the numbers they are made of, ``philox_words`` by default."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..key import Key, philox_words

_UNIT24 = 2.0**-24
Words = Callable[..., Tensor]


def random_uniform(
    shape: tuple[int, ...] | int, *, key: Key, device: torch.device | None = None, words: Words = philox_words
) -> Tensor:
    """``medfast_kernels.random_uniform``."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    drawn = words(key, math.prod(shape), device=device)
    return ((drawn >> 8).to(torch.float32) * _UNIT24).reshape(len(drawn), *shape)


def random_normal(
    shape: tuple[int, ...] | int, *, key: Key, device: torch.device | None = None, words: Words = philox_words
) -> Tensor:
    """``medfast_kernels.random_normal``."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count = math.prod(shape)
    drawn = words(key, count + count % 2, device=device)
    unit = (drawn >> 8).to(torch.float32) * _UNIT24
    radius = torch.sqrt(-2.0 * torch.log(unit[:, 0::2] + _UNIT24))  # (0, 1]: log never sees zero
    angle = 2.0 * math.pi * unit[:, 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.reshape(len(drawn), -1)[:, :count].reshape(len(drawn), *shape)


def random_ids(
    n: int, count: int, *, key: Key, device: torch.device | None = None, words: Words = philox_words
) -> Tensor:
    """``medfast_kernels.random_ids``."""
    if not 0 <= count <= n:
        raise ValueError(f"count must be in [0, n] = [0, {n}], got {count}")
    drawn = words(key, n, device=device)
    order = torch.argsort(drawn, dim=1, stable=True)
    return order[:, :count].sort(dim=1).values


def random_keep(rate: float, *, key: Key, device: torch.device | None = None, words: Words = philox_words) -> Tensor:
    """``medfast_kernels.random_keep``."""
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate is the probability of dropping, in [0, 1], got {rate}")
    return random_uniform(1, key=key, device=device, words=words)[:, 0] >= rate
