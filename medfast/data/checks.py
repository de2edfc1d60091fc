"""Is it an image worth training on, and a CT in Hounsfield units? Each test raises ``Bad`` with its class or is silent.

Limits are part of a store's recipe (``LIMITS``), so a store holds what one set of limits let through.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch.nn import functional as F

from medfast.data.image import Bad, Image

__all__ = ["LIMITS", "body_box", "check_geometry", "check_hounsfield", "check_stored", "joined"]

LIMITS = {"voxel_mm": [0.2, 10.0], "thick_mm": [5.0, 7.5], "extent_mm": 2500.0, "axis_voxels": 16, "air_share": 1e-3}
BODY = -500  # HU; above it is body, table or blanket
BINS = np.arange(-1200, 1610, 10)  # HU, of the histogram
COARSE = 4  # voxels per axis of the blocks that bodies are told apart with


def check_geometry(image: Image) -> None:
    """Voxel size, slice thickness and extent. Thick slices are noted above one limit, refused above a second."""
    low, high = LIMITS["voxel_mm"]
    size = np.round(image.spacing, 5).tolist()
    if image.spacing.min() < low or image.spacing.max() > high:
        hint = "; these look like metres" if image.spacing.max() < 0.02 else ""
        raise Bad("spacing", f"voxels of {size} mm (d, h, w); accepted are {low} to {high} mm{hint}")
    extent = image.spacing * image.shape
    if extent.max() > LIMITS["extent_mm"]:
        raise Bad("extent", f"{extent.max():.0f} mm long; no patient is longer than {LIMITS['extent_mm']:.0f} mm")
    noted, refused = LIMITS["thick_mm"]
    if image.spacing.max() > refused:
        raise Bad("thick", f"slices are {image.spacing.max():.2f} mm apart; above {refused} mm most of a finer grid "
                           "would be invented")  # fmt: skip
    if image.spacing.max() > noted + 0.01:
        image.notes.append("thick")


def check_hounsfield(histogram: np.ndarray) -> None:
    """Air must be near -1000 HU, and the commonest denser value must be that of fat or soft tissue, -150 to 100 HU.

    histogram: of ``units.Reading``, in bins of BINS. Air may be a small share (bowel gas in a tight crop) but must be
    there.
    """
    centre = (BINS[1:] + BINS[:-1]) / 2
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


def joined(digests: list[str]) -> str:
    """One digest of several."""
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def body_box(volume: np.ndarray, level: int = BODY) -> tuple[list[int], float]:
    """([d0, h0, w0, d1, h1, w1), share): box of the largest body above ``level``, and the share of all voxels above it;
    the whole volume where nothing is.

    volume: (d, h, w) int16. Bodies are told apart on blocks of COARSE voxels per axis that are at least half
    filled (thin tables and blankets are not), 26-connected; the box is then tightened to the voxel.
    """
    above = torch.from_numpy(volume > level)
    if not above.any():
        return [0, 0, 0, *volume.shape], 0.0
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
