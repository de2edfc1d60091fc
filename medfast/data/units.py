"""What the stored numbers mean, and images cut into slabs of them.

"HU": Hounsfield units, clamped to [AIR, TOP]. "percentile": 0 is the 0.5th, 1000 the 99.5th percentile of the voxels
above the image's minimum (its background), clamped to [0, 4000]. "zscore": 0 is the mean and 1000 one standard
deviation of those voxels, clamped to [-10000, 10000]. Channels are normalised one by one. ``offset`` and ``scale`` of
an index line give the file's own value back: value = stored / scale + offset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from medfast.data.checks import BINS
from medfast.data.image import Bad, Image
from medfast.data.resample import AIR, SLAB, TOP

__all__ = ["UNITS", "Reading", "Unit", "fit"]

UNITS = {"HU": (AIR, TOP, AIR), "percentile": (0, 4000, 0), "zscore": (-10000, 10000, 0)}  # low, high, padding
MOST_WRONG = 1e-3  # share of voxels that may be no numbers, outside the body


@dataclass(frozen=True)
class Unit:
    """stored = (value - offset) * scale, rounded and clamped to [low, high]; fill: what no scan covered."""

    name: str
    offset: float = 0.0
    scale: float = 1.0

    @property
    def range(self) -> tuple[int, int, int]:
        return UNITS[self.name]


def fit(image: Image, name: str) -> Unit:
    """The unit for one image of one channel. Reads every other voxel of two axes. Raises Bad where all are the same."""
    if name == "HU":
        return Unit(name)
    sample = image.stored[..., ::2, ::2].astype(np.float32) * image.slope + image.inter
    sample = sample[np.isfinite(sample)]
    if not sample.size or sample.min() == sample.max():
        raise Bad("constant", "every voxel has the same value")
    sample = sample[sample > sample.min()]
    if name == "zscore":
        centre, width = float(sample.mean(dtype=np.float64)), float(sample.std(dtype=np.float64))
    else:
        centre, top = map(float, np.percentile(sample, (0.5, 99.5)))
        width = top - centre
    if not width > 0:
        raise Bad("constant", "all voxels above the background have the same value")
    return Unit(name, round(centre, 6), 1000 / width)


class Reading:
    """One channel of an image, read once, slab by slab, and what was seen on the way.

    After ``slabs`` was exhausted: histogram, counts of a sample of unclamped values in bins of BINS; voxels, SHA-256 of
    shape and int16 voxels; wrong, (n, 3) places that held no numbers and were filled.
    """

    def __init__(self, image: Image, unit: Unit):
        self.image, self.unit = image, unit
        self.histogram = np.zeros(len(BINS) - 1, np.int64)
        self._places: list[np.ndarray] = []
        self._digest = hashlib.sha256(repr(image.stored.shape).encode())
        self._low, self._high = np.inf, -np.inf

    @property
    def voxels(self) -> str:
        return self._digest.hexdigest()

    @property
    def wrong(self) -> np.ndarray:
        return np.concatenate([np.empty((0, 3), np.int64), *self._places])

    def slabs(self) -> Iterator[np.ndarray]:
        """int16 slabs along d, in the store's unit. Raises Bad for too many values that are no numbers, or one only."""
        stored = self.image.stored
        step = max(1, SLAB // stored[0].size)
        for start in range(0, len(stored), step):
            slab = self._converted(stored[start : start + step], start)
            self._low, self._high = min(self._low, slab.min()), max(self._high, slab.max())
            for plane in slab:
                self._digest.update(plane.tobytes())
            yield slab
        if self._low == self._high:
            raise Bad("constant", f"every voxel is {int(self._low)} {self.unit.name} after clamping")

    def _converted(self, part: np.ndarray, start: int) -> np.ndarray:
        image, (low, high, fill) = self.image, self.unit.range
        if (image.slope, image.inter) != (1, 0):
            part = part * image.slope + image.inter
        holes = None
        if part.dtype.kind == "f" and not (sound := np.isfinite(part)).all():
            holes = ~sound
            self._places.append(np.argwhere(holes) + [start, 0, 0])
            if (many := sum(map(len, self._places))) >= MOST_WRONG * image.stored.size:
                raise Bad("non-finite", f"at least {many} voxels are NaN or infinite")
            part = np.where(sound, part, fill)
        self.histogram += np.histogram(part[..., ::2, ::2], BINS)[0]
        if self.unit.name != "HU":
            part = (part - self.unit.offset) * self.unit.scale
        part = np.clip(part, low, high)
        slab = np.rint(part).astype(np.int16) if part.dtype.kind == "f" else part.astype(np.int16)
        if holes is not None:
            slab[holes] = fill
        return slab
