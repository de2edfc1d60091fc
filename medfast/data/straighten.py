"""Volumes whose axes are not at right angles (CT with a tilted gantry) onto a straight grid, by their full affine.

The last two axes keep their plane, the first becomes its normal, and the grid holds the whole leaning box; corners that
the scan does not cover are filled. The volume comes resampled along its own axes, low-pass and all, so what is left is
linear interpolation among voxels of the new size.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch.nn import functional as F

__all__ = ["nearest", "straight_grid", "straighten"]

AT_ONCE = 1 << 22  # voxels of the new grid


def straight_grid(affine: np.ndarray, shape: tuple[int, ...], new: float) -> tuple[np.ndarray, tuple[int, ...]]:
    """(4x4 affine, shape) of voxels of ``new`` mm that hold the box of ``shape`` voxels at ``affine``."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    last = directions[:, 2]
    middle = directions[:, 1] - (directions[:, 1] @ last) * last
    middle /= np.linalg.norm(middle)
    normal = np.cross(middle, last)
    frame = np.stack([np.sign(normal @ directions[:, 0]) * normal, middle, last], axis=1)
    corners = np.array(list(itertools.product(*((-0.5, n - 0.5) for n in shape)))) @ affine[:3, :3].T @ frame
    low, high = corners.min(0), corners.max(0)
    made = np.eye(4)
    made[:3, :3] = frame * new
    made[:3, 3] = affine[:3, 3] + frame @ (low + new / 2)
    d, h, w = (max(1, round(float(n))) for n in (high - low) / new)
    return made, (d, h, w)


def straighten(volume: np.ndarray, affine: np.ndarray, new: float, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """int16 (d, h, w) or (c, d, h, w) at ``affine`` on its straight grid, and that grid's affine."""
    made, shape = straight_grid(affine, volume.shape[-3:], new)
    steps = np.linalg.inv(affine) @ made
    voxels = torch.from_numpy(volume.reshape(1, -1, *volume.shape[-3:])).float() - fill
    sizes = torch.tensor(volume.shape[-3:], dtype=torch.float64)
    parts = []
    for planes in _planes(shape):
        at = torch.from_numpy(_places(steps, planes, shape))
        grid = ((2 * at + 1) / sizes - 1).flip(-1).float()[None]  # grid_sample wants w, h, d in [-1, 1]
        part = F.grid_sample(voxels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0]
        parts.append((part + fill).round_().to(torch.int16).numpy())
    return np.concatenate(parts, axis=1).reshape(*volume.shape[:-3], *shape), made


def nearest(stored: np.ndarray, affine: np.ndarray, made: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The value of ``stored``, a volume at ``affine``, that the centre of each voxel at ``made`` lies in; 0 outside."""
    steps = np.linalg.inv(affine) @ made
    out = np.zeros(shape, stored.dtype)
    for planes in _planes(shape):
        at = np.floor(_places(steps, planes, shape) + 0.5 + 1e-6).astype(np.int64)
        inside = ((at >= 0) & (at < stored.shape)).all(-1)
        out[planes.start : planes.stop][inside] = stored[tuple(at[inside].T)]
    return out


def _planes(shape: tuple[int, ...]) -> list[range]:
    step = max(1, AT_ONCE // (shape[1] * shape[2]))
    return [range(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


def _places(steps: np.ndarray, planes: range, shape: tuple[int, ...]) -> np.ndarray:
    """(planes, h, w, 3): where voxels of the new grid lie, in voxels of the old one."""
    z, y, x = (np.arange(n, dtype=np.float64) for n in (len(planes), *shape[1:]))
    along = [(axis[:, None] * steps[:3, i]) for i, axis in enumerate((z + planes.start, y, x))]
    return along[0][:, None, None] + along[1][:, None] + along[2] + steps[:3, 3]
