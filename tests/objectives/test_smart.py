"""SMART on a tiny backbone in fp64: the whole iteration against an evaluation written from the paper's equations."""

import math

import pytest
import torch

from medfast.architectures import BACKBONES
from medfast.objectives import OBJECTIVES
from medfast.objectives.masking import AttentionMask, RandomMask
from medfast.objectives.smart import SMART
from medfast.types import Mask

T = torch.tensor(0.25, dtype=torch.float64)
WEIGHTS = {"amip": 1.0, "ampd": 0.1, "aitd": 0.1, "gitd": 0.1}


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2.0)))


def head(x, p, trunk, last):
    """Last layer of trunk of x: raw logits, from parameters by name."""
    x = gelu(x @ p[f"{trunk}.0.weight"].T + p[f"{trunk}.0.bias"]) @ p[f"{trunk}.2.weight"].T + p[f"{trunk}.2.bias"]
    direction = p[f"{last}.direction"]
    return (direction / direction.norm(dim=1, keepdim=True)) @ (x / x.norm())


def norm(x, p, name):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def cross_entropy(student, teacher, centre, teacher_temperature):
    p_t = ((teacher - centre) / teacher_temperature).exp()
    p_s = (student / 0.1).exp()
    return -sum(t / p_t.sum() * (s / p_s.sum()).log() for t, s in zip(p_t, p_s, strict=True))


def by_hand(o, batch, gitd, heads):
    """Eqs. 2 to 6, sample by sample and token by token. Masks are what ``picture`` shows."""
    shown, b = o.picture(batch), len(batch.views[0])
    cells = lambda name, view: shown[name][view][:, ::8, ::8, ::8]  # noqa: E731
    s, t = dict(o.named_parameters()), o.teacher.state()
    centre = {name: o.centres.get_buffer(name) for name in o.centres.names}
    student_patch, teacher_patch = {
        "author": ("patch_last", "image_last"),
        "mirrored": ("patch_last", "patch_last"),
        "shared": ("image_last", "image_last"),
    }[heads]
    seen = [o.backbone(x, Mask(cells("mask", i)), o.fill) for i, x in enumerate(batch.views)]
    taught = [o.teacher.backbone(x, Mask(cells("drop", i)), o.teacher.fill) for i, x in enumerate(batch.views)]

    def pooled(features, p, i):
        if gitd == "stage4":
            return norm(features.stages[1][i], p, "norm_final").flatten(0, 2).mean(0), "trunk_final"
        return norm(features.stages[0][i], p, "norm_semantic").flatten(0, 2).mean(0), "trunk"

    loss = dict.fromkeys(WEIGHTS, 0.0)
    for i in range(b):
        for view, other in ((0, 1), (1, 0)):
            mine, its = seen[view], taught[other]
            x, y = norm(mine.summary[i], s, "norm_semantic"), norm(its.summary[i], t, "norm_semantic")
            h = head(x, s, "trunk", "image_last"), head(y, t, "trunk", "image_last")
            loss["aitd"] += cross_entropy(*h, centre["aitd"], 0.04) / (2 * b)
            (x, trunk), (y, _) = pooled(mine, s, i), pooled(its, t, i)
            h = head(x, s, trunk, "image_last"), head(y, t, trunk, "image_last")
            loss["gitd"] += cross_entropy(*h, centre["gitd"], 0.04) / (2 * b)

            hidden = cells("mask", view)[i].flatten().nonzero().flatten().tolist()
            x = norm(mine.stages[0][i], s, "norm_semantic").flatten(0, 2)
            y = norm(taught[view].stages[0][i], t, "norm_semantic").flatten(0, 2)
            for j in hidden:
                h = head(x[j], s, "trunk", student_patch), head(y[j], t, "trunk", teacher_patch)
                loss["ampd"] += cross_entropy(*h, centre["ampd"], 0.05) / len(hidden) / (2 * b)

            tokens = norm(mine.stages[1][i], s, "norm_final") @ s["voxels.linear.weight"].T + s["voxels.linear.bias"]
            made = torch.cat(  # 2 x 2 x 2 tokens of 16^3 voxels
                [torch.cat([torch.cat([tokens[d, h, w].view(16, 16, 16) for w in (0, 1)], 2) for h in (0, 1)], 1)
                 for d in (0, 1)]
            )  # fmt: skip
            voxels = shown["mask"][view][i]
            loss["amip"] += (
                ((made - batch.views[view][i, 0]).abs() * voxels).sum() / (voxels.sum().double() + 1e-5) / (2 * b)
            )
    return {name: WEIGHTS[name] * value for name, value in loss.items()}


@pytest.mark.parametrize("gitd, heads", [("stage4", "author"), ("stage3", "mirrored"), ("stage4", "shared")])
def test_losses_and_gradients_are_those_of_the_equations(tiny, gitd, heads):
    o, batch = tiny.smart(gitd=gitd, heads=heads), tiny.batch(2)
    found, expected = o(batch, T).losses, by_hand(o, batch, gitd, heads)
    assert list(found) == list(expected)
    names, parameters = zip(*o.named_parameters(), strict=True)
    for loss in found:
        torch.testing.assert_close(found[loss], expected[loss], rtol=1e-11, atol=0.0)
        ours = torch.autograd.grad(found[loss], parameters, allow_unused=True, retain_graph=True)
        theirs = torch.autograd.grad(expected[loss], parameters, allow_unused=True, retain_graph=True)
        for name, mine, other in zip(names, ours, theirs, strict=True):
            assert (mine is None) == (other is None), (loss, name)
            if mine is not None:
                torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_a_zero_fill_is_no_parameter_and_centre_momentum_reaches_the_centres(tiny):
    o = tiny.smart(fill="zero", centre_momentum=0.25)
    assert "fill" in dict(o.named_buffers()) and "fill" not in dict(o.named_parameters())
    assert not SMART(tiny.Backbone(), AttentionMask(), fill="zero", prototypes=10, head_widths=(9, 7)).fill.any()
    before = o.centres.aitd.clone()
    o.absorb({name: (torch.ones(10), torch.tensor(2.0)) for name in o.centres.names})
    torch.testing.assert_close(o.centres.aitd, 0.25 * before + 0.75 * 0.5)


def test_centres_move_in_absorb_only_and_by_the_teachers_raw_logits(tiny):
    o, batch = tiny.smart(), tiny.batch(2)
    before = {name: o.centres.get_buffer(name).clone() for name in o.centres.names}
    sums = o(batch, T).sums
    assert all(torch.equal(before[name], o.centres.get_buffer(name)) for name in before)
    o.absorb(sums)
    shown, t = o.picture(batch), o.teacher.state()
    taught = [
        o.teacher.backbone(x, Mask(shown["drop"][i][:, ::8, ::8, ::8]), o.teacher.fill)
        for i, x in enumerate(batch.views)
    ]
    summaries = norm(torch.cat([f.summary for f in taught]), t, "norm_semantic")
    tokens = norm(torch.cat([f.stages[0] for f in taught]), t, "norm_semantic").flatten(0, 3)
    for name, rows in (("aitd", summaries), ("ampd", tokens)):
        mean = torch.stack([head(row, t, "trunk", "image_last") for row in rows]).mean(0)
        torch.testing.assert_close(o.centres.get_buffer(name), 0.9 * before[name] + 0.1 * mean)


def test_teacher_starts_as_the_student_and_follows_the_closed_form(tiny):
    torch.manual_seed(0)
    o = SMART(tiny.Backbone(), AttentionMask(), prototypes=10, head_widths=(9, 7)).double()
    o.teacher.to(torch.float64)
    student = dict(o.named_parameters())
    assert "fill" in o.teacher.state()
    assert all(torch.equal(x, student[name]) for name, x in o.teacher.state().items())
    start = {name: x.clone() for name, x in o.teacher.state().items()}
    with torch.no_grad():
        for p in o.parameters():
            p.add_(torch.randn_like(p))
    steps, left = 20, 1.0
    for k in range(7):
        o.teacher.update(student, o.momentum(k / steps))
        left *= 1.0 - 0.004 * (1 + math.cos(math.pi * k / steps)) / 2
    for name, x in o.teacher.state().items():
        torch.testing.assert_close(x, student[name] + left * (start[name] - student[name]), rtol=1e-12, atol=1e-12)
    assert not any(p.requires_grad for p in o.teacher.state().values())
    assert not any(name.startswith("teacher") for name, _ in o.named_parameters())


OFF = [{"ampd": 0}, {"aitd": 0}, {"gitd": 0}, {"amip": 0}, {"ampd": 0, "aitd": 0, "gitd": 0}, {"aitd": 0, "gitd": 0}]


@pytest.mark.parametrize(
    "settings",
    [{}, {"gitd": "stage3"}, {"heads": "mirrored"}, {"heads": "shared"}, {"fill": "zero"}, {"teacher_drop": 0.0},
     {"mask": RandomMask(0.7)}, {"mask": RandomMask(0.7), "semantic_attention": None, "weights": {"aitd": 0}},
     {"mask": RandomMask(0.7), "semantic_attention": None, "stage": 1, "weights": OFF[4]},
     *({"weights": off, "heads": heads} for off in OFF for heads in ("author", "shared"))],
)  # fmt: skip
def test_gradients_reach_every_parameter_and_weights_0_remove_terms(tiny, settings):
    settings = {"stage": 1, **settings}
    o = tiny.smart(**settings)
    out = o(tiny.batch(2), T)
    assert list(out.losses) == [name for name in WEIGHTS if settings.get("weights", {}).get(name, 1)]
    assert set(out.sums) == set(out.losses) - {"amip"}
    sum(out.losses.values()).backward()
    idle = {name for name, p in o.named_parameters() if p.grad is None or not p.grad.any()}
    expected = set()
    if "aitd" not in out.losses and o.backbone.semantic_attention:
        # the [CLS] module of the backbone is then read, not trained
        expected = {"backbone.query.weight", "backbone.value.weight", "backbone.value.bias"}
    assert idle == expected
    teacher = set() if o.teacher is None else set(o.teacher.parts)
    assert ("fill" in teacher) == bool(teacher and settings.get("teacher_drop", 0.7))
    o.absorb(out.sums)
    shown, tokens = o.picture(tiny.batch(2)), o.tokens(tiny.batch(2))
    assert ("reconstruction" in shown) == ("amip" in out.losses) and ("drop" in shown) == ("fill" in teacher)
    assert ("prototypes" in tokens) == bool(out.sums) and ("crops" in tokens) == ("ampd" in out.losses)


def test_tokens_are_those_that_patch_distillation_compares(tiny):
    o, batch = tiny.smart(), tiny.batch(2)
    tokens, hidden = o.tokens(batch, t=0.25), 2 * 2 * (int(0.7 * 64) - int(0.1 * 64))
    assert tokens["student"].shape == tokens["teacher"].shape == (hidden, 8)
    assert tokens["prototypes"].shape == (hidden, 10)
    assert torch.equal(tokens["crops"], torch.arange(4).repeat_interleave(hidden // 4))
    torch.testing.assert_close(tokens["prototypes"].sum(1), torch.ones(hidden, dtype=torch.float64))
    mean = tokens["prototypes"].mean(0)
    torch.testing.assert_close(o(batch, T).gauges["entropy_ampd"], -(mean * mean.log()).sum())


def test_noise_and_drop_path_are_the_students_and_teachers_own(tiny):
    o, batch = tiny.smart(drop_path=0.9), tiny.batch(3)
    seen = []
    o.backbone.register_forward_hook(lambda m, args, out: seen.append(args[3] is not None))
    o.teacher.backbone.register_forward_hook(lambda m, args, out: seen.append(len(args) > 3))
    o(batch, T)
    o.eval()
    o(batch, T)
    assert seen == [False, True, False, False]


def test_the_clock_moves_the_patch_temperature_alone(tiny):
    o = tiny.smart(patch_temperature=[[0.0, 0.04], [0.5, 0.04], [0.5, 0.07]])
    early, late = (o(tiny.batch(2), torch.tensor(t, dtype=torch.float64)).losses for t in (0.4, 0.6))
    assert [name for name in early if early[name] != late[name]] == ["ampd"]


def test_forward_draws_nothing_from_torch_and_repeats_itself(tiny):
    o, batch = tiny.smart(drop_path=0.5), tiny.batch(2)
    state = torch.get_rng_state()
    first, second = o(batch, T), o(batch, T)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first.losses[name], second.losses[name]) for name in first.losses)


def test_losses_are_fp32_under_autocast(tiny):
    o, batch = tiny.smart(dtype=torch.float32), tiny.batch(2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = o(batch, T.float())
    plain = o(batch, T.float())
    for name, loss in out.losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, plain.losses[name], rtol=0.2, atol=0.0)


def test_one_graph(tiny):
    o, batch = tiny.smart(dtype=torch.float32), tiny.batch(2, dtype=torch.float32)
    compiled = torch.compile(o, fullgraph=True, backend="aot_eager")
    for t in (0.0, 0.7):
        expected, found = o(batch, torch.tensor(t)), compiled(batch, torch.tensor(t))
        for name in expected.losses:
            torch.testing.assert_close(found.losses[name], expected.losses[name])
        torch.testing.assert_close(found.sums["ampd"][0], expected.sums["ampd"][0])


def test_on_a_real_swin_and_the_papers_parameter_count(tiny):
    with torch.device("meta"):
        full = SMART(BACKBONES["swin"](semantic_attention=3), AttentionMask())
    trunks = 5_509_376 + 6_295_808
    heads = 48 + 2 * 384 + 2 * 768 + trunks + 2 * 256 * 8192 + 25_198_592
    assert sum(p.numel() for p in full.parameters()) == 14_122_816 + heads
    torch.manual_seed(0)
    net = BACKBONES["swin"](embed=8, depths=[1, 1], heads=[2, 2], semantic_attention=2, sa_heads=4)
    o = SMART(net, AttentionMask(0.7, hint=0.1), prototypes=16, head_widths=(16, 8))
    out = o(tiny.batch(2, dtype=torch.float32), torch.tensor(0.0))
    assert list(out.losses) == list(WEIGHTS)
    sum(out.losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in o.parameters())


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"semantic_attention": None}, "CLS"),
        ({"semantic_attention": None, "mask": RandomMask(0.7)}, "aitd"),
        ({"gitd": "stage5"}, "stage3"),
        ({"heads": "own"}, "mirrored"),
        ({"fill": "noise"}, "zero"),
        ({"weights": {"amdp": 0.1}}, "did you mean 'ampd'"),
        ({"weights": dict.fromkeys(WEIGHTS, 0.0)}, "nothing"),
        ({"weights": {"amip": -1.0}}, "amip"),
        ({"stage": 2}, "stage"),
        ({"stage": 0}, "stage"),
        ({"teacher_drop": 1.5}, "teacher_drop"),
        ({"weights": {"amip": "1"}}, "amip"),
        ({"momentum": [0.996]}, "momentum"),
        ({"student_temperature": 0.0}, "student_temperature"),
    ],
)
def test_what_cannot_work_is_refused_when_built(tiny, settings, says):
    with pytest.raises(ValueError, match=says):
        tiny.smart(**settings)


def test_views_must_be_two_of_one_shape(tiny):
    o, batch = tiny.smart(), tiny.batch(2)
    for views in (batch.views[:1], (batch.views[0], batch.views[1][..., :24])):
        with pytest.raises(ValueError, match="2 views"):
            o(type(batch)(views=views, boxes=None, key=batch.key), T)


def test_dagman_is_smart():
    assert OBJECTIVES["dagman"] is OBJECTIVES["smart"] is SMART
