"""Reading NIfTI without believing it.

Bytes are read once, hashed, inflated whole (only that checks the CRC), and the raw header is judged before anything
repairs it. What readers disagree about is refused, because then no answer is safe.

Voxels come back as (d, h, w): d from inferior to superior, h from posterior to anterior, w from left to right, that is
RAS+ with its axes reversed, so that w is the fastest axis as in the file.
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from medfast.data.image import Bad, Image, oriented

inflater: Any = zlib
with suppress(ImportError):
    from isal import isal_zlib as inflater  # twice as fast

__all__ = ["inflate", "parse", "read", "take"]

FREED = 1 << 24  # bytes that are given back at a time
CHUNK = 1 << 16  # bytes; what follows the end of a gzip member is copied, so a member must not be handed all the rest
MOST_DEFLATED = 1032  # bytes that a byte of gzip can hold
MAX_CONFLICT = 0.01  # share of a voxel by which qform, sform and pixdim may differ


def read(file: Path) -> tuple[str, bytearray]:
    """SHA-256 and bytes of a file, which readers may empty while they decode them."""
    with file.open("rb") as stream:
        data = bytearray(os.fstat(stream.fileno()).st_size)
        count = stream.readinto(data)
        data[count:] = stream.read()
    return hashlib.sha256(data).hexdigest(), data


def parse(data: bytes | bytearray, channels: int | None = None, peek: bool = False) -> Image:
    """Image in the bytes of a .nii or .nii.gz, told apart by content and not by name. Raises Bad.

    channels: how many volumes the fourth axis must hold; None takes three axes only. peek: data are the first bytes of
    a file, the header is judged and voxels come back as zeros that take no memory.
    """
    data = _first(data) if peek else inflate(data)
    header = _header(data)
    notes: list[str] = []
    shape, dtype = _shape(header, channels), _dtype(header)
    affine = _affine(header, notes)
    slope, inter = _scaling(header, notes)
    return oriented(take(data, dtype, shape, _offset(header), peek), slope, inter, affine, notes)


def take(
    data: bytes | bytearray, dtype: np.dtype, shape: tuple[int, ...], offset: int = 0, peek: bool = False
) -> np.ndarray:  # fmt: skip
    """Voxels, first axis fastest; zeros where only peeking. Raises Bad where the data end before the header says."""
    if peek:
        return np.broadcast_to(np.zeros((), dtype), shape)
    count = int(np.prod(shape, dtype=np.int64))
    needed = offset + count * dtype.itemsize
    if len(data) < needed:
        raise Bad("short-file", f"the header promises {needed} bytes, the file has {len(data)}")
    return np.frombuffer(data, dtype, count, offset).reshape(shape, order="F")


def inflate(data: bytes | bytearray) -> bytes | bytearray:
    """The bytes themselves, or what they hold if they are gzip; every member whole and with the right CRC, else Bad.

    A bytearray is emptied from its front on the way, so that memory does not hold all of both.
    """
    if not data:
        raise Bad("not-nifti", "the file is empty")
    if data[:2] != b"\x1f\x8b":
        return data
    # A member ends with its size, modulo 2**32: most files are one, and then nothing has to grow. Zeros of bytes() take
    # no memory before they are written over, so a size that is no size costs nothing.
    plain = io.BytesIO(bytes(min(int.from_bytes(data[-4:], "little"), MOST_DEFLATED * len(data))))
    place = 0
    while data[place : place + 2] == b"\x1f\x8b":
        stream = inflater.decompressobj(16 + zlib.MAX_WBITS)
        while not stream.eof:
            chunk = data[place : place + CHUNK]
            if not chunk:
                raise Bad("gzip-truncated", "the compressed data end before their end mark; the file is incomplete")
            try:
                plain.write(stream.decompress(chunk))
            except inflater.error as error:
                raise Bad("gzip-crc", f"the compressed data are damaged ({error})") from None
            place += len(chunk) - len(stream.unused_data)
            if place > FREED and isinstance(data, bytearray):
                del data[:place]
                place = 0
    if data[place:].strip(b"\0"):
        raise Bad("gzip-crc", f"{len(data) - place} bytes that are no gzip follow the compressed data")
    del data
    plain.truncate()
    return plain.getvalue()


def _first(data: bytes | bytearray) -> bytes | bytearray:
    """What the first bytes of a file hold, as far as they go."""
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return inflater.decompressobj(16 + zlib.MAX_WBITS).decompress(data)
    except inflater.error as error:
        raise Bad("gzip-crc", f"the compressed data are damaged ({error})") from None


def _header(data: bytes | bytearray) -> nib.Nifti1Header:
    for kind, size, magic in ((nib.Nifti1Header, 348, slice(344, 348)), (nib.Nifti2Header, 540, slice(4, 12))):
        if len(data) < size or data[magic][:1] != b"n":
            continue
        if data[magic][:3] in (b"ni1", b"ni2"):
            raise Bad("not-nifti", "the header of a .hdr/.img pair; convert it into one .nii file")
        if data[magic][:3] not in (b"n+1", b"n+2"):
            continue
        for endianness in "<>":
            if np.frombuffer(data, f"{endianness}i4", 1)[0] == size:
                return kind(bytes(data[:size]), endianness=endianness, check=False)
    looks = "text" if data[:64].isascii() and b"\0" not in data[:64] else "another format"
    raise Bad("not-nifti", f"no NIfTI header: {len(data)} bytes that look like {looks}")


def _offset(header: nib.Nifti1Header) -> int:
    """Where the voxels start, in bytes; a float in NIfTI-1."""
    offset = float(header["vox_offset"])
    if not np.isfinite(offset) or offset < header.sizeof_hdr:
        raise Bad("not-nifti", f"voxels would start at byte {offset:g}, which is not behind the header")
    return int(offset)


def _shape(header: nib.Nifti1Header, channels: int | None) -> tuple[int, ...]:
    axes = int(header["dim"][0])
    if not 1 <= axes <= 7:
        raise Bad("not-nifti", f"the header names {axes} axes")
    dim = [int(n) for n in header["dim"][1 : axes + 1]]
    if min(dim) < 1:
        raise Bad("not-nifti", f"the header's shape is {dim}")
    dim = dim[:3] + [n for n in dim[3:] if n > 1]
    if len(dim) < 3 or min(dim[:3]) < 2:
        raise Bad("2d", f"shape {dim} is no volume")
    if channels is None and len(dim) > 3:
        raise Bad("4d", f"shape {dim} has {len(dim)} axes; a volume has three. Split it, or ask for channels")
    if channels is not None and dim[3:] != [channels]:
        raise Bad("4d", f"shape {dim} does not hold {channels} channels, as asked for")
    return tuple(dim)


def _dtype(header: nib.Nifti1Header) -> np.dtype:
    code = int(header["datatype"])
    try:
        dtype = header.get_data_dtype()
    except (KeyError, HeaderDataError):
        raise Bad("voxel-type", f"unknown voxel type {code}") from None
    if dtype.kind not in "iuf":
        raise Bad("voxel-type", f"voxels are {header._data_type_codes.label[code]}, not one real number each")
    if int(header["bitpix"]) not in (0, 8 * dtype.itemsize):
        raise Bad("voxel-type", f"voxel type {dtype} contradicts bitpix {int(header['bitpix'])}")
    return dtype


def _scaling(header: nib.Nifti1Header, notes: list[str]) -> tuple[float, float]:
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if not np.isfinite(slope) or slope == 0:
        if np.isfinite(inter) and inter != 0:  # an offset that the standard says is not applied
            notes.append("no-slope")
        return 1.0, 0.0
    if not np.isfinite(inter):
        raise Bad("voxel-type", f"scl_slope is {slope} but scl_inter is {inter}")
    return slope, inter


def _affine(header: nib.Nifti1Header, notes: list[str]) -> np.ndarray:
    """4x4, (i, j, k, 1) of the file to RAS mm. Where the header gives several answers they must agree."""
    unit = int(header["xyzt_units"]) & 7
    if unit not in (0, 2):
        name = {1: "metres", 3: "micrometres"}.get(unit, f"unit {unit}")
        raise Bad("spacing", f"the header gives lengths in {name}, which most readers ignore; rewrite it in mm")
    pixdim = np.abs(header["pixdim"][1:4].astype(np.float64))
    sound = bool(np.isfinite(pixdim).all() and (pixdim > 0).all())
    if not sound:
        notes.append("pixdim")
    answers = {}
    if int(header["sform_code"]) > 0:
        answers["sform"] = np.asarray(header.get_sform(), np.float64)
    if int(header["qform_code"]) > 0 and sound:
        answers["qform"] = _qform(header)
    if not answers:
        if not sound:
            raise Bad("spacing", f"no voxel size: pixdim is {header['pixdim'][1:4].tolist()} and there is no affine")
        notes.append("no-orientation")
        return np.diag([*pixdim, 1.0])
    for name, affine in answers.items():
        columns = np.linalg.norm(affine[:3, :3], axis=0)
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6 * max(columns.prod(), 1e-12):
            raise Bad("affine", f"the {name} is singular or not finite")
    _agree(answers, pixdim if sound else None)
    return answers["sform"] if "sform" in answers else answers["qform"]


def _qform(header: nib.Nifti1Header) -> np.ndarray:
    try:
        return np.asarray(header.get_qform(), np.float64)
    except (ValueError, HeaderDataError) as error:
        raise Bad("affine", f"the qform cannot be read ({error})") from None


def _agree(answers: dict[str, np.ndarray], pixdim: np.ndarray | None) -> None:
    axes = {name: affine[:3, :3] for name, affine in answers.items()}
    sizes = {name: np.linalg.norm(matrix, axis=0) for name, matrix in axes.items()}
    if len(axes) == 2:
        # Origins may differ (a template's sform); they do not touch the voxels that are stored.
        apart = np.linalg.norm(axes["sform"] - axes["qform"], axis=0) / sizes["qform"]
        if apart.max() > MAX_CONFLICT:
            raise Bad("qform-sform", f"qform and sform differ by {apart.max():.0%} of a voxel; readers take either")
    elif pixdim is not None:
        ((name, size),) = sizes.items()
        if (np.abs(size - pixdim) > MAX_CONFLICT * pixdim).any():
            raise Bad("qform-sform", f"{name} says voxels of {np.round(size, 4).tolist()} mm, "
                                     f"pixdim says {np.round(pixdim, 4).tolist()}; readers take either")  # fmt: skip
