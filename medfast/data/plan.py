"""The plan of a sample: which volume, where to cut, how to change it; data that any executor can carry out.

A plan is a pure function of (seed, step, slot) and the YAML's data section. It does not depend on the micro-batch, the
rank, the order of calls or what was planned before, so a resumed or re-sharded run sees the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

import medfast_kernels as mk
from medfast_kernels import Key, Role

from . import cutout as cutout_module
from . import intensity as intensity_module
from . import orientation
from .cutout import Cutout
from .intensity import Change

__all__ = ["Plan", "Recipe", "plan", "recipe", "valid"]

_PARENT = 255  # the view number under which the parent crop, which nobody sees, draws its place


@dataclass(frozen=True)
class Recipe:
    """What is the same for all samples. size: voxels of a view. parent, zoom: range of factors of ``size`` per axis.
    rotate, flip: whether each view is turned or flipped (``orientation``)."""

    size: tuple[int, int, int]
    views: int
    parent: tuple[float, float] | None
    zoom: tuple[float, float] | None
    changes: tuple[Change, ...]
    foreground: bool
    rotate: tuple[bool, ...]
    flip: tuple[bool, ...]
    cutout: Cutout | None


@dataclass(frozen=True)
class Plan:
    """volume (b,) int64: index into the given volumes. start, extent (b, views, 3) int64: box in stored voxels; it may
    reach beyond the volume, and is brought to ``Recipe.size`` where it has another extent. params: (b, views) float32.
    turns: "rotation" and "flip", where there are any, (b, views) int64.
    """

    volume: np.ndarray
    start: np.ndarray
    extent: np.ndarray
    params: Mapping[str, np.ndarray]
    turns: Mapping[str, np.ndarray]

    @property
    def boxes(self) -> np.ndarray:
        """(b, views, 6) int64, start then stop."""
        return np.concatenate([self.start, self.start + self.extent], axis=-1)

    def oriented(self, box: np.ndarray, sample: int, view: int) -> np.ndarray:
        """``box`` (d, h, w), turned and flipped as this sample's view is."""
        names = ("rotation", "flip")
        rotation, flip = (int(self.turns[name][sample, view]) if name in self.turns else 0 for name in names)
        return orientation.orient(box, rotation, flip) if rotation or flip else box


def recipe(
    *, size, views: int, parent=None, zoom=None, intensity=None, foreground: bool = False,
    rotate: bool | Sequence[bool] = False, flip: bool | Sequence[bool] = False, cutout=None,
) -> Recipe:  # fmt: skip
    """Check the data section's entries. ValueError says which one is wrong and what is accepted."""
    axes = tuple(size) if isinstance(size, Sequence) else (size,) * 3
    if len(axes) != 3 or not all(isinstance(n, int) and n > 0 for n in axes):
        raise ValueError(f"data.size is a number of voxels, or one for each of three axes, got {size!r}")
    if not isinstance(views, int) or not 1 <= views < _PARENT:
        raise ValueError(f"views must be a whole number from 1 to {_PARENT - 1}, got {views!r}")
    if not isinstance(foreground, bool):
        raise ValueError(f"data.foreground is true or false, got {foreground!r}")
    parent, zoom = _range("parent", parent), _range("zoom", zoom)
    if parent and parent[0] < (zoom or (1.0, 1.0))[1]:
        raise ValueError(f"data.parent starts at {parent[0]} times the size, but a view takes up to "
                         f"{(zoom or (1.0, 1.0))[1]}; make parent at least as large")  # fmt: skip
    return Recipe(
        axes, views, parent, zoom, intensity_module.parse(intensity, views), foreground,
        orientation.per_view("rotate", rotate, views), orientation.per_view("flip", flip, views),
        cutout_module.parse(cutout),
    )  # fmt: skip


def _range(name: str, value) -> tuple[float, float] | None:
    if value is None:
        return None
    pair = value if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(pair) != 2 or not all(isinstance(x, int | float) for x in pair) or not 0 < float(pair[0]) <= float(pair[1]):
        raise ValueError(f"data.{name} is a factor of the size, a range [low, high] of factors, or null, got {value!r}")
    return float(pair[0]), float(pair[1])


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int, stream: int) -> np.ndarray:
    """Keyed permutation of ``count`` volumes for one epoch."""
    key = Key(seed, epoch, torch.zeros(1, dtype=torch.int64)).at(Role.VOLUME, layer=stream)
    return torch.argsort(mk.random_uniform(count, key=key)[0], stable=True).numpy()


def _volumes(seed: int, number: np.ndarray, count: int, stream: int) -> np.ndarray:
    epoch, place = np.divmod(number, count)
    result = np.empty_like(number)
    for e in np.unique(epoch):
        result[epoch == e] = _order(seed, int(e), count, stream)[place[epoch == e]]
    return result


def _extent(size: np.ndarray, factors: tuple[float, float] | None, unit: np.ndarray) -> np.ndarray:
    if factors is None:
        return np.broadcast_to(size, unit.shape)
    low, high = factors
    return np.maximum(1, np.rint(size * (low + (high - low) * unit))).astype(np.int64)


def _place(extent: np.ndarray, unit: np.ndarray, *spans: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """A start for every box, uniform among those where each span holds the box, or the box the span if it is shorter.

    spans are nested, the innermost first; nested spans always leave at least one start.
    """
    low = np.maximum.reduce([np.minimum(a, b - extent) for a, b in spans])
    high = np.minimum.reduce([np.maximum(a, b - extent) for a, b in spans])
    return low + np.floor(unit * (high - low + 1)).astype(np.int64)


def plan(
    recipe: Recipe, shapes: np.ndarray, bodies: np.ndarray, *,
    seed: int, batch: int, step: int, slots: torch.Tensor, stream: int = 0,
) -> Plan:  # fmt: skip
    """Plan the samples ``slots`` (b,) of a step's global batch of ``batch``.

    shapes (n, 3), bodies (n, 6) int64: extent and body box (start, stop) of each volume, in stored voxels. Sample
    step * batch + slot walks through a keyed permutation of the volumes, so each comes once an epoch. ``stream`` keeps
    splits apart. With ``recipe.foreground`` boxes stay inside the body box, or hold it whole where they are larger.
    Views are cut inside a common parent box where there is a parent; its part outside the volume counts for nothing.
    """
    key, size, count = Key(seed, step, slots), np.array(recipe.size), recipe.views
    volume = _volumes(seed, step * batch + slots.numpy(), len(shapes), stream)
    shape, body = shapes[volume][:, None], bodies[volume][:, None]  # (b, 1, 3 or 6)
    whole = (np.zeros_like(shape), shape)
    spans = ((body[..., :3], body[..., 3:]), whole) if recipe.foreground else (whole,)
    if recipe.parent:
        unit = mk.random_uniform((1, 2, 3), key=key.at(Role.CROP, view=_PARENT, layer=stream)).double().numpy()
        extent = _extent(size, recipe.parent, unit[:, :, 0])
        start = _place(extent, unit[:, :, 1], *spans)
        parent = (np.maximum(start, 0), np.minimum(start + extent, shape))
        focus = (np.maximum(parent[0], spans[0][0]), np.minimum(parent[1], spans[0][1]))
        spans = (focus, parent, whole)
    unit = mk.random_uniform((2, 3), key=key.at(Role.CROP, layer=stream).stack(count)).double().numpy()
    unit = unit.reshape(count, -1, 2, 3).swapaxes(0, 1)
    extent = _extent(size, recipe.zoom, unit[:, :, 0])
    start = _place(extent, unit[:, :, 1], *spans)
    params = intensity_module.draw(recipe.changes, key.at(Role.AUGMENT, layer=stream), count)
    turns = orientation.draw(recipe.rotate, recipe.flip, recipe.size, key, count, stream)
    return Plan(volume, start, extent, params, turns)


def valid(start: np.ndarray, extent: np.ndarray, shape: np.ndarray, size: tuple[int, int, int]) -> torch.Tensor | None:
    """(*size) bool, True where the centre of the view's voxel lies in the volume; None where all do. Inputs (3,)."""
    axes = []
    for begin, length, end, n in zip(start, extent, shape, size, strict=True):
        centre = begin + (np.arange(n) + 0.5) * (length / n)
        axes.append(torch.from_numpy((centre > 0) & (centre < end)))
    if all(bool(axis.all()) for axis in axes):
        return None
    return axes[0][:, None, None] & axes[1][:, None] & axes[2]
