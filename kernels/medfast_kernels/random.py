"""Draws from the one generator (see ``key``): its words, uniform and normal numbers, distinct ids, stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor

from . import key as definition
from ._checks import NAMESPACE
from ._dispatch import WHY_NO_CPP, choose
from .key import Key, address, signed
from .reference import random as reference

_OPERATORS = getattr(torch.ops, NAMESPACE)


def philox_words(key: Key, count: int, *, device: torch.device | None = None) -> Tensor:
    """The first ``count`` 32-bit numbers of each sample's draw, (b, count) int64 in [0, 2**32).

    Here and below: on ``device``, that of key.sample if None; b = len(key.sample). Raises ValueError for a key without
    samples.
    """
    counter = address(key, device)
    if choose("philox_words", counter.device) == "cpp":
        return _OPERATORS.philox_words(counter, count, signed(key.seed))
    return definition.philox_words(key, count, device=device)


def random_uniform(shape: tuple[int, ...] | int, *, key: Key, device: torch.device | None = None) -> Tensor:
    """(b, *shape) fp32 in [0, 1): the top 24 bits of each word. The same bits on every backend."""
    return reference.random_uniform(shape, key=key, device=device, words=philox_words)


def random_normal(shape: tuple[int, ...] | int, *, key: Key, device: torch.device | None = None) -> Tensor:
    """(b, *shape) fp32 standard normal numbers (Box-Muller on words 2i and 2i + 1); devices agree within 1e-6."""
    return reference.random_normal(shape, key=key, device=device, words=philox_words)


def random_ids(n: int, count: int, *, key: Key, device: torch.device | None = None) -> Tensor:
    """(b, count) int64, ascending, distinct ids in [0, n): those with the smallest words, lowest first among equals."""
    return reference.random_ids(n, count, key=key, device=device, words=philox_words)


def random_keep(rate: float, *, key: Key, device: torch.device | None = None) -> Tensor:
    """(b,) bool for stochastic depth, False with probability ``rate``."""
    return reference.random_keep(rate, key=key, device=device, words=philox_words)


def _fake(counter: Tensor, count: int, seed: int) -> Tensor:
    return counter.new_empty((counter.shape[0], count))


if WHY_NO_CPP is None:
    torch.library.register_fake(f"{NAMESPACE}::philox_words", _fake)
