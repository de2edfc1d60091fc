"""Stochastic depth of the 3D Swin: what is drawn, by whom, and what a dropped branch leaves."""

import pytest
import torch

import medfast_kernels as mk
from medfast.architectures import Swin
from medfast.types import Key

TINY = {"embed": 8, "depths": (2, 2), "heads": (2, 4), "window": 2, "sa_heads": 4}


def test_drop_path_does_not_depend_on_the_batch_split():
    torch.manual_seed(0)
    swin = Swin(**TINY, drop_path=0.8).double()
    volume, sample = torch.randn(4, 1, 8, 8, 8, dtype=torch.float64), torch.tensor([7, 3, 900, 4])
    whole = swin(volume, key=Key(5, 2, sample)).stages[-1]
    parts = torch.cat([swin(volume[i : i + 1], key=Key(5, 2, sample[i : i + 1])).stages[-1] for i in range(4)])
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)
    plain = swin(volume).stages[-1]
    assert not torch.allclose(whole, plain)
    assert not torch.allclose(swin(volume, key=Key(5, 3, sample)).stages[-1], whole)
    assert torch.equal(swin(volume, key=Key(5)).stages[-1], swin(volume, key=Key(5, 0, torch.arange(4))).stages[-1])
    assert torch.equal(swin.eval()(volume).stages[-1], plain)


def test_views_stacked_along_the_batch_drop_as_they_would_alone():
    torch.manual_seed(0)
    swin = Swin(**TINY, drop_path=0.8).double()
    volume, key = torch.randn(6, 1, 8, 8, 8, dtype=torch.float64), Key(1, 0, torch.tensor([4, 8, 5]))
    both = swin(volume, key=key.stack(2)).stages[-1]
    second = swin(volume[3:], key=key._replace(stream=1 << 16)).stages[-1]
    torch.testing.assert_close(both[3:], second, rtol=1e-12, atol=1e-12)


def test_a_dropped_branch_leaves_nothing_and_a_kept_one_is_scaled():
    """Attention branch alone, its projection bias included; the mean over samples is the undropped block."""
    torch.manual_seed(0)
    block = Swin(**TINY, drop_path=0.4).stages[-1].blocks[-1].double()
    assert block.rate == pytest.approx(0.4)
    torch.nn.init.normal_(block.attn.proj.bias)
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    x = torch.randn(1, 2, 2, 2, 16, dtype=torch.float64)
    branch = block(x, None) - x
    many = block(x.expand(4000, -1, -1, -1, -1), Key(3, 0, torch.arange(4000))) - x
    kept = mk.random_keep(0.4, key=Key(3, 0, torch.arange(4000)).at(mk.Role.DROP_PATH, layer=block.layer))
    assert not many[~kept].any()
    torch.testing.assert_close(many[kept], (branch / 0.6).expand(int(kept.sum()), -1, -1, -1, -1))
    assert kept.double().mean().item() == pytest.approx(0.6, abs=0.04)  # five sigma


def test_rates_rise_linearly_and_every_branch_draws_for_itself():
    blocks = [block for stage in Swin(drop_path=0.26).stages for block in stage.blocks]
    assert [block.rate for block in blocks] == pytest.approx([0.02 * i for i in range(14)])
    assert [block.layer for block in blocks] == list(range(0, 28, 2))
    block = Swin(**TINY, drop_path=0.5).stages[-1].blocks[-1]
    torch.nn.init.zeros_(block.attn.proj.weight)
    x, key = torch.randn(64, 2, 2, 2, 16), Key(0, 0, torch.arange(64))
    attention, mlp = (mk.random_keep(0.5, key=key.at(mk.Role.DROP_PATH, layer=block.layer + i)) for i in (0, 1))
    assert not torch.equal(attention, mlp)
    assert torch.equal((block(x, key) != x).flatten(1).any(dim=1), mlp)  # the attention branch is zero here


def test_attention_of_dropped_samples_is_not_computed():
    block = Swin(**TINY).stages[0].blocks[0]
    torch.nn.init.normal_(block.attn.proj.bias)
    out = block.attn(torch.randn(2, 4, 4, 4, 8), torch.tensor([False, True]))
    torch.testing.assert_close(out[0], block.attn.proj.bias.expand(4, 4, 4, -1))
    assert not torch.allclose(out[1], block.attn.proj.bias.expand(4, 4, 4, -1))
