"""Resampling a CT volume to another spacing.

A CT value stands for a small cell and a scan covers the cells' edges, so the new grid starts at the old one's edge, has
round(extent / spacing) voxels of exactly the asked size, and its first centre lies half a new voxel inside. Values are
clamped before they are filtered, or padding of -3024 would smear into skin. Kernels, as a function of the scale s = new
/ old spacing: "triangle", half width max(1, s), anti-aliased, linear when up-sampling; "area", the average over the new
cell; "linear", half width 1, which folds noise but is what MONAI's bilinear did for published weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

__all__ = ["AIR", "EXECUTORS", "KERNELS", "TOP", "grid", "new_affine", "resample", "resample_dali", "resample_slabs",
           "weights"]  # fmt: skip

AIR, TOP = -1024, 3071
KERNELS = ("triangle", "area", "linear")
BAND = 16  # new voxels whose weights are one dense block
SLAB = 2**22  # voxels that are float at a time, so a worker stays small whatever the length of the scan


def grid(shape: tuple[int, ...], spacing: np.ndarray, new: float) -> tuple[int, ...]:
    """Voxels per axis of the new grid, at least one."""
    return tuple(max(1, round(n * float(mm) / new)) for n, mm in zip(shape, spacing, strict=True))


def new_affine(affine: np.ndarray, spacing: np.ndarray, new: float) -> np.ndarray:
    """(d, h, w, 1) to mm of the new grid: same edge, so the first centre moves by (new - old) / 2 along each axis."""
    directions = affine[:3, :3] / spacing
    out = np.eye(4)
    out[:3, :3] = directions * new
    out[:3, 3] = affine[:3, 3] + directions @ ((new - spacing) / 2)
    return out


def weights(old: int, count: int, scale: float, kernel: str) -> Tensor:
    """(count, old) float32, rows add up to one. Taps outside the volume fall on its first or last voxel."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; accepted are {', '.join(KERNELS)}")
    half = {"triangle": max(1.0, scale), "linear": 1.0, "area": scale / 2 + 0.5}[kernel]
    centre = (torch.arange(count, dtype=torch.float64) + 0.5) * scale - 0.5
    first = torch.floor(centre - half).long()
    taps = first[:, None] + torch.arange(int(2 * half) + 3)
    offset = (taps - centre[:, None]).abs()
    if kernel == "area":
        weight = (scale / 2 + 0.5 - offset).clamp(0.0, min(1.0, scale))
    else:
        weight = (1 - offset / half).clamp_min(0.0)
    weight = weight / weight.sum(1, keepdim=True)
    return torch.zeros(count, old, dtype=torch.float64).scatter_add_(1, taps.clamp(0, old - 1), weight).float()


def resample(volume: np.ndarray, spacing: np.ndarray, new: float = 2.0, kernel: str = "triangle") -> np.ndarray:
    """int16 (d, h, w) HU on the new grid. volume: (d, h, w) real HU, any strides; spacing: its mm (d, h, w)."""
    step = max(1, SLAB // volume[0].size)
    slabs = (np.clip(volume[start : start + step], AIR, TOP) for start in range(0, len(volume), step))
    return resample_slabs(slabs, volume.shape, spacing, new, kernel)


def resample_slabs(
    slabs: Iterable[np.ndarray], shape: tuple[int, ...], spacing: np.ndarray, new: float, kernel: str = "triangle",
    limits: tuple[int, int] = (AIR, TOP),
) -> np.ndarray:  # fmt: skip
    """The same from consecutive slabs along d of a volume of ``shape``, clamped already, which need never exist whole.

    Memory: 6 bytes a new voxel, and a slab as float.
    """
    out = grid(shape, spacing, new)
    along = [weights(n, m, new / mm, kernel) for n, m, mm in zip(shape, out, spacing.tolist(), strict=True)]
    volume, start = torch.zeros(out), 0
    rows, columns = _bands(along[1]), _bands(along[2])
    for slab in slabs:
        planes = _planes(torch.from_numpy(slab), rows, columns, out[1:])
        share = along[0][:, start : start + len(slab)]
        touched = share.any(1).nonzero()
        first, last = int(touched[0]), int(touched[-1]) + 1
        volume[first:last] += (share[first:last] @ planes.flatten(1)).unflatten(1, out[1:])
        start += len(slab)
    return volume.round_().clamp_(*limits).to(torch.int16).numpy()


def _bands(weight: Tensor) -> list[tuple[slice, slice, Tensor]]:
    """(new voxels, old voxels that they are made of, their weights): a dense product would mostly multiply zeros."""
    bands = []
    for start in range(0, len(weight), BAND):
        share = weight[start : start + BAND]
        touched = share.any(0).nonzero()
        old = slice(int(touched[0]), int(touched[-1]) + 1)
        bands.append((slice(start, start + len(share)), old, share[:, old].contiguous()))
    return bands


def _planes(slab: Tensor, rows: list, columns: list, size: tuple[int, ...]) -> Tensor:
    """(n, *size) float32 of an int16 slab (n, h, w): its planes on the new grid."""
    high = torch.empty(len(slab), size[0], slab.shape[2])
    for plane, made in zip(slab, high, strict=True):
        values = plane.float()
        for new, old, share in rows:
            torch.mm(share, values[old], out=made[new])
    planes = torch.empty(len(slab) * size[0], size[1])
    for new, old, share in columns:
        torch.mm(high.flatten(0, 1)[:, old], share.T, out=planes[:, new])
    return planes.unflatten(0, (len(slab), size[0]))


def resample_dali(
    slabs: Iterable[np.ndarray], shape: tuple[int, ...], spacing: np.ndarray, new: float, kernel: str = "triangle",
    limits: tuple[int, int] = (AIR, TOP),
) -> np.ndarray:  # fmt: skip
    """The same with DALI's CPU operators, triangle kernel only; within 1 HU. Holds the volume whole as float."""
    if kernel != "triangle":
        raise ValueError(f"DALI has no kernel {kernel!r} of this definition; accepted is 'triangle'")
    from nvidia.dali import Pipeline, fn, types

    out = grid(shape, spacing, new)
    end = [m * new / float(mm) for m, mm in zip(out, spacing, strict=True)]
    whole = np.concatenate([slab.astype(np.float32) for slab in slabs])[..., None]

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        source = fn.external_source(source=lambda: [whole], layout="DHWC")
        # The region says where the new grid ends; size alone would stretch the voxels to fit.
        pipeline.set_outputs(fn.resize(source, size=list(out), roi_start=[0.0, 0.0, 0.0], roi_end=end,
                                       antialias=True, interp_type=types.DALIInterpType.INTERP_LINEAR))  # fmt: skip
    pipeline.build()
    (resized,) = pipeline.run()
    return np.clip(np.rint(np.asarray(resized.at(0))[..., 0]), *limits).astype(np.int16)


EXECUTORS = {"torch": resample_slabs, "dali": resample_dali}
