"""iBOT, iBOT + SMART and AttMask on a tiny backbone in fp64, against an evaluation written from their description."""

import math

import pytest
import torch

from medfast.objectives import OBJECTIVES
from medfast.objectives.block_mask import BlockMask
from medfast.objectives.ibot import IBOT
from medfast.objectives.masking import AttentionMask, RandomMask
from medfast.types import Mask

T = torch.tensor(0.01875, dtype=torch.float64)  # half way up the ramp: temperature .055
SMALL = {"prototypes": 10, "head_widths": (9, 7)}
CASES = {
    "ibot": ({"image": ["pool"], "stage": 1}, BlockMask(0.3), None),
    "ibot_smart": ({}, AttentionMask(0.7, hint=0.1), 1),
    "attmask": ({"heads": "separate"}, AttentionMask((0.1, 0.5), hint=0.1, hint_mode="random", masked=0.5), 1),
}


def build(tiny, name, **more):
    settings, mask, attended = CASES[name]
    torch.manual_seed(0)
    made = OBJECTIVES[name](tiny.Backbone(attended), more.pop("mask", mask), **SMALL, **{**settings, **more})
    return tiny.ready(made, torch.float64)


def norm(x, p, name):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def head(x, p, trunk, last):
    x = x @ p[f"{trunk}.0.weight"].T + p[f"{trunk}.0.bias"]
    x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2.0))) @ p[f"{trunk}.2.weight"].T + p[f"{trunk}.2.bias"]
    direction = p[f"{last}.direction"]
    return (direction / direction.norm(dim=1, keepdim=True)) @ (x / x.norm())


def image_logits(name, features, i, p):
    if name == "cls":
        return head(norm(features.summary[i], p, "norm"), p, "trunk", "image_last")
    return head(norm(features.stages[1][i], p, "norm_pool").flatten(0, 2).mean(0), p, "trunk_pool", "image_last")


def cross_entropy(student, teacher, centre):
    p_t = ((teacher - centre) / 0.055).exp()
    p_s = (student / 0.1).exp()
    return -sum(t / p_t.sum() * (s / p_s.sum()).log() for t, s in zip(p_t, p_s, strict=True))


def by_hand(o, batch):
    look, b = o._look(batch, drop_path=False), len(batch.views[0])
    masks = look.mask.where.chunk(2)
    s, t = dict(o.named_parameters()), o.teacher.state()
    seen = [o.backbone(x, Mask(m), o.fill) for x, m in zip(batch.views, masks, strict=True)]
    taught = look.taught  # whose views are checked below
    last = "image_last" if o.patch_layer == "image_last" else "patch_last"
    patch = image = torch.zeros((), dtype=torch.float64)
    for i in range(b):
        for view in (0, 1):
            row, other = view * b + i, (1 - view) * b + i
            for name in o.image:
                h = image_logits(name, seen[view], i, s), image_logits(name, taught, other, t)
                image = image + cross_entropy(*h, o.centres.get_buffer(name)) / (2 * b) / len(o.image)
            mine = norm(seen[view].stages[0][i], s, "norm").flatten(0, 2)
            same = norm(taught.stages[0][row], t, "norm").flatten(0, 2)
            hidden = masks[view][i].flatten().nonzero().flatten().tolist()
            for j in hidden:
                h = head(mine[j], s, "trunk", last), head(same[j], t, "trunk", last)
                patch = patch + cross_entropy(*h, o.centres.patch) / max(len(hidden), 1) / (2 * b)
    return {"patch": patch, "image": image}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_description(tiny, name):
    o, batch = build(tiny, name), tiny.batch(2, step=1)
    found, expected = o(batch, T).losses, by_hand(o, batch)
    assert list(found) == ["patch", "image"]
    names, parameters = zip(*o.named_parameters(), strict=True)
    for loss in found:
        torch.testing.assert_close(found[loss], expected[loss], rtol=1e-11, atol=0.0)
        ours = torch.autograd.grad(found[loss], parameters, allow_unused=True, retain_graph=True)
        theirs = torch.autograd.grad(expected[loss], parameters, allow_unused=True, retain_graph=True)
        for parameter, mine, other in zip(names, ours, theirs, strict=True):
            zero = torch.zeros(())
            torch.testing.assert_close(
                zero if mine is None else mine, zero if other is None else other, rtol=1e-8, atol=1e-12, msg=parameter
            )


def test_the_teacher_sees_clean_views_but_where_it_is_noisy(tiny):
    for name, noisy in (("ibot", False), ("attmask", False), ("ibot_smart", True)):
        o, batch, seen = build(tiny, name), tiny.batch(2), []
        o.teacher.backbone.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args))
        o(batch, T)
        assert torch.equal(seen[0][0], torch.cat(batch.views))
        assert (len(seen[0]) > 1) == noisy
        if noisy:
            drop = seen[0][1].where
            assert drop.flatten(1).sum(1).tolist() == [45] * 4  # ceil(.7 x 64)
            assert len({tuple(row.flatten().tolist()) for row in drop}) == 4
            assert "fill" in o.teacher.state()


def test_masks_are_guided_by_what_the_teacher_attends_to(tiny):
    for order, settings in (("high", {"hint": 0.0}), ("low", {"hint": 0.0})):
        o = build(tiny, "attmask", mask=AttentionMask(0.25, order=order, **settings))
        shown = o.picture(tiny.batch(2))
        for mask, attention in zip(shown["mask"], shown["attention"], strict=True):
            where = mask[:, ::8, ::8, ::8].flatten(1)
            least, most = (attention.flatten(1).argsort(1)[:, rows] for rows in (slice(0, 16), slice(-16, None)))
            hidden = where.nonzero()[:, 1].view(2, 16)
            assert torch.equal(hidden, (most if order == "high" else least).sort(1).values)


def test_block_masks_come_with_the_batch_and_are_those_of_forward(tiny):
    o, batch = build(tiny, "ibot"), tiny.batch(3, slots=[4, 0, 9])
    (name, make), *none = o.ahead(tiny.size).items()
    given = make(batch.key.stack(2)).chunk(2)
    assert name == "mask" and not none and given[0].shape == (3, *tiny.cells)
    ahead = o(tiny.batch(3, slots=[4, 0, 9], targets={"mask": given}), T)
    for loss, value in o(batch, T).losses.items():
        assert torch.equal(value, ahead.losses[loss])
    for other in (tiny.smit(BlockMask(0.3)), tiny.smart(mask=BlockMask(0.3))):
        assert torch.equal(other.ahead(tiny.size)["mask"](batch.key.stack(2)), torch.cat(given))
    assert build(tiny, "attmask").ahead(tiny.size) == {} == build(tiny, "ibot", mask=RandomMask(0.3)).ahead(tiny.size)


@pytest.mark.parametrize("name", CASES)
def test_nothing_depends_on_the_batch_split(tiny, name):
    o, whole = build(tiny, name), tiny.batch(4, slots=[5, 2, 9, 7])
    together, parts = o(whole, T), [o(tiny.split(whole, rows), T) for rows in (slice(0, 2), slice(2, 4))]
    for loss, value in together.losses.items():
        torch.testing.assert_close(value, (parts[0].losses[loss] + parts[1].losses[loss]) / 2, rtol=1e-12, atol=0.0)
    for key, (total, count) in together.sums.items():
        torch.testing.assert_close(total, parts[0].sums[key][0] + parts[1].sums[key][0])
        assert count == parts[0].sums[key][1] + parts[1].sums[key][1]


@pytest.mark.parametrize(
    "name, settings",
    [*((name, {}) for name in CASES), ("ibot", {"image": None, "stage": 2}), ("ibot_smart", {"image": ["cls"]}),
     ("ibot", {"weights": {"image": 0}}), ("ibot", {"weights": {"patch": 0}}), ("ibot", {"heads": "separate"})],
)  # fmt: skip
def test_gradients_reach_every_parameter_and_weights_0_remove_terms(tiny, name, settings):
    o, batch = build(tiny, name, **settings), tiny.batch(3)
    out = o(batch, T)
    off = settings.get("weights", {})
    assert list(out.losses) == [loss for loss in ("patch", "image") if loss not in off]
    sum(out.losses.values()).backward()
    idle = {parameter.rsplit(".", 1)[0] for parameter, p in o.named_parameters() if p.grad is None or not p.grad.any()}
    reads_last = "pool" in o.image or o.stage == 1
    # a token of the tiny backbone's first stage sees its own cell alone, so hidden ones see no voxel
    expected = {"backbone.patch"} if "image" in off else set()
    assert idle == (expected if reads_last else {*expected, "backbone.second"})
    o.absorb(out.sums)
    assert set(o.tokens(batch)) == {"student", "teacher", "prototypes", *["crops"] * ("patch" in out.losses)}


def test_teacher_starts_as_the_student_and_follows_the_global_step(tiny):
    o = IBOT(tiny.Backbone(1), AttentionMask(0.7), teacher_drop=0.7, **SMALL)
    student = dict(o.named_parameters())
    assert all(torch.equal(x, student[name]) for name, x in o.teacher.state().items())
    assert [o.momentum(t) for t in (0.0, 0.5, 1.0)] == pytest.approx([0.996, 0.998, 1.0])


def test_settings_are_their_defaults_and_can_be_changed(tiny):
    o = OBJECTIVES["ibot_smart"](tiny.Backbone(1), AttentionMask(0.7), **SMALL)
    assert isinstance(o, IBOT) and o.teacher_drop == 0.7 and o.image == ("cls", "pool")
    assert OBJECTIVES["ibot_smart"](tiny.Backbone(1), AttentionMask(0.7), teacher_drop=0.5, **SMALL).teacher_drop == 0.5
    with pytest.raises(TypeError):
        OBJECTIVES["attmask"](tiny.Backbone(1), AttentionMask(0.7), nonsense=1)


def test_what_cannot_work_is_refused(tiny):
    for settings in ({"mask": AttentionMask(0.7)}, {"mask": RandomMask(), "image": ["cls"]}):
        with pytest.raises(ValueError, match="CLS"):
            IBOT(tiny.Backbone(None), **SMALL, **settings)
    with pytest.raises(ValueError, match="CLS"):
        OBJECTIVES["attmask"](tiny.Backbone(None), RandomMask(), **SMALL)
    for wrong in (
        {"stage": 3},
        {"image": ["mean"]},
        {"heads": "none"},
        {"teacher_drop": 1.5},
        {"weights": {"recon": 1}},
    ):
        with pytest.raises(ValueError):
            IBOT(tiny.Backbone(None), RandomMask(), **SMALL, **wrong)
