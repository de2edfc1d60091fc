"""The way of batches from the data pipeline to the objective: which, in which order, on which device."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from medfast.training.distributed import World
from medfast.training.settings import Train
from medfast.types import Batch

__all__ = ["moved", "schedule", "slots"]


def slots(rank: int, ranks: int, train: Train) -> list[list[int]]:
    """Global slots of each micro-batch of a rank in a step: those of all ranks at a time are consecutive, in order of
    rank, so that groups of consecutive slots meet whatever the number of ranks and of micro-batches."""
    _, micro = train.shares(ranks)
    begins = range(rank * micro, train.batch, ranks * micro)
    return [list(range(begin, begin + micro)) for begin in begins]


def schedule(
    first: int, train: Train, here: World, passed: Collection[int] = ()
) -> Iterator[tuple[int, list[int]]]:  # fmt: skip
    """(step, global slots) of this rank's micro-batches from step ``first`` on; none of the steps in ``passed``."""
    for step in range(first, train.steps):
        if step not in passed:
            yield from ((step, found) for found in slots(here.rank, here.size, train))


def moved(batches: Iterable[Batch], train: Train, here: World, seen: deque[Batch] | None = None) -> Iterator[Batch]:
    """Batches on the rank's device, in the run's precision. seen: where they are remembered as they were."""
    cuda = here.device.type == "cuda"
    dtype = torch.float64 if train.precision == "fp64" else None
    for batch in batches:
        if seen is not None:
            seen.append(batch)
        there = (_pinned(batch) if cuda else batch).to(here.device, dtype)
        # a number of Python's would be copied to the device by every draw, and compiled in as a constant
        if cuda or train.compile:
            there = replace(there, key=there.key._replace(step=torch.tensor(there.key.step, device=here.device)))
        yield there


def _pinned(batch: Batch) -> Batch:
    """The batch with its large tensors in page-locked memory, from which a copy to the device does not wait; what the
    data pipeline made on the device (data.device=cuda) is there already."""

    def pin(x: Tensor) -> Tensor:
        return x if x.is_cuda else x.pin_memory()

    return replace(
        batch,
        views=tuple(map(pin, batch.views)),
        valid=tuple(None if x is None else pin(x) for x in batch.valid),
        targets={name: tuple(map(pin, per_view)) for name, per_view in batch.targets.items()},
    )
