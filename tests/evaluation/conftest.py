"""A small world without a store or a network: phantoms that are balls, and an objective that fills in their mean."""

import pytest
import torch

from medfast.types import Batch, Objective, Output
from medfast_kernels import Key

SIZE, CELL = (32, 32, 32), 8


class Stream:
    """Two views of balls of different sizes; volume and ball depend on step and slot alone."""

    batch_size = 3
    note = None

    def __init__(self):
        self.volumes = ["v0", "v1"]
        records = [{"id": name, "shape": list(SIZE)} for name in ("v0", "v1", "v2")]
        self.store = _Store(records)

    def batch(self, step, slots):
        grid = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in SIZE), indexing="ij"))
        radius = grid.square().sum(0).sqrt()
        views = tuple(
            torch.stack([(0.2 + 0.6 * (radius < 0.4 + 0.1 * ((step + slot + view) % 4)))[None] for slot in slots])
            for view in range(2)
        )
        volume = torch.tensor([slot % 2 for slot in slots])
        boxes = torch.zeros(len(slots), 2, 6)
        return Batch(views, boxes, Key(0, step, torch.tensor(list(slots))), (None, None), {"volume": volume})


class _Store(list):
    @property
    def records(self):
        return list(self)


class Fills(Objective):
    """Hides every second cell along the last axis; fills in what ``answer`` makes of the view."""

    views = 2

    def __init__(self, answer=torch.full_like, value=0.5):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 2))
        self.answer = lambda view: answer(view, value)

    def cells(self, size):
        return tuple(n // CELL for n in size)

    def picture(self, batch):
        where = torch.zeros(len(batch.views[0]), *self.cells(SIZE), dtype=torch.bool)
        where[..., ::2] = True
        masks = batch.targets.get("mask", (where, where))
        hidden = tuple(_repeat(m) for m in masks)
        return {
            "reconstruction": tuple(self.answer(v) for v in batch.views),
            "mask": hidden,
            "drop": hidden,
            "attention": tuple(m.float() for m in masks),
        }

    def forward(self, batch, t):
        return Output({})

    def tokens(self, batch, t=0.0):
        rows = torch.cat(batch.views).flatten(1)[:, :64:4] @ torch.ones(16, 2) * self.weight[0]
        return {"student": rows, "teacher": rows, "prototypes": rows.softmax(1)}


def _repeat(cells):
    for axis in (1, 2, 3):
        cells = cells.repeat_interleave(CELL, axis)
    return cells


@pytest.fixture(scope="session")
def stream():
    return Stream()


@pytest.fixture(scope="session")
def fills():
    return Fills
