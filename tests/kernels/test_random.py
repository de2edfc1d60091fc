"""Philox against its published vectors, and what the draws promise."""

import pytest
import torch

import medfast_kernels as mk
from medfast_kernels.key import philox_words

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [  # Random123, kat_vectors, philox4x32 10
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ONES, ONES, ONES, ONES), (1 << 64) - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(monkeypatch, counter, seed, expected):
    block, sample, step, stream = counter
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *a, **k: arange(*a, **k) + block)  # the block is not an argument
    words = philox_words(mk.Key(seed, step, torch.tensor([sample]), stream), 4)
    assert [f"{int(word):08x}" for word in words[0]] == expected.split()


def test_numbers_depend_on_their_address_alone():
    key = mk.Key(7, step=3, sample=torch.tensor([5, 9, 2])).at(mk.Role.NOISE, layer=4)
    whole = mk.random_uniform((2, 5), key=key)
    alone = mk.random_uniform((2, 5), key=key._replace(sample=torch.tensor([9]), step=torch.tensor(3)))
    assert torch.equal(whole[1:2], alone)
    assert torch.equal(mk.random_uniform(3, key=key), whole.flatten(1)[:, :3])
    for other in (key._replace(seed=8), key._replace(step=4), key.at(mk.Role.MASK, layer=4), key.at(mk.Role.NOISE)):
        assert not torch.equal(mk.random_uniform((2, 5), key=other), whole)


def test_uniform_and_normal_are_distributed_as_they_say():
    key = mk.Key(1, sample=torch.arange(4))
    uniform, normal = mk.random_uniform(20_001, key=key), mk.random_normal(20_001, key=key)
    assert uniform.dtype == normal.dtype == torch.float32
    assert uniform.min() >= 0 and uniform.max() < 1 and normal.isfinite().all()
    assert abs(uniform.mean() - 0.5) < 5e-3 and abs(uniform.var() - 1 / 12) < 2e-3
    assert abs(normal.mean()) < 1e-2 and abs(normal.var() - 1) < 2e-2 and abs((normal**4).mean() - 3) < 0.1


def test_ids_are_distinct_ascending_and_fair():
    ids = mk.random_ids(10, 4, key=mk.Key(2, sample=torch.arange(4000)))
    assert (ids.diff(dim=1) > 0).all() and ids.min() == 0 and ids.max() == 9
    assert (torch.bincount(ids.flatten(), minlength=10) / 4000 - 0.4).abs().max() < 0.03
    assert mk.random_ids(5, 0, key=mk.Key(2, sample=torch.arange(3))).shape == (3, 0)


def test_keep_drops_at_its_rate():
    key = mk.Key(3, sample=torch.arange(4000))
    assert abs(mk.random_keep(0.3, key=key).float().mean() - 0.7) < 0.03
    assert mk.random_keep(0.0, key=key).all() and not mk.random_keep(1.0, key=key).any()


@pytest.mark.parametrize("draw", [mk.random_uniform, mk.random_normal])
def test_a_draw_without_samples_is_refused(draw):
    with pytest.raises(ValueError, match="key.sample"):
        draw((2,), key=mk.Key(0))


def test_bad_counts_and_rates_are_refused():
    key = mk.Key(0, sample=torch.arange(2))
    with pytest.raises(ValueError, match="count"):
        mk.random_ids(4, 5, key=key)
    with pytest.raises(ValueError, match="rate"):
        mk.random_keep(1.5, key=key)
