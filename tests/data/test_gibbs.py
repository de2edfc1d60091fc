"""Gibbs ringing: what it takes away, and that it is drawn without moving what others draw."""

import numpy as np
import pytest
import torch

from medfast.data import intensity
from medfast.data.executor_torch import gibbs
from medfast_kernels import Key, Role


def test_frequencies_beyond_the_radius_go_and_the_mean_stays():
    torch.manual_seed(0)
    view = 0.4 + 0.2 * torch.rand(8, 12, 16)
    previous = view.var()
    for strength in (0.3, 0.6, 0.9):
        made = gibbs(view, strength)
        assert made.mean().item() == pytest.approx(view.mean().item(), abs=1e-5)
        radius = (1 - strength) * 16 * 0.5**0.5
        k = np.stack(np.meshgrid(*(np.fft.fftfreq(n) * n for n in view.shape), indexing="ij"))
        outside = np.abs(np.fft.fftn(made.numpy())[(k**2).sum(0) > radius**2 + 1e-6])
        assert outside.max() < 1e-3 and made.var() < previous
        previous = made.var()
    torch.testing.assert_close(gibbs(view, 1.0), view.mean().expand(view.shape), rtol=0, atol=1e-5)


def test_a_pure_wave_stays_inside_and_goes_outside():
    wave = 0.5 + 0.3 * torch.cos(2 * torch.pi * 3 * torch.arange(16) / 16).expand(16, 16, 16)
    torch.testing.assert_close(gibbs(wave, 0.7), wave, rtol=0, atol=1e-5)  # radius 3.39
    assert gibbs(wave, 0.8).std() < 1e-5  # radius 2.26


def test_it_is_off_where_the_coin_says_so_and_moves_no_other_draw():
    key = Key(1, 2, torch.arange(64)).at(Role.AUGMENT)
    with_it = intensity.parse({"noise": {"p": 0.5}, "gibbs": {"p": [0.5, 0.0]}}, 2)
    without = intensity.parse({"noise": {"p": 0.5}}, 2)
    drawn = intensity.draw(with_it, key, 2)
    np.testing.assert_array_equal(drawn["noise"], intensity.draw(without, key, 2)["noise"])
    assert 20 < np.count_nonzero(drawn["gibbs"][:, 0]) < 44 and not drawn["gibbs"][:, 1].any()
    with pytest.raises(ValueError, match="gibbs.range"):
        intensity.parse({"gibbs": {"p": 1.0, "range": [0.0, 1.5]}}, 2)
