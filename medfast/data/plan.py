"""The plan of a sample: which volume, where to cut, how to change it; data that any executor can carry out.

A plan is a pure function of (seed, step, slot) and the YAML's data section. It does not depend on the micro-batch, the
rank, the order of calls or what was planned before, so a resumed or re-sharded run sees the same samples.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

import medfast_kernels as mk
from medfast_kernels import Key, Role

from . import cutout as cutout_module
from . import intensity as intensity_module
from . import order, orientation
from .cutout import Cutout
from .intensity import Change

__all__ = ["Plan", "Recipe", "largest", "plan", "recipe", "valid"]

_PARENT = 255  # the view number under which the parent crop, which nobody sees, draws its place


@dataclass(frozen=True)
class Recipe:
    """What is the same for all samples. size: voxels of a view. parent, zoom: range of factors of ``size`` per axis; an
    axis of one voxel stays one. rotate, flip: whether each view is turned or flipped (``orientation``). flat: views are
    given without their first axis, which is one voxel."""

    size: tuple[int, int, int]
    views: int
    parent: tuple[float, float] | None
    zoom: tuple[float, float] | None
    changes: tuple[Change, ...]
    foreground: bool
    rotate: tuple[bool, ...]
    flip: tuple[bool, ...]
    cutout: Cutout | None
    flat: bool = False


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

    @property
    def numbers(self) -> dict[str, np.ndarray]:
        """``params`` by place, (views * b,): those of all samples' first views, and so on."""
        return {name: value.T.ravel() for name, value in self.params.items()}

    @property
    def turned(self) -> np.ndarray | None:
        """``orientation.bits`` by place, (views * b,), or None where nothing is turned or flipped."""
        if not self.turns:
            return None
        straight = np.zeros(self.start.shape[:2], np.int64)
        rotation, flip = (self.turns.get(name, straight) for name in ("rotation", "flip"))
        return orientation.bits(rotation, flip).T.ravel()

    def oriented(self, box: np.ndarray, sample: int, view: int) -> np.ndarray:
        """``box`` (..., d, h, w), turned and flipped as this sample's view is."""
        names = ("rotation", "flip")
        rotation, flip = (int(self.turns[name][sample, view]) if name in self.turns else 0 for name in names)
        return orientation.orient(box, rotation, flip) if rotation or flip else box


def recipe(
    *, size, views: int, parent=None, zoom=None, intensity=None, foreground: bool = False,
    rotate: bool | Sequence[bool] = False, flip: bool | Sequence[bool] = False, cutout=None, dimensions: int = 3,
) -> Recipe:  # fmt: skip
    """Check the data section's entries. ValueError says which one is wrong and what is accepted.

    dimensions: spatial axes of what the store holds. A size of two axes is that of a picture, or of one axial slice.
    """
    axes, flat = _axes(size, dimensions)
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
        cutout_module.parse(cutout), flat,
    )  # fmt: skip


def _axes(size, dimensions: int) -> tuple[tuple[int, int, int], bool]:
    """(d, h, w) and whether views have two axes only."""
    axes = tuple(size) if isinstance(size, Sequence) else (size,) * dimensions
    if len(axes) not in (2, 3) or not all(isinstance(n, int) and n > 0 for n in axes):
        raise ValueError(f"data.size is a number of voxels, or one for each of three axes, or [h, w], got {size!r}")
    if dimensions == 2 and len(axes) == 3 and axes[0] != 1:
        raise ValueError(f"the store holds pictures, which have no depth: data.size is a number, [h, w] or [1, h, w], "
                         f"got {size!r}")  # fmt: skip
    d, h, w = (1, *axes)[-3:]
    return (d, h, w), len(axes) == 2


def _range(name: str, value) -> tuple[float, float] | None:
    if value is None:
        return None
    pair = value if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(pair) != 2 or not all(isinstance(x, int | float) for x in pair) or not 0 < float(pair[0]) <= float(pair[1]):
        raise ValueError(f"data.{name} is a factor of the size, a range [low, high] of factors, or null, got {value!r}")
    return float(pair[0]), float(pair[1])


def _extent(size: np.ndarray, factors: tuple[float, float] | None, unit: np.ndarray) -> np.ndarray:
    if factors is None:
        return np.broadcast_to(size, unit.shape)
    low, high = factors
    return np.where(size == 1, 1, np.maximum(1, np.rint(size * (low + (high - low) * unit)))).astype(np.int64)


def largest(recipe: Recipe) -> tuple[int, int, int]:
    """Voxels of the largest box that a view may be made of."""
    d, h, w = _extent(np.array(recipe.size), recipe.zoom, np.ones((1, 3)))[0].tolist()
    return d, h, w


def _place(extent: np.ndarray, unit: np.ndarray, *spans: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """A start for every box, uniform among those where each span holds the box, or the box the span if it is shorter.

    spans are nested, the innermost first; nested spans always leave at least one start.
    """
    low = np.maximum.reduce([np.minimum(a, b - extent) for a, b in spans])
    high = np.minimum.reduce([np.maximum(a, b - extent) for a, b in spans])
    return low + np.floor(unit * (high - low + 1)).astype(np.int64)


def plan(
    recipe: Recipe, shapes: np.ndarray, bodies: np.ndarray, *,
    seed: int, batch: int, step: int, slots: torch.Tensor, stream: int = 0, chances: Sequence[float] | None = None,
    shuffle: bool = True, damaged: Container[int] = (),
) -> Plan:  # fmt: skip
    """Plan the samples ``slots`` (b,) of a step's global batch of ``batch``.

    shapes (n, 3), bodies (n, 6) int64: extent and body box (start, stop) of each volume, in stored voxels. Sample
    step * batch + slot walks through a keyed permutation of the volumes, so each comes once an epoch; chances, shuffle:
    see ``order.volumes``. In place of a volume in ``damaged`` comes the next that is not. ``stream`` keeps
    splits apart. With ``recipe.foreground`` boxes stay inside the body box, or hold it whole where they are larger.
    Views are cut inside a common parent box where there is a parent; its part outside the volume counts for nothing.
    """
    key, size, count = Key(seed, step, slots), np.array(recipe.size), recipe.views
    volume = order.volumes(seed, step * batch + slots.numpy(), len(shapes), stream, chances, shuffle)
    volume = np.array([_sound(int(v), damaged, len(shapes)) for v in volume], dtype=np.int64)
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


def _sound(volume: int, damaged: Container[int], count: int) -> int:
    return next(v % count for v in range(volume, volume + count) if v % count not in damaged)


def valid(start: np.ndarray, extent: np.ndarray, shape: np.ndarray, size: tuple[int, int, int]) -> torch.Tensor | None:
    """(*size) bool, True where the centre of the view's voxel lies in the volume; None where all do. Inputs (3,)."""
    axes = []
    for begin, length, end, n in zip(start, extent, shape, size, strict=True):
        centre = begin + (np.arange(n) + 0.5) * (length / n)
        axes.append(torch.from_numpy((centre > 0) & (centre < end)))
    if all(bool(axis.all()) for axis in axes):
        return None
    return axes[0][:, None, None] & axes[1][:, None] & axes[2]
