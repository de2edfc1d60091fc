"""Quarter turns and flips of a view in the plane of its last two axes, as numbers of the plan.

They move stored voxels and change none, whether by ``orient``, before an executor sees a box, or by the executor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import medfast_kernels as mk

__all__ = ["bits", "draw", "orient", "per_view", "turn"]

FLIPS = 3  # none, the last axis but one, the last one
_LAYER = 16  # of the role AUGMENT, above the layers of the splits, under which intensity changes are drawn


def per_view(name: str, value: bool | Sequence[bool], views: int) -> tuple[bool, ...]:
    """data.rotate or data.flip, true, false, or one for each view, checked."""
    found = (value,) * views if isinstance(value, bool) else tuple(value) if isinstance(value, list | tuple) else ()
    if len(found) != views or not all(isinstance(x, bool) for x in found):
        raise ValueError(f"data.{name} is true or false, or one of them for each of {views} views, got {value!r}")
    return found


def draw(
    rotate: Sequence[bool], flip: Sequence[bool], size: Sequence[int], key: mk.Key, views: int, stream: int
) -> dict[str, np.ndarray]:
    """Name -> (b, views) int64: "rotation", quarter turns 0 to 3, and "flip", 0 to 2, where some view has them.

    A plane whose axes differ is turned by 0 or 2 quarters, which keep its shape.
    """
    found = {}
    for name, on, kinds, layer in (("rotation", rotate, 4, _LAYER), ("flip", flip, FLIPS, _LAYER + 2)):
        if any(on):
            unit = mk.random_uniform(1, key=key.at(mk.Role.AUGMENT, layer=layer + stream).stack(views))[:, 0].double()
            unit = unit.numpy().reshape(views, -1).T
            step = 2 if name == "rotation" and size[-1] != size[-2] else 1
            found[name] = step * np.floor(unit * (kinds // step)).astype(np.int64) * np.array(on)
    return found


def orient(box: np.ndarray, rotation: int, flip: int) -> np.ndarray:
    """``box`` (..., h, w) turned by ``rotation`` quarters from h towards w, then flipped along h (1) or w (2)."""
    if rotation:
        box = np.rot90(box, rotation, (-2, -1))
    return np.ascontiguousarray(np.flip(box, flip - FLIPS) if flip else box)


def bits(rotation: np.ndarray | int, flip: np.ndarray | int) -> np.ndarray:
    """The same as ``turn`` of ``medfast_kernels.augment``: 1 exchanges the two axes, then 4 and 8 mirror them."""
    return np.array([0, 5, 12, 9])[rotation] ^ np.array([0, 4, 8])[flip]


def turn(box: np.ndarray, number: int) -> np.ndarray:
    """``box`` (..., h, w) as ``bits`` say, contiguous."""
    box = box.swapaxes(-2, -1) if number & 1 else box
    mirrored = tuple(axis for bit, axis in ((4, -2), (8, -1)) if number & bit)
    return np.ascontiguousarray(np.flip(box, mirrored) if mirrored else box)
