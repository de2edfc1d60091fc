"""The scan judges headers as prepare does, forecasts what prepare makes, and its page names nobody."""

import json
import os

import numpy as np
import pytest
from scans import SHAPE, ct, dicom_series, nifti

from medfast.__main__ import main
from medfast.data.inputs import find
from medfast.data.prepare import prepare
from medfast.data.recipe import recipe
from medfast.data.scan import forecast, samples, survey
from medfast.data.scan_page import scan
from medfast.data.store import Store, read_lines

SECRET = "Mustermann"
SPACINGS = [np.diag([1.0, 1.0, 2.0, 1.0]), np.diag([1.2, 1.2, 3.0, 1.0]), np.diag([-0.9, -0.9, 4.0, 1.0])]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / SECRET
    folder.mkdir()
    for n in range(6):
        data = nifti(
            ct(n, (24 + n, 48, 40)).transpose(2, 1, 0), SPACINGS[n % 3], compress=n % 2, descrip=SECRET.encode()
        )
        (folder / f"{n}.nii{'.gz' * (n % 2)}").write_bytes(data)
    (folder / "copy.nii").write_bytes((folder / "0.nii").read_bytes())
    (folder / "metres.nii").write_bytes(nifti(ct(9), np.diag([0.001, 0.001, 0.002, 1])))
    (folder / "thick.nii").write_bytes(nifti(ct(9).transpose(2, 1, 0), np.diag([1, 1, 9.0, 1])))
    (folder / "text.nii").write_text(SECRET * 99)
    return folder


def test_rows_agree_with_what_prepare_says(folder, tmp_path):
    rows = survey(find(folder), recipe(), jobs=2, progress=False)
    summary = prepare(folder, tmp_path / "store", max_bad=1, progress=False)
    refused = {os.path.basename(row["path"]): row["kind"] for row in summary.bad}
    found = {os.path.basename(row["path"]): row.get("kind", "duplicate" if "twin" in row else None) for row in rows}
    assert {name: kind for name, kind in found.items() if kind} == refused
    shapes = {row["id"]: row["path"] for row in read_lines(tmp_path / "store" / "private" / "sources.jsonl")}
    stored = {row["path"]: row.get("stored") for row in rows}
    for record in Store(tmp_path / "store").records:
        assert stored[shapes[record["id"]]] == record["shape"]


@pytest.mark.parametrize("settings", [{}, {"spacing": 1.5}, {"body": True}, {"layout": "blosc2"}])
def test_the_forecast_is_within_five_per_cent(folder, tmp_path, settings):
    cases, settled = find(folder), recipe(**{name: value for name, value in settings.items() if name != "layout"})
    rows = survey(cases, settled, jobs=1, progress=False)
    layout = settings.get("layout", "npy")
    if layout != "npy":
        pytest.importorskip(layout)
    expected = forecast(rows, samples(cases, rows, settled, count=4), 1, layout)
    summary = prepare(folder, tmp_path / "store", max_bad=1, progress=False, **settings)
    size = sum(file.stat().st_size for file in (tmp_path / "store").rglob("*") if "private" not in file.parts)
    assert expected.volumes == len(summary.good) and expected.seconds > 0
    assert abs(expected.bytes - size) < 0.05 * size
    assert expected.bad == {"duplicate": 1, "spacing": 1, "thick": 1, "not-nifti": 1}


def test_labels_are_counted(tmp_path):
    for n in range(3):
        voxels = ct(n, (40, 48, 40)).transpose(2, 1, 0)
        (tmp_path / f"{n}.nii").write_bytes(nifti(voxels))
        (tmp_path / f"{n}_label.nii").write_bytes(nifti((voxels > 0).astype(np.uint8)))
    (tmp_path / "list.csv").write_text("image,label\n" + "".join(f"{n}.nii,{n}_label.nii\n" for n in range(3)))
    cases, settled = find(tmp_path / "list.csv"), recipe()
    rows = survey(cases, settled, jobs=1, progress=False)
    expected = forecast(rows, samples(cases, rows, settled, count=4), jobs=1)
    prepare(tmp_path / "list.csv", tmp_path / "store", progress=False)
    size = sum(file.stat().st_size for file in (tmp_path / "store").rglob("*") if "private" not in file.parts)
    assert abs(expected.bytes - size) < 0.05 * size


def test_headers_alone_are_read(folder, monkeypatch):
    """Voxels behind the header may be missing or damaged: nobody looks at them."""
    for file in folder.glob("?.nii*"):
        file.write_bytes(file.read_bytes()[:60000])
    rows = survey(find(folder), recipe(), jobs=1, progress=False)
    assert sum("stored" in row for row in rows) == 7


def test_the_page_shows_and_names_nobody(folder, tmp_path, capsys):
    dicom_series(folder / "series", ct(20), StudyDescription=SECRET)
    scan(folder, tmp_path / "scan", count=3)
    text = (tmp_path / "scan" / "index.html").read_text()
    assert not [word for word in (SECRET, "nobody", ".nii", str(tmp_path), "1.2.3") if word in text]
    assert text.count("<img") == 9 and "http" not in text and "not-nifti" in text and "gantry" not in text
    rows = [json.loads(line) for line in (tmp_path / "scan" / "private" / "scan.jsonl").read_text().splitlines()]
    assert len(rows) == 11 and sum(row["files"] == SHAPE[0] for row in rows) == 1
    assert sum(row.get("sample") == "good" for row in rows) == 3
    assert "11 cases" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(folder, tmp_path, capsys):
    assert main(["data", "prepare", str(folder), "--store", str(tmp_path / "store"), "--dry-run"]) == 0
    assert "6 volumes" in capsys.readouterr().out and not (tmp_path / "store").exists()
    assert main(["data", "scan", str(folder), "--out", str(tmp_path / "s"), "--modality", "xr"]) == 2
