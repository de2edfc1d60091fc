"""Preparing a CT at 2 mm, ours and MONAI's, appended to benchmarks/results/prepare.jsonl.

    python benchmarks/prepare.py [--copies 12]

"volumes_per_s": wall, ours with two jobs. "cpu_s": seconds of one core for one volume, ours (read, hash, inflate with
its CRC, check, resample, write, read back) and MONAI's (LoadImaged, Orientationd, Spacingd, np.save), each on one
thread in a process of its own, under both allocators (``apart``); the goal is one for the tuned. First, what we stored
is held to the definition in fp64; no row of what is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from apart import ALLOCATORS, apart
from rows import append, environment
from volumes import SPACING, copies, ct, stored_values

from medfast.data.prepare import prepare
from medfast.data.resample import AIR, TOP, grid, weights
from medfast.data.store import Store, verify


def ours(files: Path, out: Path, jobs: int) -> dict[str, float]:
    begin, cpu = time.perf_counter(), time.process_time()
    made = prepare(files, out, jobs=jobs, spacing=SPACING, progress=False)
    return {"count": len(made.good), "wall": time.perf_counter() - begin, "cpu": time.process_time() - cpu}


def monai(files: Path, out: Path) -> dict[str, float]:
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, Spacingd

    chain = Compose([LoadImaged("image"), EnsureChannelFirstd("image"), Orientationd("image", "RAS"),
                     Spacingd("image", (SPACING,) * 3)])  # fmt: skip
    out.mkdir()
    begin, cpu, found = time.perf_counter(), time.process_time(), sorted(files.iterdir())
    for file in found:
        made: dict = chain({"image": str(file)})  # type: ignore[assignment]
        np.save(out / f"{file.name}.npy", made["image"].numpy().astype(np.int16), allow_pickle=False)
    return {"count": len(found), "wall": time.perf_counter() - begin, "cpu": time.process_time() - cpu}


def seconds(who: str, files: Path, out: Path, allocator: str) -> float:
    """Of one core for one volume."""
    took = apart(__file__, "--one", who, files, out, allocator=allocator)
    return round(took["cpu"] / took["count"], 3)


def wrong(store: Store) -> str | None:
    """What sets a stored volume apart from the definition, computed in fp64, if it is more than a rounding."""
    verify(store)
    voxels, affine = stored_values(ct())
    if np.any(affine[:3, :3] - np.diag(np.diag(affine)[:3])):
        return "the CT lies obliquely; choose another"
    volume = voxels.T[tuple(slice(None, None, int(np.sign(mm))) for mm in np.diag(affine)[2::-1])]
    sizes = np.abs(np.diag(affine)[2::-1])
    truth = torch.from_numpy(np.clip(volume, AIR, TOP).astype(np.float64))
    for axis, (n, m, mm) in enumerate(zip(volume.shape, grid(volume.shape, sizes, SPACING), sizes, strict=True)):
        truth = torch.tensordot(weights(n, m, SPACING / mm, "triangle").double(), truth.movedim(axis, 0), 1)
        truth = truth.movedim(0, axis)
    corner = (slice(None), slice(8, -8), slice(8, -8))  # away from the voxels that the copies changed
    found = torch.from_numpy(np.array(store.volume(0))).double()
    error = (found[corner] - truth[corner]).abs().max().item()
    return None if error <= 0.51 else f"off by {error:.2f} HU"


def main() -> None:
    parser = argparse.ArgumentParser(description="Preparing a CT at 2 mm, ours and MONAI's.")
    parser.add_argument("--copies", type=int, default=12)
    parser.add_argument("--one", nargs=3, metavar=("WHO", "FILES", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.one:
        who, files, out = given.one[0], Path(given.one[1]), Path(given.one[2])
        print(json.dumps(ours(files, out, 1) if who == "ours" else monai(files, out)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = copies(folder / "files", given.copies)
        both = ours(files, folder / "both", 2)
        if found := wrong(Store(folder / "both")):
            sys.exit(f"prepare: {found}: no rows")
        cpu = {kind: {who: seconds(who, files, folder / f"{who}-{kind}", kind) for who in ("ours", "monai")}
               for kind in ALLOCATORS}  # fmt: skip
    rate = both["count"] / both["wall"]
    ratio = {kind: round(took["monai"] / took["ours"], 2) for kind, took in cpu.items()}
    row = {**environment(), "file": ct().name, "spacing": SPACING, "volumes_per_s": round(rate, 2), "jobs": 2,
           "cpu_s": cpu, "ratio_per_core": ratio}  # fmt: skip
    append("prepare", [row])
    print(f"{rate:.2f} volumes/s with two jobs; seconds of a core a volume: "
          + "; ".join(f"{kind} allocator {took['ours']:.2f}, MONAI {took['monai']:.2f} = {ratio[kind]:.2f}x"
                      for kind, took in cpu.items()))  # fmt: skip


if __name__ == "__main__":
    main()
