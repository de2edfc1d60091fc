"""The teacher's average of the student: whole on every rank, or in pieces beside the pieces of the student.

An average is taken element by element, so pieces cut where the student's are give the bits that the whole gives, and
need no communication. Forward passes never meet pieces: they see a whole replica, filled once per optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from medfast.training.distributed import World
from medfast.training.settings import Train
from medfast.types import Objective, Teacher

__all__ = ["LARGE", "Average", "Replicated", "Sharded", "averaging"]

LARGE = 100_000_000  # parameters of the teacher from which it is cut by default: 0.4 GB in fp32
BUCKET = 1 << 26  # elements that are gathered at a time
_ROUNDED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Average(Protocol):
    """Keeps an objective's teacher."""

    def update(self, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, once per optimizer step. Collective."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The teacher in full precision by canonical name, complete on rank 0. Collective."""
        ...


def averaging(
    objective: Objective, train: Train, here: World, piece: Callable[[nn.Parameter], Tensor], cut: bool
) -> Average | None:
    """The average that ``train.teacher`` asks for, None without a teacher, which holds the student's start already.

    piece: this rank's elements of a student's parameter, as ``World.piece`` cuts them. cut: no rank holds more of the
    student than that (ZeRO-3), so that the average can only be taken of pieces.
    """
    teacher = objective.teacher
    if teacher is None:
        return None
    numel = sum(p.numel() for p in teacher.parameters())
    saves = here.size > 1 and train.precision == "bf16"  # else a replica is as large as the average
    sharded = numel >= LARGE and saves if train.teacher == "auto" else train.teacher == "sharded"
    if not (sharded or cut):
        return Replicated(objective, teacher)
    return Sharded(objective, teacher, here, piece, torch.bfloat16 if sharded and train.precision == "bf16" else None)


class Replicated:
    """The objective's teacher is the average."""

    def __init__(self, objective: Objective, teacher: Teacher):
        self.objective, self.teacher = objective, teacher

    def update(self, momentum: float) -> None:
        student = {**dict(self.objective.named_parameters()), **dict(self.objective.named_buffers())}
        self.teacher.update(student, momentum)

    def state(self) -> dict[str, Tensor]:
        return self.teacher.state()


class Sharded:
    """Every rank averages its piece in full precision; the objective's teacher becomes a replica for forward passes.

    dtype: of the replica's weights that autocast rounds to it in every forward pass anyway, those of linear layers and
    convolutions, so that the teacher says the same bit for bit; the others stay as they are. None: nothing is rounded.
    """

    def __init__(
        self, objective: Objective, teacher: Teacher, here: World, piece: Callable[[nn.Parameter], Tensor],
        dtype: torch.dtype | None,
    ):  # fmt: skip
        self.objective, self.teacher, self.here, self.piece = objective, teacher, here, piece
        self.master = {name: here.piece(p).clone() for name, p in teacher.named_parameters()}
        if dtype is not None:
            for module in teacher.modules():
                if type(module) in _ROUNDED:
                    module.weight.data = module.weight.data.to(dtype)
        self.buckets = list(_buckets(dict(teacher.named_parameters())))

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        student = dict(self.objective.named_parameters())
        pieces = [self.piece(student[name]).to(mine.dtype) for name, mine in self.master.items()]
        torch._foreach_lerp_(list(self.master.values()), pieces, 1.0 - momentum)
        replica = dict(self.teacher.named_parameters())
        for names in self.buckets:
            ready = [self.master[name].to(replica[name].dtype) for name in names]
            for name, flat in zip(names, self.here.unite(ready, [replica[n].numel() for n in names]), strict=True):
                replica[name].view(-1).copy_(flat)
        for name, buffer in self.teacher.named_buffers():
            buffer.copy_(self.objective.get_buffer(name))

    def state(self) -> dict[str, Tensor]:
        shapes = {name: p.shape for name, p in self.teacher.named_parameters()}
        whole = {}
        for name, shape in shapes.items():
            flat = self.here.unite([self.master[name]], [shape.numel()])[0]
            if self.here.first:
                whole[name] = flat.view(shape).cpu()
        return {**whole, **dict(self.teacher.named_buffers())}


def _buckets(parameters: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of parameters of one dtype, in runs of about ``BUCKET`` elements."""
    for dtype in sorted({p.dtype for p in parameters.values()}, key=str):
        names: list[str] = []
        held = 0
        for name, p in parameters.items():
            if p.dtype == dtype:
                names.append(name)
                held += p.numel()
            if held >= BUCKET:
                yield names
                names, held = [], 0
        if names:
            yield names
