"""Groups of samples reach over ranks: contrast and batch statistics do not know how many there are."""

import pytest
import torch
from group_ranks import BATCH, losses_and_gradients
from ranks import torchrun

from medfast.training.distributed import World
from medfast.training.loop import _group, _schedule
from medfast.training.settings import Train
from medfast.types import Objective

ALONE = World(0, 1, torch.device("cpu"))


def test_two_ranks_train_what_one_does_with_and_without_accumulation(tmp_path):
    torchrun("group_ranks.py", str(tmp_path))
    expected = losses_and_gradients(ALONE, BATCH)
    for rank in (0, 1):
        for found in torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True).values():
            assert found.keys() == expected.keys()
            for name, value in found.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-13, msg=name)
    for name, value in losses_and_gradients(ALONE, BATCH // 2).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize("ranks, micro", [(1, 12), (2, 3), (3, 2), (4, 1), (3, 4)])
def test_what_ranks_hold_at_a_time_are_consecutive_slots(ranks, micro):
    train = Train(steps=2, batch=12, micro=micro)
    runs = [list(_schedule(0, train, World(rank, ranks, torch.device("cpu")))) for rank in range(ranks)]
    seen = []
    for together in zip(*runs, strict=True):
        assert len({step for step, _ in together}) == 1
        seen += [slot for _, slots in together for slot in slots]
    assert seen == [*range(12), *range(12)]


def test_ranks_times_micro_batch_must_be_whole_groups():
    objective = Objective()
    objective.group = 8
    _group(objective, 8, ALONE)
    _group(objective, 4, World(0, 2, torch.device("cpu")))
    for micro, size in ((4, 1), (4, 3)):
        with pytest.raises(ValueError, match="objective.group=8"):
            _group(objective, micro, World(0, size, torch.device("cpu")))
