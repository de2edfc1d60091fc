"""One decoded case into what the store keeps of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from medfast.data import checks, resample
from medfast.data.formats import decode
from medfast.data.image import Bad, Blobs, Image
from medfast.data.recipe import DICOM
from medfast.data.straighten import nearest, straighten
from medfast.data.units import Reading, Unit, fit

__all__ = ["Product", "label", "make"]

QUANTILES = (0.5, 5, 25, 50, 75, 95, 99.5)
BODY_MARGIN = 5  # voxels of the new grid that a body box keeps around the body
BODY_LEVEL = {"HU": checks.BODY, "percentile": 100, "zscore": -500}
LARGEST_LABEL = 32767
Product = tuple[np.ndarray, dict[str, Any]]


def make(blobs: Blobs, recipe: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any], Image]:
    """(volume, index line, image): int16 (d, h, w), (c, d, h, w) or (h, w) on the new grid; its part of the index
    line; and what it was made of. Takes the bytes out of ``blobs``. Raises Bad."""
    image = decode(blobs, axes=recipe["dimensions"], channels=recipe["channels"],
                   lean=recipe.get("straighten", False))  # fmt: skip
    if image.modality and image.modality not in DICOM[recipe["modality"]]:
        raise Bad("modality", f"the file says its modality is {image.modality}, the store holds {recipe['modality']}")
    volume, record = _picture(image, recipe) if recipe["dimensions"] == 2 else _volume(image, recipe)
    quantiles = np.percentile(volume, QUANTILES).round(1).tolist()
    return volume, {
        "shape": list(volume.shape),
        **record,
        "percentiles": dict(zip(map(str, QUANTILES), quantiles, strict=True)),
        "source": {"shape": list(image.shape), "spacing": [round(mm, 5) if mm == mm else None for mm in image.spacing],
                   "orientation": image.orientation, "angle": image.angle},
        "notes": image.notes,
    }, image  # fmt: skip


def _volume(image: Image, recipe: dict[str, Any]) -> Product:
    checks.check_geometry(image)
    channels = image.stored if image.stored.ndim == 4 else image.stored[None]
    made = [_channel(Image(**{**vars(image), "stored": stored}), recipe) for stored in channels]
    new = recipe["spacing"]
    volume = made[0][0] if image.stored.ndim == 3 else np.stack([one for one, _, _ in made])
    checks.check_stored(volume.shape[-3:])
    level = BODY_LEVEL[recipe["unit"]]
    box, foreground = checks.body_box(volume if volume.ndim == 3 else volume.max(0), level)
    _check_holes(made, image.spacing, new, box)
    affine = resample.new_affine(image.affine, image.spacing, new)
    if image.lean:
        volume, affine = straighten(volume, affine, new, recipe["fill"])
        checks.check_stored(volume.shape[-3:])
        box, foreground = checks.body_box(volume if volume.ndim == 3 else volume.max(0), level)
    if recipe["body"]:
        volume, box, affine = _cut(volume, box, affine)
    units = [unit for _, unit, _ in made]
    voxels = [reading.voxels for _, _, reading in made]
    return volume, {
        "voxels": voxels[0] if len(voxels) == 1 else checks.joined(voxels),
        "spacing": [new] * 3,
        "affine": np.round(affine, 6).tolist(),
        "body": box,
        "foreground": foreground,
        "filled": sum(len(reading.wrong) for _, _, reading in made),
        **_scale(units),
    }  # fmt: skip


def _channel(image: Image, recipe: dict[str, Any]) -> tuple[np.ndarray, Unit, Reading]:
    unit = fit(image, recipe["unit"])
    reading = Reading(image, unit)
    volume = resample.EXECUTORS[recipe["executor"]](
        reading.slabs(), image.stored.shape, image.spacing, recipe["spacing"], recipe["kernel"], unit.range[:2]
    )
    if unit.name == "HU":
        checks.check_hounsfield(reading.histogram)
    return volume, unit, reading  # fmt: skip


def _picture(image: Image, recipe: dict[str, Any]) -> Product:
    """A radiograph keeps its own pixels."""
    if min(image.shape) < checks.LIMITS["axis_voxels"]:
        raise Bad("too-small", f"{list(image.shape)} pixels; each axis needs {checks.LIMITS['axis_voxels']}")
    unit = fit(image, recipe["unit"])
    reading = Reading(Image(**{**vars(image), "stored": image.stored[None]}), unit)
    (plane,) = np.concatenate(list(reading.slabs()))
    if len(reading.wrong):
        raise Bad("non-finite", f"{len(reading.wrong)} pixels are NaN or infinite")
    return plane, {"voxels": reading.voxels, "body": [0, 0, *plane.shape], **_scale([unit])}


def _scale(units: list[Unit]) -> dict[str, Any]:
    return {} if units[0].name == "HU" else {"offset": [u.offset for u in units], "scale": [u.scale for u in units]}


def _check_holes(made: list, spacing: np.ndarray, new: float, box: list[int]) -> None:
    """Values that are no numbers were filled; inside the body that would be a lie."""
    for _, _, reading in made:
        place = (reading.wrong + 0.5) * spacing / new
        inside = ((place >= box[:3]) & (place < box[3:])).all(1)
        if inside.any():
            raise Bad("non-finite", f"{inside.sum()} voxels inside the body's box are NaN or infinite")


def _cut(volume: np.ndarray, box: list[int], affine: np.ndarray) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Volume, body box and affine cut to the body with a margin, and to no less than a volume must have."""
    size, least = np.array(volume.shape[-3:]), checks.LIMITS["axis_voxels"]
    low, high = np.array(box[:3]) - BODY_MARGIN, np.array(box[3:]) + BODY_MARGIN
    short = np.maximum(0, least - (high - low))
    low = np.minimum(np.maximum(low - short // 2, 0), size - least)
    high = np.minimum(np.maximum(high + (short + 1) // 2, low + least), size)
    affine = affine.copy()
    affine[:3, 3] += affine[:3, :3] @ low
    cut = volume[(..., *(slice(a, b) for a, b in zip(low, high, strict=True)))]
    return np.ascontiguousarray(cut), (np.array(box) - np.concatenate([low, low])).tolist(), affine


def label(data: bytes, image: Image, record: dict[str, Any], recipe: dict[str, Any]) -> Product:
    """Label volume on the grid of the stored volume, nearest neighbour: uint8, or int16 where a class is above 255.

    Raises Bad("label") where it is no map of classes, or lies on another grid than the image.
    """
    try:
        found = decode([data], axes=recipe["dimensions"], lean=recipe.get("straighten", False))
    except Bad as bad:
        raise Bad("label", f"the label volume is bad ({bad.kind}): {bad}") from None
    if found.shape != image.shape:
        raise Bad("label", f"the label volume has {list(found.shape)} voxels (d, h, w), the image {list(image.shape)}")
    if np.abs(found.affine - image.affine).max() > 0.5 * np.nanmin(image.spacing):
        raise Bad("label", "the label volume lies elsewhere than the image: their affines differ by over half a voxel")
    values = found.stored if recipe["dimensions"] == 2 else _nearest(found, record, recipe["spacing"], image.affine)
    values = values * found.slope + found.inter
    if not np.isfinite(values).all() or (values != np.rint(values)).any() or values.min() < 0:
        raise Bad("label", "classes must be whole numbers from 0; this looks like an image")
    if values.max() > LARGEST_LABEL:
        raise Bad("label", f"class {int(values.max())} is above {LARGEST_LABEL}")
    values = values.astype(np.uint8 if values.max() < 256 else np.int16)
    return values, {"classes": np.unique(values).tolist()}


def _nearest(found: Image, record: dict[str, Any], new: float, affine: np.ndarray) -> np.ndarray:
    """The old voxel that each new voxel's centre lies in."""
    if found.lean:
        return nearest(found.stored, affine, np.array(record["affine"]), tuple(record["shape"][-3:]))
    first = np.linalg.solve(affine, np.array(record["affine"]) @ [0, 0, 0, 1])[:3]
    at = [
        np.clip(np.floor(start + 0.5 + np.arange(count) * new / mm + 1e-6), 0, size - 1).astype(int)
        for start, count, mm, size in zip(first, record["shape"][-3:], found.spacing, found.shape, strict=True)
    ]
    return found.stored[np.ix_(*at)]  # fmt: skip
