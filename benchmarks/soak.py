"""Minutes of random reads and augmentation, and does memory stay flat? Exit 1 if not.

python benchmarks/soak.py [--minutes 10] [--executor torch] [--workers 2]
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

from crops import CONFIGS

from medfast.data.loader import open_stream
from medfast.data.phantom import write_phantoms
from medfast.data.prepare import prepare

EVERYTHING = {**CONFIGS["author"], "size": 64, "rotate": True, "flip": True, "cutout": True, "foreground": True}
CYCLE = 200  # batches of a stream before the next one takes its place: what streams leave behind shows too
GROWTH = 32  # MB that the last third may be above the first, after a tenth that warms up


def resident() -> float:
    """MB of this process and the processes it started."""
    total, own = 0, Path("/proc/self")
    for status in [own / "status", *(Path("/proc") / child / "status" for child in _children())]:
        found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
        total += int(found.group(1)) if found else 0
    return total / 1024


def _children() -> list[str]:
    return [child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()]


def soak(store: Path, seconds: float, executor: str, workers: int) -> list[float]:
    """MB, about once a second."""
    seen, begin, seed, counted = [], time.monotonic(), 0, 0
    while time.monotonic() - begin < seconds:
        intensity = {**EVERYTHING["intensity"], "gibbs": {"p": 0.1}}
        section = {"store": str(store), "executor": executor, "workers": workers, **EVERYTHING, "intensity": intensity}
        stream, seed = open_stream(section, seed=seed, batch=4, views=2, split="train"), seed + 1
        for _ in stream.run((step, range(4)) for step in range(CYCLE)):
            counted += 8
            if time.monotonic() - begin >= len(seen) + 1:
                seen.append(resident())
                print(f"{len(seen):4d} s  {counted:7d} crops  {seen[-1]:8.1f} MB", flush=True)
            if time.monotonic() - begin >= seconds:
                break
        stream.close()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description="Does the memory of the loader stay flat?")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--executor", default="torch", choices=("torch", "dali"))
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_phantoms(Path(folder) / "files", 8, seed=0)
        prepare(Path(folder) / "files", Path(folder) / "store", spacing=4.0, progress=False)
        seen = soak(Path(folder) / "store", 60 * given.minutes, given.executor, given.workers)
    steady = seen[len(seen) // 10 :]
    third = max(1, len(steady) // 3)
    first, last = max(steady[:third]), max(steady[-third:])
    print(f"largest in the first third {first:.0f} MB, in the last {last:.0f} MB")
    if last > first + GROWTH:
        sys.exit(f"memory grew by {last - first:.0f} MB")


if __name__ == "__main__":
    main()
