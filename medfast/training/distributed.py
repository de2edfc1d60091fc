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

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """``medfast.types.Gather`` over all ranks: gradients of what each of them makes of a row are added up.

        rows: (b, ...), as many on every rank. Collective, in the backward pass too.
        """
        if self.size == 1:
            return rows, 0
        whole: Tensor = _Gathered.apply(rows, self.rank, self.size)  # type: ignore[assignment]
        return whole, self.rank * len(rows)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def agree(self, what: str, value: str) -> None:
        """ValueError naming ``what`` unless ``value`` is rank 0's on all ranks."""
        if value != self.share(value):
            raise ValueError(
                f"rank {self.rank} differs from rank 0 in {what}; do all ranks run the same code and files?"
            )

    def share(self, text: str) -> str:
        """Rank 0's ``text``, on every rank. Sent as bytes: torch's object collectives unpickle what they receive."""
        if self.size == 1:
            return text
        sent = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor([len(sent)], device=self.device)
        dist.broadcast(length, src=0)
        if not self.first:
            sent = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        dist.broadcast(sent, src=0)
        return bytes(sent.tolist()).decode()


class _Gathered(torch.autograd.Function):
    """Rows of all ranks, concatenated in order of rank."""

    @staticmethod
    def forward(ctx, rows: Tensor, rank: int, size: int) -> Tensor:
        ctx.rank, ctx.size = rank, size
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(size)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        whole = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole)
        return whole.chunk(ctx.size)[ctx.rank], None, None


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
