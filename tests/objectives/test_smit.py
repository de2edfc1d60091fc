"""SMIT on a tiny backbone in fp64, against an evaluation written from its description."""

import math

import pytest
import torch

from medfast.objectives import OBJECTIVES
from medfast.objectives.masking import AttentionMask, RandomMask
from medfast.objectives.smit import SMIT
from medfast.types import Mask

T = torch.tensor(0.03, dtype=torch.float64)  # image temperature half way up its ramp, patch temperature still low


def norm(x, p):
    x = x - x.mean(-1, keepdim=True)
    return (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"]).flatten(0, 2)


def head(x, p, name):
    trunk = f"head_trunk.{name}"
    x = x @ p[f"{trunk}.0.weight"].T + p[f"{trunk}.0.bias"]
    x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2.0))) @ p[f"{trunk}.2.weight"].T + p[f"{trunk}.2.bias"]
    direction = p[f"head_last.{name}.direction"]
    return (direction / direction.norm(dim=1, keepdim=True)) @ (x / x.norm())


def cross_entropy(student, teacher, centre, teacher_temperature):
    p_t = ((teacher - centre) / teacher_temperature).exp()
    p_s = (student / 0.1).exp()
    return -sum(t / p_t.sum() * (s / p_s.sum()).log() for t, s in zip(p_t, p_s, strict=True))


def by_hand(o, batch):
    masks = o.picture(batch)["mask"]
    s, t = dict(o.named_parameters()), o.teacher.state()
    seen = [o.backbone(x, Mask(m[:, ::8, ::8, ::8]), o.fill) for x, m in zip(batch.views, masks, strict=True)]
    taught = [o.teacher.backbone(x) for x in batch.views]  # clean
    b = len(batch.views[0])
    loss = {"recon": 0.0, "patch": 0.0, "image": 0.0}
    for i in range(b):
        for view in (0, 1):
            mine, same, other = seen[view].stages[0][i], taught[view].stages[0][i], taught[1 - view].stages[0][i]
            mine, same, other = norm(mine, s), norm(same, t), norm(other, t)
            h = head(mine.mean(0), s, "image"), head(other.mean(0), t, "image")
            loss["image"] += cross_entropy(*h, o.centres.image, 0.055) / (2 * b)
            hidden = masks[view][i, ::8, ::8, ::8].flatten().nonzero().flatten().tolist()
            for j in hidden:
                h = head(mine[j], s, "patch"), head(same[j], t, "patch")
                loss["patch"] += cross_entropy(*h, o.centres.patch, 0.04) / len(hidden) / (2 * b)
            tokens = seen[view].stages[1][i] @ s["voxels.linear.weight"].T + s["voxels.linear.bias"]
            made = tokens.view(2, 2, 2, 16, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(32, 32, 32)
            error = (made - batch.views[view][i, 0]).abs()[masks[view][i]]
            loss["recon"] += error.sum() / (len(error) + 1e-5) / (2 * b)
    return {"recon": loss["recon"], "patch": 0.1 * loss["patch"], "image": 0.1 * loss["image"]}


def test_losses_and_gradients_are_those_of_the_description(tiny):
    o, batch = tiny.smit(RandomMask(0.7)), tiny.batch(2)
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


@pytest.mark.parametrize("off", [{}, {"recon": 0}, {"patch": 0}, {"image": 0}, {"patch": 0, "image": 0}])
def test_gradients_reach_every_parameter_and_weights_0_remove_terms(tiny, off):
    o = tiny.smit(RandomMask(0.7), weights=off)
    out = o(tiny.batch(2), T)
    assert list(out.losses) == [name for name in ("recon", "patch", "image") if off.get(name, 1)]
    sum(out.losses.values()).backward()
    idle = [name for name, p in o.named_parameters() if p.grad is None or not p.grad.any()]
    # without reconstruction nothing reads the stages behind the distilled one
    assert idle == ([] if "recon" in out.losses else ["backbone.second.weight", "backbone.second.bias"])
    o.absorb(out.sums)
    found = o.tokens(tiny.batch(2))
    assert ("prototypes" in found) == bool(out.sums) and ("crops" in found) == ("patch" in out.losses)
    assert ("reconstruction" in o.picture(tiny.batch(2))) == ("recon" in out.losses)


def test_nothing_depends_on_the_batch_split(tiny):
    o, whole = tiny.smit(RandomMask(0.7)), tiny.batch(4, slots=[5, 2, 9, 7])
    together, parts = o(whole, T), [o(tiny.split(whole, rows), T) for rows in (slice(0, 2), slice(2, 4))]
    for name, loss in together.losses.items():
        torch.testing.assert_close(loss, (parts[0].losses[name] + parts[1].losses[name]) / 2, rtol=1e-12, atol=0.0)
    for name, (total, count) in together.sums.items():
        torch.testing.assert_close(total, parts[0].sums[name][0] + parts[1].sums[name][0])
        assert count == parts[0].sums[name][1] + parts[1].sums[name][1]


def test_teacher_starts_as_the_student_and_never_sees_the_fill(tiny):
    o = SMIT(tiny.Backbone(None), RandomMask(0.7), stage=1, prototypes=10, head_widths=(9, 7))
    student = dict(o.named_parameters())
    assert all(torch.equal(x, student[name]) for name, x in o.teacher.state().items())
    assert "fill" not in o.teacher.state()
    assert [o.momentum(t) for t in (0.0, 0.5, 1.0)] == pytest.approx([0.996, 0.998, 1.0])


def test_centre_momentum_reaches_the_centres(tiny):
    o = tiny.smit(RandomMask(0.7), centre_momentum=0.25)
    before = o.centres.patch.clone()
    o.absorb({name: (torch.ones(10), torch.tensor(2.0)) for name in o.centres.names})
    torch.testing.assert_close(o.centres.patch, 0.25 * before + 0.75 * 0.5)


def test_drop_path_is_the_students_own(tiny):
    o, batch, seen = tiny.smit(RandomMask(0.7), drop_path=0.9), tiny.batch(3), []
    o.backbone.register_forward_hook(lambda m, args, out: seen.append(args[3] is not None))
    o.teacher.backbone.register_forward_hook(lambda m, args, out: seen.append(len(args) > 1))
    o(batch, T)
    o.eval()
    o(batch, T)
    assert seen == [False, True, False, False]


def test_what_smit_cannot_train_is_refused(tiny):
    for backbone, mask in ((tiny.Backbone(1), RandomMask()), (tiny.Backbone(None), AttentionMask())):
        with pytest.raises(ValueError, match="smart"):
            SMIT(backbone, mask, stage=1)
    with pytest.raises(ValueError, match="stage"):
        SMIT(tiny.Backbone(None), RandomMask(), stage=3)
    assert OBJECTIVES["smit"] is SMIT
