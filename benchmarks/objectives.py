"""Step time and peak memory of every objective with its preset's backbone: rows of benchmarks/results/objectives.jsonl.

    python benchmarks/objectives.py                                    # all, 64^3 on CPU (medfast bench objectives)
    python benchmarks/objectives.py --device cuda --size 128 --precision bf16
    python benchmarks/objectives.py --objectives smart mae --rounds 5

One optimizer step of two volumes, each with the views its objective wants: losses, backward, AdamW, centres, the
teacher's average; no loader. Each objective runs in a process of its own, whose memory is what it adds to the resident
memory of one that has imported the same things (CPU), or the most that tensors took (CUDA). First its shrunk preset
must give on the device in fp32 the losses that fp64 gives on the CPU; no row on red. One that does not fit has a row
without numbers.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
from dataclasses import replace
from typing import Any

import torch
from apart import apart
from rows import ROOT, append, environment
from step import TOLERANCE, measure, stepper

from medfast import config as configuration
from medfast.objectives import OBJECTIVES
from medfast.types import Batch, Key, Objective

BATCH, CELL = 2, 16  # volumes; voxels
IMAGE = 512  # SDDA-MAE's, as many pixels as 64^3 has voxels


def overrides(name: str, size: int) -> list[str]:
    """What a preset needs at this size and with two volumes; all else is the preset's."""
    found = ["objective.group=2"] if name == "moco_v3" else []
    if name == "swinfuse":  # its rows are planes of tokens, whose number the heads divide
        found += [f"objective.backbone.dim_width={(size // 2) ** 2}", "objective.backbone.dim_heads=[4,8,16,32]"]
    return found


def patchwork(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Volumes of random cells. All noise looks alike to a mean over tokens, and a batch norm of what hardly differs
    magnifies roundings: on noise MoCo v3 in fp32 is .3 % off."""
    made = torch.rand(BATCH, 1, *(-(-n // CELL) for n in size), generator=generator)
    for axis, n in enumerate(size, start=2):
        made = made.repeat_interleave(CELL, dim=axis).narrow(axis, 0, n)
    return made.contiguous()


def batch_of(objective: Objective, size: tuple[int, ...], device: str, dtype: torch.dtype) -> Batch:
    """Two volumes with everything that the data pipeline may say of them."""
    generator = torch.Generator().manual_seed(1)
    views = tuple(patchwork(size, generator) for _ in range(objective.views))
    key = Key(0, 0, torch.arange(BATCH))
    targets = {name: make(key.stack(objective.views)).chunk(objective.views)
               for name, make in objective.ahead(size).items()}  # fmt: skip
    turns = torch.tensor([[1, 0], [2, 0]])
    params = {"rotation": turns, "flip": turns, "volume": torch.arange(BATCH)}
    made = Batch(views, None, key, (None,) * len(views), params, {**targets, "uncut": views}).to(device, dtype)
    return replace(made, key=made.key._replace(step=torch.zeros((), dtype=torch.int64, device=device)))


def built(name: str, size: int | None, device: str, dtype: torch.dtype) -> tuple[Objective, Batch]:
    """The objective of a preset and a batch for it; size None: both shrunk, as --tiny makes them."""
    extra = [] if size is None else overrides(name, size)
    config = configuration.load(ROOT / "configs" / f"{name}.yaml", *extra, tiny=size is None)
    length = 64 if size is None else size
    flat = (1, length if size is None else IMAGE, length if size is None else IMAGE)
    objective = configuration.build(config).to(device, dtype).train()
    if objective.teacher is not None:
        objective.teacher.to(device, dtype)
    return objective, batch_of(objective, flat if name == "sdda_mae" else (length,) * 3, device, dtype)


def check(name: str, device: str) -> None:
    """SystemExit unless the shrunk preset has the same losses in fp32 on ``device`` and in fp64 on the CPU."""
    found = []
    for where, dtype in (("cpu", torch.float64), (device, torch.float32)):
        objective, batch = built(name, None, where, dtype)
        losses = objective(batch, torch.tensor(0.1, device=where)).losses
        found.append({key: float(value.detach()) for key, value in losses.items()})
    for key, truth in found[0].items():
        if not abs(found[1][key] - truth) < TOLERANCE * max(abs(truth), 1e-12):
            raise SystemExit(f"{name}: {key} is wrong on {device}: {found[1][key]} for {truth}; no row is written")


def one(name: str, size: int, device: str, precision: str, rounds: int) -> dict[str, Any]:
    """Measured in this process, which measures nothing else."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    objective, batch = built(name, size, device, torch.float32)
    milliseconds = measure(stepper(objective, batch, device, precision), device, rounds)
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else added / 2**10
    return {
        "view": list(batch.views[0].shape[2:]), "views": objective.views, "backbone": type(objective.backbone).__name__,
        "parameters": sum(p.numel() for p in objective.parameters()), "ms_p50": round(milliseconds, 1),
        "peak_mib": round(peak),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="One optimizer step of every objective.")
    parser.add_argument("--objectives", nargs="*", default=list(OBJECTIVES), choices=list(OBJECTIVES), metavar="NAME")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    given = parser.parse_args()
    settings = (given.size, given.device, given.precision, given.rounds)
    if given.one:
        return print(json.dumps(one(given.one, *settings)))
    for name in given.objectives:
        check(name, given.device)
        options = ("--size", "--device", "--precision", "--rounds")
        pairs = [x for pair in zip(options, settings, strict=True) for x in pair]
        try:
            found = apart(__file__, "--one", name, *pairs)
        except subprocess.CalledProcessError:
            found = {"ms_p50": None, "peak_mib": None}
        row = {**environment(given.device), "objective": name, "size": given.size, "batch": BATCH,
               "precision": given.precision, "rounds": given.rounds, **found}  # fmt: skip
        append("objectives", [row])
        print(f"{name:12} {found['ms_p50'] or 'does not fit'} ms a step, {found['peak_mib']} MiB", flush=True)


if __name__ == "__main__":
    main()
