"""In which order the volumes of a split come: a permutation an epoch, or draws in proportion to weights.

Both are pure functions of (seed, epoch), so sample number n has its volume whatever was drawn before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

import medfast_kernels as mk
from medfast_kernels import Key, Role

__all__ = ["volumes"]

_OFFSET, _SHUFFLE = 2, 4  # layers of the role VOLUME above those of the splits


def volumes(
    seed: int, number: np.ndarray, count: int, stream: int, chances: Sequence[float] | None = None,
    shuffle: bool = True,
) -> np.ndarray:  # fmt: skip
    """Volume, in [0, count), of each sample ``number`` (b,) int64.

    Without chances every volume comes once an epoch of ``count`` samples: permuted, or in order without shuffle. With
    them (count,), that add up to 1, volume i comes floor or ceil of count * chances[i] times an epoch, and exactly
    count * chances[i] times on average.
    """
    if chances is None and not shuffle:
        return number % count
    epoch, place = np.divmod(number, count)
    result = np.empty_like(number)
    weights = None if chances is None else tuple(chances)
    for e in np.unique(epoch):
        result[epoch == e] = _order(seed, int(e), count, stream, weights)[place[epoch == e]]
    return result


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int, stream: int, chances: tuple[float, ...] | None) -> np.ndarray:
    order = _permutation(seed, epoch, count, stream)
    if chances is None:
        return order
    # systematic sampling: equally spaced points, shifted together, on the volumes' shares laid end to end
    ends = np.cumsum(np.array(chances)[order])
    shift = float(_uniform(seed, epoch, 1, stream + _OFFSET)[0])
    points = (np.arange(count) + shift) / count * ends[-1]
    drawn = order[np.minimum(np.searchsorted(ends, points, side="right"), count - 1)]
    return drawn[_permutation(seed, epoch, count, stream + _SHUFFLE)]


def _permutation(seed: int, epoch: int, count: int, layer: int) -> np.ndarray:
    return torch.argsort(_uniform(seed, epoch, count, layer), stable=True).numpy()


def _uniform(seed: int, epoch: int, count: int, layer: int) -> torch.Tensor:
    key = Key(seed, epoch, torch.zeros(1, dtype=torch.int64)).at(Role.VOLUME, layer=layer)
    return mk.random_uniform(count, key=key)[0]
