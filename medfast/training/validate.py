"""The validation loss: the objective itself on fixed held-out crops under fixed masks, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

import medfast_kernels as mk
from medfast.objectives.gauges import collapse_gauges
from medfast.training.distributed import World
from medfast.training.settings import Train
from medfast.training.strategies import autocast
from medfast.types import Batch, Key, Objective

__all__ = ["crops", "validate"]

AT_ONCE = 2  # crops of a forward: the same on any number of ranks, and fits where a run fits
HIDDEN = 0.7  # share of cells, whatever the objective's own masks hide, so that runs can be compared
_KEY = 0x76616C6964  # of the masks; no run's seed changes them


def crops(holdout, count: int) -> Iterator[Batch]:
    """The first ``count`` held-out samples, in order of (step, slot), a few at a time."""
    for step in range(math.ceil(count / holdout.batch_size)):
        slots = list(range(min(holdout.batch_size, count - step * holdout.batch_size)))
        for first in range(0, len(slots), AT_ONCE):
            yield holdout.batch(step, slots[first : first + AT_ONCE])


def with_masks(objective: Objective, batch: Batch) -> Batch:
    """The batch with one random mask per view in ``targets``, drawn from the crop's number alone."""
    masks = []
    for view, volume in enumerate(batch.views):
        cells = objective.cells(tuple(volume.shape[2:]))
        if cells is None:
            return batch
        key = Key(_KEY, batch.key.step, batch.key.sample).at(mk.Role.MASK, view=view)
        n = math.prod(cells)
        hidden = mk.random_ids(n, round(HIDDEN * n), key=key)
        masks.append(torch.zeros(len(volume), n, dtype=torch.bool).scatter(1, hidden, True).unflatten(1, cells))
    return replace(batch, targets={**batch.targets, "mask": tuple(masks)})


@torch.no_grad()
def validate(
    objective: Objective, holdout, train: Train, t: float, world: World
) -> tuple[dict[str, float], dict[str, float]]:
    """(mean losses over the crops, collapse gauges of the first of them); no drop path, nothing is changed."""
    losses: dict[str, Tensor] = {}
    gauges: dict[str, Tensor] = {}
    clock = torch.tensor(t, dtype=torch.float64, device=world.device)
    training = objective.training
    objective.eval()
    for batch in crops(holdout, train.validate_crops):
        batch = with_masks(objective, batch).to(world.device, torch.float64 if train.precision == "fp64" else None)
        with autocast(train.precision, world.device):
            found = objective(batch, clock).losses
            if not gauges and hasattr(objective, "tokens"):
                gauges = collapse_gauges(objective.tokens(batch))
        for name, loss in found.items():
            losses[name] = losses.get(name, 0.0) + loss.double() * (len(batch.views[0]) / train.validate_crops)
    objective.train(training)
    mean = {name: value.item() for name, value in losses.items()}
    return {**mean, "total": math.fsum(mean.values())}, {name: value.item() for name, value in gauges.items()}
