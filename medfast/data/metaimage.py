"""Reading MetaImage (.mha): ``Name = value`` lines, the last one ``ElementDataFile = LOCAL``, then the voxels."""

from __future__ import annotations

import zlib

import numpy as np

from medfast.data.image import Bad, Image, oriented
from medfast.data.nifti import take
from medfast.data.nrrd import sound

__all__ = ["parse"]

TYPES = {"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4",
         "MET_UINT": "u4", "MET_FLOAT": "f4", "MET_DOUBLE": "f8"}  # fmt: skip
LOCAL = b"ElementDataFile = LOCAL"
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def parse(data: bytes | bytearray, channels: int | None = None, peek: bool = False) -> Image:
    """Image in the bytes of a .mha file. channels: how many numbers each voxel must hold. peek: judge the header
    alone, as in ``nifti.parse``. Raises Bad."""
    place = data.find(LOCAL)
    if place < 0:
        raise Bad("detached", "no 'ElementDataFile = LOCAL': the voxels are elsewhere (.mhd); join both into one .mha")
    head, place = data[:place], data.find(b"\n", place) + 1
    pairs = [line.split("=", 1) for line in head.decode("latin-1").splitlines() if "=" in line]
    fields = {name.strip(): value.strip() for name, value in pairs}
    if fields.get("ElementType") not in TYPES:
        raise Bad("voxel-type", f"voxels are {fields.get('ElementType')!r}, not one real number each")
    big = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False")).lower() == "true"
    dtype = np.dtype(TYPES[fields["ElementType"]]).newbyteorder(">" if big else "<")
    try:
        sizes, affine = [int(n) for n in fields["DimSize"].split()], _affine(fields)
        held = int(fields.get("ElementNumberOfChannels", 1))
    except (KeyError, ValueError) as error:
        raise Bad("affine", f"the MetaImage header's sizes or directions cannot be read ({error})") from None
    if len(sizes) != 3 or min(sizes) < 2:
        raise Bad("4d" if len(sizes) > 3 else "2d", f"DimSize {sizes} is no volume")
    if held != (channels or 1):
        raise Bad("4d", f"each voxel holds {held} numbers; {channels or 1} were asked for")
    if not peek and fields.get("CompressedData", "False").lower() == "true":
        data, place = _inflate(data[place:]), 0
    voxels = take(data, dtype, (held, *sizes), place, peek)
    voxels = voxels[0] if channels is None else voxels.transpose(1, 2, 3, 0)
    return oriented(voxels, 1.0, 0.0, sound(affine), [])


def _affine(fields: dict[str, str]) -> np.ndarray:
    """4x4, (i, j, k, 1) to RAS mm. The matrix of the header lists one axis after another."""
    spacing = [float(x) for x in (fields.get("ElementSpacing") or fields["ElementSize"]).split()]
    turn = fields.get("TransformMatrix", fields.get("Rotation", fields.get("Orientation", "1 0 0 0 1 0 0 0 1")))
    origin = fields.get("Offset", fields.get("Position", fields.get("Origin", "0 0 0")))
    affine = np.eye(4)
    affine[:3, :3] = np.array([float(x) for x in turn.split()]).reshape(3, 3).T * spacing
    affine[:3, 3] = [float(x) for x in origin.split()]
    return LPS_TO_RAS @ affine


def _inflate(body: bytes | bytearray) -> bytes:
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(body)
    except zlib.error as error:
        raise Bad("gzip-crc", f"the compressed data are damaged ({error})") from None
    if not stream.eof:
        raise Bad("gzip-truncated", "the compressed data end before their end mark; the file is incomplete")
    return plain
