"""Crops per second of the loader, appended to benchmarks/results/crops.jsonl.

    python benchmarks/crops.py --store STORE [--executor torch dali] [--config smart author smit] [--workers 0 1 2]

Each row is the best of several rounds of the whole path (plan, cut, execute, mark); a crop is one view.
"""

from __future__ import annotations

import argparse
import time
from importlib import metadata

from rows import append, environment

from medfast.data.loader import open_stream

EVERY = {"gain": {"p": 0.8}, "shift": {"p": 0.5}, "contrast": {"p": 0.8}, "gamma": {"p": 1.0}}
CONFIGS = {
    "smart": {"size": 128, "window": [-500, 500]},
    "author": {
        "size": 128, "window": [-500, 500], "parent": [1.4, 1.8], "zoom": [0.8, 1.2],
        "intensity": {"noise": {"p": [0.8, 0.5]}, "blur": {"p": [1.0, 0.5]}, **EVERY},
    },
    "smit": {"size": 96, "window": [-175, 250], "parent": 128 / 96},
}  # fmt: skip


def dali_version() -> str | None:
    return next((d.version for d in metadata.distributions() if d.metadata["Name"].startswith("nvidia-dali")), None)


def measure(store: str, config: str, executor: str, workers: int, seconds: float, rounds: int) -> float:
    section = {"store": store, "executor": executor, "workers": workers, **CONFIGS[config]}
    stream = open_stream(section, seed=0, batch=4, views=2, split="train")
    best, batches = 0.0, stream.run((step, range(4)) for step in range(1_000_000))
    for _ in range(workers + 2):  # first touch, builds, and what was made ahead
        next(batches)
    for _ in range(rounds):
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            count += sum(len(view) for view in next(batches).views)
        best = max(best, count / (time.perf_counter() - begin))
    stream.close()
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description="Crops per second of the loader.")
    parser.add_argument("--store", required=True)
    parser.add_argument("--executor", nargs="+", default=["torch", "dali"], choices=["torch", "dali"])
    parser.add_argument("--config", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a round")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    for config in given.config:
        for executor in given.executor:
            for workers in given.workers:
                rate = measure(given.store, config, executor, workers, given.seconds, given.rounds)
                row = {
                    **environment(), "dali": dali_version(), "executor": executor, "config": config,
                    "workers": workers, "crops_per_s": round(rate, 2),
                }  # fmt: skip
                append("crops", [row])
                print(f"{config:7s} {executor:6s} {workers} workers  {rate:8.2f} crops/s", flush=True)


if __name__ == "__main__":
    main()
