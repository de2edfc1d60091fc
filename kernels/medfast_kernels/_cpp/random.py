"""Draws in C++ as torch operators: fake implementations, and the way there from a checked call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import NAMESPACE
from .._dispatch import WHY_NO_CPP
from ..key import Key, address, signed

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


def _register() -> None:
    def fake(name: str, kernel) -> None:
        torch.library.register_fake(f"{NAMESPACE}::{name}", kernel)

    fake("philox_words", lambda counter, count, seed: counter.new_empty((counter.shape[0], count)))
    for name in ("random_uniform", "random_normal"):
        fake(name, lambda counter, count, seed: counter.new_empty((counter.shape[0], count), dtype=torch.float32))
    fake("random_ids", lambda counter, n, count, seed: counter.new_empty((counter.shape[0], count)))
    fake("random_keep", lambda counter, rate, seed: counter.new_empty(counter.shape[:1], dtype=torch.bool))


if WHY_NO_CPP is None:
    _register()
