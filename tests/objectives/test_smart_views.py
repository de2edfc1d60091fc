"""Views and masks of SMART: which view teaches which, whose attention hides what, what masks of the data do."""

import math

import pytest
import torch

from medfast.objectives.masking import AttentionMask, RandomMask
from medfast.types import Features

T = torch.tensor(0.25, dtype=torch.float64)


def _perturb(rows):
    """A forward hook that changes what a backbone says of some rows of the stack."""

    def hook(module, args, out):
        bump = torch.zeros(len(out.summary), dtype=torch.float64)
        bump[rows] = 0.1
        shape = lambda x: bump.view(-1, *(1,) * (x.ndim - 1)) * torch.arange(x.shape[-1])  # noqa: E731
        return Features(tuple(x + shape(x) for x in out.stages), out.summary + shape(out.summary), out.attention)

    return hook


@pytest.mark.parametrize("loss, where, cross", [("ampd", 0, False), ("gitd", 1, True), ("aitd", None, True)])
def test_which_teacher_view_feeds_which_student_view(tiny, loss, where, cross):
    o, b = tiny.smart(), 2
    batch = tiny.batch(b, targets={"mask": tuple(torch.rand(b, *tiny.cells) > 0.5 for _ in range(2))})
    kept = []
    o.backbone.register_forward_hook(lambda m, a, out: kept.append(out))

    def gradient():
        value = o(batch, T).losses[loss]
        features = kept.pop()
        return torch.autograd.grad(value, features.summary if where is None else features.stages[where])[0]

    before = gradient()
    for view, rows in ((0, slice(0, b)), (1, slice(b, 2 * b))):
        handle = o.teacher.backbone.register_forward_hook(_perturb(rows))
        changed = (gradient() - before).flatten(1).abs().amax(1) > 1e-9
        handle.remove()
        fed = 1 - view if cross else view
        assert changed.tolist() == [i // b == fed for i in range(2 * b)]


def test_each_view_is_rebuilt_from_itself_and_masked_by_its_own_attention(tiny):
    o, b = tiny.smart(), 2
    batch = tiny.batch(b)
    before = o.picture(batch)

    def flip(module, args, out):
        attention = out.attention.clone()
        attention[b:] = 1 - attention[b:]
        return Features(out.stages, out.summary, attention)

    handle = o.teacher.backbone.register_forward_hook(flip)
    after = o.picture(batch)
    handle.remove()
    assert torch.equal(before["mask"][0], after["mask"][0]) and torch.equal(before["drop"][1], after["drop"][1])
    assert not torch.equal(before["mask"][1], after["mask"][1])
    assert torch.equal(before["reconstruction"][0], after["reconstruction"][0])
    assert not torch.equal(before["reconstruction"][1], after["reconstruction"][1])


def test_masks_have_exact_counts_and_are_each_sample_and_view_its_own(tiny):
    shown = tiny.smart().picture(tiny.batch(3))
    for name, count in (("mask", int(0.7 * 64) - int(0.1 * 64)), ("drop", math.ceil(0.7 * 64))):
        rows = torch.cat(shown[name]).flatten(1)
        assert rows.sum(1).tolist() == [count * 512] * 6
        assert len({tuple(row.tolist()) for row in rows[:, ::64]}) == 6
    assert shown["attention"][0].shape == (3, *tiny.cells)
    random = tiny.smart(mask=RandomMask(0.7)).picture(tiny.batch(3))
    assert not any(torch.equal(*pair) for pair in zip(random["mask"], random["drop"], strict=True))
    assert shown["reconstruction"][1].shape == (3, 1, *tiny.size) and shown["reconstruction"][1].dtype == torch.float32


@pytest.mark.parametrize("mask", [AttentionMask(0.7, hint=0.1, hint_mode="random"), RandomMask(0.7)])
def test_nothing_depends_on_the_batch_split(tiny, mask):
    o, whole = tiny.smart(mask=mask, drop_path=0.4), tiny.batch(4, slots=[5, 2, 9, 7])
    together, parts = o(whole, T), [o(tiny.split(whole, rows), T) for rows in (slice(0, 2), slice(2, 4))]
    for name, loss in together.losses.items():
        torch.testing.assert_close(loss, (parts[0].losses[name] + parts[1].losses[name]) / 2, rtol=1e-12, atol=0.0)
    for name, (total, count) in together.sums.items():
        torch.testing.assert_close(total, parts[0].sums[name][0] + parts[1].sums[name][0])
        assert count == parts[0].sums[name][1] + parts[1].sums[name][1]
    assert together.sums["ampd"][1] == 8 * 64 and together.sums["aitd"][1] == 8


def test_the_teachers_most_attended_cells_are_hidden_but_the_hints(tiny):
    shown = tiny.smart().picture(tiny.batch(2))
    for view in (0, 1):
        hidden = shown["mask"][view][:, ::8, ::8, ::8].flatten(1)
        order = shown["attention"][view].flatten(1).argsort(dim=1, descending=True, stable=True)  # dropped cells tie
        assert hidden.gather(1, order).tolist() == [[6 <= i < 44 for i in range(64)]] * 2


def test_padding_does_not_count(tiny):
    o = tiny.smart(mask=RandomMask(1.0), weights={"ampd": 0, "aitd": 0, "gitd": 0})
    valid = torch.ones(2, *tiny.size, dtype=torch.bool)
    valid[0, :, :, 20:] = False
    batch = tiny.batch(2, valid=(valid, None))
    before = o(batch, T).losses["amip"].item()
    batch.views[0][0, :, :, :, 20:] += 5.0
    assert o(batch, T).losses["amip"].item() == before
    batch.views[1][0, :, :, :, 20:] += 5.0
    assert o(batch, T).losses["amip"].item() != before


def test_fixed_masks_are_used_as_given(tiny):
    o = tiny.smart()
    where = tuple(torch.rand(2, *o.cells(tiny.size)) > 0.4 for _ in range(2))
    shown = o.picture(tiny.batch(2, targets={"mask": where}))
    assert all(torch.equal(shown["mask"][i][:, ::8, ::8, ::8], where[i]) for i in range(2))
    drawn = o.picture(tiny.batch(2))["mask"]
    again = tiny.batch(2, targets={"mask": tuple(m[:, ::8, ::8, ::8] for m in drawn)})
    for name, loss in o(tiny.batch(2), T).losses.items():
        torch.testing.assert_close(o(again, T).losses[name], loss)
    with pytest.raises(ValueError, match="mask"):
        o(tiny.batch(2, targets={"mask": tuple(w[:, 1:] for w in where)}), T)
