"""Reading NRRD: a text header, an empty line, raw or gzip voxels (teem.sourceforge.net/nrrd/format.html)."""

from __future__ import annotations

import re

import numpy as np

from medfast.data.image import Bad, Image, oriented
from medfast.data.nifti import inflate, take

__all__ = ["parse", "sound"]

TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    "float": "f4",
    "double": "f8",
}
TO_RAS = {"right": 1.0, "left": -1.0, "anterior": 1.0, "posterior": -1.0, "superior": 1.0, "inferior": -1.0}
LONG = {name[0]: name for name in TO_RAS}


def parse(data: bytes | bytearray, channels: int | None = None, peek: bool = False) -> Image:
    """Image in the bytes of a .nrrd file. channels: how many the axis without a direction must hold. peek: judge the
    header alone, as in ``nifti.parse``. Raises Bad."""
    ends = [(data.find(end), len(end)) for end in (b"\n\n", b"\r\n\r\n")]
    place, length = min((end for end in ends if end[0] >= 0), default=(-1, 0))
    if place < 0:
        raise Bad("short-file", "the NRRD header has no end")
    head, place = data[:place], place + length
    fields = dict(line.split(":", 1) for line in head.decode("latin-1").splitlines()[1:]
                  if ":" in line and ":=" not in line and not line.startswith("#"))  # fmt: skip
    fields = {name.strip().lower(): value.strip() for name, value in fields.items()}
    if "data file" in fields or "datafile" in fields:
        raise Bad("detached", "the voxels are in another file (.nhdr); join both into one .nrrd")
    if fields.get("type", "").lower() not in TYPES:
        raise Bad("voxel-type", f"voxels are {fields.get('type')!r}, not one real number each")
    encoding = fields.get("encoding", "").lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise Bad("codec", f"encoding {encoding!r}; accepted are raw and gzip")
    dtype = np.dtype(TYPES[fields["type"].lower()]).newbyteorder(">" if fields.get("endian") == "big" else "<")
    try:
        sizes = [int(n) for n in fields["sizes"].split()]
        directions = _directions(fields, len(sizes))
    except (KeyError, ValueError) as error:
        raise Bad("affine", f"the NRRD header's sizes, space or directions cannot be read ({error})") from None
    _check_axes(sizes, directions, channels)
    if encoding != "raw" and not peek:
        data, place = inflate(data[place:]), 0
    voxels = take(data, dtype, tuple(sizes), place, peek)
    steps = {axis: direction for axis, direction in enumerate(directions) if direction is not None}
    rest = [axis for axis in range(len(sizes)) if axis not in steps]
    affine, notes = np.eye(4), [] if "space" in fields else ["no-orientation"]
    affine[:3, :3] = np.stack(list(steps.values()), axis=1)
    if origin := _vector(fields.get("space origin", "none")):
        affine[:3, 3] = np.array(origin) * _space(fields)
    return oriented(voxels.transpose([*steps, *rest]), 1.0, 0.0, sound(affine), notes)


def sound(affine: np.ndarray) -> np.ndarray:
    """The same affine, or Bad: axes must be finite, no two parallel."""
    columns = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or columns.min() <= 0:
        raise Bad("spacing", f"voxels of {columns.tolist()} mm")
    axes = affine[:3, :3] / columns
    if abs(np.linalg.det(axes)) < 1e-6:
        raise Bad("affine", "two axes are parallel")
    return affine


def _check_axes(sizes: list[int], directions: list, channels: int | None) -> None:
    spatial = [n for n, direction in zip(sizes, directions, strict=True) if direction is not None]
    rest = [n for n, direction in zip(sizes, directions, strict=True) if direction is None]
    if len(spatial) != 3 or min(sizes) < 1 or min(spatial) < 2:
        raise Bad("2d" if len(spatial) < 3 or min(spatial) < 2 else "4d", f"sizes {sizes} are no volume")
    if rest != ([] if channels is None else [channels]):
        asked = "none were" if channels is None else f"{channels} were"
        raise Bad("4d", f"sizes {sizes} hold {rest or 'no'} channels; {asked} asked for")


def _space(fields: dict[str, str]) -> np.ndarray:
    """Signs that turn the file's space into RAS."""
    name = fields.get("space", "ras").lower()
    words = [LONG[letter] for letter in name] if len(name) == 3 else name.split("-")
    if len(words) != 3 or any(word not in pair for word, pair in
                              zip(words, (("right", "left"), ("anterior", "posterior"), ("superior", "inferior")),
                                  strict=True)):  # fmt: skip
        raise Bad("affine", f"space {name!r} names no anatomical directions of three axes")
    return np.array([TO_RAS[word] for word in words])


def _vector(text: str) -> list[float] | None:
    return None if text == "none" else [float(x) for x in text.strip("()").split(",")]


def _directions(fields: dict[str, str], axes: int) -> list[np.ndarray | None]:
    """Step of each axis in RAS mm, None for an axis that is not spatial."""
    signs = _space(fields)
    if "space directions" in fields:
        vectors = [_vector(text) for text in re.findall(r"none|\([^)]*\)", fields["space directions"])]
        found = [None if v is None else np.array(v) * signs for v in vectors]
    else:
        steps = [float(x) for x in fields["spacings"].split()]
        unit = iter(np.eye(3))
        found = [None if not np.isfinite(mm) else next(unit) * mm for mm in steps]
    if len(found) != axes or any(v is not None and v.shape != (3,) for v in found):
        raise ValueError(f"{len(found)} directions for {axes} axes")
    return found
