"""SimCLR, MoCo v3 and BYOL on a tiny backbone in fp64, against evaluations written from their equations."""

import pytest
import torch
from torch.nn import functional as F

from medfast.objectives.byol import BYOL
from medfast.objectives.contrast import Groups, groups_of
from medfast.objectives.moco_v3 import MoCoV3
from medfast.objectives.projectors import BatchNorm, Projector
from medfast.objectives.simclr import SimCLR
from medfast.types import alone

T = torch.tensor(0.5)


def made(build, tiny, **settings):
    """In fp64, the teacher apart from the student."""
    torch.manual_seed(0)
    o = build(tiny.Backbone(None), **settings).double()
    if o.teacher is not None:
        o.teacher.to(torch.float64)
        o.teacher.copy_({name: x + 0.1 * torch.randn_like(x) for name, x in o.teacher.state().items()})
    return o


def same_gradients(o, found, expected):
    names, parameters = zip(*o.named_parameters(), strict=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0.0)
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (found, expected))
    for name, mine, other in zip(names, ours, theirs, strict=True):
        assert mine.abs().sum() > 0, name
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-11, msg=name)


def unit(x):
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


def normed(x, weight=None, bias=None):
    """Batch norm of rows (samples, width) by the definition."""
    x = (x - x.mean(0)) / (((x - x.mean(0)) ** 2).mean(0) + 1e-5).sqrt()
    return x if weight is None else x * weight + bias


def mlp(p, part, x, layers, last_norm):
    for i in range(layers):
        x = x @ p[f"{part}.linears.{i}.weight"].T
        if i + 1 < layers:
            x = normed(x, p[f"{part}.norms.{i}.weight"], p[f"{part}.norms.{i}.bias"]).clamp(min=0)
        else:
            x = normed(x) if last_norm else x + p[f"{part}.linears.{i}.bias"]
    return x


@pytest.mark.parametrize("group, relu_last", [(4, False), (2, True)])
def test_simclr_is_nt_xent_of_the_projected_summaries(tiny, group, relu_last):
    o, batch = made(SimCLR, tiny, group=group, relu_last=relu_last), tiny.batch(4)
    p, z, expected = dict(o.named_parameters()), {}, 0.0
    for v in (0, 1):
        hidden = (o.backbone(batch.views[v]).summary @ p["projector.0.weight"].T + p["projector.0.bias"]).clamp(min=0)
        out = hidden @ p["projector.2.weight"].T + p["projector.2.bias"]
        for i, row in enumerate(unit(out.clamp(min=0) if relu_last else out)):
            z[v, i] = row
    for v, i in z:
        others = [key for key in z if key != (v, i) and key[1] // group == i // group]
        total = sum((z[v, i] @ z[key] / 0.5).exp() for key in others)
        expected = expected - ((z[v, i] @ z[1 - v, i] / 0.5).exp() / total).log() / 8
    same_gradients(o, o(batch, T).losses["contrast"], expected)


def test_moco_contrasts_queries_with_the_teachers_keys_of_the_other_view(tiny):
    o, batch = made(MoCoV3, tiny, group=2, hidden=9, width=6, temperature=0.3), tiny.batch(4)
    p, q = dict(o.named_parameters()), o.teacher.state()
    expected = 0.0
    for at in (0, 2):
        rows = slice(at, at + 2)
        one, other = (
            unit(mlp(p, "predictor", mlp(p, "projector", o.backbone(x[rows]).summary, 3, True), 2, True))
            for x in batch.views
        )
        with torch.no_grad():
            keys = [unit(mlp(q, "projector", o.teacher.backbone(x[rows]).summary, 3, True)) for x in batch.views]
        for query, key in ((one, keys[1]), (other, keys[0])):
            p_own = (query @ key.T / 0.3).softmax(1).diagonal()
            expected = expected - 2 * 0.3 * p_own.log().sum() / 4
    same_gradients(o, o(batch, T).losses["contrast"], expected)
    assert (o.momentum(0.0), o.momentum(1.0)) == (0.99, 1.0)


def test_byol_predicts_the_other_views_target(tiny):
    o, batch = made(BYOL, tiny, group=4, hidden=9, width=6), tiny.batch(4)
    p, q = dict(o.named_parameters()), o.teacher.state()
    predicted = [
        mlp(p, "predictor", mlp(p, "projector", o.backbone(x).summary, 2, False), 2, False) for x in batch.views
    ]
    with torch.no_grad():
        targets = [mlp(q, "projector", o.teacher.backbone(x).summary, 2, False) for x in batch.views]
    pairs = ((predicted[0], targets[1]), (predicted[1], targets[0]))
    expected = sum((2 - 2 * (unit(a) * unit(b)).sum(1)).mean() for a, b in pairs)
    same_gradients(o, o(batch, T).losses["cosine"], expected)
    assert o.momentum(0.7) == 0.99


@pytest.mark.parametrize("build", [MoCoV3, BYOL])
def test_a_teacher_starts_as_the_student_and_gets_no_gradient(build, tiny):
    o = build(tiny.Backbone(None), group=2, hidden=9, width=6)
    own = dict(o.named_parameters())
    assert all(torch.equal(x, own[name]) for name, x in o.teacher.state().items())
    assert not any(x.requires_grad for x in o.teacher.state().values())
    assert not any(name.startswith("predictor") for name in o.teacher.state())


@pytest.mark.parametrize("build, settings", [(SimCLR, {}), (BYOL, {"hidden": 9}), (MoCoV3, {"hidden": 9, "group": 2})])
def test_cls_of_an_inner_stage_is_as_wide_as_its_tokens(build, settings, tiny):
    o, batch = build(tiny.Backbone(1), **settings), tiny.batch(2, dtype=torch.float32)
    assert all(x.isfinite() for x in o(batch, T).losses.values())


def pretend(rows, rank, size):
    """A gather of ranks that all live here: ``rows`` are everybody's, the rank's own keep their place."""
    share = len(rows) // size
    return lambda own: (rows, rank * share)


@pytest.mark.parametrize("size, group", [(2, 4), (3, 6), (3, 4), (4, 12), (2, 12)])
def test_shares_of_ranks_add_up_to_the_group(size, group):
    """12 samples over ranks, groups that straddle them, too: members and own rows are those of one rank."""
    rows = torch.arange(12.0).view(12, 1)
    whole = [share.members for share in Groups(group, alone).shares(rows)]
    seen = []
    for rank in range(size):
        own = rows.chunk(size)[rank]
        shares = Groups(group, pretend(rows, rank, size)).shares(own)
        assert torch.equal(torch.cat([share.own for share in shares]), own)
        for share in shares:
            assert any(torch.equal(share.members, members) for members in whole)
        seen += [row for share in shares for row in share.own.flatten().tolist()]
    assert seen == rows.flatten().tolist()


def test_no_whole_groups_are_refused_and_validation_shows_one(tiny):
    o, batch = made(SimCLR, tiny, group=3), tiny.batch(4)
    with pytest.raises(ValueError, match="objective.group=3"):
        o(batch, T)
    assert o.eval()(batch, T).losses["contrast"] == made(SimCLR, tiny, group=4)(batch, T).losses["contrast"]
    assert groups_of(o).size == 0


def test_batch_statistics_are_those_of_a_view_and_a_group():
    norm, x = BatchNorm(3, affine=False).double(), torch.randn(4, 2, 5, 3, dtype=torch.float64)
    out = norm(x, Groups(2, alone))
    for at in (0, 2):
        for view in (0, 1):
            expected = F.batch_norm(x[at : at + 2, view].reshape(10, 3), None, None, training=True)
            torch.testing.assert_close(out[at : at + 2, view].reshape(10, 3), expected)


def test_wrong_settings_are_sentences(tiny):
    for settings, words in [({"group": 0}, "at least 1"), ({"temperature": 0.0}, "temperature")]:
        with pytest.raises(ValueError, match=words):
            SimCLR(tiny.Backbone(None), **settings)
    with pytest.raises(ValueError, match="momentum"):
        BYOL(tiny.Backbone(None), momentum=(0.9, 0.5))


def test_the_projector_is_trained_and_keeps_both_directions():
    plain, code = Projector(4), Projector(4, relu_last=True)
    x = torch.randn(50, 4)
    assert all(p.requires_grad for p in plain.parameters())
    assert plain(x).min() < 0 <= code(x).min()
    torch.testing.assert_close(plain(x).norm(dim=-1), torch.ones(50))
