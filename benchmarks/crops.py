"""Crops per second out of a store, appended to benchmarks/results/crops.jsonl; a crop is one view.

    python benchmarks/crops.py [--layout npy] [--config raw light ...] [--contender torch dali monai ...]

raw: int16 boxes, cut and nothing else. plain: windowed. light: turned, mirrored, gain and shift. author: all of SMART's
public recipe. MONAI gets the same files and, in light, the same changes: "monai" is PersistentDataset over the prepared
steps, warmed up, "monai nii.gz" reads the files each time. Contenders take turns, a row is the best of several rounds
of the whole path. Before that, views of our executors are held to the definition; no row of what is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib import metadata
from pathlib import Path

import torch
from rows import append, environment
from volumes import store_at_2mm

import medfast_kernels as mk
from medfast.data.loader import Stream, open_stream

EVERY = {"gain": {"p": 0.8}, "shift": {"p": 0.5}, "contrast": {"p": 0.8}, "gamma": {"p": 1.0}}
LIGHT = {"gain": {"p": 1.0, "range": [0.75, 1.25]}, "shift": {"p": 1.0, "range": [0.0, 0.1]}}
CONFIGS = {
    "raw": {"size": 128},
    "plain": {"size": 128, "window": [-500, 500]},
    "light": {"size": 128, "window": [-500, 500], "rotate": True, "flip": True, "intensity": LIGHT},
    "author": {
        "size": 128, "window": [-500, 500], "parent": [1.4, 1.8], "zoom": [0.8, 1.2],
        "intensity": {"noise": {"p": [0.8, 0.5]}, "blur": {"p": [1.0, 0.5]}, **EVERY},
    },
    "smit": {"size": 96, "window": [-175, 250], "parent": 128 / 96},
}  # fmt: skip
CONTENDERS = ("torch", "dali", "monai", "monai nii.gz")
ALLOWED = {"cpu": 2e-4, "cuda": 1e-3}  # on the [0, 1] scale
BATCH = 4


def dali_version() -> str | None:
    return next((d.version for d in metadata.distributions() if d.metadata["Name"].startswith("nvidia-dali")), None)


def stream_of(store: Path, config: str, executor: str, workers: int, device: str = "cpu", batch: int = BATCH) -> Stream:
    section = {"store": str(store), "executor": executor, "workers": workers, "device": device, **CONFIGS[config]}
    return open_stream(section, seed=0, batch=batch, views=2, split="train")


def wrong(store: Path, config: str, executor: str, device: str = "cpu") -> str | None:
    """What sets this executor's views apart from those of the definition, if it is too much."""
    given, truth = stream_of(store, config, executor, 0, device), stream_of(store, config, "torch", 0)
    found = given.batch(1, range(BATCH))
    with mk.backend("reference"):
        expected = truth.batch(1, range(BATCH))
    errors = [(a.cpu() - b).abs().max().item() for a, b in zip(found.views, expected.views, strict=True)]
    given.close()
    truth.close()
    return None if max(errors) <= ALLOWED[device] else f"off by {max(errors):.1e}, allowed {ALLOWED[device]:.0e}"


def batches(stream: Stream) -> Generator[int, None, None]:
    """Makes batches without end; gives the crops in each."""
    with closing(stream):
        for batch in stream.run((step, range(stream.batch_size)) for step in range(100_000)):
            yield sum(len(view) for view in batch.views)


def boxes(stream: Stream) -> Generator[int, None, None]:
    """Cuts batches of int16 boxes without end, in as many threads as the stream has workers."""

    def cut(step: int) -> int:
        return len(stream.cutter.cut(step, torch.arange(stream.batch_size))[1])

    with closing(stream), ThreadPoolExecutor(max(1, stream.workers)) as pool:
        made = deque(pool.submit(cut, step) for step in range(stream.workers + 1))
        for step in itertools.count(len(made)):
            yield made.popleft().result()
            made.append(pool.submit(cut, step))


def contender(
    name: str, config: str, files: Path, store: Path, cache: Path, workers: int
) -> Generator[int, None, None]:
    if name.startswith("monai"):
        import crops_monai

        return crops_monai.batches(files, cache if name == "monai" else None, CONFIGS[config], BATCH, workers)
    stream = stream_of(store, config, name, workers)
    return boxes(stream) if config == "raw" else batches(stream)


def rates(runs: Mapping[str, Iterator[int]], seconds: float, rounds: int, warm: int = 8) -> dict[str, float]:
    """Crops a second of each, the best of ``rounds`` in which they take turns."""
    best = dict.fromkeys(runs, 0.0)
    for run in runs.values():
        for _ in range(warm):  # first touch, builds, and what was made ahead
            next(run)
    for _ in range(rounds):
        for name, run in runs.items():
            next(run)  # what was made ahead while the others ran
            begin, count = time.perf_counter(), 0
            while time.perf_counter() - begin < seconds:
                count += next(run)
            best[name] = max(best[name], count / (time.perf_counter() - begin))
    return best


def names_of(config: str, wanted: list[str], first: bool) -> list[str]:
    """Who takes part: boxes alone need no executor, and MONAI, which reads no store of ours, has the light recipe."""
    ours = [name for name in wanted if name == "torch" or name == "dali" and config != "raw"]
    return ours + [name for name in wanted if name.startswith("monai") and config == "light" and first]


def measure(
    config: str, layout: str, names: list[str], where: tuple[Path, Path, Path], given: argparse.Namespace
) -> None:  # fmt: skip
    """where: files, store of them, cache of MONAI's."""
    files, store, cache = where
    for name in names:
        if config != "raw" and not name.startswith("monai") and (found := wrong(store, config, name)):
            sys.exit(f"{config}, {name}: {found}: no rows")
    runs = {name: contender(name, config, files, store, cache, given.workers) for name in names}
    best = rates(runs, given.seconds, given.rounds, warm=2 * len(list(files.iterdir())) // BATCH)
    for run in runs.values():
        run.close()
    for name, rate in best.items():
        row = {
            **environment(), "dali": dali_version(), "executor": name, "config": config, "layout": layout,
            "workers": given.workers, "crops_per_s": round(rate, 2),
            **({"ratio_to_monai": round(rate / best["monai"], 2)} if "monai" in best else {}),
            **({"ratio_to_nii": round(rate / best["monai nii.gz"], 1)} if "monai nii.gz" in best else {}),
        }  # fmt: skip
        append("crops", [row])
        print(f"{config:7s} {layout:7s} {name:13s} {given.workers} workers  {rate:8.2f} crops/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Crops per second out of a store.")
    parser.add_argument("--folder", type=Path, help="where files and stores are kept (default: a temporary folder)")
    parser.add_argument("--layout", nargs="+", default=["npy", "blosc2"], help="of the store")
    parser.add_argument("--contender", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--config", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a round")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        for number, layout in enumerate(given.layout):
            files, store = store_at_2mm(folder, layout)
            for config in given.config:
                names = names_of(config, given.contender, number == 0)
                measure(config, layout, names, (files, store, folder / "monai"), given)


if __name__ == "__main__":
    main()
