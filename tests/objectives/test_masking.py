import pytest
import torch

import medfast_kernels as mk
from medfast.objectives import MASKS
from medfast.objectives.block_mask import BlockMask
from medfast.objectives.masking import (
    AttentionMask,
    RandomMask,
    count_of,
    hidden_rows,
    hidden_tokens,
    hidden_voxels,
    random_cells,
    with_ids,
)
from medfast.types import Key, Mask

SMART_CELLS, SMIT_CELLS = (8, 8, 8), (6, 6, 6)


def key(b=4, seed=3, step=0):
    return Key(seed, step, torch.arange(b))


def attention(b=4, n=512, seed=0):
    return torch.rand(b, n, generator=torch.Generator().manual_seed(seed)).softmax(1)


@pytest.mark.parametrize(
    "mask, cells, count",
    [
        (AttentionMask(0.7, hint=0.0), SMART_CELLS, 358),
        (AttentionMask(0.7, hint=0.1, hint_mode="random"), SMART_CELLS, 323),
        (AttentionMask(0.7, hint=0.1, hint_mode="top"), SMART_CELLS, 307),
        (RandomMask(0.7), SMART_CELLS, 359),
        (RandomMask(0.7, rounding="floor"), SMART_CELLS, 358),
        (RandomMask(0.7), SMIT_CELLS, 152),
    ],
)
def test_exactly_as_many_cells_are_hidden_as_the_papers_say(mask, cells, count):
    n = cells[0] ** 3
    drawn = mask(cells, key(), attention(n=n))
    assert drawn.where.shape == (4, *cells)
    assert drawn.where.flatten(1).sum(1).tolist() == [count] * 4
    assert drawn.hidden.shape == (4, count) and drawn.visible.shape == (4, n - count)
    for row in range(4):
        flat = drawn.where[row].flatten()
        assert drawn.hidden[row].tolist() == flat.nonzero().flatten().tolist()
        assert drawn.visible[row].tolist() == (~flat).nonzero().flatten().tolist()


def test_attention_masks_hide_the_most_attended_but_the_hints():
    weights = attention()
    order = weights.argsort(1, descending=True)
    top = AttentionMask(0.7, hint=0.1)(SMART_CELLS, key(), weights).where.flatten(1)
    drawn = AttentionMask(0.7, hint=0.1, hint_mode="random")(SMART_CELLS, key(), weights).where.flatten(1)
    low = AttentionMask(0.7, hint=0.0, order="low")(SMART_CELLS, key(), weights).where.flatten(1)
    for row in range(4):
        assert not top[row, order[row, :51]].any() and top[row, order[row, 51:358]].all()
        assert (~drawn[row, order[row, :51]]).sum() == 35 and drawn[row, order[row, 51:358]].all()
        assert not top[row, order[row, 358:]].any() and not drawn[row, order[row, 358:]].any()
        assert low[row, order[row, -358:]].all()


def test_random_masks_differ_between_samples_views_steps_and_roles():
    mask = RandomMask(0.5)
    both = mask((4, 4, 4), key().stack(2)).where
    assert len({tuple(row.flatten().tolist()) for row in both}) == 8
    assert not torch.equal(mask((4, 4, 4), key(step=1)).where, both[:4])
    assert torch.equal(mask((4, 4, 4), key()).where, both[:4])
    drop = random_cells((4, 4, 4), 32, key().at(mk.Role.TEACHER_DROP)).where
    assert not torch.equal(drop, both[:4])


@pytest.mark.parametrize("mask", [RandomMask(0.7), AttentionMask(0.7, hint=0.1, hint_mode="random")])
def test_a_sample_has_the_same_mask_in_any_batch(mask):
    weights, slots = attention(b=6, n=64), torch.arange(6)
    whole = mask((4, 4, 4), Key(5, 2, slots), weights).where
    parts = [mask((4, 4, 4), Key(5, 2, slots[rows]), weights[rows]).where for rows in (slice(0, 2), slice(2, 6))]
    assert torch.equal(whole, torch.cat(parts))


def test_every_cell_is_hidden_equally_often():
    where = RandomMask(0.25)((3, 3, 3), Key(0, 0, torch.arange(4000))).where.flatten(1).float().mean(0)
    assert (where - 7 / 27).abs().max() < 0.04


def test_counts_do_not_trip_over_rounding_errors():
    assert [count_of(0.07, 100), count_of(0.7, 10), count_of(0.29, 100, "floor"), count_of(0.7, 512)] == [7, 7, 29, 359]


def test_hidden_tokens_are_gathered_or_weighted():
    tokens = torch.arange(2 * 8 * 3.0).reshape(2, 8, 3)
    known = random_cells((2, 2, 2), 3, key(2).at(mk.Role.MASK))
    few, ones = hidden_tokens(tokens, known)
    assert torch.equal(few[1], tokens[1][known.where[1].flatten()]) and torch.equal(ones, torch.ones(2, 3))
    every, weight = hidden_tokens(tokens, Mask(known.where))
    assert torch.equal(every, tokens) and torch.equal(weight.bool(), known.where.flatten(1))
    uneven = known.where.clone()
    uneven[0] = False
    for mask, crops in ((known, [0, 0, 0, 1, 1, 1]), (Mask(known.where), [0, 0, 0, 1, 1, 1]), (Mask(uneven), [1] * 3)):
        rows, crop = hidden_rows(tokens, mask)
        assert crop.tolist() == crops and torch.equal(rows, tokens[mask.where.flatten(1)])


def test_a_cell_covers_its_voxels_and_the_last_one_is_cut():
    where = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    where[0, 0, 1, 0] = True
    voxels = hidden_voxels(Mask(where), 16, (20, 30, 32))
    assert voxels.shape == (1, 20, 30, 32)
    assert voxels[0, :16, 16:30, :16].all() and voxels.sum() == 16 * 14 * 16


def test_wrong_arguments_are_refused():
    for wrong in ({"ratio": 1.2}, {"rounding": "round"}):
        with pytest.raises(ValueError):
            RandomMask(**wrong)
    for wrong in (
        {"ratio": -0.1},
        {"hint": 0.8},
        {"hint_mode": "some"},
        {"order": "up"},
        {"order": "low", "hint": 0.1},
    ):
        with pytest.raises(ValueError):
            AttentionMask(**wrong)
    with pytest.raises(ValueError, match="attention"):
        AttentionMask()((4, 4, 4), key())
    with pytest.raises(ValueError, match="attention"):
        AttentionMask()((4, 4, 4), key(), attention(n=63))


def test_attmask_draws_one_ratio_a_step_and_leaves_some_samples_whole():
    mask, weights = AttentionMask((0.1, 0.5), hint=0.0, masked=0.5), attention(b=40, n=200)
    counts = mask((5, 5, 8), Key(5, 2, torch.arange(20)).stack(2), weights).where.flatten(1).sum(1)
    (count,) = set(counts.tolist()) - {0}  # one ratio for all samples and both views
    assert 20 <= count <= 100 and 8 <= (counts == 0).sum() <= 32
    steps = {
        mask((5, 5, 8), Key(5, s, torch.arange(40)), weights).where.flatten(1).sum(1).max().item() for s in range(9)
    }
    assert len(steps) > 5
    part = mask((5, 5, 8), Key(5, 2, torch.arange(7, 20)), weights[7:20])
    assert part.hidden is None and part.where.flatten(1).sum(1).tolist() == counts[7:20].tolist()


def test_attmask_hints_have_a_ratio_of_their_own():
    weights, shown = attention(b=1, n=1000), []
    for step in range(12):
        drawn = AttentionMask((0.2, 0.6), hint=0.2, hint_mode="random")(
            (10, 10, 10), Key(1, step, torch.arange(1)), weights
        )
        top = weights.argsort(1, descending=True)[0, :200]
        shown.append(((~drawn.where.flatten()[top]).sum().item(), drawn.where.sum().item()))
    for hints, hidden in shown:
        assert 40 <= hints <= 120 and 200 <= hidden + hints <= 600
    assert any(abs(hints / 200 - (hidden + hints) / 1000) > 0.05 for hints, hidden in shown)


def test_ids_follow_from_a_mask_whose_samples_hide_equally_many():
    known = random_cells((2, 2, 2), 3, key(2))
    found = with_ids(Mask(known.where))
    assert torch.equal(found.hidden, known.hidden) and torch.equal(found.visible, known.visible)
    with pytest.raises(ValueError, match="equally many"):
        with_ids(Mask(torch.eye(2, 8, dtype=torch.bool).cumsum(1).bool().view(2, 2, 2, 2)))


def test_the_table_names_all():
    assert {"random": RandomMask, "block": BlockMask, "attention": AttentionMask} == MASKS
