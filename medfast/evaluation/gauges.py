"""What collapse gauges would read for a collapsed and for a random model, measured beside the model itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medfast.objectives.gauges import gathered, watched
from medfast.types import Batch, Objective

__all__ = ["Gauge", "gauges_of", "recentre", "shuffled", "uniform_losses"]

# What has no reference to be held against: a scale that is the model's own, a spread, a count
_ALONE = ("teacher_norm", "head_entropy_spread", "rows")
_SETTLE = 1000  # updates of the centres: at a momentum of .99, 4e-5 of where they started is left


@dataclass(frozen=True)
class Gauge:
    """One gauge. value: of the model; collapsed, random: what such models show; ceiling: the largest possible value."""

    value: float
    collapsed: float
    random: float
    ceiling: float


def shuffled(objective: Objective, seed: int = 0) -> Objective:
    """A copy in which each weight tensor, the teacher's too, has its own numbers in random order.

    It keeps the scale of every layer and nothing of what was learned, so it stands for a random model at any time, once
    its centres are its own (``recentre``).
    """
    twin = copy.deepcopy(objective)
    generator = torch.Generator().manual_seed(seed)
    tensors = list(twin.parameters())
    if twin.teacher is not None:
        tensors += [x for x in twin.teacher.state().values() if x.is_floating_point()]
    with torch.no_grad():
        for tensor in tensors:
            order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
            tensor.copy_(tensor.flatten()[order].view_as(tensor))
    return twin


@torch.no_grad()
def recentre(objective: Objective, batches: Sequence[Batch], t: float) -> None:
    """Move the centres of the teacher's logits to where they settle if these batches are all there is."""
    objective.eval()
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in batches:
        clock = torch.tensor(t, dtype=torch.float64, device=batch.views[0].device)
        for name, (total, count) in objective(batch, clock).sums.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + total, before[1] + count)
    for _ in range(_SETTLE):
        objective.absorb(sums)


def gauges_of(objective: Objective, batches: Sequence[Batch], t: float) -> dict[str, Gauge]:
    """The gauges of ``objective`` on ``batches`` at time t of the run that have references, with these.

    {} where the objective shows nothing.
    """
    objective.eval()
    values = watched(objective, batches, t)
    if not values:
        return {}
    tokens, used = gathered(objective, batches, t)
    ceilings = _ceilings(tokens)
    twin = shuffled(objective)
    recentre(twin, batches[:used], t)
    random = watched(twin, batches, t)
    return {
        name: Gauge(
            value=float(value),
            collapsed=1.0 if name.startswith("rank") or name == "position_similarity" else 0.0,
            random=float(random[name]),
            ceiling=ceilings.get(name, 1.0),
        )
        for name, value in values.items()
        if name not in _ALONE
    }


def uniform_losses(objective: Objective) -> dict[str, float]:
    """What each distillation term costs while the student holds all K prototypes equally likely: weight x ln K.

    {} where the objective centres no prototypes.
    """
    centres, weights = getattr(objective, "centres", None), getattr(objective, "weights", {})
    if centres is None:
        return {}
    return {name: weights[name] * math.log(len(centre)) for name, centre in centres.named_buffers()}


def _ceilings(tokens: dict[str, Tensor]) -> dict[str, float]:
    ceilings = {f"rank_{part}": float(min(x.shape)) for part, x in tokens.items() if part != "crops"}
    if "prototypes" in tokens:
        rows, prototypes = tokens["prototypes"].shape
        ceilings |= dict.fromkeys(("entropy_used", "entropy_each"), math.log(prototypes))
        ceilings["information"] = math.log(min(rows, prototypes))  # rows cannot tell more than which of them it is
    if "crops" in tokens:
        crop = int(torch.bincount(tokens["crops"]).max())
        ceilings["information_within"] = math.log(min(crop, tokens["prototypes"].shape[1]))
    return ceilings
