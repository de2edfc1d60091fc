"""SimPROT, SimPROT-W and BTROT: tokens meet at the place of the volume that they are of."""

import itertools
from dataclasses import replace

import pytest
import torch

from medfast.data.orientation import orient
from medfast.objectives import OBJECTIVES
from medfast.objectives.btrot import BTROT
from medfast.objectives.gauges import same_position
from medfast.objectives.masking import AttentionMask, RandomMask
from medfast.objectives.positions import restored, shown
from medfast.objectives.simprot import SimPROT

T = torch.tensor(0.5)
TURNS = list(itertools.product(range(4), range(3)))


def turned(maps, turns):
    """What the data pipeline would have made of (n, d, h, w, c) maps, were they volumes."""
    return torch.stack(
        [
            torch.from_numpy(orient(x.movedim(-1, 0).numpy(), k, f)).movedim(0, -1)
            for x, (k, f) in zip(maps, turns, strict=True)
        ]
    )


@pytest.mark.parametrize("grid, turns", [((4, 4, 4), TURNS), ((2, 3, 5), [t for t in TURNS if t[0] % 2 == 0])])
def test_every_rotation_and_flip_is_undone(grid, turns):
    maps = torch.randn(len(turns), *grid, 3)
    rotation, flip = torch.tensor(turns).T
    made = turned(maps, turns)
    assert torch.equal(restored(made, rotation, flip), maps)
    assert not torch.equal(made, maps)


def params(b, seed=3):
    torch.manual_seed(seed)
    rotation, flip = torch.randint(0, 4, (b, 2)), torch.randint(0, 3, (b, 2))
    rotation[:, 1], flip[:, 1] = 0, 0
    return {"rotation": rotation, "flip": flip, "volume": torch.tensor([0, 1, 1, 2, 3, 4])[:b]}


def made(build, tiny, **settings):
    torch.manual_seed(0)
    o = build(tiny.Backbone(None), RandomMask(0.75), cell=8, **settings).double()
    if o.teacher is not None:
        o.teacher.to(torch.float64)
        o.teacher.copy_({name: x + 0.1 * torch.randn_like(x) for name, x in o.teacher.state().items()})
    return o


def tokens(backbone, volume, given):
    """(2, b, n, c) of what each view shows, put back by loops over (h, w)."""
    maps = backbone(volume).stages[-1]
    b = len(maps) // 2
    out = torch.zeros_like(maps)
    h = maps.shape[-2]
    for row in range(2 * b):
        k, f = (int(given[name][row % b, row // b]) for name in ("rotation", "flip"))
        for y, x in itertools.product(range(h), range(h)):
            to_y, to_x = y, x
            for _ in range(k):
                to_y, to_x = h - 1 - to_x, to_y
            to_y = h - 1 - to_y if f == 1 else to_y
            to_x = h - 1 - to_x if f == 2 else to_x
            out[row, :, y, x] = maps[row, :, to_y, to_x]
    return out.flatten(1, 3).unflatten(0, (2, b))


def weighted(z, group, weight, mode, volume):
    """Eq. 3 as fidelity has it, token by token: positives, other positions, weighted same position elsewhere."""
    _, b, n, _ = z.shape
    total = 0.0
    for v, i, m in itertools.product((0, 1), range(b), range(n)):
        own, terms = z[v, i, m], []
        for w, j, q in itertools.product((0, 1), range(b), range(n)):
            if j // group != i // group or (w, j, q) == (v, i, m):
                continue
            s = own @ z[w, j, q] / 0.5
            weighs = q == m and volume[j] != volume[i]
            if weighs:
                terms.append(weight * s.exp() if mode == "exp" else (s * (1 + weight)).exp())
            else:
                terms.append(s.exp())
        total = total + (-(own @ z[1 - v, i, m]) / 0.5 + sum(terms).log()) / (2 * b * n)
    return total


@pytest.mark.parametrize("weight, mode, group", [(1.0, "exp", 4), (5.0, "exp", 2), (5.0, "exp", 4), (2.0, "logit", 4)])
def test_simprot_is_the_weighted_contrast_of_restored_tokens(tiny, weight, mode, group):
    o, given = made(SimPROT, tiny, weight=weight, weight_mode=mode, group=group), params(4)
    batch = tiny.batch(4, params=given)
    volume, hidden, _ = shown(batch, o.mask, o.cell, o.fill, True)
    x, p = tokens(o.backbone, volume, given), dict(o.named_parameters())
    z = (x @ p["projector.0.weight"].T + p["projector.0.bias"]).clamp(min=0) @ p["projector.2.weight"].T
    z = z + p["projector.2.bias"]
    expected = weighted(z / z.norm(dim=-1, keepdim=True), group, weight, mode, given["volume"].tolist())
    found = o(batch, T).losses["contrast"]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0.0)
    names, parameters = zip(*o.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (found, expected))
    for name, mine, other in zip(names, ours, theirs, strict=True):
        assert mine.abs().sum() > 0, name
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-11, msg=name)
    assert hidden[:4].sum() == 0


def test_simprot_w_weighs_5_and_1_is_simprot(tiny):
    batch = tiny.batch(4, params=params(4))
    torch.manual_seed(0)
    ours = OBJECTIVES["simprot_w"](tiny.Backbone(None), RandomMask(0.75), cell=8, group=4).double()
    losses = [made(SimPROT, tiny, weight=w, group=4)(batch, T).losses["contrast"] for w in (1.0, 5.0)]
    assert ours(batch, T).losses["contrast"] == losses[1] > losses[0]


def test_btrot_predicts_the_same_token_of_the_other_view(tiny):
    o, given = made(BTROT, tiny, hidden=9, width=6, group=4), params(4)
    batch = tiny.batch(4, params=given)
    volume, _, _ = shown(batch, o.mask, o.cell, o.fill, True)

    def mlp(p, part, x):
        x = x @ p[f"{part}.linears.0.weight"].T
        flat = x.flatten(0, -2)
        x = (x - flat.mean(0)) / (flat.var(0, unbiased=False) + 1e-5).sqrt()
        x = (x * p[f"{part}.norms.0.weight"] + p[f"{part}.norms.0.bias"]).clamp(min=0)
        return x @ p[f"{part}.linears.1.weight"].T + p[f"{part}.linears.1.bias"]

    p, q = dict(o.named_parameters()), o.teacher.state()
    predicted = [mlp(p, "predictor", mlp(p, "projector", x)) for x in tokens(o.backbone, volume, given)]
    with torch.no_grad():
        target = [mlp(q, "projector", x) for x in tokens(o.teacher.backbone, volume, given)]
    expected = 0.0
    for mine, other in ((predicted[0], target[1]), (predicted[1], target[0])):
        alike = (mine * other).sum(-1) / mine.norm(dim=-1) / other.norm(dim=-1)
        expected = expected + (2 - 2 * alike).mean()
    found = o(batch, T).losses["cosine"]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0.0)
    parameters = list(o.parameters())
    for mine, other in zip(*(torch.autograd.grad(x, parameters) for x in (found, expected)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-11)


def test_cells_of_noise_are_exact_for_every_sample_and_the_first_view_has_none(tiny):
    batch = tiny.batch(3, params=params(3))
    volume, hidden, key = shown(batch, RandomMask(0.75), (4, 8, 8), 0.1, False)
    assert key is None
    cells = hidden[3:, ::4, ::8, ::8]  # the first voxel of each cell
    assert torch.equal(cells.repeat_interleave(4, 1).repeat_interleave(8, 2).repeat_interleave(8, 3), hidden[3:])
    assert cells.flatten(1).sum(1).tolist() == [96] * 3 and not torch.equal(cells[0], cells[1])
    assert torch.equal(volume[:3], batch.views[0]) and hidden[:3].sum() == 0
    noise = volume[3:, 0][hidden[3:]]
    assert noise.mean().abs() < 0.01 and abs(noise.std() - 0.1) < 0.005
    part = shown(tiny.split(batch, slice(1, 3)), RandomMask(0.75), (4, 8, 8), 0.1, False)
    assert torch.equal(part[1][2:], hidden[4:]) and torch.equal(part[0][2:], volume[4:])


def test_without_restoring_tokens_meet_elsewhere(tiny):
    batch = tiny.batch(2, params=params(2))
    unturned = replace(batch, params={**batch.params, "rotation": torch.zeros(2, 2, dtype=torch.int64),
                                      "flip": torch.zeros(2, 2, dtype=torch.int64)})  # fmt: skip
    off = made(SimPROT, tiny, restore=False)
    assert off(batch, T).losses["contrast"] == off(unturned, T).losses["contrast"]
    assert made(SimPROT, tiny)(batch, T).losses["contrast"] != off(batch, T).losses["contrast"]


def test_same_position_is_1_where_tokens_tell_their_place_alone():
    place = torch.nn.functional.normalize(torch.randn(1, 6, 4), dim=-1)
    assert same_position(place.expand(6, -1, -1)).item() == pytest.approx(1.0)
    assert abs(same_position(torch.nn.functional.normalize(torch.randn(40, 50, 64), dim=-1))) < 0.02


def test_what_is_missing_or_does_not_fit_is_a_sentence(tiny):
    o = made(SimPROT, tiny, weight=5.0)
    assert o.needs == {"rotation", "flip"}
    with pytest.raises(ValueError, match="data.rotate"):
        o(tiny.batch(2), T)
    with pytest.raises(ValueError, match="volume"):
        o(tiny.batch(2, params={name: x for name, x in params(2).items() if name != "volume"}), T)
    for build in (SimPROT, BTROT):
        with pytest.raises(ValueError, match="random"):
            build(tiny.Backbone(None), AttentionMask(0.7))
