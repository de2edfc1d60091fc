"""Fixed crops under fixed masks: what validation and the report judge a model by.

They are the same for every run on the same store whose data section cuts held-out volumes alike (size, window, parent,
zoom, foreground, rotate, flip, plain_holdout, holdout): neither the run's seed nor its batch matters, and no intensity
change touches the target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

import medfast_kernels as mk
from medfast.types import Batch, Key, Objective

__all__ = ["AT_ONCE", "HIDDEN", "HOLDOUT_BATCH", "HOLDOUT_SEED", "crops", "with_masks"]

# What a held-out stream is opened with in place of train.seed and train.batch, on which its crops would depend.
HOLDOUT_SEED, HOLDOUT_BATCH = 0x686F6C64, 8
AT_ONCE = 2  # crops of a forward: the same on any number of ranks
HIDDEN = 0.7  # share of cells, whatever the objective's own masks hide, so that runs can be compared
_KEY = 0x76616C6964  # of the masks; no run's seed changes them


def crops(holdout, count: int, micro: int) -> Iterator[Batch]:
    """The first ``count`` samples of a held-out stream, in order of (step, slot), at most ``micro`` at a time."""
    for step in range(math.ceil(count / holdout.batch_size)):
        slots = list(range(min(holdout.batch_size, count - step * holdout.batch_size)))
        for first in range(0, len(slots), micro):
            yield holdout.batch(step, slots[first : first + micro])


def with_masks(objective: Objective, batch: Batch) -> Batch:
    """The batch with one random mask per view in ``targets``, drawn from step, slot and view alone.

    As it is where the objective takes no masks. Views and masks are on the batch's device.
    """
    masks = []
    for view, volume in enumerate(batch.views):
        cells = objective.cells(tuple(volume.shape[2:]))
        if cells is None:
            return batch
        sample = batch.key.sample
        key = Key(_KEY, batch.key.step, sample).at(mk.Role.MASK, view=view)
        n = math.prod(cells)
        hidden = mk.random_ids(n, round(HIDDEN * n), key=key, device=volume.device)
        where = torch.zeros(len(volume), n, dtype=torch.bool, device=volume.device).scatter(1, hidden, True)
        masks.append(where.unflatten(1, cells))
    return replace(batch, targets={**batch.targets, "mask": tuple(masks)})
