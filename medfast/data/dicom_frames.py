"""DICOM objects that hold many frames (Enhanced CT and MR), as if each frame were a slice in a file of its own."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from medfast.data.image import Bad

__all__ = ["GROUPS", "frames", "pixels", "slices"]

SHARED, EACH = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
GROUPS = [SHARED, EACH]
_PARTS = {
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing",),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
}
_ALIKE = ("Rows", "Columns", "Modality", "BitsAllocated", "SamplesPerPixel", "PatientID")


def frames(about: Any) -> int:
    return int(about.get("NumberOfFrames", 1) or 1)


def slices(about: Any) -> list[Any]:
    """A header for each frame of the object ``about``, with the tags of a slice. Raises Bad where it does not say where
    its frames lie."""
    from pydicom import Dataset

    each, shared = about.get(EACH) or [], about.get(SHARED) or []
    if len(each) != frames(about):
        raise Bad("multi-frame", f"{frames(about)} frames in one DICOM object, which does not say where each one lies")
    found = []
    for one in each:
        made = Dataset()
        for name in _ALIKE:
            if name in about:
                setattr(made, name, about[name].value)
        for part, names in _PARTS.items():
            source = one.get(part) or (shared[0].get(part) if shared else None)
            for name in names:
                if source and name in source[0]:
                    setattr(made, name, source[0][name].value)
        found.append(made)
    return found


def pixels(blob: bytes | bytearray) -> np.ndarray:
    """(frames, rows, columns) stored numbers. Raises Bad."""
    import pydicom

    about = pydicom.dcmread(io.BytesIO(blob))
    del blob
    try:
        found = about.pixel_array
    except (RuntimeError, NotImplementedError) as error:
        raise Bad("codec", f"the pixels are compressed in a way no installed decoder knows ({error})") from None
    except (ValueError, AttributeError, EOFError) as error:
        raise Bad("short-file", f"the pixels of some frames are missing or incomplete ({error})") from None
    return found
