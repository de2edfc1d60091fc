"""Reading DICOM without believing it: slices of one series into a volume, or one radiograph.

File names and instance numbers say nothing about order: slices are sorted by position along the slice normal, and what
is not evenly spaced, straight and whole is refused, because readers fill such gaps without a word.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from medfast.data import dicom_frames
from medfast.data.image import MAX_SHEAR, Bad, Blobs, Image, oriented

__all__ = ["by_series", "parse", "parse_picture", "peek"]

MAX_GAP = 1.05  # largest over smallest distance between neighbouring slices
SAME_PLACE = 1e-3  # mm; closer slices are one slice twice
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
HEADER = ["SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing",
          "Rows", "Columns", "NumberOfFrames", "Modality", "RescaleSlope", "RescaleIntercept", "SamplesPerPixel",
          "PhotometricInterpretation", "PatientID", "BitsAllocated", *dicom_frames.GROUPS]  # fmt: skip


def _pydicom():
    try:
        import pydicom
    except ModuleNotFoundError:
        raise ModuleNotFoundError("reading DICOM needs pydicom: pip install 'medfast[dicom]'") from None
    return pydicom


def header(source: Path | bytes | bytearray):
    """The tags of HEADER of one file; an empty data set where it is no DICOM."""
    pydicom = _pydicom()
    from pydicom.errors import InvalidDicomError

    try:
        return pydicom.dcmread(source if isinstance(source, Path) else io.BytesIO(source), stop_before_pixels=True,
                               specific_tags=HEADER)  # fmt: skip
    except (InvalidDicomError, EOFError, OSError):
        return pydicom.Dataset()


def by_series(files: Iterable[Path]) -> list[tuple[tuple[Path, ...], str | None]]:
    """(files, patient) of each series of each folder, sorted by name.

    What has no rows (reports, contours), and what no reader knows, is a group of its own, to be refused by name.
    """
    groups: dict[tuple, list[Path]] = defaultdict(list)
    for file in sorted(files):
        about = header(file)
        own = "Rows" not in about or "SeriesInstanceUID" not in about
        series = str(file) if own else str(about.SeriesInstanceUID)
        groups[(file.parent, series, str(about.get("PatientID") or ""))].append(file)
    return sorted((tuple(group), patient or None) for (_, _, patient), group in groups.items())


def parse(blobs: Blobs) -> Image:
    """The volume of one series. blobs: the bytes of its files in any order; emptied while they are decoded, so that
    memory holds the series once. Raises Bad."""
    headers = _headers(blobs)
    planes = dicom_frames.pixels(blobs.pop()) if len(blobs) == 1 and len(headers) > 1 else None
    notes: list[str] = []
    order, affine = _stack(headers)
    scales = {_scale(about) for about in headers}
    shape = (len(order), int(headers[0].Rows), int(headers[0].Columns))
    stack, place = None, -1
    for number, same in order:
        if planes is None:
            plane, slope, inter = _pixels(blobs[number])
            blobs[number] = bytearray()
        else:
            plane, (slope, inter) = planes[number], _scale(headers[number])
        if len(scales) > 1:
            plane = plane.astype(np.float32) * np.float32(slope) + np.float32(inter)
        if stack is None:
            stack = np.empty(shape, plane.dtype)
        if same and not np.array_equal(plane, stack[place]):
            raise Bad("doubled", "two different slices have the same position (several phases in one series?)")
        place += not same
        stack[place] = plane
    assert stack is not None
    if place + 1 < len(order):
        notes.append("doubled")
    slope, inter = scales.pop() if len(scales) == 1 else (1.0, 0.0)
    if scales:
        notes.append("rescale")
    image = oriented(stack[: place + 1].transpose(2, 1, 0), slope, inter, affine, notes)
    return _named(image, headers[0])


def peek(files: tuple[Path, ...]) -> Image:
    """What the headers of a series promise; voxels are zeros that take no memory. Raises Bad."""
    headers = _headers(files)
    order, affine = _stack(headers)
    kept = sum(not same for _, same in order)
    shape = (int(headers[0].Columns), int(headers[0].Rows), kept)
    zeros = np.broadcast_to(np.zeros((), np.int16), shape)
    image = oriented(zeros, 1.0, 0.0, affine, ["doubled"] if kept < len(order) else [])
    return _named(image, headers[0])


def _headers(sources: Sequence[Path | bytes | bytearray]) -> list:
    """Of each slice: a file, or a frame of the only file. Raises Bad."""
    headers = [header(source) for source in sources]
    if len(headers) == 1 and dicom_frames.frames(headers[0]) > 1:
        headers = dicom_frames.slices(headers[0])
    _check_kind(headers)
    return headers


def _scale(about) -> tuple[float, float]:
    return float(about.get("RescaleSlope", 1)), float(about.get("RescaleIntercept", 0))


def _named(image: Image, about) -> Image:
    image.modality, image.leaning = str(about.get("Modality", "")) or None, "tilt"
    return image


def parse_picture(blob: bytes | bytearray) -> Image:
    """One radiograph, (h, w), bright where dense (MONOCHROME1 is turned round). Raises Bad."""
    about = header(blob)
    _check_kind([about])
    plane, slope, inter = _pixels(blob)
    if about.get("PhotometricInterpretation") == "MONOCHROME1":
        plane = plane.max() - plane
    sizes = about.get("PixelSpacing") or about.get("ImagerPixelSpacing") or [np.nan, np.nan]
    return Image(plane, slope, inter, np.eye(4), np.array([float(mm) for mm in sizes]), "picture", 0.0,
                 modality=str(about.get("Modality", "")) or None)  # fmt: skip


def _check_kind(headers: list) -> None:
    for about in headers:
        if "Rows" not in about or "Columns" not in about:
            raise Bad("no-image", "a DICOM object without pixels (report, contours), or no DICOM at all")
        if int(about.get("NumberOfFrames", 1) or 1) > 1:
            raise Bad("multi-frame", "several DICOM objects of several frames each; convert the series to NIfTI")
        if int(about.get("SamplesPerPixel", 1)) != 1:
            raise Bad("voxel-type", "pixels are colours, not one number each")
    kinds = {(int(h.Rows), int(h.Columns), str(h.get("Modality")), int(h.get("BitsAllocated", 0))) for h in headers}
    if len(kinds) > 1:
        raise Bad("mixed-series", f"one series holds {len(kinds)} kinds of slices (sizes or modalities differ)")


def _stack(headers: list) -> tuple[list[tuple[int, bool]], np.ndarray]:
    """(order, affine): (which file, is it at the same place as the one before) along the slice normal; 4x4, (column,
    row, slice, 1) to RAS mm. Raises Bad where slices do not make up an even, straight stack."""
    if len(headers) < 2:
        raise Bad("2d", "a series of one slice is no volume")
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        if missing := sum(not about.get(name) for about in headers):
            raise Bad("position", f"{missing} of {len(headers)} slices have no {name}")
    positions = np.array([h.ImagePositionPatient for h in headers], np.float64)
    axes = np.array([h.ImageOrientationPatient for h in headers], np.float64).reshape(-1, 2, 3)
    sizes = np.array([h.PixelSpacing for h in headers], np.float64)
    if not all(np.isfinite(values).all() for values in (positions, axes, sizes)) or sizes.min() <= 0:
        raise Bad("position", "positions, directions or pixel sizes are not finite, positive numbers")
    if np.abs(axes - axes[0]).max() > 1e-3 or np.abs(sizes - sizes[0]).max() > 1e-3 * sizes[0].max():
        raise Bad("mixed-series", "slices of one series differ in direction or pixel size")
    (along, down), normal = axes[0], np.cross(*axes[0])
    if abs(along @ down) > MAX_SHEAR or not 0.99 < np.linalg.norm(normal) < 1.01:
        raise Bad("affine", "the image directions are not two unit vectors at a right angle")
    heights = positions @ normal
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    same = np.concatenate([[False], steps < SAME_PLACE])
    kept = order[~same]
    _check_stack(positions[kept], heights[kept], normal)
    step = (positions[kept[-1]] - positions[kept[0]]) / (len(kept) - 1)
    if np.linalg.norm(step - (step @ normal) * normal) <= MAX_SHEAR * abs(step @ normal):
        step = (step @ normal) * normal
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS @ np.stack([along * sizes[0][1], down * sizes[0][0], step], axis=1)
    affine[:3, 3] = LPS_TO_RAS @ positions[kept[0]]
    return list(zip(order.tolist(), same.tolist(), strict=True)), affine


def _check_stack(positions: np.ndarray, heights: np.ndarray, normal: np.ndarray) -> None:
    if len(heights) < 2:
        raise Bad("position", "all slices have the same position")
    steps = np.diff(heights)
    if steps.max() <= MAX_GAP * steps.min():
        return
    lean = (positions[-1] - positions[0]) / (heights[-1] - heights[0]) - normal
    tilt = "+tilt" if np.linalg.norm(lean) > MAX_SHEAR else ""
    raise Bad(f"gap{tilt}", f"slices are {steps.min():.3f} to {steps.max():.3f} mm apart (missing slices, or two "
                            f"acquisitions){', and the stack leans' if tilt else ''}")  # fmt: skip


def _pixels(blob: bytes | bytearray) -> tuple[np.ndarray, float, float]:
    """(rows, columns) stored numbers, slope, intercept. Raises Bad."""
    pydicom = _pydicom()
    slice_ = pydicom.dcmread(io.BytesIO(blob))
    try:
        plane = slice_.pixel_array
    except (RuntimeError, NotImplementedError) as error:
        raise Bad("codec", f"the pixels are compressed in a way no installed decoder knows ({error}); "
                           "pylibjpeg and python-gdcm read more") from None  # fmt: skip
    except (ValueError, AttributeError, EOFError) as error:
        raise Bad("short-file", f"the pixels of a slice are missing or incomplete ({error})") from None
    return plane, float(slice_.get("RescaleSlope", 1)), float(slice_.get("RescaleIntercept", 0))
