"""Formats, told apart by their first bytes and never by a name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from medfast.data import dicom, metaimage, nifti, nrrd, picture
from medfast.data.image import Bad, Blobs, Image
from medfast.data.inputs import Case

__all__ = ["decode", "fetch", "peek"]

HEAD = 1 << 16  # bytes that hold the header of any volume


def fetch(case: Case) -> tuple[str, Blobs]:
    """(hash, bytes of each file). The hash of several files does not depend on their names or order."""
    found = [nifti.read(file) for file in case.files]
    source = found[0][0] if len(found) == 1 else _digest(*sorted(digest for digest, _ in found))
    if case.label is not None:
        source = _digest(source, "label", nifti.read(case.label)[0])
    return source, [data for _, data in found]


def decode(blobs: Blobs, *, axes: int = 3, channels: int | None = None, lean: bool = False) -> Image:
    """The image in the bytes of a case, which are taken out of ``blobs`` so that they are freed while it is made.

    axes: 3, or 2 for radiographs. channels: how many a voxel must hold, None for a plain volume. lean: take axes that
    are off a right angle. Raises Bad.
    """
    return _upright(_decoded(blobs, axes, channels), lean)


def _upright(image: Image, lean: bool) -> Image:
    if image.lean and not lean:
        raise Bad(image.leaning, f"two axes are {image.lean:.1f} degrees off a right angle (gantry tilt); --straighten "
                                 "resamples such volumes onto a straight grid")  # fmt: skip
    return image


def _decoded(blobs: Blobs, axes: int, channels: int | None) -> Image:
    first = blobs[0]
    if first[128:132] == b"DICM":
        if channels is not None:
            raise Bad("4d", f"a DICOM series holds one channel, {channels} were asked for")
        del first
        return dicom.parse(blobs) if axes == 3 else dicom.parse_picture(blobs.pop())
    if first[:8] == b"\x89PNG\r\n\x1a\n":
        if axes == 3:
            raise Bad("2d", "a picture is no volume; --modality xr takes pictures")
        return picture.parse(blobs.pop())
    if axes == 2:
        raise Bad("3d", "no picture: PNG and single DICOM images are accepted here")
    reader = _reader(first)
    del first
    return reader(blobs.pop(), channels)


def peek(case: Case, channels: int | None = None, lean: bool = False) -> Image:
    """The volume that the headers of a case promise; its voxels are zeros that take no memory. Raises Bad."""
    with case.path.open("rb") as stream:
        head = stream.read(HEAD)
    if head[128:132] == b"DICM":
        return _upright(dicom.peek(case.files), lean)
    return _upright(_reader(head)(head, channels, peek=True), lean)


def _reader(first: bytes | bytearray) -> Callable[..., Image]:
    if first[:4] == b"NRRD":
        return nrrd.parse
    return metaimage.parse if b"ObjectType" in first[:200] or b"NDims" in first[:200] else nifti.parse


def _digest(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
