"""SwinFUSE on its backbone, tiny, in fp64, against an evaluation written from its equations."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from medfast.architectures import BACKBONES
from medfast.objectives.density import jensen_shannon
from medfast.objectives.swinfuse import SwinFUSE

T = torch.tensor(0.5)


def made(**settings):
    torch.manual_seed(0)
    backbone = BACKBONES["swinfuse"](embed=6, depths=[1, 1], heads=[1, 2], window=2, dim_width=6, dim_heads=[1, 1])
    backbone.dim.branches[1].load_state_dict(backbone.dim.branches[0].state_dict())  # drawn apart, nothing overlaps
    return SwinFUSE(backbone, contrast_width=5, rows=6, **settings).double()


def batch(tiny, b=2, **extra):
    made = tiny.batch(b, **extra)
    small = tuple(view[..., :16, :16, :16] for view in made.views)
    torch.manual_seed(7)
    uncut = tuple(torch.rand_like(view) for view in small)
    return replace(made, views=small, params={"rotation": torch.randint(0, 4, (b, 2))}, targets={"uncut": uncut})


def divergence(a, b):
    """Section 3.6, point by point: Gaussian kernels, nearest-neighbour deviation, nobody its own kernel."""
    points = torch.cat((a, b))
    n, s = len(points), len(a)
    gaps = [[(points[i] - points[j]).square().sum() for j in range(n)] for i in range(n)]
    nearest = [min(math.sqrt(gaps[i][j].item()) for j in range(n) if j != i) for i in range(n)]
    deviation = sum(nearest) / n
    densities = []
    for cloud in (range(s), range(s, n)):
        p = torch.stack([sum(torch.exp(-0.5 * gaps[i][j] / deviation**2) for j in cloud if j != i) for i in range(n)])
        densities.append(p / p.sum())
    middle = (densities[0] + densities[1]) / 2
    return sum(0.5 * (p * (p / middle).log()).sum() for p in densities)


def random(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_divergence_is_the_definitions_with_its_gradient():
    a, b = random(2, 5, 3, seed=1).requires_grad_(), (random(2, 5, 3, seed=2) + 0.5).requires_grad_()
    found, expected = jensen_shannon(a, b), torch.stack([divergence(x, y) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0.0)
    for ours, theirs in zip(*(torch.autograd.grad(x.sum(), (a, b)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_the_divergence_lies_between_0_and_ln_2():
    a = random(1, 40, 3, seed=1)
    near, far = jensen_shannon(a, random(1, 40, 3, seed=2)), jensen_shannon(a, a + 100.0)
    assert 0 <= near < 0.5 * far and far.item() == pytest.approx(math.log(2), rel=1e-6)
    assert jensen_shannon(a.float() * 1e-4 + 50, a.float() * 1e-4 + 50).isfinite()


def test_losses_and_gradients_are_those_of_the_description(tiny):
    o, given = made(), batch(tiny)
    p = dict(o.named_parameters())
    pair = o.backbone.encode_pair(*given.views)
    last = torch.cat([x.stages[-1] for x in pair])
    vector = last.flatten(1, 3).mean(1)
    whole, turns = torch.cat(given.targets["uncut"]), given.params["rotation"].T.flatten()
    restored = o.decoder(last, (16, 16, 16))
    told = vector @ p["rotation.weight"].T + p["rotation.bias"]
    z = vector @ p["contrast.weight"].T + p["contrast.bias"]
    z = (z / z.norm(dim=1, keepdim=True)) @ (z / z.norm(dim=1, keepdim=True)).T / 0.5
    contrast = 0.0
    for i in range(4):
        total = sum(z[i, j].exp() for j in range(4) if j != i)
        contrast = contrast - (z[i, (i + 2) % 4].exp() / total).log() / 4
    points = o._points(pair, given.key.stack(2))
    expected = {
        "recon": sum(((x - y).abs().sum() / (4096 + 1e-5)) for x, y in zip(restored, whole, strict=True)) / 4,
        "rotation": -told.log_softmax(1)[torch.arange(4), turns].mean(),
        "contrast": contrast,
        "divergence": -sum(divergence(x, y) for x, y in zip(*points, strict=True)) / 2,
    }
    found = o(given, T).losses
    assert list(found) == list(expected)
    names, parameters = zip(*o.named_parameters(), strict=True)
    for loss in found:
        torch.testing.assert_close(found[loss], expected[loss], rtol=1e-9, atol=0.0)
        ours, theirs = (
            torch.autograd.grad(x[loss], parameters, allow_unused=True, retain_graph=True) for x in (found, expected)
        )
        for name, mine, other in zip(names, ours, theirs, strict=True):
            assert (mine is None) == (other is None), (loss, name)
            if mine is not None:
                torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-10)


def test_views_keep_their_own_output_and_rows_are_each_branchs(tiny):
    o, given = made(weights={"contrast": 0, "recon": 0}), batch(tiny)
    pair = o.backbone.encode_pair(*given.views)
    assert not torch.allclose(pair[0].stages[-1], pair[1].stages[-1])
    with torch.no_grad():
        o.rotation.weight.normal_()
    logits = [o.rotation(x.stages[-1].flatten(1, 3).mean(1)) for x in pair]
    expected = F.cross_entropy(torch.cat(logits), given.params["rotation"].T.flatten())
    torch.testing.assert_close(o(given, T).losses["rotation"], expected)
    for view, points in enumerate(o._points(pair, given.key.stack(2))):
        rows = pair[view].extra["dim"]
        assert points.shape == (2, 6, 6)
        assert all(any(torch.equal(x, row) for row in rows[i]) for i in range(2) for x in points[i])


@pytest.mark.parametrize("off", ["recon", "rotation", "contrast", "divergence"])
def test_weights_0_remove_terms_and_gradients_reach_all_else(tiny, off):
    o, given = made(weights={off: 0}), batch(tiny)
    out = o(given, T)
    assert off not in out.losses and len(out.losses) == 3
    sum(out.losses.values()).backward()
    assert [name for name, p in o.named_parameters() if p.grad is None] == []
    assert ("reconstruction" in o.picture(given)) == (off != "recon")


def test_what_cannot_work_is_refused(tiny):
    with pytest.raises(ValueError, match="encode_pair"):
        SwinFUSE(tiny.Backbone(None))
    with pytest.raises(ValueError, match="rows"):
        made_with = BACKBONES["swinfuse"](embed=6, depths=[1], heads=[1], window=2, dim_width=6, dim_heads=[1])
        SwinFUSE(made_with, rows=1)
    with pytest.raises(ValueError, match="data.cutout"):
        made()(replace(batch(tiny), targets={}), T)
