"""Ranks: who we are, one sum over all, and an orderly end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["World", "world"]


@dataclass(frozen=True)
class World:
    """rank, size: of this process among all. device: where this rank computes."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, x: Tensor) -> Tensor:
        """Sum of ``x`` over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def agree(self, value: object) -> None:
        """ValueError unless ``value`` is the same on all ranks."""
        if self.size > 1:
            values: list[object] = [None] * self.size
            dist.all_gather_object(values, value)
            if any(v != values[0] for v in values):
                raise ValueError(f"ranks differ where they must not: {values}")

    def share(self, value: object) -> object:
        """Rank 0's ``value``, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def world() -> Iterator[World]:
    """The process group of RANK and WORLD_SIZE (set by torchrun), or of one process; gloo on CPU, NCCL on GPUs.

    A group that is there already is used, and left to its owner: DeepSpeed keeps groups of its own, so several runs in
    one process need one group around them. Left in order it ends with a barrier; without one a third of CPU launches
    abort on exit.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if cuda:
        torch.cuda.set_device(device)
    if owned := not dist.is_initialized():
        _join(backend)
    here = World(dist.get_rank(), dist.get_world_size(), device)
    try:
        yield here
        here.barrier()
    finally:
        if owned:
            dist.destroy_process_group()


def _join(backend: str) -> None:
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
