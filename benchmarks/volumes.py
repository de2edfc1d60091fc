"""What the benchmarks of the data path read: files made of one real CT, and a store of them.

CT: lidc_0314_mid.nii.gz beside the checkout, or the file that MEDFAST_CT names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from rows import ROOT

from medfast.data.prepare import prepare
from medfast.data.resample import resample

SPACING = 2.0  # mm


def ct() -> Path:
    file = Path(os.environ.get("MEDFAST_CT") or ROOT.parent / "shared" / "data" / "ct" / "lidc_0314_mid.nii.gz")
    if not file.is_file():
        sys.exit(f"these rows are measured on a real CT, and there is no {file}: name another with MEDFAST_CT")
    return file


def stored_values(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """int16 (w, h, d) as the file has them, and its affine."""
    image = nib.Nifti1Image.from_filename(file)
    return np.asanyarray(image.dataobj).astype(np.int16), np.asarray(image.affine)


def copies(folder: Path, count: int) -> Path:
    """``count`` files of the CT at its own spacing, each with one voxel of its own: nothing is a duplicate."""
    voxels, affine = stored_values(ct())
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        voxels[number, 0, 0] += 1
        nib.save(nib.Nifti1Image(voxels, affine), folder / f"copy_{number:02d}.nii.gz")
    return folder


def set_at_2mm(folder: Path, count: int = 24) -> Path:
    """``count`` volumes of the size of a chest, about 180 x 200 x 200 at 2 mm: the CT mirrored to its triple length and
    rolled, as .nii.gz."""
    voxels, affine = stored_values(ct())
    sizes = np.linalg.norm(affine[:3, :3], axis=0)[::-1]
    small = resample(voxels.T, sizes, SPACING)
    whole = np.concatenate([small, small[::-1], small])
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rolled = np.roll(whole, (7 * number, 3 * number, 5 * number), (0, 1, 2))
        nib.save(nib.Nifti1Image(rolled.T, np.diag([SPACING, SPACING, SPACING, 1])), folder / f"v{number:02d}.nii.gz")
    return folder


def store_at_2mm(folder: Path, layout: str = "npy") -> tuple[Path, Path]:
    """(files, store of them), made where they are not there yet."""
    files, store = folder / "files", folder / layout
    if not files.is_dir():
        set_at_2mm(files)
    if not store.is_dir():
        prepare(files, store, layout=layout, spacing=SPACING, progress=False)
    return files, store
