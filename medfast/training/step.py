"""One optimizer step: micro-batches, update, centres, teacher, in that order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from medfast.objectives.gauges import equal_views
from medfast.training.distributed import World
from medfast.training.job import Job
from medfast.training.log import finite
from medfast.training.optim import rates
from medfast.training.strategies import Strategy
from medfast.types import Batch, Objective, Output

__all__ = ["steady", "train_step", "usable"]

INPUT = "the input"


class _Tally:
    """Outputs of a step's micro-batches, added up."""

    def __init__(self):
        self.values: dict[tuple[str, str], Tensor] = {}
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.odd: list[Tensor] = []  # of each micro-batch: is its input, is a loss of it, not finite

    def add(self, output: Output, fine: Tensor) -> None:
        self.odd.append(torch.stack([~fine, *(~x.detach().isfinite() for x in output.losses.values())]))
        for kind, scalars in (("loss", output.losses), ("gauge", output.gauges)):
            for name, value in scalars.items():
                before = self.values.get((kind, name))
                value = value.detach().double()
                self.values[kind, name] = value if before is None else before + value
        for name, (sum_, count) in output.sums.items():
            before = self.sums.get(name)
            pair = sum_.detach(), torch.as_tensor(count, device=sum_.device).detach()
            self.sums[name] = (pair[0].clone(), pair[1].clone()) if before is None else (
                before[0] + pair[0], before[1] + pair[1]
            )  # fmt: skip

    def reduced(
        self, here: World, wishes: tuple[bool, ...]
    ) -> tuple[dict[str, dict[str, float]], list[str], tuple[bool, ...]]:
        """Means over micro-batches and ranks, what is not finite and on which rank, and whether any rank has each wish;
        ``sums`` become those of all ranks.

        One all-reduce in fp64 and one wait for the device; the norm of the gradient is the other wait.
        """
        flags = torch.tensor(wishes, dtype=torch.float64, device=here.device)
        odd = torch.zeros(here.size, len(self.odd), len(self.odd[0]), dtype=torch.float64, device=here.device)
        odd[here.rank] = torch.stack(self.odd)
        pieces = [torch.stack([*self.values.values()]), flags, odd, *(x for pair in self.sums.values() for x in pair)]
        whole = here.total(torch.cat([x.flatten().double() for x in pieces]))
        found = [new.view(x.shape).to(x.dtype)
                 for new, x in zip(whole.split([x.numel() for x in pieces]), pieces, strict=True)]  # fmt: skip
        self.sums = dict(zip(self.sums, zip(found[3::2], found[4::2], strict=True), strict=True))
        means: dict[str, dict[str, float]] = {"loss": {}, "gauge": {}}
        for (kind, name), value in zip(self.values, found[0].tolist(), strict=True):
            means[kind][name] = value / (here.size * len(self.odd))
        names = [INPUT, *means["loss"]]
        faults = [f"{names[term]} of rank {rank}, micro-batch {micro}"
                  for rank, micro, term in found[2].nonzero().tolist()]  # fmt: skip
        return means, faults, tuple(flag > 0 for flag in found[1].tolist())


def train_step(
    job: Job, strategy: Strategy, batches: Iterator[Batch], step: int, wishes: Callable[[], tuple[bool, ...]]
) -> tuple[dict[str, Any], tuple[bool, ...]]:
    """Take the step's micro-batches and update once: (row of metrics, whether some rank has each of ``wishes``).

    wishes: asked when the step's micro-batches are done.

    Everything that follows a schedule is a function of t = step / steps alone. Where an input, a loss or the gradient
    is not finite on any rank, no rank updates anything, and the row has "skipped", a sentence.
    """
    objective, t = job.objective, step / job.train.steps
    buffers = _buffers(objective)
    clock = torch.tensor(t, dtype=torch.float64, device=job.here.device)
    tally = _Tally()
    for micro in range(job.accumulate):
        job.watch.at(step, "data", micro)
        batch, fine = usable(next(batches))
        job.watch.at(step, "forward", micro)
        output = strategy.forward(batch, clock)
        job.watch.at(step, "backward", micro)
        strategy.backward(_poisoned(torch.stack(list(output.losses.values())).sum(), fine))
        tally.add(replace(output, gauges=output.gauges | equal_views(batch)), fine)
    job.watch.at(step, "reduce")
    means, faults, wished = tally.reduced(job.here, wishes())
    job.watch.at(step, "update")
    lr, decay = rates(job.optim, t)
    norm, momentum = strategy.step(lr, decay, t).item(), None
    if not faults and math.isfinite(norm):
        objective.absorb(tally.sums)
        if objective.teacher is not None:
            momentum = float(objective.momentum(t))
            strategy.teach(momentum)
    total = None if faults else math.fsum(means["loss"].values())
    row = {"step": step, **means, "total": total, "lr": lr, "weight_decay": decay, "momentum": momentum,
           "grad_norm": norm}  # fmt: skip
    if faults or not math.isfinite(norm):
        _put_back(buffers)
        row = {**finite(row), "skipped": f"not finite: {', '.join(faults or ['the gradient'])}"}
    return row, wished


def usable(batch: Batch) -> tuple[Batch, Tensor]:
    """(the batch, whether all numbers of its views and targets are finite, 0-dim bool); where not, they are zeros.

    Zeros, because every rank must go through the same forward and backward pass: others wait for it in collectives.
    """
    given = [x for x in (*batch.views, *(x for per_view in batch.targets.values() for x in per_view))
             if x.is_floating_point()]  # fmt: skip
    fine = torch.stack([x.isfinite().all() for x in given]).all()

    def clean(x: Tensor) -> Tensor:
        return torch.where(fine, x, torch.zeros_like(x)) if x.is_floating_point() else x

    targets = {name: tuple(map(clean, per_view)) for name, per_view in batch.targets.items()}
    return replace(batch, views=tuple(map(clean, batch.views)), targets=targets), fine


@contextmanager
def steady(objective: Objective) -> Iterator[None]:
    """What is done inside leaves buffers (running statistics of batch norm) as they were."""
    before = _buffers(objective)
    try:
        yield
    finally:
        _put_back(before)


def _buffers(objective: Objective) -> list[tuple[Tensor, Tensor]]:
    return [(x, x.clone()) for x in objective.buffers() if x.is_floating_point()]


@torch.no_grad()
def _put_back(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for x, before in buffers:
        x.copy_(before)


def _poisoned(loss: Tensor, fine: Tensor) -> Tensor:
    """The loss, NaN where it or the input is not finite, and its gradient with it: the norm that all ranks take of the
    gradient then says so to every strategy alike, and an infinite loss of finite gradient does not pass."""
    return loss * torch.where(fine & loss.detach().isfinite(), 1.0, math.nan).to(loss.dtype)
