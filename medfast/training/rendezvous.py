"""The ranks of a launch find each other, or those that are missing are named within the time limit."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

__all__ = ["LOST", "RankLost", "join"]

LOST = 69  # exit code: a rank is hung or missing
_POLL_S = 0.2


class RankLost(RuntimeError):
    """A rank is hung, missing or dead; the sentence names it, its host, and where it was last seen."""


def join(backend: str, rank: int, size: int, limit: float) -> None:
    """Initialise the process group of ``size`` ranks that MASTER_ADDR and MASTER_PORT name.

    limit: seconds that the ranks may be apart, 0 for torch's half an hour. Raises RankLost naming the ranks that did
    not come, ValueError where the launcher has set no address.
    """
    limit = limit or 1800.0
    store = _store(rank, size, limit)
    _roll_call(store, rank, size, limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def _store(rank: int, size: int, limit: float) -> dist.Store:
    """The key-value store of this launch: torchrun's own where it has one, else in rank 0's process."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        absent = " and ".join(missing)
        raise ValueError(f"RANK and WORLD_SIZE are set, {absent} not: start the ranks with torchrun or srun")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(address, port, size, is_master=rank == 0 and not shared, multi_tenant=True,
                              timeout=timedelta(seconds=limit), wait_for_workers=False)  # fmt: skip
    except (RuntimeError, TimeoutError) as error:
        whom = "the launcher" if shared else "rank 0"
        raise RankLost(f"rank {rank}: {whom} cannot be reached at {address}:{port} within {limit:.0f} s; is it "
                       "missing, or is the port closed or taken?") from error  # fmt: skip
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"medfast/attempt_{attempt}", store)


def _roll_call(store: dist.Store, rank: int, size: int, limit: float) -> None:
    """Wait until all ranks are there. Raises RankLost."""
    store.set(f"here/{rank}", socket.gethostname())
    begin, absent = time.monotonic(), set(range(size))
    while absent := {other for other in absent if not store.check([f"here/{other}"])}:
        if time.monotonic() - begin > limit:
            present = sorted({*range(size)} - absent)
            there = ", ".join(f"rank {r} on host {store.get(f'here/{r}').decode()}" for r in present)
            raise RankLost(
                f"rank {', '.join(map(str, sorted(absent)))} of {size} did not come within {limit:.0f} s "
                f"(train.watchdog_s); there are: {there}. Did its node start, and does it reach MASTER_ADDR?"
            )
        time.sleep(_POLL_S)
