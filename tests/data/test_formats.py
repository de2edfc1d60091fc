"""NRRD, MetaImage, PNG: the same volume as NIfTI, and damage refused with its class."""

import gzip
import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from scans import nifti

from medfast.data import nifti as nifti_module
from medfast.data.formats import decode, fetch
from medfast.data.image import Bad
from medfast.data.inputs import Case

VOXELS = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)  # i, j, k
#  i runs to anterior, j to inferior, k to the right
AFFINE = np.array([[0, 0, 3.0, -10], [1, 0, 0, -20], [0, -2, 0, 30], [0, 0, 0, 1]])
RAW = VOXELS.tobytes(order="F")


def nrrd(body=RAW, **fields):
    columns = AFFINE[:3, :3].T * [-1, -1, 1]
    about = {"type": "short", "dimension": "3", "space": "left-posterior-superior", "sizes": "5 6 7",
             "space directions": " ".join(f"({','.join(map(str, c))})" for c in columns), "endian": "little",
             "encoding": "raw", "space origin": "(10,20,30)", **fields}  # fmt: skip
    lines = ["NRRD0004", "# a comment", *(f"{k}: {v}" for k, v in about.items() if v is not None), "note:=text"]
    return "\n".join(lines).encode() + b"\n\n" + body


def mha(body=RAW, **fields):
    axes = (AFFINE[:3, :3] / np.linalg.norm(AFFINE[:3, :3], axis=0)).T * [-1, -1, 1]
    about = {"ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
             "CompressedData": "False", "TransformMatrix": " ".join(map(str, axes.ravel())), "Offset": "10 20 30",
             "ElementSpacing": "1 2 3", "DimSize": "5 6 7", "ElementType": "MET_SHORT", **fields}  # fmt: skip
    lines = [f"{k} = {v}" for k, v in about.items() if v is not None]
    return "\n".join([*lines, "ElementDataFile = LOCAL"]).encode() + b"\n" + body


def png(array):
    Picture = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    stream = io.BytesIO()
    Picture.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def refused(data, **options):
    with pytest.raises(Bad) as caught:
        decode([data], **options)
    return caught.value.kind


@pytest.mark.parametrize("data", [
    nrrd(), nrrd(gzip.compress(RAW), encoding="gzip"), nrrd(VOXELS.astype(">i2").tobytes(order="F"), endian="big"),
    nrrd(space="LPS"), nrrd().replace(b"\n", b"\r\n", 12),
    mha(), mha(zlib.compress(RAW), CompressedData="True"),
    mha(VOXELS.astype(">i2").tobytes(order="F"), BinaryDataByteOrderMSB="True"),
    mha(VOXELS.astype(np.float32).tobytes(order="F"), ElementType="MET_FLOAT"),
])  # fmt: skip
def test_every_format_gives_the_volume_that_nifti_gives(data):
    truth = nifti_module.parse(nifti(VOXELS, AFFINE))
    image = decode([data])
    np.testing.assert_array_equal(image.stored, truth.stored)
    np.testing.assert_allclose(image.affine, truth.affine, atol=1e-9)
    assert image.orientation == truth.orientation == "AIR" and image.notes == []


def test_channels_are_taken_only_where_asked_for():
    two = np.stack([VOXELS, VOXELS + 1])
    vector = two.tobytes(order="F")
    spaced = {"space directions": "none (1,0,0) (0,2,0) (0,0,3)", "dimension": "4", "sizes": "2 5 6 7", "space": "RAS"}
    files = [nifti(np.moveaxis(two, 0, -1)), nrrd(vector, **spaced), mha(vector, ElementNumberOfChannels="2")]
    for data in files:
        image = decode([data], channels=2)
        assert image.stored.shape[0] == 2 and (image.stored[1] - image.stored[0] == 1).all()
        assert refused(data) == refused(data, channels=3) == "4d"
    for data in (nifti(VOXELS), nrrd(), mha()):
        assert refused(data, channels=2) == "4d"


@pytest.mark.parametrize("data, kind", [
    (nrrd()[:-1], "short-file"), (mha()[:-1], "short-file"), (nrrd()[:90], "short-file"),
    (nrrd(gzip.compress(RAW)[:-9], encoding="gzip"), "gzip-truncated"),
    (nrrd(gzip.compress(RAW)[:-8] + b"\0" * 8, encoding="gzip"), "gzip-crc"),
    (mha(zlib.compress(RAW)[:-1], CompressedData="True"), "gzip-truncated"),
    (mha(zlib.compress(RAW)[:-1] + b"\0", CompressedData="True"), "gzip-crc"),
    (nrrd(type="block"), "voxel-type"), (mha(ElementType="MET_OTHER"), "voxel-type"), (nrrd(encoding="bzip2"), "codec"),
    (nrrd(**{"data file": "x.raw"}), "detached"), (mha().replace(b"LOCAL", b"x.raw"), "detached"),
    (nrrd(**{"space directions": "(1,0,0) (0,1,.2) (0,0,1)"}), "shear"), (nrrd(space="scanner-xyz"), "affine"),
    (nrrd(sizes="5 six 7"), "affine"), (nrrd(sizes=None), "affine"), (mha(DimSize="5 6"), "2d"),
    (mha(ElementSpacing="1 0 3"), "spacing"), (mha(ElementSpacing="1 nan 3"), "spacing"),
    (mha(TransformMatrix="1 0 0"), "affine"), (nrrd(sizes="5 42", dimension="2",
     **{"space directions": "(1,0,0) (0,1,0)"}), "2d"),
])  # fmt: skip
def test_damage_has_a_class(data, kind):
    assert refused(data) == kind


def test_spacings_without_directions_are_noted():
    image = decode([nrrd(space=None, spacings="1 2 3", **{"space directions": None, "space origin": None})])
    assert image.notes == ["no-orientation"] and image.spacing.tolist() == [3, 2, 1]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pictures(dtype):
    plane = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, (30, 20)).astype(dtype)
    image = decode([png(plane)], axes=2)
    np.testing.assert_array_equal(image.stored, plane)
    assert np.isnan(image.spacing).all() and image.shape == (30, 20)
    assert refused(png(plane)) == "2d" and refused(nifti(VOXELS), axes=2) == "3d"
    assert refused(png(np.zeros((20, 20, 3), np.uint8)), axes=2) == "voxel-type"
    assert refused(png(plane)[:-30], axes=2) == "png"
    flipped = bytearray(png(plane))
    flipped[len(flipped) // 2] ^= 1
    assert refused(bytes(flipped), axes=2) == "png"


def test_decoding_takes_the_bytes_so_that_they_can_be_freed():
    blobs = [nifti(VOXELS)]
    decode(blobs)
    assert blobs == []


def test_a_label_is_part_of_the_hash(tmp_path: Path):
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    a, b = tmp_path / "a", tmp_path / "b"
    assert len({fetch(case)[0] for case in (Case((a,)), Case((a,), b), Case((b,), a), Case((a, b)))}) == 4
