"""Commands as processes of their own, forked from this one, which has everything imported already."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

__all__ = ["FORK", "Outcome", "bind", "kill", "run"]

FORK: Any = multiprocessing.get_context("fork")
_POLL_S = 0.02
_PDEATHSIG = 1  # of prctl(2)
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MEDFAST_TRACEBACK")

Command = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Outcome:
    """codes: rank -> exit code, -9 of a process that SIGKILL ended, None of one that had not ended within the limit.
    text: what all ranks printed. seconds: until the last of them had ended."""

    codes: Mapping[int, int | None]
    text: str
    seconds: float


def run(
    command: Command, arguments: Sequence[str], log: Path, limit: float, ranks: int = 1,
    inject: Mapping[int, Callable[[], None]] | None = None, absent: Collection[int] = (), victims: Collection[int] = (),
) -> Outcome:  # fmt: skip
    """Run ``command(arguments)`` in ``ranks`` processes and wait for them.

    inject: rank -> what is done in its process first. absent: ranks that are never started. victims: ranks that nobody
    waits for, as they are made to hang. Whatever is left after the others have ended, or after ``limit`` seconds, is
    killed, as a launcher would do.
    """
    begin, port = time.monotonic(), _free_port()
    processes = {}
    for rank in sorted({*range(ranks)} - {*absent}):
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in where.items()} if ranks > 1 else {}
        file = log.with_name(f"{log.name}.{rank}")
        file.write_bytes(b"")
        act = (inject or {}).get(rank)
        processes[rank] = FORK.Process(target=_child, args=(command, list(arguments), file, environment, act))
        processes[rank].start()
    try:
        waited = [process for rank, process in processes.items() if rank not in victims]
        while any(process.is_alive() for process in waited) and time.monotonic() - begin < limit:
            time.sleep(_POLL_S)
        codes = {rank: process.exitcode for rank, process in processes.items()}
    finally:
        for process in processes.values():
            kill(process)
    text = "".join(log.with_name(f"{log.name}.{rank}").read_text(errors="replace") for rank in processes)
    return Outcome(codes, text, time.monotonic() - begin)


def kill(process: BaseProcess) -> None:
    """End a process of ``run`` and what it has started."""
    process.kill()  # it may not have come to lead its group yet
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()


def bind() -> None:
    """This process ends when the one that started it does."""
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)


def _child(
    command: Command, arguments: Sequence[str], log: Path, environment: Mapping[str, str],
    inject: Callable[[], None] | None,
) -> None:  # fmt: skip
    bind()
    os.setsid()
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in _LAUNCHER:
        os.environ.pop(name, None)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", **environment}
    torch.set_num_threads(1)  # ranks share the cores, and the last bits of a sum depend on the number of threads
    if inject is not None:
        inject()
    sys.exit(command(arguments))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
