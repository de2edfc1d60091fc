"""What ranks do with gradients. Both strategies have the interface of ``Strategy`` and the same checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from medfast.training import optim as optimisation
from medfast.training.distributed import World
from medfast.training.ema import averaging
from medfast.training.settings import Optim, Train
from medfast.types import Batch, Objective, Output

__all__ = ["AllReduce", "Strategy", "autocast", "products", "read_moments", "write_moments"]

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of a parameter; "step" is 0-dim


class Strategy(Protocol):
    """Forward and backward per micro-batch, one ``step`` after the last of them."""

    def forward(self, batch: Batch, t: Tensor) -> Output: ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of ``loss``, a mean over this micro-batch, added up."""
        ...

    def step(self, lr: float, decay: float, t: float) -> Tensor:
        """Mean gradients over micro-batches and ranks, clip, update; returns the norm before clipping, 0-dim.

        Where that norm is not finite nothing is updated, neither parameters nor moments, and the gradients are gone.
        """
        ...

    def teach(self, momentum: float) -> None:
        """Average the student into the teacher, once per optimizer step. Collective."""
        ...

    def contents(self) -> dict[str, dict[str, Tensor]]:
        """The parts "student", "teacher" and, as "exp_avg/<parameter>", ..., "optimizer", not sharded, complete on
        rank 0. Collective."""
        ...

    def whole(self) -> AbstractContextManager[Objective]:
        """The objective with all of its parameters, for what is no training step. Collective."""
        ...

    def load_moments(self, moments: Mapping[str, Tensor]) -> None: ...

    def close(self) -> None:
        """Let go of the objective, which another strategy is to take over after a rollback."""
        ...


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """bf16 arithmetic over fp32 parameters, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def products(precision: str) -> Iterator[None]:
    """How fp32 matrices are multiplied, ``torch.set_float32_matmul_precision``; as before at the end."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class AllReduce:
    """Gradients are averaged over ranks in one all-reduce per dtype; the rest is plain PyTorch."""

    def __init__(self, objective: Objective, optim: Optim, train: Train, world: World, accumulate: int):
        self.objective, self.optim, self.world, self.accumulate = objective, optim, world, accumulate
        self.precision = train.precision
        self.parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.rules = optimisation.groups(self.parameters, optim)
        self.optimizer = optimisation.adamw(self.parameters, self.rules, optim)
        self.average = averaging(objective, train, world, world.piece, cut=False)

    def forward(self, batch: Batch, t: Tensor) -> Output:
        with autocast(self.precision, self.world.device):
            return self.objective(batch, t)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulate).backward()

    def step(self, lr: float, decay: float, t: float) -> Tensor:
        gradients = self._reduced()
        norm = optimisation.clip(gradients, self.optim.clip)
        optimisation.set_rates(self.optimizer.param_groups, self.rules, lr, decay, t)
        if norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def teach(self, momentum: float) -> None:
        if self.average is not None:
            self.average.update(momentum)

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

    def contents(self) -> dict[str, dict[str, Tensor]]:
        student = {name: p.detach() for name, p in self.objective.named_parameters()}
        teacher = {} if self.average is None else self.average.state()
        return {"student": student, "teacher": teacher, "optimizer": read_moments(self.optimizer, self.parameters)}

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        write_moments(self.optimizer, self.parameters, moments)

    def whole(self) -> AbstractContextManager[Objective]:
        return nullcontext(self.objective)

    def close(self) -> None: ...


def read_moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """``Strategy.contents()["optimizer"]`` of an AdamW that holds whole parameters."""
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
