"""Every class of bad input: a file made by code, the action that docs/data.md promises, a line in the ledger."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from scans import STEP, ct, dicom_series, dicom_slice, nifti, place_of

from medfast.data.prepare import prepare
from medfast.data.store import DataError, Store, read_lines

pytest.importorskip("pydicom", reason="pydicom is not installed")
DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def volume(seed=0):
    """(w, h, d), as nibabel has it."""
    return ct(seed).transpose(2, 1, 0)


def damaged(data, at):
    data = bytearray(data)
    data[at] ^= 1
    return bytes(data)


def holes(where, count):
    found = volume(30).astype(np.float32)
    found[where][: count or None] = np.nan
    return found


WHOLE, PLAIN = nifti(volume(1), compress=True), nifti(volume(1))
TURN = {"sform_code": 1, "qform_code": 0}
TILTED = {"srow_y": [0, 1, 2 * np.sin(0.3), 0], "srow_z": [0, 0, 2 * np.cos(0.3), 0]}
COLOUR = np.zeros((40, 44, 20), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
OBLIQUE = np.diag([1.0, 1.0, 2.0, 1.0])
OBLIQUE[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
REFUSED = {
    "truncated.nii.gz": (WHOLE[: len(WHOLE) // 2], "gzip-truncated"),
    "trailer.nii.gz": (WHOLE[:-8], "gzip-truncated"),
    "crc.nii.gz": (damaged(WHOLE, -6), "gzip-crc"),
    "body.nii.gz": (damaged(gzip.compress(PLAIN, 0), 4000), "gzip-crc"),
    "short.nii": (PLAIN[:-1], "short-file"),
    "empty.nii.gz": (b"", "not-nifti"),
    "page.nii.gz": (b"<html>404</html>" * 30, "not-nifti"),
    "nan.nii": (nifti(holes((slice(None), slice(None), slice(5)), 0)), "non-finite"),
    "nan_in_body.nii": (nifti(holes((20, 22), 3)), "non-finite"),
    "constant.nii": (nifti(np.full((40, 44, 20), 7, np.int16)), "constant"),
    "zero.nii": (nifti(volume(2), pixdim=0, sform_code=0, qform_code=0), "spacing"),
    "metres.nii": (nifti(volume(3), np.diag([0.001, 0.001, 0.002, 1])), "spacing"),
    "unit.nii": (nifti(volume(3), xyzt_units=1), "spacing"),
    "conflict.nii": (nifti(volume(4), srow_x=[1.2, 0, 0, 0], qform_code=1), "qform-sform"),
    "shear.nii": (nifti(volume(5), **TURN, **TILTED), "shear"),
    "singular.nii": (nifti(volume(6), **TURN, srow_x=[0, 0, 0, 0]), "affine"),
    "four.nii": (nifti(np.stack([volume(), volume()], -1)), "4d"),
    "flat.nii": (nifti(volume()[:, :, :1]), "2d"),
    "colour.nii": (nifti(COLOUR), "voxel-type"),
    "complex.nii": (nifti(volume().astype(np.complex64)), "voxel-type"),
    "offset.nii": (nifti(volume(7) + np.int16(1024)), "not-hu"),
    "twice.nii": (nifti(volume(8) - np.int16(1000)), "not-hu"),
    "window.nii": (nifti(((volume(9).clip(-160, 240) + 160) * 0.6).astype(np.uint8)), "not-hu"),
    "thick.nii": (nifti(volume(10), np.diag([1, 1, 8.0, 1])), "thick"),
    "long.nii": (nifti(ct(11, (400, 20, 20)).transpose(2, 1, 0), np.diag([2, 2, 7.0, 1])), "extent"),
    "small.nii": (nifti(ct(12, (40, 44, 24)).transpose(2, 1, 0)), "too-small"),
}
TAKEN = {  # accepted, and what is noted
    "a_good.nii.gz": (WHOLE, []),
    "misnamed.nii.gz": (nifti(volume(21)), ["misnamed"]),
    "nan_in_air.nii": (nifti(holes((0, 0), 3)), []),
    "oblique.nii": (nifti(volume(22), OBLIQUE), ["oblique"]),
    "pixdim.nii": (nifti(volume(23), pixdim=[1, np.nan, 1, 2, 0, 0, 0, 0]), ["pixdim"]),
    "negative.nii": (nifti(volume(24), pixdim=[1, -1, 1, 2, 0, 0, 0, 0]), []),
    "left.nii": (nifti(volume(25), np.diag([-1.0, 1, 2, 1])), []),
    "trailing.nii": (nifti(volume(26)[..., None]), []),
    "no_slope.nii": (nifti(volume(27), scl_slope=0, scl_inter=-1024), ["no-slope"]),
    "double.nii": (nifti(volume(28).astype(np.float64)), []),
    "padded.nii": (nifti(np.where(np.arange(40)[:, None, None] < 3, -3024, volume(29)).astype(np.int16)), []),
    "thickish.nii": (nifti(ct(31).transpose(2, 1, 0), np.diag([1, 1, 6.0, 1])), ["thick"]),
    "nowhere.nii": (nifti(volume(32), sform_code=0, qform_code=0), ["no-orientation"]),
}


def dicom_folders(folder):
    """(folder -> class of those refused, folder -> notes of those taken)"""
    dicom_series(folder / "gap", ct(40), skip=(7, 8, 9, 10, 11))
    dicom_series(folder / "tilt", ct(41), tilt=0.3)
    z = place_of("000.dcm")
    dicom_slice(dicom_series(folder / "nowhere", ct(42)) / "000.dcm", ct(42)[z], [0, 0, 0], ImagePositionPatient=None)
    dicom_slice(dicom_series(folder / "doubled", ct(43)) / "zzz.dcm", ct(43)[5], [-20, -30, 5 + STEP * 4])
    short = sorted(dicom_series(folder / "short", ct(44)).iterdir())[6]
    short.write_bytes(short.read_bytes()[:-9])
    dicom_series(folder / "mr", ct(45), modality="MR")
    dicom_series(folder / "two", ct(46), series="1.5")
    for file in dicom_series(folder / "tmp", ct(47), series="1.6").iterdir():
        file.rename(folder / "two" / f"b{file.name}")
    dicom_slice(dicom_series(folder / "again", ct(48)) / "zzz.dcm", ct(48)[4], [-20, -30, 5 + STEP * 4])
    (folder / "rescale").mkdir()
    for z, plane in enumerate(ct(49)):
        dicom_slice(folder / "rescale" / f"{z}.dcm", plane, [0, 0, STEP * z], inter=-1024 - z)
    refused = {"gap": "gap", "tilt": "tilt", "nowhere": "position", "doubled": "doubled", "short": "short-file",
               "mr": "modality"}  # fmt: skip
    return refused, {"two": [], "again": ["doubled"], "rescale": ["rescale"]}


def test_every_class_has_its_action(tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    for name, (data, _) in {**REFUSED, **TAKEN}.items():
        (folder / name).write_bytes(data)
    (folder / "z_twin.nii.gz").write_bytes(WHOLE)
    (folder / "z_voxel_twin.nii").write_bytes(nifti(volume(1), descrip=b"same voxels, other header"))
    refused, taken = dicom_folders(folder)
    key = lambda row: Path(row["path"]).relative_to(folder).parts[0]  # noqa: E731
    with pytest.raises(DataError, match="--max-bad"):
        prepare(folder, tmp_path / "store", progress=False)
    private = tmp_path / "store" / "private"
    expected = {**{name: kind for name, (_, kind) in REFUSED.items()}, **refused, "z_twin.nii.gz": "duplicate",
                "z_voxel_twin.nii": "duplicate"}  # fmt: skip
    lines = read_lines(private / "quarantine.jsonl", "path", "kind", "message")
    assert {key(row): row["kind"] for row in lines} == expected and len(lines) == len(expected)
    notes = {record["id"]: record["notes"] for record in Store(tmp_path / "store").records}
    found = [(key(row), notes[row["id"]]) for row in read_lines(private / "sources.jsonl")]
    assert sorted(found) == sorted([(name, note) for name, (_, note) in TAKEN.items()] + [("two", [])]
                                   + list(taken.items()))  # fmt: skip
    by_id = {row["id"]: key(row) for row in read_lines(private / "sources.jsonl")}
    filled = {by_id[record["id"]]: record["filled"] for record in Store(tmp_path / "store").records}
    assert filled["nan_in_air.nii"] == 3 and sum(filled.values()) == 3


def test_the_page_names_every_class():
    """docs/data.md promises an action for each class that prepare can write, and for no other."""
    import re

    source = "".join(file.read_text() for file in (DOCS.parents[1] / "medfast" / "data").glob("*.py"))
    classes = set(re.findall(r'Bad\(\s*"([a-z0-9-]+)"', source)) | {"gap", "tilt", "duplicate", "3d"}
    table = set(re.findall(r"`([a-z0-9-]+)`", DOCS.read_text().split("## Bad input")[1].split("\n## ")[0]))
    assert classes <= table, f"not on the page: {sorted(classes - table)}"
