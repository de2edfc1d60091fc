"""One optimizer step: micro-batches, update, centres, teacher, in that order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from medfast.training.distributed import World
from medfast.training.optim import rates
from medfast.training.settings import Optim, Train
from medfast.training.strategies import Strategy
from medfast.types import Batch, Objective, Output

__all__ = ["Diverged", "train_step"]


class Diverged(RuntimeError):
    """A loss or gradient is not finite; nothing was saved since."""


class _Tally:
    """Outputs of a step's micro-batches, added up."""

    def __init__(self):
        self.values: dict[tuple[str, str], Tensor] = {}
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, output: Output) -> None:
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

    def reduced(self, here: World, accumulate: int, stop: bool) -> tuple[dict[str, dict[str, float]], bool]:
        """Means over micro-batches and ranks, and whether any rank wants to stop; ``sums`` become those of all ranks.

        One all-reduce in fp64 and one wait for the device; the norm, known after the update only, is the other wait.
        """
        flag = torch.tensor(float(stop), dtype=torch.float64, device=here.device)
        scalars = torch.stack([*self.values.values(), flag])
        pieces = [x for pair in self.sums.values() for x in pair]
        whole = here.total(torch.cat([scalars, *(x.flatten().double() for x in pieces)]))
        scalars, *flat = whole.split([len(scalars), *(x.numel() for x in pieces)])
        pieces = [new.view(x.shape).to(x.dtype) for new, x in zip(flat, pieces, strict=True)]
        self.sums = dict(zip(self.sums, zip(pieces[::2], pieces[1::2], strict=True), strict=True))
        *means, wish = scalars.tolist()
        found: dict[str, dict[str, float]] = {"loss": {}, "gauge": {}}
        for (kind, name), value in zip(self.values, means, strict=True):
            found[kind][name] = value / (here.size * accumulate)
        return found, wish > 0


def train_step(
    objective: Objective, strategy: Strategy, batches: Iterator[Batch], step: int, train: Train, optim: Optim,
    here: World, accumulate: int, stop: bool,
) -> tuple[dict[str, Any], bool]:  # fmt: skip
    """Take the next ``accumulate`` batches and update once: (row of metrics, whether some rank was told to stop).

    Everything that follows a schedule is a function of t = step / steps alone. Raises Diverged.
    """
    t = step / train.steps
    clock = torch.tensor(t, dtype=torch.float64, device=here.device)
    tally = _Tally()
    for _ in range(accumulate):
        output = strategy.forward(next(batches), clock)
        strategy.backward(torch.stack(list(output.losses.values())).sum())
        tally.add(output)
    means, stop = tally.reduced(here, accumulate, stop)
    _finite(step, means["loss"])
    lr, decay = rates(optim, t)
    norm = strategy.step(lr, decay, t).item()
    _finite(step, {"gradient norm": norm})
    objective.absorb(tally.sums)
    momentum = None
    if objective.teacher is not None:
        momentum = float(objective.momentum(t))
        objective.teacher.update({**dict(objective.named_parameters()), **dict(objective.named_buffers())}, momentum)
    row = {"step": step, **means, "total": math.fsum(means["loss"].values()), "lr": lr, "weight_decay": decay,
           "momentum": momentum, "grad_norm": norm}  # fmt: skip
    return row, stop


def _finite(step: int, values: dict[str, float]) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        told = ", ".join(f"{name} = {value:.6g}" for name, value in values.items())
        raise Diverged(f"step {step}: {', '.join(bad)} is not finite ({told}). Lower optim.lr, or set optim.clip")
