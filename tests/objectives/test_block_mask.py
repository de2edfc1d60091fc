"""Blockwise masks: how many, what shape, whose."""

import pytest
import torch

import medfast_kernels as mk
from medfast.objectives import MASKS
from medfast.objectives import block_mask as module
from medfast.objectives.block_mask import BlockMask
from medfast.types import Key

CELLS = (8, 8, 8)


def key(b=24, seed=3, step=1):
    return Key(seed, step, torch.arange(b))


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.7])
def test_counts_come_close_to_the_ratio_and_never_above(ratio):
    drawn = BlockMask(ratio)(CELLS, key())
    counts = drawn.where.flatten(1).sum(1)
    wanted = int(round(ratio * 512, 6))
    assert drawn.hidden is None and drawn.visible is None and drawn.where.shape == (24, *CELLS)
    assert counts.max() <= wanted and counts.min() > 0
    assert counts.double().mean() > 0.85 * wanted
    assert len(set(counts.tolist())) > 1  # it is not filled up to the wanted number


def test_a_box_has_the_volume_and_the_shape_that_were_drawn():
    draws = torch.rand(500, 5, generator=torch.Generator().manual_seed(0)).numpy()
    for unit in draws:
        box = module._box((16, 16, 16), 100.0, (0.3, 1 / 0.3), unit)
        if box is None:
            continue
        sides = [s.stop - s.start for s in box]
        assert all(s.start >= 0 and s.stop <= 16 for s in box)
        depth = (100.0 / torch.tensor(sides[1:]).double().div(sides[0]).prod().item()) ** (1 / 3)
        assert abs(depth - sides[0]) < 1.6  # each side is rounded on its own
        assert all(0.3 / 1.5 < side / sides[0] < 1.5 / 0.3 for side in sides[1:])
    assert module._box((4, 4, 4), 100.0, (0.3, 1 / 0.3), draws[0]) is None


def test_masks_are_made_of_boxes_not_of_scattered_cells():
    """Blocks leave far fewer borders between hidden and visible cells than cells drawn one by one."""

    def borders(where):
        return sum((where.narrow(a, 1, 7) != where.narrow(a, 0, 7)).sum().item() for a in (1, 2, 3))

    blocks = BlockMask(0.3)(CELLS, key()).where
    scattered = MASKS["random"](0.3)(CELLS, key()).where
    assert borders(blocks) < 0.55 * borders(scattered)


def test_a_sample_has_the_same_mask_in_any_batch_and_another_in_each_view_and_step():
    mask, slots = BlockMask(0.3), torch.arange(4)
    whole = mask(CELLS, Key(5, 2, slots).stack(2)).where
    parts = [mask(CELLS, Key(5, 2, slots[rows]).stack(2)).where for rows in (slice(0, 1), slice(1, 4))]
    assert torch.equal(whole[:4], torch.cat([parts[0][:1], parts[1][:3]]))
    assert torch.equal(whole[4:], torch.cat([parts[0][1:], parts[1][3:]]))
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 8
    assert not torch.equal(mask(CELLS, Key(5, 3, slots)).where, whole[:4])


def test_a_longer_draw_goes_on_where_the_shorter_one_ended(monkeypatch):
    before = BlockMask(0.7)(CELLS, key(6)).where
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    assert torch.equal(BlockMask(0.7)(CELLS, key(6)).where, before)


def test_ratios_are_drawn_and_some_samples_stay_whole():
    counts = BlockMask([0.1, 0.5], masked=0.5)(CELLS, key(200)).where.flatten(1).sum(1)
    whole = (counts == 0).double().mean()
    assert 0.38 < whole < 0.62
    assert counts.max() <= 256 and counts.max() > 220 and counts[counts > 0].min() < 80
    assert not BlockMask(0.0)(CELLS, key(2)).where.any()


def test_wrong_arguments_are_refused():
    for wrong in (
        {"ratio": 1.2},
        {"ratio": [0.5, 0.1]},
        {"masked": 2.0},
        {"aspect": (0.0, 1.0)},
        {"aspect": (2.0, 1.0)},
    ):
        with pytest.raises(ValueError):
            BlockMask(**wrong)
    with pytest.raises(ValueError, match="sample"):
        BlockMask()(CELLS, mk.Key(0))
