"""The whole way from files to a store: what is taken, what is named, what is private."""

import gzip
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medfast.data import nifti
from medfast.data.ledger import Ledger
from medfast.data.prepare import default_jobs, prepare
from medfast.data.recipe import recipe
from medfast.data.store import DataError, Store, read_lines, verify

SHARED = Path(__file__).parents[3] / "shared" / "data" / "ct"
PLANTED = "Mustermann"


def ct(seed=0, shape=(50, 44, 40)):
    rng = np.random.default_rng(seed)
    volume = np.full(shape, -1000.0)
    volume[8:-8, 8:-8] = -100
    volume[12:-12, 12:-12] = 50
    return np.rint(volume + 20 * rng.standard_normal(shape)).astype(np.int16)


def packed(voxels, spacing=(1.0, 1.0, 2.0), **header):
    image = nib.Nifti1Image(voxels, np.diag([*spacing, 1.0]))
    image.header.set_xyzt_units("mm")
    data = bytearray(image.to_bytes())
    for name, value in header.items():
        np.frombuffer(data, nib.Nifti1Header.template_dtype, 1)[name][0] = value
    return bytes(data)


def good(folder, name, seed=0, **header):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(gzip.compress(packed(ct(seed), **header), 1))


@pytest.fixture
def bad(tmp_path):
    """One file per class of fault beside two good ones. Returns the folder and name -> class."""
    folder = tmp_path / "input"
    good(folder, "a_good.nii.gz")
    good(folder, "b_good.nii.gz", seed=1)
    whole = (folder / "a_good.nii.gz").read_bytes()
    flipped = bytearray(whole)
    flipped[-6] ^= 1
    nan = ct().astype(np.float32)
    nan[20:24, 20:24, 20:24] = np.nan
    files = {
        "truncated.nii.gz": (whole[: len(whole) // 2], "gzip-truncated"),
        "text.nii.gz": (b"I was saved under a wrong name\n" * 30, "not-nifti"),
        "crc.nii.gz": (bytes(flipped), "gzip-crc"),
        "four.nii": (packed(np.stack([ct(), ct()], -1)), "4d"),
        "nan.nii": (packed(nan), "non-finite"),
        "offset.nii": (packed(ct() + np.int16(1000)), "not-hu"),
        "constant.nii": (packed(np.full((40, 40, 40), 3, np.int16)), "constant"),
        "zero.nii": (packed(ct(2), pixdim=0, sform_code=0, qform_code=0), "spacing"),
        "conflict.nii": (packed(ct(3), srow_x=[1.2, 0, 0, 0], qform_code=1), "qform-sform"),
        "metres.nii": (packed(ct(4), spacing=(0.001, 0.001, 0.002)), "spacing"),
        "units.nii": (packed(ct(4), xyzt_units=1), "spacing"),
        "empty.nii.gz": (b"", "not-nifti"),
        "twin.nii.gz": (whole, "duplicate"),
        "voxel_twin.nii": (packed(ct(1), descrip=b"same voxels, other header"), "duplicate"),
        "small.nii": (packed(ct(5, (50, 44, 14))), "too-small"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    (folder / "dangling.nii").symlink_to(tmp_path / "nowhere")
    return folder, {name: kind for name, (_, kind) in files.items()} | {"dangling.nii": "unreadable"}


def test_every_bad_file_is_named_with_its_class(bad, tmp_path, capsys):
    folder, kinds = bad
    summary = prepare(folder, tmp_path / "store", max_bad=1, jobs=2)
    named = {Path(row["path"]).name: row["kind"] for row in summary.bad}
    named["dangling.nii"] = named.pop("nowhere")
    assert named == kinds and len(summary.good) == summary.new == 2
    printed = capsys.readouterr().out
    for row in summary.bad:
        assert f"{row['kind']}: {row['path']}: {row['message']}" in printed
    assert read_lines(tmp_path / "store" / "private" / "quarantine.jsonl") == summary.bad
    assert verify(Store(tmp_path / "store")) == 2


def test_too_many_bad_ones_fail_after_the_work_is_done(bad, tmp_path):
    folder, _ = bad
    with pytest.raises(DataError, match=r"--max-bad") as caught:
        prepare(folder, tmp_path / "store", progress=False)
    assert "87.5%" in str(caught.value) and "2 spacing" not in str(caught.value)  # 14 of 16; two repeats do not count
    assert len(Store(tmp_path / "store")) == 2


def test_nothing_usable(tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    with pytest.raises(DataError, match="no usable volume"):
        prepare(folder, tmp_path / "store", max_bad=1)
    (folder / "text.nii.gz").write_text("no")
    with pytest.raises(DataError, match="no usable volume.*not-nifti"):
        prepare(folder, tmp_path / "store", max_bad=1)
    with pytest.raises(ValueError, match="there is no"):
        prepare(tmp_path / "missing", tmp_path / "store")


def test_nothing_of_names_and_headers_leaves_private(tmp_path):
    folder = tmp_path / "input"
    secret = PLANTED.encode()
    good(folder, f"{PLANTED}_1970.nii.gz", descrip=secret, aux_file=secret, intent_name=secret, db_name=secret)
    (folder / f"{PLANTED}.nii").write_text(PLANTED * 100)
    prepare(folder, tmp_path / "store", max_bad=1, progress=False)
    public, private = b"", b""
    for file in (tmp_path / "store").rglob("*"):
        if file.is_file() and "private" in file.parts:
            private += file.read_bytes()
        else:
            public += str(file.relative_to(tmp_path)).encode() + (file.read_bytes() if file.is_file() else b"")
    assert secret in private and secret not in public and b"1970" not in public and str(folder).encode() not in public


def test_a_second_run_reads_nothing_but_copies(bad, tmp_path, capsys, monkeypatch):
    folder, _ = bad
    first = prepare(folder, tmp_path / "store", max_bad=1, progress=False)
    (folder / "dangling.nii").unlink()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*.npy")}
    real = nifti.read
    monkeypatch.setattr(
        nifti, "read", lambda file: real(file) if "twin" in file.name else pytest.fail(f"{file} was read")
    )  # whether a copy is one depends on its twin
    second = prepare(folder, tmp_path / "store", max_bad=1)
    assert second.good == first.good and second.new == 0 and len(second.bad) == len(first.bad) - 1
    assert "nothing to do" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*.npy")}


def test_moved_sources_are_known_and_repaired_ones_are_taken(tmp_path):
    folder, store = tmp_path / "input", tmp_path / "store"
    good(folder, "a.nii.gz")
    (folder / "b.nii.gz").write_text("broken")
    first = prepare(folder, store, max_bad=1, progress=False)
    (folder / "a.nii.gz").rename(folder / "z.nii.gz")
    good(folder, "b.nii.gz", seed=1)
    second = prepare(folder, store, progress=False)
    assert second.new == 1 and second.bad == [] and set(first.good) < set(second.good)
    assert read_lines(store / "private" / "quarantine.jsonl") == []


@pytest.mark.parametrize("descrip", [b"", b"same voxels, other header"])
def test_a_copy_stands_for_its_twin_once_that_is_gone(tmp_path, descrip):
    folder, store = tmp_path / "input", tmp_path / "store"
    good(folder, "a.nii.gz")
    good(folder, "b.nii.gz", descrip=descrip)
    first = prepare(folder, store, progress=False)
    assert [row["kind"] for row in first.bad] == ["duplicate"]
    (folder / "a.nii.gz").unlink()
    for _ in range(2):
        again = prepare(folder, store, progress=False)
        assert (again.good, again.new, again.bad) == (first.good, 0, [])
    assert read_lines(store / "private" / "quarantine.jsonl") == [] and verify(Store(store)) == 1
    good(folder, "a.nii.gz")
    assert [row["kind"] for row in prepare(folder, store, progress=False).bad] == ["duplicate"]


def test_recipes_do_not_mix_and_bad_arguments_teach(tmp_path):
    good(tmp_path / "input", "a.nii.gz")
    prepare(tmp_path / "input", tmp_path / "store", progress=False)
    with pytest.raises(ValueError, match="spacing 2.0, now 1.5"):
        prepare(tmp_path / "input", tmp_path / "store", spacing=1.5)
    for wrong in ({"kernel": "cubic"}, {"spacing": 0.0}, {"max_bad": 2}, {"executor": "gpu"},
                  {"kernel": "area", "executor": "dali"}):  # fmt: skip
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            prepare(tmp_path / "input", tmp_path / "new", **wrong)
    with pytest.raises(DataError, match="not empty"):
        prepare(tmp_path / "input", tmp_path / "input")


def test_the_index_describes_the_volume(tmp_path):
    good(tmp_path / "input", "a.nii.gz")
    prepare(tmp_path / "input", tmp_path / "store", spacing=2.0, progress=False)
    store = Store(tmp_path / "store")
    (record,), volume = store.records, store.volume(0)
    assert record["shape"] == list(volume.shape) == [40, 22, 25] and record["spacing"] == [2.0, 2.0, 2.0]
    np.testing.assert_allclose(np.array(record["affine"]) @ [0, 0, 0, 1], [0.5, 0.5, 0, 1])
    assert record["body"] == [0, 4, 4, 40, 18, 21]
    assert record["foreground"] == pytest.approx((volume > -500).mean(), abs=1e-4)
    assert record["percentiles"]["50"] == np.percentile(volume, 50)
    assert record["source"] == {"shape": [40, 44, 50], "spacing": [2.0, 1.0, 1.0], "orientation": "RAS", "angle": 0.0}


def test_jobs_are_the_cores_that_may_be_used(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert default_jobs() == 3
    good(tmp_path / "input", "a.nii.gz")
    with pytest.raises(ValueError, match="jobs is 0"):
        prepare(tmp_path / "input", tmp_path / "store", jobs=0)


def test_the_store_does_not_depend_on_jobs(bad, tmp_path):
    folder, _ = bad
    for jobs in (1, 3):
        prepare(folder, tmp_path / str(jobs), jobs=jobs, max_bad=1, progress=False)
    one, three = ((tmp_path / jobs / "index.jsonl").read_text() for jobs in "13")
    assert one == three and len(one.splitlines()) == 2


def test_one_store_one_description(tmp_path):
    settings = recipe(spacing=2.0)
    with Ledger(tmp_path / "store", settings):
        assert json.loads((tmp_path / "store" / "STORE.json").read_text())["recipe"] == settings


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real volumes of ../shared/data/ct are not here")
def test_real_volumes(tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    for name in ("sts_002.nii.gz", "sts_024.nii.gz", "totalseg_example_ct_sm.nii.gz", "scct.nii"):
        (folder / name).symlink_to(SHARED / name)
    summary = prepare(folder, tmp_path / "store", max_bad=1, progress=False)
    assert len(summary.good) == 3 and [row["kind"] for row in summary.bad] == ["not-hu"]
    shapes = {tuple(record["shape"]) for record in Store(tmp_path / "store").records}
    assert shapes == {(78, 70, 79), (90, 76, 73), (45, 152, 183)}
