"""What collapse gauges would read for a collapsed and for a random model, measured beside the model itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medfast.objectives.gauges import collapse_gauges
from medfast.types import Batch, Objective

__all__ = ["Gauge", "gauges_of", "shuffled"]


@dataclass(frozen=True)
class Gauge:
    """One gauge. value: of the model; collapsed, random: what such models show; ceiling: the largest possible value."""

    value: float
    collapsed: float
    random: float
    ceiling: float


def shuffled(objective: Objective, seed: int = 0) -> Objective:
    """A copy in which each weight tensor, the teacher's too, has its own numbers in random order.

    It keeps the scale of every layer and nothing of what was learned, so it stands for a random model at any time.
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


def gauges_of(objective: Objective, batches: Sequence[Batch]) -> dict[str, Gauge]:
    """The collapse gauges of ``objective`` on the tokens of all ``batches``, with their references.

    {} where the objective has no ``tokens``.
    """
    tokens = _tokens(objective, batches)
    values = collapse_gauges(tokens)
    random = collapse_gauges(_tokens(shuffled(objective), batches))
    ceilings = _ceilings(tokens)
    return {
        name: Gauge(
            value=float(value),
            collapsed=1.0 if name.startswith("rank") else 0.0,
            random=float(random[name]),
            ceiling=ceilings[name],
        )
        for name, value in values.items()
    }


def _ceilings(tokens: dict[str, Tensor]) -> dict[str, float]:
    ceilings = {f"rank_{part}": float(min(x.shape)) for part, x in tokens.items()}
    if "prototypes" in tokens:
        ceilings |= dict.fromkeys(
            ("entropy_used", "entropy_each", "information"), math.log(tokens["prototypes"].shape[1])
        )
    return ceilings


def _tokens(objective: Objective, batches: Sequence[Batch]) -> dict[str, Tensor]:
    tokens = getattr(objective, "tokens", None)
    if tokens is None:
        return {}
    found = [tokens(batch) for batch in batches]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}
