"""What each worker of the loader does at this moment, where it can be read after the worker was killed or got stuck.

A worker, thread or process, has a small file, mapped into memory: what it reads, since when, how much memory it holds,
and the seconds it has spent in each stage.
"""

from __future__ import annotations

import mmap
import os
import re
import resource
import shutil
import signal
import struct
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["STAGES", "Watch", "memory"]

# plan: which box. check: hash at first touch. read: boxes from the store. make: executor. finish: noise, marks, targets
STAGES = ("plan", "check", "read", "make", "finish")
_ROW = struct.Struct(f"<qqdq{len(STAGES)}d")  # pid, volume + 1 or 0, since when, kilobytes, seconds of each stage


class Watch:
    """Shared by the workers of one stream; picklable, as workers may be processes. ``close`` removes the files."""

    def __init__(self):
        memory_disk = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="medfast-", dir=memory_disk))
        self.close = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._local = threading.local()

    def __getstate__(self):
        return {"folder": self.folder}

    def __setstate__(self, state):
        self.folder, self._local = state["folder"], threading.local()

    def _mine(self) -> mmap.mmap:
        if not hasattr(self._local, "row"):
            with (self.folder / f"{os.getpid()}-{threading.get_native_id()}").open("w+b") as file:
                file.write(_ROW.pack(os.getpid(), 0, 0.0, 0, *[0.0] * len(STAGES)))
                file.flush()
                self._local.row = mmap.mmap(file.fileno(), _ROW.size)
        return self._local.row

    @contextmanager
    def reading(self, volume: int) -> Iterator[None]:
        """Say that this worker reads a volume of the store's index while the block runs."""
        row = self._mine()
        struct.pack_into("<qdq", row, 8, volume + 1, time.monotonic(),
                         resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # fmt: skip
        try:
            yield
        finally:
            struct.pack_into("<q", row, 8, 0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin, row, place = time.perf_counter(), self._mine(), 32 + 8 * STAGES.index(name)
        try:
            yield
        finally:
            (before,) = struct.unpack_from("<d", row, place)
            struct.pack_into("<d", row, place, before + time.perf_counter() - begin)

    def seconds(self) -> dict[str, float]:
        """Stage -> seconds that all workers have spent in it."""
        rows = [row[4:] for row in self._rows()]
        return {name: sum(row[i] for row in rows) for i, name in enumerate(STAGES)}

    def stuck(self, file: Callable[[int], Path]) -> str:
        """A sentence for each worker that is reading now. file: of a volume."""
        now = time.monotonic()
        told = [f"worker {pid} has been reading {file(volume - 1)} for {now - since:.0f} s and holds {kilo >> 10} MB"
                for pid, volume, since, kilo, *_ in self._rows() if volume]  # fmt: skip
        return "; ".join(told) or "no worker is reading a file"

    def died(self, pid: int, exitcode: int, file: Callable[[int], Path]) -> str:
        """A sentence about a worker process that ended with an exit code of ``multiprocessing``."""
        how = f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with exit code {exitcode}"
        doing = next((f" while it read {file(volume - 1)}; it held {kilo >> 10} MB"
                      for found, volume, _, kilo, *_ in self._rows() if found == pid and volume), "")  # fmt: skip
        oom = " SIGKILL is what the kernel sends when memory runs out." if exitcode == -signal.SIGKILL else ""
        return f"worker {pid} {how}{doing}.{oom}"

    def _rows(self) -> list[tuple]:
        rows = []
        for file in sorted(self.folder.glob("*")):
            content = file.read_bytes()
            if len(content) == _ROW.size:  # not one that is just being made
                rows.append(_ROW.unpack(content))
        return rows


def memory() -> str:
    """A sentence about the memory of this machine and, where it has one, of this control group."""
    try:
        facts = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
        free, whole = (int(facts[name]) >> 10 for name in ("MemAvailable", "MemTotal"))
        told = f"{free} MB of this machine's {whole} MB are available"
    except (OSError, KeyError):
        return "this system does not say how much memory is available"
    try:
        kills = dict(line.split() for line in Path("/sys/fs/cgroup/memory.events").read_text().splitlines())["oom_kill"]
    except (OSError, KeyError, ValueError):
        return told
    return f"{told}; the kernel has ended {kills} processes of this control group for want of memory"
