"""Ranks: who we are, one sum over all, and an orderly end."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from medfast.training import launch
from medfast.training.rendezvous import join

__all__ = ["World", "world"]

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


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

    def bounds(self, numel: int) -> tuple[int, int]:
        """(begin, end) of this rank's elements of a flat tensor: ceil(numel / size) a rank in order of rank, the last
        ones fewer. It is where ZeRO-3 cuts a parameter."""
        each = -(-numel // self.size)
        return min(self.rank * each, numel), min((self.rank + 1) * each, numel)

    def piece(self, x: Tensor) -> Tensor:
        """This rank's elements of ``x``, contiguous and the same on all ranks: a view, (end - begin,)."""
        begin, end = self.bounds(x.numel())
        return x.detach().view(-1)[begin:end]

    def unite(self, pieces: Sequence[Tensor], numels: Sequence[int]) -> list[Tensor]:
        """The flat tensors (numel,) that ``pieces``, one ``piece`` of each, are cut from; one all-gather, collective.

        All are of one dtype and on one device.
        """
        if self.size == 1:
            return list(pieces)
        lengths = [-(-numel // self.size) for numel in numels]
        mine = pieces[0].new_zeros(sum(lengths))
        for place, piece in zip(mine.split(lengths), pieces, strict=True):
            place[: piece.numel()] = piece
        found = mine.new_empty(self.size, len(mine))
        _all_gather(found.view(-1), mine)
        columns = found.split(lengths, dim=1)
        return [column.reshape(-1)[:numel] for column, numel in zip(columns, numels, strict=True)]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def agree(self, what: str, value: str) -> None:
        """ValueError naming ``what`` unless ``value`` is rank 0's on all ranks."""
        if value != self.share(value):
            raise ValueError(
                f"rank {self.rank} differs from rank 0 in {what}; do all ranks run the same code and files?"
            )

    def share(self, text: str, rank: int = 0) -> str:
        """One rank's ``text``, on every rank. Sent as bytes: torch's object collectives unpickle what they receive."""
        if self.size == 1:
            return text
        sent = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor([len(sent)], device=self.device)
        dist.broadcast(length, src=rank)
        if self.rank != rank:
            sent = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        dist.broadcast(sent, src=rank)
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
def world(limit: float = 0.0) -> Iterator[World]:
    """The process group of RANK and WORLD_SIZE (set by torchrun, DeepSpeed's launcher, or as srun's tasks have it), or
    of one process; gloo on CPU, NCCL on GPUs.

    limit: seconds after which ranks that have not come are named in a ``RankLost``, 0 for half an hour. A group that is
    there already is used, and left to its owner: DeepSpeed keeps groups of its own, so several runs in
    one process need one group around them. Left in order it ends with a barrier; without one a third of CPU launches
    abort on exit.
    """
    os.environ.update(launch.ranks(os.environ))
    cuda = torch.cuda.is_available()
    device = _gpu(torch.cuda.device_count()) if cuda else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if cuda:
        torch.cuda.set_device(device)
    if owned := not dist.is_initialized():
        _join(backend, limit)
    here = World(dist.get_rank(), dist.get_world_size(), device)
    try:
        yield here
        here.barrier()
    finally:
        if owned:
            dist.destroy_process_group()


def _gpu(count: int) -> torch.device:
    """This rank's of the ``count`` GPUs that it sees; DeepSpeed reads LOCAL_RANK as well. ValueError without one."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if count == 1 and "SLURM_LOCALID" in os.environ:  # --gpus-per-task shows each task its own GPU alone, as number 0
        local = 0
    if local >= count:
        raise ValueError(
            f"LOCAL_RANK={local}, but this rank sees {count} GPUs: start at most {count} ranks on a node, or let the "
            "job have more GPUs (SLURM: --gpus-per-node as large as --ntasks-per-node)"
        )
    os.environ["LOCAL_RANK"] = str(local)
    return torch.device("cuda", local)


def _join(backend: str, limit: float) -> None:
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        join(backend, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), limit)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
