"""Strings planted wherever a format has room for text reach nothing but ``private/``."""

import io
import json

import numpy as np
import pytest
from scans import ct, dicom_series, dicom_slice, nifti

from medfast.data.prepare import prepare
from medfast.data.scan_page import scan
from medfast.data.show import show
from medfast.data.store import Store

NAME, DATE, UID = "Mustermann", "19700203", "1.2.826.0.1.77777"
PLANTED = (NAME, DATE, UID, "Klinikum", "77777")


def dicom_text():
    return {"series": UID, "PatientName": f"{NAME}^Max", "PatientID": NAME, "PatientBirthDate": DATE, "StudyDate": DATE,
            "InstitutionName": "Klinikum", "StudyInstanceUID": UID,
            "SOPInstanceUID": f"{UID}.1", "AccessionNumber": NAME, "StudyDescription": NAME, "OperatorsName": NAME,
            "FrameOfReferenceUID": UID, "ImageComments": NAME}  # fmt: skip


def plant(folder):
    """One good case and one bad case of every format, under telling names."""
    folder.mkdir()
    text = NAME.encode()
    voxels = ct(1).transpose(2, 1, 0)
    for name, header in ((f"{NAME}_{DATE}.nii.gz", {}), (f"{NAME}_bad.nii.gz", {"xyzt_units": 1})):
        data = nifti(voxels, compress=True, descrip=text, aux_file=text, intent_name=text, db_name=text, **header)
        (folder / name).write_bytes(data)
    dicom_series(folder / NAME / DATE, ct(2), **dicom_text())
    dicom_series(folder / NAME / "gap", ct(3), skip=(5, 6, 7), **dicom_text())
    raw = ct(4).transpose(2, 1, 0).tobytes(order="F")
    head = f"NRRD0004\n# {NAME}\ntype: short\ndimension: 3\nsizes: 40 44 20\nspace: LPS\nspace directions: (1,0,0) " \
           f"(0,1,0) (0,0,2)\ncontent: {NAME}\nencoding: raw\nendian: little\npatient:={NAME} {DATE}\n\n"  # fmt: skip
    (folder / f"{NAME}.nrrd").write_bytes(head.encode() + raw)
    (folder / f"{NAME}_bad.nrrd").write_bytes(head.replace("short", NAME).encode() + raw)
    raw = ct(5).transpose(2, 1, 0).tobytes(order="F")
    (folder / f"{NAME}.mha").write_bytes(
        f"ObjectType = Image\nNDims = 3\nComment = {NAME}\nElementSpacing = 1 1 2\nDimSize = 40 44 20\n"
        f"AcquisitionDate = {DATE}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n".encode() + raw)  # fmt: skip
    (folder / f"{NAME}_label.nii").write_bytes(nifti((voxels > 0).astype(np.uint8), descrip=text))
    row = {"image": f"{NAME}_{DATE}.nii.gz", "label": f"{NAME}_label.nii", "patient": NAME, "date": DATE}
    rows = [row, {"image": f"{NAME}_bad.nii.gz"}, {"image": NAME}, *({"image": f"{NAME}{end}"} for end in
            (".nrrd", "_bad.nrrd", ".mha"))]  # fmt: skip
    (folder / f"{NAME}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / f"{NAME}.jsonl"


def contents(folder, root):
    """(public, private) bytes of all files and of their names below ``root``."""
    found = {True: b"", False: b""}
    for file in sorted(folder.rglob("*")):
        found["private" in file.parts] += str(file.relative_to(root)).encode()
        found["private" in file.parts] += file.read_bytes() if file.is_file() else b""
    return found[False], found[True]


def leaks(data, folder):
    return [word for word in (*PLANTED, str(folder)) if word.encode() in data]


def test_planted_strings_stay_private(tmp_path):
    pytest.importorskip("pydicom", reason="pydicom is not installed")
    listed = plant(tmp_path / "in")
    store = tmp_path / "store"
    summary = prepare(listed, store, max_bad=1, progress=False)
    assert len(summary.good) == 4 and sorted(row["kind"] for row in summary.bad) == ["gap", "spacing", "voxel-type"]
    scan(listed, tmp_path / "scan", count=4, progress=False)
    show(store, Store(store).records[0]["id"], tmp_path / "scan" / "x.png", size=32, cell=8)
    for folder in (store, tmp_path / "scan"):
        public, private = contents(folder, tmp_path)
        assert not leaks(public, tmp_path / "in")
        assert NAME.encode() in private
    assert sum("group" in record for record in Store(store).records) == 2  # of a list, of DICOM


def test_pictures_leave_their_text_behind(tmp_path):
    pytest.importorskip("pydicom", reason="pydicom is not installed")
    Picture = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    from PIL.PngImagePlugin import PngInfo

    (tmp_path / "in").mkdir()
    info, stream = PngInfo(), io.BytesIO()
    info.add_text("Patient", NAME)
    plane = (np.abs(ct(1)[10]) + 1).astype(np.uint16)
    Picture.fromarray(plane).save(stream, "PNG", pnginfo=info)
    (tmp_path / "in" / f"{NAME}.png").write_bytes(stream.getvalue())
    dicom_slice(tmp_path / "in" / f"{NAME}.dcm", plane.astype(np.int16)[::-1], [0, 0, 0], modality="CR", inter=0,
                **dicom_text())  # fmt: skip
    assert NAME.encode() in stream.getvalue()
    assert len(prepare(tmp_path / "in", tmp_path / "store", modality="xr", progress=False).good) == 2
    public, _ = contents(tmp_path / "store", tmp_path)
    assert not leaks(public, tmp_path / "in")
