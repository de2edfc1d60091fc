import types

import pytest
import torch

from medfast.objectives.held_out import crops, with_masks
from medfast.types import Batch, Objective
from medfast_kernels import Key


class Cells(Objective):
    views = 2

    def cells(self, size):
        return tuple(n // 8 for n in size)


def batch_of(step, slots, seed=0):
    views = tuple(torch.zeros(len(slots), 1, 32, 24, 32) for _ in range(2))
    return Batch(views, None, Key(seed, step, torch.tensor(list(slots))))


def test_a_mask_depends_on_step_slot_and_view_alone():
    together = with_masks(Cells(), batch_of(0, [0, 1, 2])).targets["mask"]
    alone = with_masks(Cells(), batch_of(0, [2], seed=9)).targets["mask"]
    other_step = with_masks(Cells(), batch_of(1, [0, 1, 2])).targets["mask"]
    assert all(torch.equal(a[2:], b) for a, b in zip(together, alone, strict=True))
    assert not torch.equal(together[0], together[1]) and not torch.equal(together[0][0], together[0][1])
    assert not torch.equal(together[0], other_step[0])


def test_seven_of_ten_cells_are_hidden():
    for mask in with_masks(Cells(), batch_of(0, [0, 1])).targets["mask"]:
        assert mask.shape == (2, 4, 3, 4) and mask.dtype == torch.bool
        assert mask.flatten(1).sum(1).tolist() == [round(0.7 * 48)] * 2


def test_an_objective_without_masks_gets_none():
    assert "mask" not in with_masks(Objective(), batch_of(0, [0])).targets


@pytest.mark.parametrize("micro", [1, 2, 5])
def test_crops_are_the_slots_of_successive_steps(micro):
    stream = types.SimpleNamespace(batch_size=3, batch=batch_of)
    found = [(b.key.step, slot) for b in crops(stream, 5, micro) for slot in b.key.sample.tolist()]
    assert found == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
