"""Groups of samples: what is told from what, and what is normalised together.

A group is a run of consecutive global slots of a fixed size, gathered from all ranks with gradient, so a loss does not
depend on the number of ranks or on accumulation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import medfast_kernels as mk
from medfast.types import Gather, Objective, alone


class Share(NamedTuple):
    """members: (size, ...) of a group, of which this rank has ``count`` from number ``first`` on."""

    members: Tensor
    first: int
    count: int

    @property
    def own(self) -> Tensor:
        return self.members[self.first : self.first + self.count]


class Groups(NamedTuple):
    """size: samples of a group; 0: all that are shown are one. gather: see ``medfast.types.Gather``."""

    size: int
    gather: Gather

    def shares(self, rows: Tensor) -> list[Share]:
        """The groups that this rank has a part of. rows: (b, ...), a sample each, in order of their slots.

        Nothing is gathered where micro-batches are whole groups. ValueError where those of all ranks are not.
        """
        size = self.size or len(rows)
        whole, begin = (rows, 0) if len(rows) % size == 0 else self.gather(rows)
        if len(whole) % size:
            raise ValueError(
                f"objective.group={size} samples are taken together, so the micro-batches of all ranks must be a "
                f"multiple of it, and these are {len(whole)}: change objective.group, train.batch or train.micro"
            )
        end = begin + len(rows)
        return [
            Share(whole[at : at + size], max(begin - at, 0), min(end, at + size) - max(begin, at))
            for at in range(begin // size * size, end, size)
        ]


def groups_of(objective: Objective) -> Groups:
    """The groups that ``objective.group`` asks for; in validation, which shows two crops at a time, one of all."""
    return Groups(objective.group, objective.gather) if objective.training else Groups(0, alone)


def group_size(group: int) -> int:
    """``group``, checked."""
    if group < 1:
        raise ValueError(f"group, the number of samples that are taken together, must be at least 1, got {group}")
    return group


def by_sample(x: Tensor, views: int = 2) -> Tensor:
    """(views * b, ...), view after view, as (b, views, ...)."""
    return x.unflatten(0, (views, -1)).transpose(0, 1)


def token_contrast(
    z: Tensor,
    groups: Groups,
    temperature: float,
    weight: float = 1.0,
    weight_mode: str = "exp",
    volume: Tensor | None = None,
) -> Tensor:
    """``medfast_kernels.token_contrast`` within each group, mean over the tokens of this rank's samples.

    z: (2 * b, positions, dim) L2-normalised, view after view. volume: (b,) ids of volumes, or None where all differ.
    """
    shares = groups.shares(by_sample(z))
    ids = [None] * len(shares) if volume is None else [share.members for share in groups.shares(volume)]
    losses = [
        (2 * share.count / len(z))
        * mk.token_contrast(
            share.members.transpose(0, 1), temperature=temperature, weight=weight, weight_mode=weight_mode, volume=same,
            anchors=(share.first, share.count),
        )
        for share, same in zip(shares, ids, strict=True)
    ]  # fmt: skip
    return torch.stack(losses).sum()


def nt_xent(z: Tensor, groups: Groups, temperature: float) -> Tensor:
    """NT-Xent over the 2 * size views of each group, mean over this rank's views (SimCLR, Chen et al. 2020, eq. 1).

    z: (2 * b, dim) L2-normalised vectors, view after view.
    """
    return token_contrast(z.unsqueeze(1), groups, temperature)
