"""Positions, spacing and values of the new grid, on volumes whose truth is known everywhere."""

import importlib.util

import numpy as np
import pytest
import torch

from medfast.data.resample import AIR, KERNELS, TOP, grid, new_affine, resample, resample_dali, weights

SPACING = np.array([3.27, 0.9766, 0.78])
SHAPE = (31, 70, 90)
ORIGIN = np.array([-20.0, 11.0, 5.0])


def affine(spacing=SPACING):
    out = np.diag([*spacing, 1.0])
    out[:3, 3] = ORIGIN
    return out


def places(matrix, shape):
    index = np.stack([*np.meshgrid(*map(np.arange, shape), indexing="ij"), np.ones(shape)], -1)
    return (index @ matrix.T)[..., :3]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("new", [1.5, 2.0, 4.0])
def test_a_ramp_stays_where_it_was(kernel, new):
    slope = np.array([3.1, -2.7, 4.3])
    volume = places(affine(), SHAPE) @ slope
    out = resample(volume, SPACING, new, kernel)
    truth = places(new_affine(affine(), SPACING, new), out.shape) @ slope
    inside = tuple(slice(int(np.ceil(2 * max(1, mm / new) + 1)), -int(np.ceil(2 * max(1, mm / new) + 1)))
                   for mm in np.maximum(SPACING, new))  # fmt: skip
    # Rounding; the ripple of a triangle cut into few taps; "area" takes whole voxels, so up to half of one.
    atol = {"linear": 0.51, "triangle": 2.0, "area": 0.5 + 0.5 * np.abs(slope * SPACING).sum()}[kernel]
    np.testing.assert_allclose(out[inside], truth[inside], atol=atol)
    assert abs((out[inside] - truth[inside]).mean()) < 0.1


def test_an_ellipsoid_keeps_centre_and_volume():
    centre, radii = np.array([30.0, 45.0, 41.0]), np.array([22.0, 18.0, 25.0])
    inside = (((places(affine(), SHAPE) - centre) / radii) ** 2).sum(-1) < 1
    volume = np.where(inside, 1000, 0).astype(np.int16)
    out = resample(volume, SPACING, 2.0)
    mass = out.astype(np.float64)
    where = places(new_affine(affine(), SPACING, 2.0), out.shape)
    found = (where * mass[..., None]).sum((0, 1, 2)) / mass.sum()
    np.testing.assert_allclose(found, centre, atol=0.1)
    assert mass.sum() / 1000 * 8 == pytest.approx(4 / 3 * np.pi * radii.prod(), rel=0.02)


def test_the_grid_is_exact_and_shares_the_edge():
    assert grid(SHAPE, SPACING, 2.0) == (51, 34, 35)
    assert grid((1, 2, 3), np.array([0.3, 0.3, 0.3]), 2.0) == (1, 1, 1)
    moved = new_affine(affine(), SPACING, 2.0)
    np.testing.assert_allclose(np.linalg.norm(moved[:3, :3], axis=0), 2.0)
    np.testing.assert_allclose(moved @ [-0.5, -0.5, -0.5, 1], affine() @ [-0.5, -0.5, -0.5, 1])


def test_same_spacing_changes_nothing():
    volume = np.random.default_rng(1).integers(AIR, TOP, SHAPE).astype(np.int16)
    np.testing.assert_array_equal(resample(volume, np.full(3, 2.0), 2.0), volume)


def test_padding_is_clamped_before_it_is_filtered():
    volume = np.full((16, 16, 32), -3024, np.int16)
    volume[..., 16:] = 40
    clamped = np.clip(volume, AIR, TOP)
    np.testing.assert_array_equal(resample(volume, np.full(3, 0.7), 2.0), resample(clamped, np.full(3, 0.7), 2.0))


def test_the_triangle_folds_less_noise_than_linear():
    noise = (100 * np.random.default_rng(2).standard_normal((40, 60, 60))).astype(np.int16)
    spacing = np.full(3, 0.7)
    # White noise and independent taps: the deviation is the product over axes of the root of the summed squares.
    expected = 100 * float(weights(60, 21, 2 / 0.7, "triangle").double()[3:-3].square().sum(1).mean().sqrt()) ** 3
    assert resample(noise, spacing)[3:-3, 3:-3, 3:-3].std() == pytest.approx(expected, rel=0.08)
    assert resample(noise, spacing, kernel="linear").std() > 2 * expected


def test_weights_by_hand():
    row = weights(8, 2, 4.0, "triangle")[0].tolist()  # centre at 1.5, half width 4; what lies before 0 falls on 0
    by_hand = np.array([0.5 + 1.5 + 2.5, 3.5, 3.5, 2.5, 1.5, 0.5, 0, 0])
    np.testing.assert_allclose(row, by_hand / 16, atol=1e-7)
    assert torch.allclose(weights(8, 2, 4.0, "area"), torch.tensor([[0.25] * 4 + [0.0] * 4, [0.0] * 4 + [0.25] * 4]))
    with pytest.raises(ValueError, match="triangle, area, linear"):
        weights(8, 2, 4.0, "cubic")


def test_slabs_make_no_difference(monkeypatch):
    volume = np.random.default_rng(3).integers(AIR, TOP, SHAPE).astype(np.int16)
    whole = resample(volume, SPACING)
    monkeypatch.setattr("medfast.data.resample.SLAB", 3 * 70 * 90)
    assert np.abs(resample(volume, SPACING).astype(int) - whole).max() <= 1


@pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None if importlib.util.find_spec("nvidia") else True,
                    reason="DALI is not installed")  # fmt: skip
def test_dali_agrees_within_one_hu():
    volume = np.random.default_rng(4).integers(-1200, 3000, SHAPE).astype(np.int16)
    clamped = [volume[:9].clip(AIR, TOP), volume[9:].clip(AIR, TOP)]
    ours, theirs = resample(volume, SPACING).astype(int), resample_dali(clamped, SHAPE, SPACING, 2.0).astype(int)
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 0.01
    with pytest.raises(ValueError, match="triangle"):
        resample_dali(clamped, SHAPE, SPACING, 2.0, "area")
