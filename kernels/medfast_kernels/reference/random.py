"""Draws in plain PyTorch: the definition that every other backend is held to. Nothing waits for a device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import key as generator
from .._checks import check_key
from .._random import check_count, check_ids, check_rate, check_shape
from ..key import Key

_UNIT24 = 2.0**-24


def philox_words(key: Key, count: int, *, device: torch.device | None = None) -> Tensor:
    """``medfast_kernels.philox_words`` in plain PyTorch, whatever backend is asked for."""
    check_count("count", count)
    check_key(key)
    return generator.philox_words(key, count, device=device)


def random_uniform(shape: tuple[int, ...] | int, *, key: Key, device: torch.device | None = None) -> Tensor:
    """``medfast_kernels.random_uniform`` in plain PyTorch, whatever backend is asked for."""
    shape = check_shape(shape)
    words = philox_words(key, math.prod(shape), device=device)
    return _unit(words).reshape(len(words), *shape)


def random_normal(shape: tuple[int, ...] | int, *, key: Key, device: torch.device | None = None) -> Tensor:
    """``medfast_kernels.random_normal`` in plain PyTorch, whatever backend is asked for."""
    shape = check_shape(shape)
    count = math.prod(shape)
    unit = _unit(philox_words(key, count + count % 2, device=device))
    radius = torch.sqrt(-2.0 * torch.log(unit[:, 0::2] + _UNIT24))  # (0, 1]: log never sees zero
    angle = 2.0 * math.pi * unit[:, 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(1)[:, :count].reshape(len(unit), *shape)


def random_ids(n: int, count: int, *, key: Key, device: torch.device | None = None) -> Tensor:
    """``medfast_kernels.random_ids`` in plain PyTorch, whatever backend is asked for."""
    check_ids(n, count)
    order = torch.argsort(philox_words(key, n, device=device), dim=1, stable=True)
    return order[:, :count].sort(dim=1).values


def random_keep(rate: float, *, key: Key, device: torch.device | None = None) -> Tensor:
    """``medfast_kernels.random_keep`` in plain PyTorch, whatever backend is asked for."""
    check_rate(rate)
    return random_uniform(1, key=key, device=device)[:, 0] >= rate


def _unit(words: Tensor) -> Tensor:
    """Uniform in [0, 1): the top 24 bits, which fp32 holds exactly."""
    return (words >> 8).to(torch.float32) * _UNIT24
