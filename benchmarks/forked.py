"""Ranks as forks of one process: what takes long to import is imported once, and many groups follow one another."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import deepspeed  # noqa: F401  the import that takes long
import torch
import torch.distributed as dist

from medfast.training.distributed import World


def together(size: int, work: Path, task: Callable[[World], None]) -> None:
    """``task`` on ``size`` ranks, forks of this process, with gloo; exits where one fails. work: where files may go."""
    meeting, ids = tempfile.mktemp(dir=work), []
    for rank in range(size):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
                dist.init_process_group("gloo", store=dist.FileStore(meeting, size), rank=rank, world_size=size)
                task(World(rank, size, torch.device("cpu")))
                dist.barrier()
                dist.destroy_process_group()
                code = 0
            finally:
                if code:
                    traceback.print_exc()
                sys.stderr.flush()
                os._exit(code)
        ids.append(pid)
    if any([os.waitpid(pid, 0)[1] for pid in ids]):
        sys.exit(f"a rank of {size} failed")
