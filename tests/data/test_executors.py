"""Executors carry out the same plan: our kernels against plain NumPy, all others against them."""

import sys

import numpy as np
import pytest
import torch

from medfast.data import orientation
from medfast.data.executor_dali import DaliExecutor, require
from medfast.data.executor_device import DeviceExecutor, beside, device_of
from medfast.data.executor_torch import TorchExecutor
from medfast_kernels import Key, Role

WINDOW = (-500.0, 500.0)
SIZE = (20, 24, 28)
CPU = torch.device("cpu")
KEY = Key(5, 3, torch.arange(2)).at(Role.NOISE).stack(2)


def scan(shape, seed=0, channels=1):
    """int16 HU with air, tissue, bone and noise, (c, d, h, w)."""
    rng = np.random.default_rng(seed)
    grid = np.indices(shape).astype(float)
    organs = 700 * np.sin(grid[0] / 5) * np.cos(grid[1] / 7 + grid[2] / 4) - 150
    return (organs + 60 * rng.normal(size=(channels, *shape))).astype(np.int16)


def windowed(crop):
    return np.clip((crop[0].astype(np.float64) + 500) / 1000, 0, 1)


def numbers(**given):
    return {name: np.array([value], dtype=np.float32) for name, value in given.items()}


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
    np.testing.assert_allclose(TorchExecutor(SIZE, WINDOW)([crop], {})[0, 0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("sigma", [1.0, 1.7, 2.0])
def test_blur_is_a_mirrored_gaussian(sigma):
    crop = scan((20, 9, 14))
    expected = windowed(crop)
    radius = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in range(3):
        padded = np.pad(expected, [(radius, radius) if a == axis else (0, 0) for a in range(3)], mode="reflect")
        expected = np.apply_along_axis(lambda line: np.convolve(line, kernel, mode="valid"), axis, padded)
    got = TorchExecutor((20, 9, 14), WINDOW)([crop], numbers(blur=sigma))
    np.testing.assert_allclose(got[0, 0].numpy(), expected, atol=1e-6)


def test_intensity_order_is_gain_shift_contrast_gamma():
    crop = scan(SIZE)
    x = np.clip(windowed(crop) * 1.2 - 0.3, 0, 1)
    x = np.clip((x - x.mean()) * 0.8 + x.mean(), 0, 1) ** 1.4
    got = TorchExecutor(SIZE, WINDOW)([crop], numbers(gain=1.2, shift=-0.3, contrast=0.8, gamma=1.4))
    np.testing.assert_allclose(got[0, 0].numpy(), x, atol=2e-6)


@pytest.mark.parametrize("rotation", range(4))
@pytest.mark.parametrize("flip", range(3))
def test_turns_left_to_the_executor_are_those_of_the_plan(rotation, flip):
    size, crop = (5, 12, 12), scan((5, 12, 12))
    turns = np.array([orientation.bits(rotation, flip)])
    expected = TorchExecutor(size, WINDOW)([orientation.orient(crop, rotation, flip)], {})
    assert torch.equal(TorchExecutor(size, WINDOW)([crop], {}, turns=turns), expected)
    np.testing.assert_array_equal(orientation.turn(crop, int(turns[0])), orientation.orient(crop, rotation, flip))


PARAMS = {
    "blur": [0.0, 1.0, 1.37, 2.0], "gain": [1.0, 0.75, 1.25, 1.1], "shift": [0.0, 0.9, -0.4, 0.05],
    "contrast": [1.0, 0.75, 1.25, 1.1], "gamma": [1.0, 0.7, 1.5, 0.71], "noise": [0.1, 0.0, 0.1, 0.1],
    "gibbs": [0.0, 0.3, 0.6, 0.0],
}  # fmt: skip
SHAPES = [(20, 24, 28), (16, 29, 34), (24, 20, 22), (23, 28, 28)]


def problem(zoom, names, channels=1):
    crops = [scan(shape, seed, channels) for seed, shape in enumerate(SHAPES if zoom else [SIZE] * 4)]
    crops[1][:, :5] = -1024
    return crops, {name: np.array(PARAMS[name], dtype=np.float32) for name in names}


@pytest.mark.parametrize("zoom", [False, True])
@pytest.mark.parametrize("names", [[], ["gain"], ["shift", "gamma"], list(PARAMS)])
def test_dali_agrees_with_ours(zoom, names):
    pytest.importorskip("nvidia.dali")
    crops, params = problem(zoom, names)
    dali, ours = DaliExecutor(SIZE, WINDOW, zoom=zoom, names=names, most=6), TorchExecutor(SIZE, WINDOW)
    for part in (slice(0, 4), slice(1, 2), slice(0, 3)):
        key = KEY._replace(sample=KEY.sample[part], stream=KEY.stream[part])
        given = crops[part], {name: value[part] for name, value in params.items()}, key, np.array([4, 8, 12, 0])[part]
        expected, got = ours(*given), dali(*given)
        assert got.shape == expected.shape and got.dtype == torch.float32 and got.is_contiguous()
        assert (expected - got).abs().max() < 2e-4
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("channels", [1, 2])
def test_what_a_gpu_does_is_what_the_cpu_does(channels):
    """Boxes of all extents in one buffer, everything in one call: the way of a GPU, walked on the CPU."""
    crops, params = problem(True, list(PARAMS), channels)
    device = DeviceExecutor(SIZE, WINDOW, CPU, most=6, extent=(24, 29, 34), channels=channels)
    turns = np.array([4, 8, 12, 0])
    expected = TorchExecutor(SIZE, WINDOW)(crops, params, KEY, turns)
    with beside(CPU):
        assert torch.equal(device(crops, params, KEY, turns), expected)
        assert torch.equal(device(crops[:1], {}), TorchExecutor(SIZE, WINDOW)(crops[:1], {}))


def test_noise_without_a_key_and_devices_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="key of its draw"):
        TorchExecutor(SIZE, WINDOW)([scan(SIZE)], numbers(noise=0.1))
    with pytest.raises(ValueError, match=r"data\.device is cpu or cuda, got 'gpu'"):
        device_of("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no GPU"):
            device_of("cuda")


def test_missing_dali_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ValueError, match=r"medfast\[dali-cu13\].*data.executor=torch"):
        require()
