"""What the reader accepts, what it refuses and with which class."""

import gzip
from itertools import product

import nibabel as nib
import numpy as np
import pytest

from medfast.data import nifti
from medfast.data.image import Bad
from medfast.data.nifti import parse, read

RNG = np.random.default_rng(0)
VOXELS = RNG.integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def packed(voxels=VOXELS, affine=AFFINE, kind=nib.Nifti1Image, **header):
    image = kind(voxels, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    data = bytearray(image.to_bytes())
    view = np.frombuffer(data, image.header.template_dtype, 1)
    for name, value in header.items():
        view[name][0] = value
    return bytes(data)


def refused(data):
    with pytest.raises(Bad) as caught:
        parse(data)
    return caught.value.kind


def test_voxels_and_geometry_survive():
    image = parse(packed())
    np.testing.assert_array_equal(image.stored, VOXELS.transpose(2, 1, 0))
    assert image.spacing.tolist() == [3.0, 2.0, 1.0] and image.orientation == "RAS" and image.notes == []


@pytest.mark.parametrize("codes", ["".join(c) for c in product("RL", "AP", "SI")] + ["PIR", "SAL", "ASR"])
def test_every_orientation_becomes_the_same_array_and_place(codes):
    wanted = nib.orientations.axcodes2ornt(codes)
    turned = nib.Nifti1Image(VOXELS, AFFINE).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.io_orientation(AFFINE), wanted))  # fmt: skip
    image = parse(packed(np.asarray(turned.dataobj), turned.affine))
    assert image.orientation == codes
    np.testing.assert_array_equal(image.stored, VOXELS.transpose(2, 1, 0))
    np.testing.assert_allclose(image.affine @ [2, 1, 3, 1], AFFINE @ [3, 1, 2, 1])


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4", "f8", ">i2"])
def test_voxel_types(dtype):
    voxels = RNG.integers(0, 200, (5, 6, 7)).astype(dtype)
    header = nib.Nifti1Header(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(voxels.dtype)
    image = parse(nib.Nifti1Image(voxels, AFFINE, header).to_bytes())
    np.testing.assert_array_equal(image.stored, voxels.transpose(2, 1, 0))


def test_scaling_of_the_header():
    image = parse(packed(scl_slope=2.0, scl_inter=-1024.0))
    assert (image.slope, image.inter) == (2.0, -1024.0)
    for nothing in (0.0, np.nan):
        image = parse(packed(scl_slope=nothing, scl_inter=7.0))
        assert (image.slope, image.inter) == (1.0, 0.0)


def test_content_and_not_the_name_decides(tmp_path):
    named_wrong = tmp_path / "a.nii.gz"
    named_wrong.write_bytes(packed())
    digest, data = read(named_wrong)
    assert len(digest) == 64 and parse(data).stored.shape == (7, 6, 5)
    halves = packed()
    members = gzip.compress(halves[:200]) + gzip.compress(halves[200:]) + b"\0" * 512
    assert parse(members).stored.shape == (7, 6, 5)
    assert parse(packed(kind=nib.Nifti2Image)).stored.shape == (7, 6, 5)


def test_damaged_compression():
    whole = gzip.compress(packed())
    assert refused(whole[:-20]) == "gzip-truncated"
    assert refused(whole[:-4]) == "gzip-truncated"
    flipped = bytearray(whole)
    flipped[-8] ^= 1  # the CRC
    assert refused(bytes(flipped)) == "gzip-crc"
    flipped = bytearray(gzip.compress(packed(), compresslevel=0))
    flipped[600] ^= 1  # one voxel, which no inflater notices by itself
    assert refused(bytes(flipped)) == "gzip-crc"
    assert refused(whole + b"more") == "gzip-crc"


def test_many_members_are_inflated_in_bounded_pieces(monkeypatch):
    """Handing each member all that is left costs the square of their number (BGZF has one per 64 KiB)."""
    fed, real = [], nifti.inflater.decompressobj

    class Watched:
        def __init__(self, *arguments):
            self.stream = real(*arguments)

        def decompress(self, data):
            fed.append(len(data))
            return self.stream.decompress(data)

        def __getattr__(self, name):
            return getattr(self.stream, name)

    monkeypatch.setattr(nifti.inflater, "decompressobj", Watched)
    whole = packed(RNG.integers(-1000, 1000, (60, 60, 60)).astype(np.int16))
    members = b"".join(gzip.compress(whole[i : i + 30_000]) for i in range(0, len(whole), 30_000))
    assert nifti.inflate(members) == nifti.inflate(gzip.compress(whole)) == whole
    assert max(fed) <= 1 << 16 < len(members)


def test_no_nifti_at_all():
    assert refused(b"") == "not-nifti"
    assert refused(b"<html><body>404</body></html>" * 20) == "not-nifti"
    assert refused(gzip.compress(b"hello, I am a text\n" * 40)) == "not-nifti"
    assert refused(packed()[:300]) == "not-nifti"
    assert refused(packed(magic=b"ni1")) == "not-nifti"
    assert refused(packed()[:-1]) == "short-file"
    for offset in (np.nan, np.inf, -352.0, 0.0, 347.0):
        assert refused(packed(vox_offset=offset)) == "not-nifti"


def test_shapes_and_voxels_that_are_no_ct():
    assert parse(packed(VOXELS[..., None])).stored.shape == (7, 6, 5)
    assert refused(packed(np.stack([VOXELS, VOXELS], -1))) == "4d"
    assert refused(packed(VOXELS[:, :, :1])) == "2d"
    assert refused(packed(VOXELS.astype(np.complex64))) == "voxel-type"
    colour = np.zeros((5, 6, 7), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    assert refused(packed(colour)) == "voxel-type"
    assert refused(packed(datatype=999)) == "voxel-type"


def test_geometry_that_readers_disagree_about():
    other = AFFINE.copy()
    other[0, 0] = 1.02
    assert refused(packed(srow_x=other[0])) == "qform-sform"
    assert refused(packed(qform_code=0, pixdim=[1, 1, 2, 3.1, 0, 0, 0, 0])) == "qform-sform"
    moved = AFFINE[0] + [0, 0, 0, 50]
    assert parse(packed(srow_x=moved)).spacing.tolist() == [3.0, 2.0, 1.0]
    assert refused(packed(xyzt_units=1)) == "spacing"
    nothing = {"sform_code": 0, "qform_code": 0}
    assert refused(packed(**nothing, pixdim=[1, 0, 0, 0, 0, 0, 0, 0])) == "spacing"
    assert parse(packed(**nothing)).notes == ["no-orientation"]
    assert parse(packed(pixdim=[1, np.nan, 2, 3, 0, 0, 0, 0])).notes == ["pixdim"]
    assert refused(packed(qform_code=0, srow_x=[0, 0, 0, 0])) == "affine"
    tilted = {"srow_y": [0, 2, 3 * np.sin(0.3), 0], "srow_z": [0, 0, 3 * np.cos(0.3), 0]}
    assert refused(packed(**tilted)) == "qform-sform"  # a qform cannot lean
    assert parse(packed(qform_code=0, **tilted)).lean == pytest.approx(np.degrees(0.3), abs=1e-3)


def test_oblique_is_noted():
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    image = parse(packed(affine=turn @ AFFINE))
    assert image.notes == ["oblique"] and image.angle == pytest.approx(np.degrees(0.2), abs=0.01)
