"""MST on a tiny backbone in fp64, against an evaluation written from its description."""

import math

import pytest
import torch
from torch.nn import functional as F

from medfast.objectives.heads import ConvVoxels
from medfast.objectives.masking import AttentionMask
from medfast.objectives.mst import MST
from medfast.types import Mask

T = torch.tensor(0.01875, dtype=torch.float64)  # half way up the ramp: temperature .055


def mst(tiny, **settings):
    torch.manual_seed(0)
    mask = AttentionMask(0.7, hint=0.0, order="low")
    made = MST(tiny.Backbone(1), mask, decoder=4, prototypes=10, head_widths=(9, 7), **settings)
    return tiny.ready(made, torch.float64)


def logits(x, p):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"]
    x = x @ p["trunk.0.weight"].T + p["trunk.0.bias"]
    x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2.0))) @ p["trunk.2.weight"].T + p["trunk.2.bias"]
    direction = p["image_last.direction"]
    return (direction / direction.norm(dim=1, keepdim=True)) @ (x / x.norm())


def decoded(tokens, p):
    """(4, 4, 4, c) tokens to (32, 32, 32) voxels."""
    x = F.gelu(
        F.conv3d(tokens.permute(3, 0, 1, 2)[None], p["decoder.coarse.weight"], p["decoder.coarse.bias"], padding=1)
    )
    x = F.interpolate(x, size=(16, 16, 16), mode="trilinear")
    x = F.gelu(F.conv3d(x, p["decoder.fine.weight"], p["decoder.fine.bias"], padding=1))[0].permute(1, 2, 3, 0)
    x = x @ p["decoder.voxels.linear.weight"].T + p["decoder.voxels.linear.bias"]
    return x.view(16, 16, 16, 2, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(32, 32, 32)


def by_hand(o, batch):
    masks = o._look(batch, drop_path=False).mask.where.chunk(2)
    s, t = dict(o.named_parameters()), o.teacher.state()
    seen = [o.backbone(x, Mask(m), o.fill) for x, m in zip(batch.views, masks, strict=True)]
    taught = [o.teacher.backbone(x) for x in batch.views]
    b, image, recon = len(batch.views[0]), 0.0, 0.0
    for i in range(b):
        for view in (0, 1):
            h_s, h_t = logits(seen[view].summary[i], s), logits(taught[1 - view].summary[i], t)
            p_t, p_s = ((h_t - o.centres.image) / 0.055).exp(), (h_s / 0.1).exp()
            image = image - (p_t / p_t.sum() * (p_s / p_s.sum()).log()).sum() / (2 * b)
            error = (decoded(seen[view].stages[0][i], s) - batch.views[view][i, 0]).abs()
            recon = recon + error.sum() / (error.numel() + 1e-5) / (2 * b)  # of all voxels, hidden or not
    return {"image": image, "recon": 0.6 * recon}


def test_losses_and_gradients_are_those_of_the_description(tiny):
    o, batch = mst(tiny), tiny.batch(2)
    found, expected = o(batch, T).losses, by_hand(o, batch)
    assert list(found) == list(expected)
    names, parameters = zip(*o.named_parameters(), strict=True)
    for loss in found:
        torch.testing.assert_close(found[loss], expected[loss], rtol=1e-11, atol=0.0)
        ours = torch.autograd.grad(found[loss], parameters, allow_unused=True, retain_graph=True)
        theirs = torch.autograd.grad(expected[loss], parameters, allow_unused=True, retain_graph=True)
        for name, mine, other in zip(names, ours, theirs, strict=True):
            assert (mine is None) == (other is None), (loss, name)
            if mine is not None:
                torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12)


def test_the_least_attended_cells_are_hidden(tiny):
    shown = mst(tiny).picture(tiny.batch(2))
    for mask, attention in zip(shown["mask"], shown["attention"], strict=True):
        where = mask[:, ::8, ::8, ::8].flatten(1)
        assert where.sum(1).tolist() == [44, 44]  # int(.7 x 64)
        ranked = attention.flatten(1).argsort(1)
        assert where.gather(1, ranked[:, :44]).all() and not where.gather(1, ranked[:, 44:]).any()


@pytest.mark.parametrize("off", ["image", "recon"])
def test_a_loss_that_weighs_0_takes_its_head_along(tiny, off):
    o, batch = mst(tiny, weights={off: 0}), tiny.batch(2)
    out = o(batch, T)
    assert off not in out.losses and len(out.losses) == 1
    o.absorb(out.sums)
    assert hasattr(o, "decoder") == (off != "recon") == ("reconstruction" in o.picture(batch))
    assert ("prototypes" in o.tokens(batch)) == (off != "image") == hasattr(o, "trunk")


def test_padding_is_not_restored(tiny):
    valid = torch.ones(2, *tiny.size, dtype=torch.bool)
    valid[:, 20:] = False
    o, batch = mst(tiny, weights={"image": 0}), tiny.batch(2, valid=(valid, None))
    made = o.picture(batch)["reconstruction"]
    errors = [(x - y).abs() for x, y in zip(made, batch.views, strict=True)]
    expected = (errors[0][:, :, :20].mean() + errors[1].mean()) / 2
    torch.testing.assert_close(o(batch, T).losses["recon"], 0.6 * expected, rtol=1e-5, atol=0.0, check_dtype=False)


def test_the_decoder_reads_neighbours_and_refuses_odd_strides(tiny):
    decoder = ConvVoxels(3, 8, hidden=4).double()
    tokens = torch.randn(1, 3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    decoder(tokens, (24, 24, 24))[0, 0, 8:16, 8:16, 8:16].sum().backward()
    assert (tokens.grad[0, 0, 1, 1] != 0).all() and decoder(tokens, (20, 24, 17)).shape == (1, 1, 20, 24, 17)
    with pytest.raises(ValueError, match="multiples"):
        ConvVoxels(3, 6)


def test_a_backbone_without_cls_is_refused(tiny):
    with pytest.raises(ValueError, match="CLS"):
        MST(tiny.Backbone(None), AttentionMask(0.7, hint=0.0, order="low"))
