import itertools
import math

import pytest
import torch

from medfast.evaluation import baselines


@pytest.fixture
def crop():
    generator = torch.Generator().manual_seed(3)
    volume = torch.rand(2, 1, 7, 5, 6, generator=generator)
    visible = torch.rand(2, 7, 5, 6, generator=generator) > 0.8
    return volume, visible


def voxels(size):
    return list(itertools.product(*map(range, size)))


def test_median_reads_known_voxels_only(crop):
    volume, visible = crop
    found = baselines.median(volume, visible)
    for sample in range(2):
        values = volume[sample, 0][visible[sample]].sort().values
        assert found[sample].unique().item() == values[(len(values) - 1) // 2]
    with pytest.raises(ValueError, match="no known voxel"):
        baselines.median(volume, torch.zeros_like(visible))


def test_nearest_is_as_near_as_brute_force_says(crop):
    volume, visible = crop
    found = baselines.nearest(volume, visible)
    for sample in range(2):
        seen = [p for p in voxels(visible.shape[1:]) if visible[sample][p]]
        for here in voxels(visible.shape[1:]):
            distance = {p: math.dist(p, here) for p in seen}
            least = min(distance.values())
            allowed = [volume[sample, 0][p].item() for p in seen if distance[p] == least]
            assert found[sample, 0][here].item() in allowed


def test_nearest_crosses_a_whole_volume_to_a_single_voxel():
    visible = torch.zeros(1, 9, 4, 8, dtype=torch.bool)
    visible[0, 8, 0, 7] = True
    volume = torch.rand(1, 1, 9, 4, 8)
    assert (baselines.nearest(volume, visible) == volume[0, 0, 8, 0, 7]).all()
    with pytest.raises(ValueError, match="no visible voxel"):
        baselines.nearest(volume, torch.zeros_like(visible))


def test_smoothing_is_a_normalised_gaussian_mean_of_visible_voxels(crop):
    volume, visible = crop
    sigma = 1.5
    found = baselines.smoothed(volume, visible, sigma, torch.full_like(volume, -1.0))
    for here in [(0, 0, 0), (3, 2, 4), (6, 4, 5)]:
        seen = [p for p in voxels(visible.shape[1:]) if visible[0][p]]
        weight = [math.exp(-0.5 * math.dist(p, here) ** 2 / sigma**2) for p in seen]
        mean = sum(w * volume[0, 0][p].item() for w, p in zip(weight, seen, strict=True)) / sum(weight)
        assert found[0, 0][here].item() == pytest.approx(mean, abs=2e-3)  # the kernel ends at four sigma


def test_smoothing_falls_back_where_nothing_visible_is_near():
    visible = torch.zeros(1, 40, 3, 3, dtype=torch.bool)
    visible[0, 0] = True
    fallback = torch.full((1, 1, 40, 3, 3), -1.0)
    found = baselines.smoothed(torch.ones_like(fallback), visible, 1.0, fallback)
    assert found[0, 0, 0, 0, 0] == pytest.approx(1)
    assert (found[0, 0, 10:] == -1).all()
