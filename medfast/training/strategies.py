"""What ranks do with gradients. Both strategies have the interface of ``Strategy`` and the same checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from medfast.training import optim as optimisation
from medfast.training.distributed import World
from medfast.training.settings import Optim, Train
from medfast.types import Batch, Objective, Output

__all__ = ["AllReduce", "Strategy", "autocast", "read_moments", "write_moments"]

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of a parameter; "step" is 0-dim


class Strategy(Protocol):
    """Forward and backward per micro-batch, one ``step`` after the last of them."""

    def forward(self, batch: Batch, t: Tensor) -> Output: ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of ``loss``, a mean over this micro-batch, added up."""
        ...

    def step(self, lr: float, decay: float, t: float) -> Tensor:
        """Mean gradients over micro-batches and ranks, clip, update; returns the norm before clipping, 0-dim."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state, full and not sharded, as "exp_avg/<parameter>", ... on every rank. Collective."""
        ...

    def load_moments(self, moments: Mapping[str, Tensor]) -> None: ...


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """bf16 arithmetic over fp32 parameters, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


class AllReduce:
    """Gradients are averaged over ranks in one all-reduce per dtype; the rest is plain PyTorch."""

    def __init__(self, objective: Objective, optim: Optim, train: Train, world: World, accumulate: int):
        self.objective, self.optim, self.world, self.accumulate = objective, optim, world, accumulate
        self.precision = train.precision
        self.parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.rules = optimisation.groups(self.parameters, optim)
        self.optimizer = optimisation.adamw(self.parameters, self.rules, optim)

    def forward(self, batch: Batch, t: Tensor) -> Output:
        with autocast(self.precision, self.world.device):
            return self.objective(batch, t)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulate).backward()

    def step(self, lr: float, decay: float, t: float) -> Tensor:
        gradients = self._reduced()
        norm = optimisation.clip(gradients, self.optim.clip)
        optimisation.set_rates(self.optimizer.param_groups, self.rules, lr, decay, t)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _reduced(self) -> list[Tensor]:
        gradients = []
        for parameter in self.parameters.values():
            if parameter.grad is None:  # a parameter idle on this rank alone must still take part in the sum
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self.world.size > 1:
            for dtype in {g.dtype for g in gradients}:
                same = [g for g in gradients if g.dtype == dtype]
                flat = self.world.total(_flatten_dense_tensors(same)).div_(self.world.size)
                torch._foreach_copy_(same, _unflatten_dense_tensors(flat, same))
        return gradients

    def moments(self) -> dict[str, Tensor]:
        return read_moments(self.optimizer, self.parameters)

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        write_moments(self.optimizer, self.parameters, moments)


def read_moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """``Strategy.moments`` of an AdamW that holds whole parameters."""
    state = optimizer.state
    return {f"{kind}/{name}": state[p][kind] for name, p in parameters.items() for kind in MOMENTS if p in state}


def write_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], moments: Mapping[str, Tensor]
) -> None:
    """Undo ``read_moments``; KeyError names what is missing."""
    for name, p in parameters.items():
        first, second, step = (moments[f"{kind}/{name}"] for kind in MOMENTS)
        optimizer.state[p] = {
            "step": step.clone(),
            "exp_avg": first.to(p, copy=True),
            "exp_avg_sq": second.to(p, copy=True),
        }
