"""Is it a CT in Hounsfield units, of a kind worth training on? Each test raises ``Bad`` with its class or is silent.

Limits are part of a store's recipe (``LIMITS``), so a store holds what one set of limits let through.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch.nn import functional as F

from medfast.data.image import Bad, Image
from medfast.data.resample import AIR, TOP

__all__ = ["LIMITS", "body_box", "check_geometry", "check_hounsfield", "check_stored", "fingerprint", "hounsfield"]

LIMITS = {"voxel_mm": [0.2, 10.0], "thick_mm": [5.0, 7.5], "extent_mm": 2500.0, "axis_voxels": 16, "air_share": 1e-3}
BODY = -500  # HU; above it is body, table or blanket
BIN = 10  # HU per bin of the histogram
COARSE = 4  # voxels per axis of the blocks that bodies are told apart with
SLAB = 2**23


def check_geometry(image: Image) -> None:
    """Voxel size, slice thickness and extent. Thick slices are noted above one limit, refused above a second."""
    low, high = LIMITS["voxel_mm"]
    size = np.round(image.spacing, 5).tolist()
    if image.spacing.min() < low or image.spacing.max() > high:
        hint = "; these look like metres" if image.spacing.max() < 0.02 else ""
        raise Bad("spacing", f"voxels of {size} mm (d, h, w); accepted are {low} to {high} mm{hint}")
    extent = image.spacing * image.stored.shape
    if extent.max() > LIMITS["extent_mm"]:
        raise Bad("extent", f"{extent.max():.0f} mm long; no patient is longer than {LIMITS['extent_mm']:.0f} mm")
    noted, refused = LIMITS["thick_mm"]
    if image.spacing.max() > refused:
        raise Bad("thick", f"slices are {image.spacing.max():.2f} mm apart; above {refused} mm most of a finer grid "
                           "would be invented")  # fmt: skip
    if image.spacing.max() > noted + 0.01:
        image.notes.append("thick")


def hounsfield(image: Image) -> tuple[np.ndarray, np.ndarray]:
    """(volume, histogram): int16 (d, h, w) HU clamped to [AIR, TOP], and counts of a sample of the unclamped values in
    bins of BIN HU from -1200 to 1600. Fractions of a HU are rounded. Raises Bad for values that are no numbers, or all
    the same.
    """
    volume = np.empty(image.stored.shape, np.int16)
    edges = np.arange(-1200, 1600 + BIN, BIN)
    histogram = np.zeros(len(edges) - 1, np.int64)
    plain = image.slope == 1 and image.inter == 0
    step = max(1, SLAB // volume[0].size)
    for start in range(0, len(volume), step):
        part = image.stored[start : start + step]
        if not plain:
            part = part * image.slope + image.inter
        if part.dtype.kind == "f" and (wrong := part.size - np.count_nonzero(np.isfinite(part))):
            raise Bad("non-finite", f"at least {wrong} voxels are NaN or infinite")
        sample = part[..., ::2, ::2]
        histogram += np.histogram(sample, edges)[0]
        clamped = np.clip(part, AIR, TOP)
        volume[start : start + step] = np.rint(clamped) if part.dtype.kind == "f" else clamped
    if volume.min() == volume.max():
        raise Bad("constant", f"every voxel is {int(volume.flat[0])} HU after clamping to [{AIR}, {TOP}]")
    return volume, histogram


def check_hounsfield(histogram: np.ndarray) -> None:
    """Air must be near -1000 HU, and the commonest denser value must be that of fat or soft tissue, -150 to 100 HU.

    histogram: of ``hounsfield``. Air may be a small share (bowel gas in a tight crop) but must stand out as a peak.
    """
    centre = np.arange(-1200, 1600, BIN) + BIN / 2
    smooth = np.convolve(histogram, np.ones(5) / 5, "same")
    air = (centre > -1080) & (centre < -920)
    dense = (centre > -300) & (centre < 1500)
    if not histogram.sum() or histogram[air].sum() < LIMITS["air_share"] * histogram.sum():
        raise Bad("not-hu", "no air near -1000 HU: not a CT in Hounsfield units (offset of 1000? MR? a window?)")
    tissue = centre[dense][smooth[dense].argmax()]
    if not smooth[dense].any() or not -150 <= tissue <= 100:
        raise Bad("not-hu", f"beside air the commonest value is {tissue:.0f}, fat and soft tissue are -150 to 100 HU: "
                            "not in Hounsfield units (was the offset applied twice?)")  # fmt: skip


def check_stored(shape: tuple[int, ...]) -> None:
    """The resampled volume must have some length on every axis; shorter than a crop is padded at load."""
    if min(shape) < LIMITS["axis_voxels"]:
        raise Bad("too-small", f"{list(shape)} voxels (d, h, w) after resampling; "
                               f"each axis needs {LIMITS['axis_voxels']}")  # fmt: skip


def fingerprint(volume: np.ndarray) -> str:
    """SHA-256 of shape and voxels: equal for one scan in two files, whatever their headers and compression say."""
    found = hashlib.sha256(repr(volume.shape).encode())
    for plane in volume:
        found.update(plane.tobytes())
    return found.hexdigest()


def body_box(volume: np.ndarray) -> tuple[list[int], float]:
    """([d0, h0, w0, d1, h1, w1), share): box of the largest body above -500 HU, and the share of all voxels above it.

    volume: (d, h, w) int16 HU. Bodies are told apart on blocks of COARSE voxels per axis that are at least half
    filled (thin tables and blankets are not), 26-connected; the box is then tightened to the voxel.
    """
    above = torch.from_numpy(volume > BODY)
    blocks = F.avg_pool3d(above[None].float(), COARSE, ceil_mode=True)[0]
    largest = _largest(blocks >= min(0.5, float(blocks.max())))
    near = F.max_pool3d(largest[None].float(), 3, 1, 1)[0] > 0
    for axis, size in enumerate(above.shape):
        near = near.repeat_interleave(COARSE, axis).narrow(axis, 0, size)
    body = above & near
    profiles = body.any(2).any(1), body.any(2).any(0), body.any(1).any(0)
    filled = [profile.nonzero() for profile in profiles]
    box = [int(at[0]) for at in filled] + [int(at[-1]) + 1 for at in filled]
    return box, round(float(above.float().mean()), 4)


def _largest(where: torch.Tensor) -> torch.Tensor:
    """The largest 26-connected part of a boolean (d, h, w)."""
    label = torch.arange(1, where.numel() + 1, dtype=torch.float64).view(where.shape) * where
    while True:
        spread = F.max_pool3d(label[None], 3, 1, 1)[0] * where
        if torch.equal(spread, label):
            break
        label = spread
    labels, counts = label[where].unique(return_counts=True)
    return label == labels[counts.argmax()]
