"""Blockwise masks in 3D: boxes until the wanted share is covered, as BEiT and iBOT hide images, with a depth added.

How many boxes a sample takes is known only when they are drawn, so this is done on the host: the data pipeline draws
the masks ahead of time and hands them over in ``Batch.targets["mask"]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import medfast_kernels as mk
from medfast.objectives.masking import ratio_range, share
from medfast.types import Key, Mask

TRIES = 10  # for one box; a sample is done when so many in a row add nothing
_RATIO_LAYER = 1  # of the role MASK; the boxes have layer 0
_AT_ONCE = 64  # boxes drawn at a time; more are the same draw, made longer


class BlockMask:
    """Random boxes of cells, at most int(ratio n) of them hidden (BEiT, Bao et al. 2022; iBOT, Zhou et al. 2022).

    ratio: share of cells to hide, or [low, high], from which each sample and view draws its own. masked: probability
    that a sample is masked at all. aspect: smallest and largest height and width of a box over its depth, drawn
    log-uniformly. Counts differ between samples, so the mask has no ids.

    Drawn in ``forward`` instead of ahead, it gives the same masks, and waits for the device.
    """

    guided = False
    even = False  # samples hide different numbers of cells

    def __init__(
        self,
        ratio: float | tuple[float, float] = 0.3,
        masked: float = 1.0,
        aspect: tuple[float, float] = (0.3, 1.0 / 0.3),
    ):
        self.low, self.high = ratio_range(ratio)
        self.masked = share("masked", masked)
        if len(aspect) != 2 or not 0.0 < aspect[0] <= aspect[1]:
            raise ValueError(f"aspect is [smallest, largest] with 0 < smallest <= largest, got {aspect!r}")
        self.aspect = float(aspect[0]), float(aspect[1])

    def __call__(self, cells: tuple[int, ...], key: Key, attention: Tensor | None = None) -> Mask:
        if key.sample is None:
            raise ValueError("BlockMask needs key.sample, the global slot of each sample; it is None")
        count, step = len(key.sample), int(key.step)
        samples = key.sample.cpu()
        streams = torch.as_tensor(key.stream).cpu().expand(count)
        rows = [
            self._sample(tuple(cells), Key(key.seed, step, samples[i : i + 1], streams[i : i + 1]))
            for i in range(count)
        ]
        return Mask(torch.from_numpy(np.stack(rows)).to(key.sample.device))

    def _sample(self, cells: tuple[int, ...], key: Key) -> np.ndarray:
        """(*cells) bool of one sample."""
        where = np.zeros(cells, dtype=bool)
        coin, unit = mk.random_uniform(2, key=key.at(mk.Role.MASK, layer=_RATIO_LAYER))[0].double().tolist()
        if coin >= self.masked:
            return where
        wanted = int(round((self.low + (self.high - self.low) * unit) * where.size, 6))
        least, drawn, tried, failed = (min(cells) // 3) ** len(cells), np.empty((0,)), 0, 0
        while failed < TRIES and (missing := wanted - int(where.sum())) > 0:
            if tried == len(drawn):  # number i of the draw is the same however many are drawn
                shape = (tried + _AT_ONCE, 2 * len(cells))
                drawn = mk.random_uniform(shape, key=key.at(mk.Role.MASK))[0].double().numpy()
            box = _box(cells, least + (missing - least) * drawn[tried, 0], self.aspect, drawn[tried, 1:])
            tried, failed = tried + 1, failed + 1
            if box is not None and 0 < int((~where[box]).sum()) <= missing:
                where[box], failed = True, 0
        return where


def _box(
    cells: Sequence[int], volume: float, aspect: tuple[float, float], unit: np.ndarray
) -> tuple[slice, ...] | None:
    """A box of about ``volume`` cells at a random place, or None where it is longer than the grid or has no cell.

    unit: 2 n - 1 numbers in [0, 1): the shapes of all axes but the first, then the places.
    """
    low, high = (math.log(x) for x in aspect)
    ratios = [1.0, *np.exp(low + (high - low) * unit[: len(cells) - 1])]
    depth = (volume / math.prod(ratios)) ** (1 / len(cells))
    sides = [round(depth * ratio) for ratio in ratios]
    if any(not 0 < side <= length for side, length in zip(sides, cells, strict=True)):
        return None
    places = unit[len(cells) - 1 :]
    starts = [int(u * (n - side + 1)) for u, n, side in zip(places, cells, sides, strict=True)]
    return tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))
