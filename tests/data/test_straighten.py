"""Leaning volumes are brought onto a straight grid by their full affine, where they were, or are refused."""

import numpy as np
import pytest
from scans import PIXEL, STEP, ct, dicom_series, nifti

from medfast.data.formats import decode
from medfast.data.image import Bad
from medfast.data.make import label, make
from medfast.data.recipe import recipe
from medfast.data.straighten import nearest, straight_grid, straighten

LEAN = np.array([[0.0, 0.1, -2.0, 30.0], [0.5, 2.0, 0.0, -20.0], [2.0, 0.0, 0.1, 5.0], [0.0, 0.0, 0.0, 1.0]])
# columns d, h, w: the stack leans by 14 degrees within the slices' own h


def places(affine, shape):
    """World coordinates of all voxels, (*shape, 3)."""
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def field(at):
    return 3 * at[..., 0] - 2 * at[..., 1] + 5 * at[..., 2]


def test_a_linear_field_stays_where_it_was():
    affine = LEAN.copy()
    affine[:3, :3] *= 2.0 / np.linalg.norm(affine[:3, :3], axis=0)
    volume = np.rint(field(places(affine, (24, 30, 28)))).astype(np.int16)
    made, at = straighten(volume, affine, 2.0, -3000)
    axes = at[:3, :3] / 2.0
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    assert np.linalg.det(axes) * np.linalg.det(affine[:3, :3]) > 0 and (at, made.shape) == (
        at,
        straight_grid(affine, volume.shape, 2.0)[1],
    )
    within = np.linalg.inv(affine) @ np.concatenate([places(at, made.shape), np.ones((*made.shape, 1))], -1)[..., None]
    within = within[..., :3, 0]
    inside = ((within > 0.01) & (within < np.array(volume.shape) - 1.01)).all(-1)
    outside = ((within < -1) | (within > np.array(volume.shape))).any(-1)
    assert inside.mean() > 0.3 and outside.any()
    assert np.abs(made - field(places(at, made.shape)))[inside].max() <= 1.01
    assert (made[outside] == -3000).all()
    pair, _ = straighten(np.stack([volume, volume + 7]), affine, 2.0, -3000)
    np.testing.assert_array_equal(pair[0], made)
    assert np.abs(pair[1] - made - 7)[inside].max() <= 1


def test_labels_take_the_voxel_that_they_lie_in():
    stored = np.arange(24 * 30 * 28).reshape(24, 30, 28)
    made, shape = straight_grid(LEAN, stored.shape, 2.0)
    found = nearest(stored, LEAN, made, shape)
    at = (np.linalg.inv(LEAN) @ np.concatenate([places(made, shape), np.ones((*shape, 1))], -1)[..., None])[..., :3, 0]
    rounded = np.rint(at).astype(int)
    inside = ((rounded >= 0) & (rounded < stored.shape)).all(-1) & (np.abs(at % 1 - 0.5) > 1e-3).all(-1)
    np.testing.assert_array_equal(found[inside], stored[tuple(rounded[inside].T)])
    assert inside.mean() > 0.3


def test_leaning_files_are_refused_or_straightened():
    affine = np.eye(4)
    affine[:3, :3] = [[2.0, 0.0, 0.0], [0.0, 2.0, 0.8], [0.0, 0.0, 2.0]]
    data = nifti(ct(5, (44, 40, 40)).transpose(2, 1, 0), affine)
    with pytest.raises(Bad, match="--straighten") as caught:
        decode([data])
    assert caught.value.kind == "shear"
    settled = recipe(spacing=2.0, straighten=True)
    volume, record, image = make([data], settled)
    assert image.lean > 20 and volume.shape[1] > 40 and volume.shape[2] == 40 and record["shape"] == list(volume.shape)
    assert abs(np.median(volume[12:32, 20:35, 15:25]) - 50) < 10, "muscle in the middle"
    classes, about = label(
        nifti((ct(5, (44, 40, 40)).transpose(2, 1, 0) > -500).astype(np.uint8), affine), image, record, settled
    )
    assert classes.shape == volume.shape and about["classes"] == [0, 1]
    agree = (classes == 1) == (volume > -500)
    assert agree.mean() > 0.95
    assert recipe() == recipe(straighten=False) and "straighten" not in recipe()


def test_a_tilted_gantry(tmp_path):
    pytest.importorskip("pydicom")
    folder = dicom_series(tmp_path / "tilt", ct(3), tilt=0.3)
    blobs = [file.read_bytes() for file in sorted(folder.iterdir())]
    settled = recipe(spacing=1.5, straighten=True)
    volume, record, image = make(list(blobs), settled)
    assert image.leaning == "tilt" and abs(image.lean - np.degrees(0.3)) < 0.1
    heights = STEP * np.cos(0.3) * len(blobs)
    assert abs(volume.shape[0] * 1.5 - heights) < 1.6 and abs(volume.shape[2] * 1.5 - PIXEL[1] * 40) < 1.6
    assert abs(np.median(volume[tuple(slice(n // 3, -n // 3) for n in volume.shape)]) - 50) < 10
