"""RCR on a tiny backbone in fp64, against an evaluation written from its description."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from medfast.objectives.heads import Upsampler
from medfast.objectives.rcr import RCR

T = torch.tensor(0.5)


def rcr(tiny, **settings):
    torch.manual_seed(0)
    return RCR(tiny.Backbone(None), contrast_width=5, **settings).double()


def batch(tiny, b=4, **extra):
    made = tiny.batch(b, **extra)
    torch.manual_seed(7)
    return replace(
        made,
        params={"rotation": torch.randint(0, 4, (b, 2))},
        targets={"uncut": tuple(torch.rand_like(view) for view in made.views)},
    )


def restored(x, p):
    """(2, 2, 2, 12) tokens to (32, 32, 32) voxels: four doublings, 12 -> 6 -> 3 -> 1 -> 1 channels."""
    x = x.permute(3, 0, 1, 2)[None]
    for i in range(4):
        x = F.conv3d(x, p[f"decoder.steps.{i}.0.weight"], p[f"decoder.steps.{i}.0.bias"], padding=1)
        mean, variance = x.mean((2, 3, 4), keepdim=True), x.var((2, 3, 4), keepdim=True, unbiased=False)
        x = (x - mean) / (variance + 1e-5).sqrt()
        x = torch.where(x > 0, x, 0.01 * x)
        x = F.interpolate(x, size=[2 * n for n in x.shape[2:]], mode="trilinear")
    return (x * p["decoder.last.weight"].view(1, -1, 1, 1, 1)).sum(1)[0] + p["decoder.last.bias"]


def by_hand(o, batch, group, read):
    p, b = dict(o.named_parameters()), len(batch.views[0])
    maps = [o.backbone(view).stages[-1] for view in batch.views]
    recon = rotation = contrast = torch.zeros((), dtype=torch.float64)
    z = {}
    for v in (0, 1):
        for i in range(b):
            tokens = maps[v][i].flatten(0, 2)
            first, second = (tokens[0], tokens[1]) if read == "cells" else (tokens.mean(0), tokens.mean(0))
            recon = recon + (restored(maps[v][i], p) - batch.targets["uncut"][v][i, 0]).abs().sum() / (32**3 + 1e-5) / (
                2 * b
            )
            told = (p["rotation.weight"] @ first + p["rotation.bias"]).exp()
            rotation = rotation - (told[batch.params["rotation"][i, v]] / told.sum()).log() / (2 * b)
            vector = p["contrast.weight"] @ second + p["contrast.bias"]
            z[v, i] = vector / vector.norm()
    for v, i in z:
        others = [(w, j) for w, j in z if (w, j) != (v, i) and j // group == i // group]
        total = sum(math.e ** (z[v, i] @ z[key] / 0.5) for key in others)
        contrast = contrast - ((z[v, i] @ z[1 - v, i] / 0.5).exp() / total).log() / (2 * b)
    return {"recon": recon, "rotation": rotation, "contrast": contrast}


@pytest.mark.parametrize("group, read", [(4, "mean"), (2, "cells")])
def test_losses_and_gradients_are_those_of_the_description(tiny, group, read):
    o, given = rcr(tiny, group=group, read=read), batch(tiny)
    found, expected = o(given, T).losses, by_hand(o, given, group, read)
    assert list(found) == list(expected)
    names, parameters = zip(*o.named_parameters(), strict=True)
    for loss in found:
        torch.testing.assert_close(found[loss], expected[loss], rtol=1e-10, atol=0.0)
        ours = torch.autograd.grad(found[loss], parameters, allow_unused=True, retain_graph=True)
        theirs = torch.autograd.grad(expected[loss], parameters, allow_unused=True, retain_graph=True)
        for name, mine, other in zip(names, ours, theirs, strict=True):
            assert (mine is None) == (other is None), (loss, name)
            if mine is not None:
                torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-11)


def test_groups_make_the_batch_split_not_matter(tiny):
    """Negatives are those of a group, whichever rank or micro-batch it is in."""
    o, whole = rcr(tiny, group=2), batch(tiny)
    parts = [
        replace(
            tiny.split(whole, rows),
            params={"rotation": whole.params["rotation"][rows]},
        )
        for rows in (slice(0, 2), slice(2, 4))
    ]
    together, apart = o(whole, T).losses, [o(part, T).losses for part in parts]
    for loss, value in together.items():
        torch.testing.assert_close(value, (apart[0][loss] + apart[1][loss]) / 2, rtol=1e-12, atol=0.0)
    assert o(whole, T).losses["contrast"] != rcr(tiny, group=4)(whole, T).losses["contrast"]


def test_part_of_a_group_is_refused_in_training_and_shown_in_validation(tiny):
    o, given = rcr(tiny, group=3), batch(tiny)
    with pytest.raises(ValueError, match="multiple"):
        o(given, T)
    assert o.eval()(given, T).losses["contrast"].isfinite()


def test_rotation_of_each_view_is_its_own(tiny):
    """(b, views) numbers and views stacked one after the other: the wrong order would mix up samples."""
    o, given = rcr(tiny), batch(tiny, 2)
    with torch.no_grad():
        o.rotation.weight.zero_()
        o.rotation.bias.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    seen = {}
    for view in (0, 1):
        for row in (0, 1):
            turns = torch.zeros(2, 2, dtype=torch.int64)
            turns[row, view] = 3
            seen[view, row] = o(replace(given, params={"rotation": turns}), T).losses["rotation"].item()
    assert len(set(seen.values())) == 1
    with torch.no_grad():
        o.rotation.weight.normal_()
    for view in (0, 1):
        for row in (0, 1):
            turns = torch.zeros(2, 2, dtype=torch.int64)
            turns[row, view] = 3
            told = o.rotation(o.backbone(given.views[view]).stages[-1].flatten(1, -2).mean(1))[row].log_softmax(0)
            base = o(replace(given, params={"rotation": 0 * turns}), T).losses["rotation"]
            moved = o(replace(given, params={"rotation": turns}), T).losses["rotation"] - base
            torch.testing.assert_close(moved, (told[0] - told[3]) / 4)


@pytest.mark.parametrize("off", ["recon", "rotation", "contrast"])
def test_gradients_reach_every_parameter_and_weights_0_remove_terms(tiny, off):
    o, given = rcr(tiny, weights={off: 0}), batch(tiny, 2)
    out = o(given, T)
    assert off not in out.losses and len(out.losses) == 2
    sum(out.losses.values()).backward()
    # what is added before an instance norm goes away in it
    idle = [name for name, p in o.named_parameters() if p.grad is None]
    assert idle == [] and o.needs == frozenset(
        {"recon": "uncut", "rotation": "rotation"}[x] for x in out.losses if x != "contrast"
    )
    assert ("reconstruction" in o.picture(given)) == (off != "recon")


def test_what_the_pipeline_did_not_give_is_named(tiny):
    o = rcr(tiny)
    assert o.needs == {"rotation", "uncut"}
    with pytest.raises(ValueError, match="data.cutout"):
        o(tiny.batch(2), T)


def test_padding_is_not_restored(tiny):
    valid = torch.ones(2, *tiny.size, dtype=torch.bool)
    valid[:, 20:] = False
    o, given = rcr(tiny, weights={"rotation": 0, "contrast": 0}), batch(tiny, 2, valid=(valid, None))
    errors = [(x - y).abs() for x, y in zip(o.picture(given)["reconstruction"], given.targets["uncut"], strict=True)]
    expected = (errors[0][:, :, :20].mean() + errors[1].mean()) / 2
    torch.testing.assert_close(o(given, T).losses["recon"], expected, rtol=1e-5, atol=0.0, check_dtype=False)


def test_the_decoder_has_the_papers_widths():
    with torch.device("meta"):
        steps = Upsampler(768, 32).steps
    assert [step[0].out_channels for step in steps] == [384, 192, 96, 48, 48]
    with pytest.raises(ValueError, match="power of two"):
        Upsampler(12, 12)
