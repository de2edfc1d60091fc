"""The probe must find what is in features, find nothing where there is nothing, and look where the organs are."""

from types import SimpleNamespace

import pytest
import torch

from medfast.evaluation.probe import (
    Tokens,
    balanced_accuracy,
    class_of_cells,
    collect,
    fit,
    map_of,
    organs_of,
    probe,
)  # fmt: skip
from medfast.types import Batch, Features, Key, Objective

CLASSES, WIDTH = 11, 24


def tokens(n, signal, seed, labels=None):
    """Class means in ``signal`` standard deviations, of unequal scales and far from zero; classes of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.arange(1.0, CLASSES + 1)
    organ = torch.multinomial(share, n, replacement=True, generator=generator) + 1
    means = torch.randn(CLASSES + 1, WIDTH, generator=torch.Generator().manual_seed(0))
    x = signal * means[organ] + torch.randn(n, WIDTH, generator=generator)
    if labels == "random":
        organ = organ[torch.randperm(n, generator=generator)]
    return Tokens(x * torch.logspace(-3, 3, WIDTH) + 100.0, organ)


def test_known_features_are_separated():
    assert probe(tokens(4000, 3.0, 1), tokens(2000, 3.0, 2)) > 0.98


def test_random_labels_are_at_chance():
    assert probe(tokens(4000, 3.0, 1, "random"), tokens(2000, 3.0, 2, "random")) == pytest.approx(1 / CLASSES, abs=0.03)
    assert probe(tokens(4000, 0.0, 1), tokens(2000, 0.0, 2)) == pytest.approx(1 / CLASSES, abs=0.03)


def test_weights_are_those_of_the_weighted_normal_equations():
    """The gradient of the sum of squares that they minimise is zero, features of any scale and offset."""
    given = tokens(300, 0.5, 3)
    made = fit(given)
    x = ((given.features.double() - made.mean) / made.scale).requires_grad_(False)
    which = torch.searchsorted(made.classes, given.organ)
    weight = 1.0 / torch.bincount(which)[which].double() / len(made.classes)
    solution = made.weights.clone().requires_grad_(True)
    error = solution[0] + x @ solution[1:] - torch.nn.functional.one_hot(which).double()
    (0.5 * (weight[:, None] * error.square()).sum() + 0.05 * solution[1:].square().sum()).backward()
    assert solution.grad.abs().max() < 1e-7
    assert (weight[:, None] * x).sum(0).abs().max() < 1e-9  # balanced: classes, not tokens, set the mean


def test_each_class_counts_as_much_in_the_accuracy():
    truth = torch.tensor([1] * 98 + [5, 5])
    assert balanced_accuracy(torch.ones(100, dtype=torch.int64), truth) == 0.5
    assert balanced_accuracy(truth, truth) == 1.0


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="tells classes apart"):
        fit(Tokens(torch.randn(5, 3), torch.ones(5, dtype=torch.int64)))


def test_a_cell_belongs_to_its_majority():
    organ = torch.zeros(1, 8, 8, 4, dtype=torch.uint8)
    organ[0, :4, :4] = 7
    organ[0, 4:, :4, :2], organ[0, 4:, :4, 2:] = 3, 5  # half of a cell is no majority
    organ[0, 4:, 4:] = 2
    organ[0, 4, 4, 0] = 9
    assert class_of_cells(organ)[0, :, :, 0].tolist() == [[7, 0], [0, 2]]
    assert class_of_cells(torch.full((1, 1, 8, 8), 4, dtype=torch.uint8)).tolist() == [[[[4, 4], [4, 4]]]]


def test_stages_come_to_one_grid():
    fine, coarse = torch.arange(64.0).view(1, 4, 4, 4, 1), torch.arange(8.0).view(1, 2, 2, 2, 1)
    one = map_of(Features((fine, coarse), torch.zeros(1)), (4, 4, 4))
    assert torch.equal(one[..., :1], fine) and one[0, 3, 1, 2, 1] == coarse[0, 1, 0, 1, 0]
    two = map_of(Features((fine, coarse), torch.zeros(1)), (2, 2, 2))
    assert torch.equal(two[..., 1:], coarse) and two[0, 0, 0, 0, 0] == fine[0, :2, :2, :2].mean()
    assert map_of(Features((torch.ones(2, 4, 4, 3),), torch.zeros(1)), (1, 4, 4)).shape == (2, 1, 4, 4, 3)


class Labelled:
    """A store of one volume in which half is organ 1 and half organ 2."""

    records = [{"id": "v0"}]

    def __init__(self, label=True):
        self.organ = torch.ones(16, 16, 16, dtype=torch.uint8).numpy() if label else None
        if label:
            self.organ[8:] = 2

    def label(self, index):
        return self.organ


def crops_of(store, start):
    boxes = torch.tensor([[[*start, *(s + 8 for s in start)]]], dtype=torch.float32)
    views = (torch.rand(1, 1, 8, 8, 8),)
    return Batch(views, boxes, Key(0, 0, torch.arange(1)), params={"volume": torch.zeros(1, dtype=torch.int64)})


def test_organs_lie_where_the_view_was_cut_and_air_outside():
    found = organs_of(Labelled(), crops_of(None, (4, -2, 10)))[0]
    assert found[:4, 2:, :6].eq(1).all() and found[4:, 2:, :6].eq(2).all()
    assert found[:, :2].eq(0).all() and found[:, :, 6:].eq(0).all()
    with pytest.raises(ValueError, match="v0 has no label"):
        organs_of(Labelled(label=False), crops_of(None, (0, 0, 0)))


class Knows(Objective):
    """An encoder whose token is the mean of the voxels below it; it is asked without masks and in evaluation."""

    def encode(self, batch):
        assert not self.training
        return [Features((torch.nn.functional.avg_pool3d(batch.views[0], 4).movedim(1, -1),), torch.zeros(1))]


def test_tokens_and_organs_are_of_the_same_place_and_air_is_left_out():
    store = Labelled()

    class Stream(SimpleNamespace):
        def batch(self, step, slots):
            given = crops_of(store, (4, 0, 12))
            return Batch((organs_of(store, given).unsqueeze(1).float(),), given.boxes, given.key, params=given.params)

    objective = Knows().train()
    found = collect(objective, Stream(store=store, batch_size=1), 3)
    assert objective.training and len(found.organ) == 3 * 4
    assert torch.equal(found.features[:, 0], found.organ.float()) and found.organ.unique().tolist() == [1, 2]
