"""What ranks hold together are whole groups of consecutive samples; test_any_ranks shows what they make of them."""

import pytest
import torch

from medfast.training.distributed import World
from medfast.training.feed import schedule
from medfast.training.settings import Train


@pytest.mark.parametrize("ranks, micro", [(1, 12), (2, 3), (3, 2), (4, 1), (3, 4)])
def test_what_ranks_hold_at_a_time_are_consecutive_slots(ranks, micro):
    train = Train(steps=2, batch=12, micro=micro)
    runs = [list(schedule(0, train, World(rank, ranks, torch.device("cpu")))) for rank in range(ranks)]
    seen = []
    for together in zip(*runs, strict=True):
        assert len({step for step, _ in together}) == 1
        seen += [slot for _, slots in together for slot in slots]
    assert seen == [*range(12), *range(12)]


def test_ranks_times_micro_batch_are_whole_groups():
    """Micro-batch and accumulation follow from the ranks: the largest that fits, and words where none does."""
    train = Train(batch=24, micro=8)
    assert [train.shares(ranks, 8) for ranks in (1, 2, 3, 4)] == [(24, 8), (12, 4), (8, 8), (6, 6)]
    assert Train(batch=24, micro=5).shares(2, 1) == (12, 4)
    with pytest.raises(ValueError, match=r"objective.group=8 .* 1 rank\(s\) x micro-batches of at most 4"):
        Train(batch=24, micro=4).shares(1, 8)
