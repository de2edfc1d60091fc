"""Crops as pictures: three planes as a radiologist expects them, with masks, attention and error laid over them.

Stored axes run d from feet to head, h from back to front, w from the patient's left to right (``data.nifti``).
Pictures follow radiological convention: the patient's right is on the left, front and head are up.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.image import imsave
from torch import Tensor

__all__ = ["ERROR_TOP", "PLANES", "Plane", "colours", "grey", "png", "richness", "slices_of", "tint", "to_voxels"]

ERROR_TOP = 0.5  # window units at the bright end of the error map


@dataclass(frozen=True)
class Plane:
    """A family of slices. axis: the one that is cut; flip: of the slice's two axes, rows then columns; edges: letters
    at the left, right and top of the picture.
    """

    name: str
    axis: int
    flip: tuple[bool, bool]
    edges: tuple[str, str, str]

    def cut(self, volume: Tensor, index: int) -> np.ndarray:
        """(rows, columns) of a (d, h, w) volume, turned as it is looked at."""
        flat = volume.select(self.axis, index)
        return flat.flip([axis for axis in (0, 1) if self.flip[axis]]).cpu().numpy()


PLANES = (
    Plane("axial", 0, (True, True), ("R", "L", "A")),
    Plane("coronal", 1, (True, True), ("R", "L", "S")),
    Plane("sagittal", 2, (True, True), ("A", "P", "S")),
)


def richness(image: Tensor) -> float:
    """Entropy of grey values in [0, 1]: large where air, fat, organs and bone are all there, 0 for air alone."""
    share = torch.histc(image.float().cpu(), bins=16, min=0, max=1) / max(image.numel(), 1)
    return float(torch.special.entr(share).sum())


def slices_of(volume: Tensor) -> tuple[int, ...]:
    """One slice per plane of a (d, h, w) volume: the richest of the middle half."""
    chosen = []
    for plane in PLANES:
        length = volume.shape[plane.axis]
        middle = range(length // 4, max(length - length // 4, length // 4 + 1))
        chosen.append(max(middle, key=lambda index: richness(volume.select(plane.axis, index))))
    return tuple(chosen)


def to_voxels(cells: Tensor, size: tuple[int, ...]) -> Tensor:
    """(*cells) values repeated to (*size) voxels; the last cell is cut where the sizes do not divide."""
    for axis, length in enumerate(size):
        cells = cells.repeat_interleave(math.ceil(length / cells.shape[axis]), dim=axis).narrow(axis, 0, length)
    return cells


def grey(image: np.ndarray) -> str:
    """(rows, columns) in [0, 1] as a data URI."""
    return png(np.repeat(np.clip(image, 0, 1)[..., None], 3, axis=-1))


def colours(image: np.ndarray, name: str, top: float, alpha: float | np.ndarray = 1.0) -> str:
    """(rows, columns) in [0, top] through a colour map, as a data URI with transparency ``alpha``."""
    rgba = colormaps[name](np.clip(image / top, 0, 1))
    rgba[..., 3] = alpha
    return png(rgba)


def tint(where: np.ndarray, colour: tuple[float, float, float], alpha: float = 0.55) -> str:
    """A transparent picture with ``colour`` where (rows, columns) bool is True, as a data URI."""
    rgba = np.zeros((*where.shape, 4))
    rgba[where] = (*colour, alpha)
    return png(rgba)


def png(pixels: np.ndarray) -> str:
    """(rows, columns, 3 or 4) in [0, 1] as a data URI."""
    file = io.BytesIO()
    imsave(file, np.ascontiguousarray((pixels * 255).round().astype(np.uint8)), format="png", metadata={"Software": ""})
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
