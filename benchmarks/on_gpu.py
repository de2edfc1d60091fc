"""What GPU rows have in common: right before timed, the device's own time, what its memory copies in the same process.

With ``device`` cpu everything runs just so that it has run: its times mean nothing and become no rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rows import append, environment
from torch import Tensor

import medfast_kernels as mk

TOLERANCE = {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest entry
Call = Callable[[], Any]


def on(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` on the backend ``name``."""

    def run(*arguments):
        with mk.backend(name):
            return function(*arguments)

    return run


def wrong(got: Sequence[Tensor], truth: Sequence[Tensor], allowed: float) -> str | None:
    errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, truth, strict=True)]
    return None if all(error <= allowed for error in errors) else f"relative errors {errors}, allowed {allowed}"


def why_no_row(check: Callable[[], str | None]) -> str | None:
    """What ``check`` says, or what it raised: a contender may fail in ways of its own."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - compilers and allocators have errors of every kind
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def milliseconds(call: Call, device: str, rounds: int) -> float:
    """Median of ``rounds`` after two."""
    return statistics.median([_once(call, device) for _ in range(rounds + 2)][2:])


def _once(call: Call, device: str) -> float:
    if device != "cuda":
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def graphed(call: Call, device: str) -> Call:
    """``call`` captured once; runs its replay. On CPU ``call`` itself."""
    if device != "cuda":
        return call
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copied(device: str) -> float:
    """Bytes a millisecond that a copy reads and writes: the ceiling of whatever only moves data."""
    source = torch.zeros((1 << 30) if device == "cuda" else 1 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source), device, 10)


def peak_extra(call: Call, device: str) -> int | None:
    """MiB that ``call`` needs at most beside what is there."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) >> 20


def write(file: str, device: str, row: dict[str, Any]) -> None:
    """One row, as soon as it exists."""
    ratio = f"x{row['ratio']} of {row['ratio_to']}" if "ratio" in row else ""
    said = f"{row['op']:<24} {row['shape']:<22} {row['dtype']:<9} {row['pass']:<19} {row['backend']:<16}"
    print(said, f"{row['ms_p50']:9.4f} ms", ratio, flush=True)
    if device == "cuda":
        append(file, [{**environment(device), **row}])


def no_row(what: str, backend: str, reason: str) -> None:
    print(f"{what}  {backend}: no row: {reason}", flush=True)
