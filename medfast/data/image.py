"""What every reader of a format returns, and how it says no."""

from __future__ import annotations

from dataclasses import dataclass, field

import nibabel as nib
import numpy as np

__all__ = ["MAX_SHEAR", "Bad", "Blobs", "Image", "oriented"]

MAX_SHEAR = 0.01  # cosine between two axes that should be orthogonal
Blobs = list[bytes | bytearray]  # bytes of the files of one case
MAX_ANGLE = 5.0  # degrees off the body's axes before an image is noted as oblique


class Bad(ValueError):
    """A file that must not be trained on. kind: the class of the fault, one word, part of the public interface."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass
class Image:
    """Decoded file.

    stored: (d, h, w), (c, d, h, w) or, for a picture, (h, w) view of the stored numbers, value = stored * slope +
    inter. affine: 4x4, (d, h, w, 1) to RAS mm; the identity for a picture. spacing: mm of each spatial axis, NaN where
    a picture does not say. orientation: axis codes of the file's own order. angle: degrees off the body's axes.
    modality: what the file calls itself ("CT", "MR"...), or None. lean: degrees by which two axes are off a right
    angle, 0 where that is nothing; leaning: the class of that fault.
    """

    stored: np.ndarray
    slope: float
    inter: float
    affine: np.ndarray
    spacing: np.ndarray
    orientation: str
    angle: float
    notes: list[str] = field(default_factory=list)
    modality: str | None = None
    lean: float = 0.0
    leaning: str = "shear"

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along the spatial axes."""
        return self.stored.shape[-len(self.spacing) :]


def oriented(stored: np.ndarray, slope: float, inter: float, affine: np.ndarray, notes: list[str]) -> Image:
    """Turn (i, j, k) or (i, j, k, c) into (d, h, w) or (c, d, h, w). affine: 4x4, (i, j, k, 1) to RAS mm."""
    codes = nib.orientations.io_orientation(affine)
    orientation = "".join(nib.orientations.ornt2axcodes(codes))
    straight = nib.orientations.apply_orientation(stored, codes)
    affine = affine @ nib.orientations.inv_ornt_aff(codes, stored.shape[:3])
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    angle = float(np.degrees(np.arccos(np.clip(np.diag(axes).min(), -1, 1))))
    shear = float(np.abs(axes.T @ axes - np.eye(3)).max())
    lean = float(np.degrees(np.arcsin(min(shear, 1.0)))) if shear > MAX_SHEAR else 0.0
    if angle > MAX_ANGLE:
        notes.append("oblique")
    reverse = affine[:, [2, 1, 0, 3]]
    return Image(straight.transpose(), slope, inter, reverse, np.linalg.norm(reverse[:3, :3], axis=0), orientation,
                 round(angle, 3), notes, lean=round(lean, 3))  # fmt: skip
