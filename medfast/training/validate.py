"""The validation loss: the objective itself on fixed held-out crops under fixed masks, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from medfast.objectives.gauges import watched
from medfast.objectives.held_out import crops, with_masks
from medfast.training.distributed import World
from medfast.training.settings import Train
from medfast.training.strategies import autocast
from medfast.types import Batch, Objective

__all__ = ["validate"]

AT_ONCE = 2  # crops of a forward: the same on any number of ranks, and fits where a run fits


@torch.no_grad()
def validate(
    objective: Objective, holdout, train: Train, t: float, world: World
) -> tuple[dict[str, float], dict[str, float]]:
    """(mean losses over the crops, gauges of the first of them that are enough); no drop path, nothing is changed."""

    def batches() -> Iterator[Batch]:
        precision = torch.float64 if train.precision == "fp64" else None
        for batch in crops(holdout, train.validate_crops, AT_ONCE):
            yield with_masks(objective, batch).to(world.device, precision)

    losses: dict[str, Tensor] = {}
    clock = torch.tensor(t, dtype=torch.float64, device=world.device)
    training = objective.training
    objective.eval()
    for batch in batches():
        with autocast(train.precision, world.device):
            found = objective(batch, clock).losses
        for name, loss in found.items():
            losses[name] = losses.get(name, 0.0) + loss.double() * (len(batch.views[0]) / train.validate_crops)
    with autocast(train.precision, world.device):
        gauges = watched(objective, batches(), t)
    objective.train(training)
    mean = {name: value.item() for name, value in losses.items()}
    read = {name: value.item() for name, value in gauges.items()}
    finite = {name: value for name, value in read.items() if math.isfinite(value)}  # JSON has no others
    return {**mean, "total": math.fsum(mean.values())}, finite
