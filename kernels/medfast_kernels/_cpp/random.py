"""Draws in C++ as torch operators: fake implementations, and the way there from a checked call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import NAMESPACE
from ..key import Key, address, signed
from .registration import register

_OPERATORS = getattr(torch.ops, NAMESPACE)


def philox_words(key: Key, count: int, *, device: torch.device | None = None) -> Tensor:
    return _OPERATORS.philox_words(address(key, device), count, signed(key.seed))


def random_uniform(shape: tuple[int, ...], *, key: Key, device: torch.device | None = None) -> Tensor:
    drawn = _OPERATORS.random_uniform(address(key, device), math.prod(shape), signed(key.seed))
    return drawn.reshape(len(drawn), *shape)


def random_normal(shape: tuple[int, ...], *, key: Key, device: torch.device | None = None) -> Tensor:
    drawn = _OPERATORS.random_normal(address(key, device), math.prod(shape), signed(key.seed))
    return drawn.reshape(len(drawn), *shape)


def random_ids(n: int, count: int, *, key: Key, device: torch.device | None = None) -> Tensor:
    return _OPERATORS.random_ids(address(key, device), n, count, signed(key.seed))


def random_keep(rate: float, *, key: Key, device: torch.device | None = None) -> Tensor:
    return _OPERATORS.random_keep(address(key, device), rate, signed(key.seed))


def _fake(dtype: torch.dtype):
    return lambda counter, count, seed: counter.new_empty((counter.shape[0], count), dtype=dtype)


register("philox_words", _fake(torch.int64))
register("random_uniform", _fake(torch.float32))
register("random_normal", _fake(torch.float32))
register("random_ids", lambda counter, n, count, seed: counter.new_empty((counter.shape[0], count)))
register("random_keep", lambda counter, rate, seed: counter.new_empty(counter.shape[:1], dtype=torch.bool))
