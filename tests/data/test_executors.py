"""Executors carry out the same plan: PyTorch against plain NumPy, DALI against PyTorch."""

import sys

import numpy as np
import pytest
import torch

from medfast.data import executor_torch
from medfast.data.executor_dali import DaliExecutor, require
from medfast.data.executor_torch import TorchExecutor

WINDOW = (-500.0, 500.0)
SIZE = (20, 24, 28)


def scan(shape, seed=0):
    """int16 HU with air, tissue, bone and noise."""
    rng = np.random.default_rng(seed)
    grid = np.indices(shape).astype(float)
    organs = 700 * np.sin(grid[0] / 5) * np.cos(grid[1] / 7 + grid[2] / 4) - 150
    return (organs + 60 * rng.normal(size=shape)).astype(np.int16)


def windowed(crop):
    return np.clip((crop.astype(np.float64) + 500) / 1000, 0, 1)


def test_window_is_applied_once_and_exactly():
    crop = scan(SIZE)
    assert (crop < -500).any() and (crop > 500).any()
    view = TorchExecutor(SIZE, WINDOW)([crop], {})
    assert view.shape == (1, 1, *SIZE) and view.dtype == torch.float32
    np.testing.assert_allclose(view[0, 0].numpy(), windowed(crop), atol=2e-7)


@pytest.mark.parametrize("shape", [(16, 29, 28), (24, 20, 33), (1, 24, 28)])
def test_resize_is_linear_between_voxel_centres(shape):
    crop = scan(shape)
    expected = windowed(crop)
    for axis, (n, m) in enumerate(zip(shape, SIZE, strict=True)):
        place = (np.arange(m) + 0.5) * n / m - 0.5
        expected = np.apply_along_axis(lambda x, at=place, n=n: np.interp(at, np.arange(n), x), axis, expected)
    np.testing.assert_allclose(TorchExecutor(SIZE, WINDOW)([crop], {})[0, 0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("sigma", [1.0, 1.7, 2.0])
def test_blur_is_a_mirrored_gaussian(sigma):
    x = np.random.default_rng(1).random((20, 9, 14))
    radius = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    expected = x
    for axis in range(3):
        padded = np.pad(expected, [(radius, radius) if a == axis else (0, 0) for a in range(3)], mode="reflect")
        expected = np.apply_along_axis(lambda line: np.convolve(line, kernel, mode="valid"), axis, padded)
    got = executor_torch.blur(torch.from_numpy(x).float(), sigma)
    assert got.is_contiguous()
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)


def test_intensity_order_is_gain_shift_contrast_gamma():
    crop = scan(SIZE)
    params = {"gain": 1.2, "shift": -0.3, "contrast": 0.8, "gamma": 1.4}
    x = np.clip(windowed(crop) * 1.2 - 0.3, 0, 1)
    x = np.clip((x - x.mean()) * 0.8 + x.mean(), 0, 1) ** 1.4
    got = TorchExecutor(SIZE, WINDOW)([crop], {k: np.array([v], dtype=np.float32) for k, v in params.items()})
    np.testing.assert_allclose(got[0, 0].numpy(), x, atol=2e-6)


PARAMS = {
    "blur": [0.0, 1.0, 1.37, 2.0], "gain": [1.0, 0.75, 1.25, 1.1], "shift": [0.0, 0.9, -0.4, 0.05],
    "contrast": [1.0, 0.75, 1.25, 1.1], "gamma": [1.0, 0.7, 1.5, 0.71], "noise": [0.1, 0.0, 0.1, 0.1],
}  # fmt: skip


@pytest.mark.parametrize("zoom", [False, True])
@pytest.mark.parametrize("names", [[], ["gain"], ["shift", "gamma"], list(PARAMS)])
def test_dali_agrees_with_torch(zoom, names):
    pytest.importorskip("nvidia.dali")
    shapes = [(20, 24, 28), (16, 29, 34), (24, 20, 22), (23, 28, 28)] if zoom else [SIZE] * 4
    crops = [scan(shape, seed) for seed, shape in enumerate(shapes)]
    crops[1][:5] = -1024
    params = {name: np.array(PARAMS[name], dtype=np.float32) for name in names}
    dali = DaliExecutor(SIZE, WINDOW, zoom=zoom, names=names, most=6)
    for part in (slice(0, 4), slice(1, 2), slice(0, 3)):
        some = {name: value[part] for name, value in params.items()}
        ours, theirs = TorchExecutor(SIZE, WINDOW)(crops[part], some), dali(crops[part], some)
        assert theirs.shape == ours.shape and theirs.dtype == torch.float32 and theirs.is_contiguous()
        assert (ours - theirs).abs().max() < 2e-4
    assert not torch.equal(ours[0], ours[1])


def test_missing_dali_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ValueError, match=r"medfast\[dali-cu13\].*data.executor=torch"):
        require()
