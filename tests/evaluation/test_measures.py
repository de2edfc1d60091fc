"""Measures of the ablations: masks that look for organs are told from masks that know nothing."""

from types import SimpleNamespace

import pytest
import torch

from medfast.evaluation.measures import hidden_organs, measures
from medfast.types import Batch, Key, Objective, Output

SIZE = (8, 8, 8)


class Store:
    """One volume; an eighth of it, a corner, is an organ."""

    def label(self, index):
        organ = torch.zeros(SIZE, dtype=torch.uint8)
        organ[:4, :4, :4] = 3
        return organ.numpy()


class Stream(SimpleNamespace):
    batch_size, store = 2, Store()

    def batch(self, step, slots):
        b = len(slots)
        boxes = torch.tensor([[[0, 0, 0, *SIZE], [4, 0, 0, 12, 8, 8]]]).float().expand(b, -1, -1)
        views = tuple(torch.rand(b, 1, *SIZE) for _ in range(2))
        return Batch(views, boxes, Key(0, step, torch.tensor(slots)), params={"volume": torch.zeros(b).long()})


class Hides(Objective):
    """Hides what ``where`` says; forward tells a number that grows and one that is none."""

    views = 2

    def __init__(self, where, guided=True):
        super().__init__()
        self.where, self.guided, self.calls = where, guided, 0

    def forward(self, batch, t):
        assert not self.training and not torch.is_grad_enabled() and 0.9 < float(t) < 1.0
        self.calls += 1
        return Output({}, {"told": torch.tensor(float(self.calls)), "nothing": torch.tensor(float("nan"))})

    def picture(self, batch):
        shown = {"mask": tuple(self.where.expand(len(view), *SIZE) for view in batch.views)}
        return shown | ({"attention": shown["mask"]} if self.guided else {})


@pytest.mark.parametrize("rows, share", [(slice(0, 4), 2.0), (slice(4, 8), 0.0), (slice(0, 8), 1.0)])
def test_hidden_organs(rows, share):
    """Half of the first view hidden: with its organ, without. In the second view no organ is left to hide."""
    where = torch.zeros(1, *SIZE, dtype=torch.bool)
    where[:, rows] = True
    batch = Stream().batch(0, [0, 1])
    assert hidden_organs(tuple(where.expand(2, *SIZE) for _ in range(2)), Stream.store, batch) == share


def test_means_over_batches_of_what_is_a_number():
    objective = Hides(torch.ones(1, *SIZE, dtype=torch.bool)).train()
    found = measures(objective, Stream(), 6)
    assert objective.training and objective.calls == 3
    assert found["told"] == 2.0 and found["hidden_organs"] == 1.0 and "nothing" not in found


def test_masks_that_nobody_guides_are_not_judged():
    assert "hidden_organs" not in measures(Hides(torch.ones(1, *SIZE, dtype=torch.bool), guided=False), Stream(), 2)
