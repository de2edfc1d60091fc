"""A DICOM series becomes the volume that it is, or is refused with the reason."""

from pathlib import Path

import numpy as np
import pytest
from scans import PIXEL, SHAPE, STEP, ct, dicom_series, dicom_slice, place_of

from medfast.data import nifti
from medfast.data.formats import decode, fetch, peek
from medfast.data.image import Bad
from medfast.data.inputs import find

pytest.importorskip("pydicom", reason="pydicom is not installed")
SHARED = Path(__file__).parents[3] / "shared" / "data"
VOLUME = ct()


def read(folder):
    (case,) = find(folder)
    return decode(fetch(case)[1])


def values(image):
    return image.stored * image.slope + image.inter


def refused(folder):
    with pytest.raises(Bad) as caught:
        read(folder)
    return caught.value.kind


def test_slices_are_ordered_by_position_and_land_where_they_were(tmp_path):
    image = read(dicom_series(tmp_path / "s", VOLUME))
    np.testing.assert_array_equal(values(image), VOLUME[:, ::-1, ::-1])  # LPS
    np.testing.assert_allclose(image.spacing, [STEP, *PIXEL])
    assert image.orientation == "LPS" and image.notes == [] and image.modality == "CT"
    np.testing.assert_allclose(image.affine @ [0, SHAPE[1] - 1, SHAPE[2] - 1, 1], [20, 30, 5, 1])


def test_a_gap_a_copy_and_phases(tmp_path):
    assert refused(dicom_series(tmp_path / "gap", VOLUME, skip=(7, 8))) == "gap"
    folder = dicom_series(tmp_path / "copy", VOLUME)
    dicom_slice(folder / "zzz.dcm", VOLUME[4], [-20, -30, 5 + STEP * 4])
    image = read(folder)
    np.testing.assert_array_equal(values(image), VOLUME[:, ::-1, ::-1])
    assert image.notes == ["doubled"]
    dicom_slice(folder / "zzz.dcm", VOLUME[9], [-20, -30, 5 + STEP * 4])
    assert refused(folder) == "doubled"


def test_two_series_in_a_folder_are_two_cases(tmp_path):
    dicom_series(tmp_path / "s", VOLUME, series="1.2.3")
    folder = dicom_series(tmp_path / "other", ct(1), series="1.2.4")
    for file in folder.iterdir():
        file.rename(tmp_path / "s" / f"b{file.name}")
    cases = find(tmp_path / "s")
    assert [len(case.files) for case in cases] == [SHAPE[0]] * 2 and {case.group for case in cases} == {"nobody"}
    for case, volume in zip(cases, (VOLUME, ct(1)), strict=True):
        np.testing.assert_array_equal(values(decode(fetch(case)[1])), volume[:, ::-1, ::-1])


def test_tilt_and_shift(tmp_path):
    assert refused(dicom_series(tmp_path / "tilt", VOLUME, tilt=0.3)) == "tilt"
    folder = tmp_path / "both"
    folder.mkdir()
    for z, plane in enumerate(VOLUME):
        dicom_slice(folder / f"{z}.dcm", plane, [0, 0, STEP * z * (2 if z > 9 else 1)], tilt=0.3)
    assert refused(folder) == "gap+tilt"


def test_rescale_that_differs_by_slice(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    for z, plane in enumerate(VOLUME):
        dicom_slice(folder / f"{z}.dcm", plane, [-20, -30, STEP * z], inter=-1024 - z)
    image = read(folder)
    assert image.notes == ["rescale"]
    np.testing.assert_array_equal(values(image), VOLUME[:, ::-1, ::-1])


@pytest.mark.parametrize("tags, kind", [
    ({"ImagePositionPatient": None}, "position"), ({"PixelSpacing": [0.8, 0.9]}, "mixed-series"),
    ({"Rows": 22, "Columns": 80}, "mixed-series"), ({"NumberOfFrames": 3}, "multi-frame"),
    ({"SamplesPerPixel": 3}, "voxel-type"), ({"PixelData": b"\0" * 100}, "short-file"),
    ({"Modality": "MR"}, "mixed-series"), ({"PixelSpacing": [0.0, 0.0]}, "position"),
    ({"PixelData": None}, "short-file"),
])  # fmt: skip
def test_one_bad_slice_refuses_the_series(tmp_path, tags, kind):
    folder = dicom_series(tmp_path / "s", VOLUME)
    z = place_of("000.dcm")
    dicom_slice(folder / "000.dcm", VOLUME[z], [-20, -30, 5 + STEP * z], **tags)
    assert refused(folder) == kind


def test_a_slice_cut_short_is_not_dropped(tmp_path):
    folder = dicom_series(tmp_path / "s", VOLUME)
    file = folder / "005.dcm"
    file.write_bytes(file.read_bytes()[:-700])
    assert refused(folder) == "short-file"


def test_what_has_no_pixels_is_a_case_of_its_own(tmp_path):
    folder = dicom_series(tmp_path / "s", VOLUME)
    (folder / "report.dcm").write_bytes(b"\0" * 128 + b"DICM")
    cases = find(folder)
    assert sorted(len(case.files) for case in cases) == [1, SHAPE[0]]
    with pytest.raises(Bad) as caught:
        decode(fetch(next(case for case in cases if len(case.files) == 1))[1])
    assert caught.value.kind == "no-image"


def test_names_do_not_matter_and_bytes_do(tmp_path):
    folder = dicom_series(tmp_path / "s", VOLUME)
    (case,) = find(folder)
    before = fetch(case)[0]
    for number, file in enumerate(sorted(folder.iterdir(), reverse=True)):
        file.rename(folder / f"1.2.840.{number}")  # no ending: known by content
    (case,) = find(folder)
    assert len(case.files) == SHAPE[0] and fetch(case)[0] == before
    dicom_slice(case.files[0], VOLUME[0], [-20, -30, 5], SeriesNumber=4)
    assert fetch(case)[0] != before


def test_a_radiograph(tmp_path):
    plane = np.abs(VOLUME[10]) + 1
    dicom_slice(tmp_path / "x.dcm", plane, [0, 0, 0], modality="CR", inter=0, ImagerPixelSpacing=[0.2, 0.3],
                PixelSpacing=None, ImagePositionPatient=None)  # fmt: skip
    (case,) = find(tmp_path, axes=2)
    image = decode(fetch(case)[1], axes=2)
    np.testing.assert_array_equal(image.stored, plane)
    assert image.spacing.tolist() == [0.2, 0.3]
    dicom_slice(tmp_path / "x.dcm", plane, [0, 0, 0], modality="CR", inter=0, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(decode(fetch(case)[1], axes=2).stored, plane.max() - plane)


def test_without_pydicom_there_is_a_sentence(tmp_path, monkeypatch):
    dicom_series(tmp_path / "s", VOLUME[:2])
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'medfast\[dicom\]'"):
        find(tmp_path / "s")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real volumes of ../shared/data are not here")
def test_real_series():
    cases = find(SHARED / "ct_dicom")
    straight = None
    for case in cases:
        if "tilt" in str(case.path):
            with pytest.raises(Bad) as caught:
                decode(fetch(case)[1])
            assert caught.value.kind == "gap+tilt"
        else:
            straight = decode(fetch(case)[1])
    assert straight is not None
    twin = nifti.parse(nifti.read(SHARED / "ct" / "sts_002.nii.gz")[1])
    np.testing.assert_array_equal(values(straight), values(twin))
    np.testing.assert_allclose(straight.affine, twin.affine, atol=1e-3)


def enhanced(file, volume, positions=True):
    """One object of many frames, in an order of its own, with the tags of a slice in its functional groups."""
    import pydicom
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    def group(**tags):
        made = Dataset()
        for name, value in tags.items():
            setattr(made, name, value)
        return Sequence([made])

    order = np.random.default_rng(2).permutation(len(volume))
    dicom_slice(file, volume[0], [0, 0, 0], ImagePositionPatient=None, ImageOrientationPatient=None, PixelSpacing=None,
                RescaleSlope=None, RescaleIntercept=None)  # fmt: skip
    made = pydicom.dcmread(file)
    made.NumberOfFrames = len(volume)
    made.PixelData = (volume[order].astype(int) + 1024).astype("<i2").tobytes()
    made.SharedFunctionalGroupsSequence = group(
        PlaneOrientationSequence=group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        PixelMeasuresSequence=group(PixelSpacing=list(PIXEL)),
        PixelValueTransformationSequence=group(RescaleSlope=1, RescaleIntercept=-1024),
    )
    if positions:
        made.PerFrameFunctionalGroupsSequence = Sequence([
            group(PlanePositionSequence=group(ImagePositionPatient=[-20, -30, 5 + STEP * float(z)]))[0] for z in order
        ])  # fmt: skip
    made.save_as(file)
    return file


def test_frames_of_one_object_are_slices(tmp_path):
    image = read(enhanced(tmp_path / "many.dcm", VOLUME))
    twin = read(dicom_series(tmp_path / "s", VOLUME))
    np.testing.assert_array_equal(values(image), values(twin))
    np.testing.assert_allclose(image.affine, twin.affine)
    np.testing.assert_allclose(peek(find(tmp_path / "many.dcm")[0]).affine, twin.affine)
    assert refused(enhanced(tmp_path / "lost.dcm", VOLUME, positions=False)) == "multi-frame"
