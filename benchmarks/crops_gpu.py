"""Crops per second when a GPU makes the views, and what a SMART step waits for them; appended to results/crops.jsonl.

    python benchmarks/crops_gpu.py [--device cuda] [--executor torch dali] [--batch 8 16]

int16 boxes travel, the full recipe of SMART's public code runs on the device. First its views are held to those of the
CPU definition, within 1e-3; no row on red. "wait_share": seconds that a loop of SMART steps (forward, backward, AdamW,
teacher) stood still for data, over all. With --device cpu everything runs to have run, and no row is written.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from crops import batches, dali_version, rates, stream_of, wrong
from rows import append, environment
from step import batch_of, stepper

from medfast import config as configuration
from medfast.data.files import append as add_line
from medfast.data.files import digest
from medfast.data.layouts import encode
from medfast.data.loader import Stream
from medfast.data.store import Header


def synthetic_store(folder: Path, count: int = 4, shape: tuple[int, int, int] = (180, 200, 200)) -> Path:
    """Volumes of the size of a chest at 2 mm: smooth organs and noise, HU. The content costs a GPU nothing."""
    (folder / "volumes").mkdir(parents=True)
    (folder / "STORE.json").write_bytes(Header({"fill": -1024}, "npy").content())
    z, y, x = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    for number in range(count):
        noise = np.random.default_rng(number).normal(0, 60, shape).astype(np.float32)
        voxels = (700 * np.sin(z / 9 + number) * np.cos(y / 13 + x / 7) - 150 + noise).astype(np.int16)
        file = folder / "volumes" / f"v{number}.npy"
        file.write_bytes(encode("npy", voxels))
        add_line(folder / "index.jsonl", {"id": f"v{number}", "shape": list(shape), "body": [0, 0, 0, *shape],
                                          "bytes": file.stat().st_size, "hash": digest(file)})  # fmt: skip
    return folder


def synchronized(run: Iterator[int], device: str) -> Iterator[int]:
    for count in run:
        if device == "cuda":
            torch.cuda.synchronize()
        yield count


def wait_share(
    stream: Stream, preset: str, device: str, batch: int, tiny: bool, steps: int = 12
) -> tuple[float, float]:
    """(share of a loop's seconds in which it waits for data, milliseconds of a step), after two that warm up."""
    config = configuration.load(preset, tiny=tiny)
    objective = configuration.build(config).to(device).train()
    if objective.teacher is not None:
        objective.teacher.to(device)
    given = batch_of(batch, config["data"]["size"], objective, device, torch.float32)
    step = stepper(objective, given, device, "bf16" if device == "cuda" else "fp32")
    made, begin, waited = batches(stream), 0.0, 0.0
    for number in range(steps + 2):
        if number == 2:
            begin, waited = time.perf_counter(), stream.waited
        next(made)
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    took = time.perf_counter() - begin
    return (stream.waited - waited) / took, 1e3 * took / steps


def main() -> None:
    parser = argparse.ArgumentParser(description="Crops per second when a GPU makes the views.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--executor", nargs="+", default=["torch", "dali"], choices=("torch", "dali"))
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--preset", default="configs/smart_author.yaml")
    given = parser.parse_args()
    red = False
    with tempfile.TemporaryDirectory() as folder:
        store = synthetic_store(Path(folder) / "store")
        for executor in given.executor:
            if executor == "dali" and importlib.util.find_spec("nvidia.dali") is None:
                print("dali is not installed: no rows of it")
                continue
            if found := wrong(store, "author", executor, given.device):
                print(f"{executor} on {given.device}: {found}: no rows", file=sys.stderr)
                red = True
                continue
            for batch in given.batch:
                row = measure(store, executor, batch, given)
                print(row, flush=True)
                if given.device == "cuda":
                    append("crops", [row])
    sys.exit(int(red))


def measure(store: Path, executor: str, batch: int, given: argparse.Namespace) -> dict[str, object]:
    stream = stream_of(store, "author", executor, given.workers, given.device, batch)
    rate = rates({executor: synchronized(batches(stream), given.device)}, given.seconds, 2)[executor]
    stream.close()
    stream = stream_of(store, "author", executor, given.workers, given.device, batch)
    share, milliseconds = wait_share(stream, given.preset, given.device, batch, tiny=given.device == "cpu")
    stream.close()
    row = {**environment(given.device), "dali": dali_version(), "executor": executor, "device": given.device,
           "config": "author", "batch": batch, "workers": given.workers, "crops_per_s": round(rate, 1),
           "step_ms": round(milliseconds, 1), "wait_share": round(share, 4)}  # fmt: skip
    if given.device == "cuda":
        row["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
    return row


if __name__ == "__main__":
    main()
