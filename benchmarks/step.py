"""Time and memory of one optimizer step of a preset: both networks, losses, backward, AdamW, the teacher's average.

    python benchmarks/step.py configs/smart.yaml --batch 2 [--device cuda] [--tiny]      # appends to results/step.jsonl

No loader: the views lie on the device, so this is what the loader has to keep up with. First a step of the shrunk
preset in fp32 must give the losses that fp64 on the CPU gives; no row on red.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from rows import ROOT, append, environment

from medfast import config as configuration
from medfast.types import Batch, Key, Objective

TOLERANCE = 2e-3  # relative, of each loss: fp32 with TF32 off against fp64


def batch_of(count: int, size: int, objective: Objective, device: str, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(1)
    views = tuple(torch.rand(count, 1, size, size, size, generator=generator) for _ in range(objective.views))
    step = torch.zeros((), dtype=torch.int64)  # on the device, so that no draw copies from the host
    return Batch(views, None, Key(0, step.to(device), torch.arange(count))).to(device, dtype)


def check(path: str, device: str) -> None:
    """Exit unless the shrunk preset has the same losses on ``device`` in fp32 and on the CPU in fp64."""
    config = configuration.load(path, tiny=True)
    losses = []
    for where, dtype in (("cpu", torch.float64), (device, torch.float32)):
        objective = configuration.build(config).to(where, dtype)
        if objective.teacher is not None:
            objective.teacher.to(where, dtype)
        batch = batch_of(2, config["data"]["size"], objective, where, dtype)
        found = objective(batch, torch.tensor(0.1, device=where)).losses
        losses.append({name: float(value.detach()) for name, value in found.items()})
    for name, truth in losses[0].items():
        error = abs(losses[1][name] - truth) / max(abs(truth), 1e-12)
        if not error < TOLERANCE:
            sys.exit(f"{name} is wrong on {device}: {losses[1][name]} for {truth}; no row is written")


def stepper(objective: Objective, batch: Batch, device: str, precision: str) -> Callable[[], None]:
    parameters = dict(objective.named_parameters())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4)
    clock = torch.tensor(0.1, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext():
            output = objective(batch, clock)
        torch.stack(list(output.losses.values())).sum().backward()
        optimizer.step()
        objective.absorb(output.sums)
        if objective.teacher is not None:
            objective.teacher.update({**parameters, **dict(objective.named_buffers())}, 0.996)

    return step


def measure(step: Callable[[], None], device: str, rounds: int) -> float:
    """Median milliseconds of a step, after two that do not count."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for number in range(rounds + 2):
        wait()
        begin = time.perf_counter()
        step()
        wait()
        if number >= 2:
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def arguments(description: str, rounds: int) -> argparse.ArgumentParser:
    """What every script that times steps of a preset asks for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs" / "smart.yaml"))
    parser.add_argument("--batch", type=int, default=1, help="volumes; each has the objective's number of views")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--tiny", action="store_true")
    return parser


def main() -> None:
    given = arguments("One optimizer step of a preset.", rounds=5).parse_args()
    check(given.config, given.device)
    config = configuration.load(given.config, tiny=given.tiny)
    objective = configuration.build(config).to(given.device).train()
    if objective.teacher is not None:
        objective.teacher.to(given.device)
    size = config["data"]["size"]
    step = stepper(objective, batch_of(given.batch, size, objective, given.device, torch.float32), given.device,
                   given.precision)  # fmt: skip
    milliseconds = measure(step, given.device, given.rounds)
    row = {
        **environment(given.device), "config": os.path.relpath(given.config, ROOT), "tiny": given.tiny,
        "batch": given.batch, "size": size, "precision": given.precision,
        "ms_p50": round(milliseconds, 1), "rounds": given.rounds,
        "volumes_per_s": round(1e3 * given.batch / milliseconds, 3),
        "parameters": sum(p.numel() for p in objective.parameters()),
    }  # fmt: skip
    if given.device == "cuda":
        row["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
    append("step", [row])
    print(f"{given.config} batch {given.batch} {given.precision} {given.device}: {milliseconds:.0f} ms a step")


if __name__ == "__main__":
    main()
