"""What this machine's CPU can do at most, and the memory that a step needs beside its inputs: for the rows."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch


def matmul() -> float:
    """FLOP a millisecond of torch's own product of two large fp32 matrices."""
    a, n = torch.randn(2048, 2048), 2048
    return 2 * n**3 / _best(lambda: torch.mm(a, a))


def copy(floats: int) -> float:
    """Bytes a millisecond that a copy of so many fp32 numbers reads and writes."""
    source = torch.randn(floats)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source))


def _best(run: Callable[[], object]) -> float:
    """Milliseconds of the fastest of some rounds: what else the machine does makes no ceiling lower."""
    times = []
    for _ in range(12):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


def peak_extra(run: Callable[[], object]) -> float | None:
    """MiB that ``run`` adds to the resident memory of this process at most; None where Linux does not tell.

    What it needs only once, such as pools of threads, is there after a first run. Free pages that the allocator holds
    are given back first, else they would hide what is needed.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # from now on the peak is a new one (proc(5))
    except (AttributeError, OSError):
        return None
    before = _kib("VmRSS")
    run()
    return round((_kib("VmHWM") - before) / 1024, 1)


def _kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
