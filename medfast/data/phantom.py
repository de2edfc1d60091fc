"""CT-like volumes that medfast writes itself, for machines that have no CT: a trunk with what a trunk holds, and where
each organ in it is.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from torch.nn import functional as F

__all__ = ["ORGANS", "trunk", "write_phantoms"]

SIZE = (360.0, 280.0, 300.0)  # mm, field of view (w, h, d)
SPACINGS = ((1.6, 1.6, 3.0), (2.0, 2.0, 2.5), (1.8, 1.8, 5.0), (1.5, 1.5, 4.0), (2.2, 2.2, 2.2))
ORIENTATIONS = ("RAS", "LPS", "LAS", "RPI")
ORGANS = (  # class i + 1 of a label volume; 0 is everything else
    "liver", "spleen", "stomach", "right kidney", "left kidney", "right lung", "left lung", "heart", "gall bladder",
    "aorta", "vertebrae",
)  # fmt: skip


class Body(NamedTuple):
    """What is painted, (d, h, w) each: hu, fp32; organ, uint8, 0 or a class of ``ORGANS``."""

    hu: np.ndarray
    organ: np.ndarray

    def paint(self, where: np.ndarray, hu, organ: str | None = None) -> None:
        """``where``: bool mask. What is painted over belongs to ``organ``, or to none."""
        self.hu[where] = hu
        self.organ[where] = 0 if organ is None else ORGANS.index(organ) + 1


def write_phantoms(
    folder: str | Path, count: int, seed: int = 0, *, spacing: float | None = None, labels: bool = False
) -> list[Path]:
    """Write ``count`` different phantoms as .nii.gz, int16 HU, of several spacings and orientations. Returns them.

    spacing: mm, of all of them along all axes instead. labels: write where the organs are as well, to ``labels/`` as
    uint8 classes of ``ORGANS``, and ``phantoms.csv``, the list of both that ``medfast data prepare`` takes.
    """
    folder = Path(folder)
    (folder / "labels" if labels else folder).mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        voxel = SPACINGS[number % len(SPACINGS)] if spacing is None else (spacing, spacing, spacing)
        volume, organs = trunk(rng, voxel)
        orientation = ORIENTATIONS[number % len(ORIENTATIONS)]
        files.append(folder / f"phantom_{number:03d}.nii.gz")
        _write(files[-1], volume, voxel, orientation)
        if labels:
            _write(folder / "labels" / files[-1].name, organs, voxel, orientation)
    if labels:
        rows = [f"{file.name},labels/{file.name}" for file in files]
        (folder / "phantoms.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    return files


def _write(file: Path, volume: np.ndarray, spacing: tuple[float, float, float], orientation: str) -> None:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.array(SIZE) / 2
    image = nib.Nifti1Image(volume.transpose(2, 1, 0), affine)
    image = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(orientation)).tolist())
    image.header.set_xyzt_units("mm")
    file.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def trunk(rng: np.random.Generator, spacing: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """(int16 HU, uint8 classes of ``ORGANS``), (d, h, w) each, of a chest and abdomen. spacing: mm (w, h, d).

    From inferior to superior, posterior to anterior.
    """
    z, y, x = _coordinates(rng, spacing)
    build = rng.uniform(0.85, 1.1)
    a, b = 150 * build, 105 * build
    waist = 1 - 0.06 * np.cos(z / 60)
    radius = np.sqrt((x / (a * waist)) ** 2 + (y / (b * waist)) ** 2)
    fat = rng.uniform(8, 25)
    body = Body(np.full(radius.shape, -1000.0, np.float32), np.zeros(radius.shape, np.uint8))
    body.paint(radius < 1, -105)
    body.paint(radius < 1 - fat / b, 50)
    inside = radius < 1 - (fat + 12) / b
    body.paint(inside, -95)
    _organs(body, x, y, z, rng, inside)
    _bones(body, x, y, z, build, rng)
    _vessels(body, x, y, z, rng)
    _lesions(body.hu, x, y, z, rng)
    body.paint((np.abs(y + b + 14) < 4) & (np.abs(x) < 190), -650)
    return _scan(body.hu, spacing, rng), body.organ


def _coordinates(rng: np.random.Generator, spacing: tuple[float, float, float]) -> tuple[np.ndarray, ...]:
    """mm from the middle, (d, h, w) each, bent a little so that no two phantoms have the same shapes."""
    counts = [round(size / mm) for size, mm in zip(SIZE, spacing, strict=True)]
    axes = [((np.arange(n) + 0.5) * mm - size / 2).astype(np.float32)
            for n, mm, size in zip(counts, spacing, SIZE, strict=True)]  # fmt: skip
    grid = np.meshgrid(*reversed(axes), indexing="ij")
    field = torch.from_numpy(rng.normal(0, 5, (1, 3, 6, 6, 6)).astype(np.float32))
    bend = F.interpolate(field, size=grid[0].shape, mode="trilinear", align_corners=True)[0].numpy()
    return tuple(axis + shift for axis, shift in zip(grid, bend, strict=True))


def _ball(x, y, z, centre, radii) -> np.ndarray:
    """Ellipsoid, centre and radii as (x, y, z) in mm."""
    (cx, cy, cz), (rx, ry, rz) = centre, radii
    return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2 < 1


def _organs(body: Body, x, y, z, rng: np.random.Generator, inside: np.ndarray) -> None:
    contrast = rng.uniform(0, 70)
    jitter = lambda *v: tuple(np.array(v) + rng.normal(0, 4, 3))  # noqa: E731
    parts = [  # centre, radii (mm), HU, organ; later ones lie in front
        (jitter(70, 5, -40), (62, 62, 58), 55 + 0.6 * contrast, "liver"),  # the lungs sit on its dome
        (jitter(-85, -20, -40), (32, 38, 45), 45 + 0.9 * contrast, "spleen"),
        (jitter(-45, 45, -50), (42, 30, 38), 20, "stomach"),
        (jitter(-45, 52, -45), (26, 14, 24), -990, "stomach"),  # gas in it
        (jitter(58, -48, -95), (24, 24, 48), 30 + 1.6 * contrast, "right kidney"),
        (jitter(-58, -48, -90), (24, 24, 48), 30 + 1.6 * contrast, "left kidney"),
        (jitter(66, 0, 75), (46, 68, 85), -860, "right lung"),
        (jitter(-66, 0, 75), (44, 66, 85), -860, "left lung"),
        (jitter(-18, 22, 50), (46, 40, 42), 40 + contrast, "heart"),
        (jitter(50, 40, -55), (16, 14, 24), 8, "gall bladder"),
    ]
    for centre, radii, value, organ in parts:
        body.paint(_ball(x, y, z, centre, radii) & inside, value, organ)
    for _ in range(14):  # bowel, some loops with gas
        centre = rng.uniform((-80, -5, -150), (80, 70, -95))
        content = rng.choice([25, 40, 15, -940], p=[0.3, 0.3, 0.2, 0.2])
        body.paint(_ball(x, y, z, centre, rng.uniform(12, 22, 3)) & inside, content)


def _bones(body: Body, x, y, z, build: float, rng: np.random.Generator) -> None:
    spine_y = -62 * build
    disc = np.mod(z + rng.uniform(0, 30), 32) < 7
    column = (x / 22) ** 2 + ((y - spine_y) / 18) ** 2 < 1
    core = (x / 18) ** 2 + ((y - spine_y) / 14) ** 2 < 1
    body.paint(column, np.where(disc, 80, np.where(core, 190, 650))[column], "vertebrae")
    canal = y - spine_y + 25
    body.paint((x / 20) ** 2 + (canal / 15) ** 2 < 1, 550, "vertebrae")
    body.paint((x / 11) ** 2 + (canal / 9) ** 2 < 1, 25)
    body.paint((np.abs(x) < 4) & (y < spine_y - 38) & (y > spine_y - 62 * build + 24) & ~disc, 500, "vertebrae")
    ring = np.sqrt((x / (126 * build)) ** 2 + (y / (84 * build)) ** 2)
    slope = np.mod(z + 0.45 * y, 27)
    rib = (np.abs(ring - 1) < 0.045) & (slope < 10) & (z > -70) & (y > spine_y - 6)
    body.paint(rib, np.where(np.abs(ring - 1) < 0.02, 280, 750)[rib])
    body.paint(_ball(x, y, z, (0, 84 * build, 75), (16, 6, 80)), 350)
    for side in (-1, 1):
        wing = _ball(x, y, z, (side * 75, -35, -160), (48, 30, 40)) & (np.abs(y + 35 + 0.3 * side * x) < 14)
        body.paint(wing, 420)


def _tube(field: np.ndarray, x, y, z, path: np.ndarray, radius: float, value: float) -> None:
    """Fill balls along a path (points, 3) of x, y, z in mm; only the neighbourhood of each point is touched."""
    reach = radius + 12  # the grid is bent by a few mm
    step = np.array([x[0, 0, -1] - x[0, 0, 0], y[0, -1, 0] - y[0, 0, 0], z[-1, 0, 0] - z[0, 0, 0]]) / (
        np.array(field.shape[::-1]) - 1)  # fmt: skip
    first = np.array([x[0, 0, 0], y[0, 0, 0], z[0, 0, 0]])
    for point in path:
        low = np.maximum(0, (point - reach - first) / step - 4).astype(int)
        high = np.maximum(0, (point + reach - first) / step + 5).astype(int)
        near = tuple(slice(lo, hi) for lo, hi in zip(low[::-1], high[::-1], strict=True))
        field[near][_ball(x[near], y[near], z[near], point, (radius,) * 3)] = value


def _vessels(body: Body, x, y, z, rng: np.random.Generator) -> None:
    blood = rng.uniform(45, 230)
    along = np.linspace(-150, 60, 60)
    swing = rng.uniform(4, 10)
    tubes = (
        ((-12 + swing * np.sin(along / 45), -30 + 0 * along, along), 11, blood, ORGANS.index("aorta") + 1),
        ((20 + 0 * along, -28 + swing * np.cos(along / 50), along), 12, 0.8 * blood, 0),  # vena cava
        ((0 * along[30:], -8 + 0 * along[30:], along[30:] + 90), 9, -990, 0),  # trachea
    )
    for path, radius, value, organ in tubes:
        _tube(body.hu, x, y, z, np.stack(path, 1), radius, value)
        _tube(body.organ, x, y, z, np.stack(path, 1), radius, organ)
    for root, value, count in (((66, -5, 60), 40, 14), ((-66, -5, 60), 40, 14), ((62, 0, -35), blood, 9)):
        for _ in range(count):  # curved branches from the root of lung or liver
            direction = rng.normal(size=3)
            direction /= np.linalg.norm(direction)
            bend = rng.normal(0, 12, 3)
            t = np.linspace(0, 1, 22)[:, None]
            path = np.array(root) + t * direction * rng.uniform(30, 50) + t**2 * bend
            _tube(body.hu, x, y, z, path, rng.uniform(1.8, 3.6), value)


def _lesions(hu, x, y, z, rng: np.random.Generator) -> None:
    for centre, value in (((70, 5, -40), -35), ((66, 0, 75), 900), ((-66, 0, 75), 900), ((58, -48, -95), -60)):
        for _ in range(rng.integers(0, 4)):
            where = _ball(x, y, z, np.array(centre) + rng.normal(0, 16, 3), rng.uniform(4, 13, 3))
            hu[where & (hu > -900) & (hu < 300)] += value


def _scan(hu: np.ndarray, spacing: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    """Blur of the scanner, noise that is stronger where more is absorbed, the scan circle's padding; int16."""
    blurred = F.avg_pool2d(torch.from_numpy(hu), 3, 1, 1, count_include_pad=False).numpy()
    hu = 0.5 * hu + 0.5 * blurred
    white = rng.normal(size=hu.shape).astype(np.float32)
    grain = F.avg_pool2d(torch.from_numpy(white), 2, 1, 1)[:, : hu.shape[1], : hu.shape[2]].numpy()
    level = rng.uniform(12, 28) * np.sqrt(3.0 / spacing[2])
    hu = hu + level * (0.6 * white + grain) * (0.45 + 0.55 * (hu > -800))
    h, w = hu.shape[1:]
    y, x = np.ogrid[:h, :w]
    outside = ((x - w / 2 + 0.5) * spacing[0]) ** 2 + ((y - h / 2 + 0.5) * spacing[1]) ** 2 > 196**2
    hu[:, outside] = rng.choice([-2000, -3024, -1024])
    return np.rint(np.clip(hu, -3024, 3071)).astype(np.int16)
