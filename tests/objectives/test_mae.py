"""MAE on a tiny ViT in fp64, against an evaluation written from its description."""

import math

import pytest
import torch

from medfast.architectures import BACKBONES
from medfast.objectives.block_mask import BlockMask
from medfast.objectives.mae import MAE
from medfast.objectives.masking import AttentionMask, RandomMask
from medfast.types import Batch, Key

SIZE, T = (16, 8, 16), torch.tensor(0.5)  # 4 x 2 x 4 patches of 4 voxels
PLACES = [(i, j, k) for i in range(4) for j in range(2) for k in range(4)]


def mae(**settings) -> MAE:
    torch.manual_seed(0)
    vit = BACKBONES["vit"](size=SIZE, patch=4, embed=12, depth=1, heads=2, cls=True, positions="sincos", drop_path=0.0)
    made = MAE(vit, RandomMask(0.75), decoder_width=8, decoder_depth=1, decoder_heads=2, **settings).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


def batch(b=2, **extra) -> Batch:
    torch.manual_seed(1)
    return Batch((torch.rand(b, 1, *SIZE, dtype=torch.float64),), None, Key(3, 5, torch.arange(b)), **extra)


def norm(x, p, name):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def position(place, width=8):
    """Sines and cosines of the middle, first and last coordinate, one wave each in 6 channels; the other two are 0."""
    d, h, w = place
    waves = [f(x) for x in (h, d, w) for f in (math.sin, math.cos)]
    return torch.tensor([*waves, 0.0, 0.0], dtype=torch.float64)


def decoded(p, seen, visible):
    """The decoder on one sample: seen (1 + visible, 12), [CLS] first -> (32, 8)."""
    x = linear(seen, p, "decoder.embed")

    rows = [x[0]]
    for n, place in enumerate(PLACES):
        row = x[1 + visible.index(n)] if n in visible else p["decoder.fill"]
        rows.append(row + position(place))
    x = torch.stack(rows)
    block = "decoder.blocks.0"
    qkv = linear(norm(x, p, f"{block}.norm1"), p, f"{block}.attn.qkv").view(-1, 3, 2, 4)
    heads = []
    for head in range(2):
        q, k, v = (qkv[:, i, head] for i in range(3))
        heads.append(((q @ k.T) / 2.0).exp() / ((q @ k.T) / 2.0).exp().sum(1, keepdim=True) @ v)
    x = x + linear(torch.cat(heads, 1), p, f"{block}.attn.proj")
    hidden = linear(norm(x, p, f"{block}.norm2"), p, f"{block}.mlp.fc1")
    x = x + linear(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2.0))), p, f"{block}.mlp.fc2")
    return norm(x, p, "decoder.norm")[1:]


def by_hand(o, batch, normalise=False, valid=None):
    look, p, loss = o._look(batch, drop_path=False), dict(o.named_parameters()), 0.0
    seen = o.backbone.encode_visible(batch.views[0], look.mask)
    for i in range(len(batch.views[0])):
        where = look.mask.where[i]
        visible = (~where.flatten()).nonzero().flatten().tolist()
        made, total, count = linear(decoded(p, seen[i], visible), p, "predict"), 0.0, 0
        for n, (d, h, w) in enumerate(PLACES):
            if n in visible:
                continue
            inside = (slice(4 * d, 4 * d + 4), slice(4 * h, 4 * h + 4), slice(4 * w, 4 * w + 4))
            patch = batch.views[0][(i, 0, *inside)].flatten()
            if normalise:
                patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            real = torch.ones(64, dtype=torch.bool) if valid is None else valid[(i, *inside)].flatten()
            total, count = total + (made[n] - patch).square()[real].sum(), count + int(real.sum())
        loss = loss + total / count / len(batch.views[0])
    return loss


@pytest.mark.parametrize("normalise", [False, True])
def test_loss_and_gradients_are_those_of_the_description(normalise):
    o, given = mae(normalise=normalise), batch()
    found, expected = o(given, T).losses["recon"], by_hand(o, given, normalise)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0.0)  # fixed positions are fp32
    parameters = list(o.parameters())
    ours, theirs = (torch.autograd.grad(x, parameters) for x in (found, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-8)


def test_padding_is_not_judged():
    valid = torch.ones(2, *SIZE, dtype=torch.bool)
    valid[:, :, :, 6:] = False
    given, o = batch(valid=(valid,)), mae()
    torch.testing.assert_close(o(given, T).losses["recon"], by_hand(o, given, valid=valid), rtol=1e-8, atol=0.0)


def test_the_encoder_computes_the_visible_patches_alone():
    o, lengths = mae(), []
    o.backbone.blocks[0].register_forward_hook(lambda m, args, out: lengths.append(args[0].shape[1]))
    out = o(batch(), T)
    assert lengths == [1 + 8] and out.gauges["mask_ratio"] == 0.75  # int(32 x (1 - .75)) and [CLS]
    assert o._look(batch(), False).mask.visible.shape == (2, 8)


def test_samples_have_their_own_masks_whatever_the_batch():
    """SimTROT's code has one mask for a whole batch."""
    o, given = mae(), batch(3)
    mask = o._look(given, False).mask.where
    assert len({tuple(row.flatten().tolist()) for row in mask}) == 3
    part = Batch((given.views[0][1:],), None, given.key._replace(sample=given.key.sample[1:]))
    assert torch.equal(o._look(part, False).mask.where, mask[1:])


def test_a_hidden_voxel_is_not_seen():
    o, given = mae(), batch()
    hidden = o.picture(given)["mask"][0]
    changed = Batch((torch.where(hidden.unsqueeze(1), 7.0, given.views[0]),), None, given.key)
    shown = [o.picture(x)["reconstruction"][0] for x in (given, changed)]
    assert torch.equal(*shown) and shown[0].shape == given.views[0].shape


def test_fixed_masks_are_taken_and_other_sizes_work():
    o, where = mae(), torch.zeros(2, 4, 2, 4, dtype=torch.bool)
    where[:, :2] = True
    assert torch.equal(o._look(batch(targets={"mask": (where,)}), False).mask.where, where)
    where[0, 2, 0, 0] = True
    with pytest.raises(ValueError, match="equally many"):
        o(batch(targets={"mask": (where,)}), T)
    small = Batch((torch.rand(1, 1, 8, 8, 8, dtype=torch.float64),), None, Key(0, 0, torch.arange(1)))
    assert o(small, T).losses["recon"].isfinite()


def test_what_cannot_drop_tokens_is_refused(tiny):
    with pytest.raises(ValueError, match="encode_visible"):
        MAE(tiny.Backbone(None), RandomMask())
    for mask in (BlockMask(0.3), AttentionMask(0.7)):
        with pytest.raises(ValueError, match="equally many"):
            MAE(mae().backbone, mask)
