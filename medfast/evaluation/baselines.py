"""Predictors that learn nothing: what a reconstruction has to beat before it may be called one.

All take volume (b, c, *size) and visible (b, *size) bool, the voxels a predictor may read, and give (b, c, *size).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["gaussian", "median", "nearest", "smoothed"]

_FAR = 1 << 20  # squared voxels, beyond any volume, and small enough to add to without overflow


def median(volume: Tensor, known: Tensor) -> Tensor:
    """Each crop's median over the voxels of ``known``, everywhere: the best constant in L1 for those voxels."""
    out = torch.empty_like(volume)
    for sample, channel in _planes(volume):
        values = volume[sample, channel][known[sample]]
        if not len(values):
            raise ValueError(f"sample {sample} of the batch has no known voxel, so it has no median")
        out[sample, channel] = values.median()
    return out


def nearest(volume: Tensor, visible: Tensor) -> Tensor:
    """Each voxel takes the value of the visible voxel nearest to it (Euclidean, exact; ties are open)."""
    if not visible.flatten(1).any(1).all():
        raise ValueError("a sample of the batch has no visible voxel to interpolate from")
    source = _nearest_index(visible)
    flat = volume.flatten(2)
    index = source.flatten(1).unsqueeze(1).expand_as(flat)
    return flat.gather(2, index).view_as(volume)


def _nearest_index(visible: Tensor) -> Tensor:
    """(b, *size) int64 raster index of the nearest visible voxel.

    Squared distance is a sum over axes, so the minimum is taken one axis after the other, carrying the index along. An
    axis is done once the next step is longer than every distance found.
    """
    size = visible.shape[1:]
    index = torch.arange(math.prod(size), device=visible.device).view(1, *size).expand_as(visible)
    distance = torch.where(visible, 0, _FAR).to(torch.int32)
    for axis in range(1, visible.dim()):
        start_distance, start_index = distance, index
        distance, index = distance.clone(), index.clone()
        for step in range(1, visible.shape[axis]):
            if step * step >= int(distance.max()):
                break
            length = visible.shape[axis] - step
            for to, of in ((step, 0), (0, step)):
                here = distance.narrow(axis, to, length)
                candidate = start_distance.narrow(axis, of, length) + step * step
                closer = candidate < here
                here.copy_(torch.where(closer, candidate, here))
                place = index.narrow(axis, to, length)
                place.copy_(torch.where(closer, start_index.narrow(axis, of, length), place))
    return index


def smoothed(volume: Tensor, visible: Tensor, sigma: float, fallback: Tensor) -> Tensor:
    """Normalised convolution: Gaussian mean of the visible voxels, ``sigma`` in voxels.

    Where no visible voxel lies within the kernel, ``fallback`` (b, c, *size). Source: Knutsson and Westin, CVPR 1993.
    """
    weight = visible.unsqueeze(1).to(volume.dtype)
    total = gaussian(weight, sigma)
    mean = gaussian(volume * weight, sigma) / total.clamp_min(1e-12)
    return torch.where(total > 1e-6, mean, fallback)


def gaussian(volume: Tensor, sigma: float) -> Tensor:
    """(b, c, *size) blurred along every spatial axis, sigma in voxels; outside counts as 0.

    As matrix products: at these lengths much faster on a CPU than convolutions with one channel.
    """
    for axis in range(2, volume.dim()):
        place = torch.arange(volume.shape[axis], device=volume.device, dtype=volume.dtype)
        kernel = torch.exp(-0.5 * ((place[:, None] - place) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        volume = (volume.movedim(axis, -1) @ kernel).movedim(-1, axis)
    return volume


def _planes(volume: Tensor):
    return ((sample, channel) for sample in range(volume.shape[0]) for channel in range(volume.shape[1]))
