"""Token-wise contrast on CPU, forward and backward: this package against what a user would write, in time and memory.

    python benchmarks/token_contrast.py            # appends rows to benchmarks/results/token_contrast.jsonl

Each row is one process, with the allocator as it comes or told to keep its pages ("tuned"), because page faults are
half the time of what allocates much. Losses and gradients are compared with fp64 first: no row on a red check, and none
of a working tree that differs from its commit. The rounds of all contenders are interleaved. Memory is what a step
needs beside its inputs; a contender that needs more than there is gets no row, and that is said.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys

import ceilings
import torch
from apart import ALLOCATORS, apart
from interleaved import interleaved
from rows import append, environment
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils.checkpoint import checkpoint

import medfast_kernels as mk

TEMPERATURE, CHUNK = 0.5, 1024
SHAPES = {"2 x 8 x 512": (2, 8, 512, 128), "2 x 2048 x 1": (2, 2048, 1, 128), "2 x 8 x 64": (2, 8, 64, 128)}
MEMORY = {n: (2, 8, n // 16, 128) for n in (8192, 16384, 32768)}


def targets(z: Tensor) -> Tensor:
    n = len(z)
    return (torch.arange(n) + n // 2) % n


def extra(rows: Tensor, n: int, positions: int, weight: float) -> Tensor:
    """(rows, n), added to logits: -inf on oneself, the logarithm of the weight at one's position of other volumes."""
    column, half = torch.arange(n), n // 2
    same = (rows[:, None] % positions == column % positions) & (rows[:, None] % half != column % half)
    return torch.where(same, math.log(weight), 0.0).masked_fill_(rows[:, None] == column, -torch.inf)


class Dense:
    """SimCLR as it is mostly written: all logits and one cross entropy; what is added to them is made beforehand."""

    def __init__(self, shape: tuple[int, ...], weight: float) -> None:
        n = math.prod(shape[:3])
        self.extra = None if weight == 1 else extra(torch.arange(n), n, shape[2], weight)

    def __call__(self, z: Tensor) -> Tensor:
        z = z.flatten(0, 2)
        logits = z @ z.T / TEMPERATURE
        logits = logits.fill_diagonal_(-torch.inf) if self.extra is None else logits + self.extra
        return cross_entropy(logits, targets(z))


class Chunked:
    """The same in blocks of rows whose logits are computed again for the backward."""

    def __init__(self, shape: tuple[int, ...], weight: float) -> None:
        self.positions, self.weight = shape[2], weight

    def __call__(self, z: Tensor) -> Tensor:
        z = z.flatten(0, 2)
        target, n = targets(z), len(z)

        def block(rows: Tensor) -> Tensor:
            logits = z[rows] @ z.T / TEMPERATURE
            if self.weight == 1:
                logits[torch.arange(len(rows)), rows] = -torch.inf
            else:
                logits = logits + extra(rows, n, self.positions, self.weight).to(z.dtype)
            return cross_entropy(logits, target[rows], reduction="sum")

        losses = [checkpoint(block, rows, use_reentrant=False) for rows in torch.arange(n).split(CHUNK)]
        return torch.stack(losses).sum() / n  # type: ignore[arg-type]  # checkpoint is typed as any


class Ours:
    def __init__(self, shape: tuple[int, ...], weight: float) -> None:
        self.weight = weight

    def __call__(self, z: Tensor) -> Tensor:
        with mk.backend("cpp"):
            return mk.token_contrast(z, temperature=TEMPERATURE, weight=self.weight)


CONTENDERS = {"dense": Dense, "chunked": Chunked, "cpp": Ours}


def tokens(shape: tuple[int, ...]) -> Tensor:
    torch.manual_seed(0)
    return normalize(torch.randn(shape), dim=-1).requires_grad_()


def step(run, z: Tensor) -> tuple[Tensor, Tensor]:
    loss = run(z)
    return loss, torch.autograd.grad(loss, z)[0]


def check(runs: dict, z: Tensor, shape: tuple[int, ...], weight: float) -> None:
    truth = step(Chunked(shape, weight), z.detach().double().requires_grad_())
    for name, run in runs.items():
        for got, expected in zip(step(run, z), truth, strict=True):
            error = ((got - expected).abs().max() / expected.abs().max()).item()
            if error > 1e-5:
                sys.exit(f"{name} is wrong at {shape}: relative error {error:.1e}; no row is written")


def measure(name: str, weight: float, rounds: int, allocator: str) -> list[dict]:
    shape = SHAPES[name]
    z, runs = tokens(shape), {key: make(shape, weight) for key, make in CONTENDERS.items()}
    check(runs, z, shape, weight)
    calls = {key: lambda run=run: step(run, z) for key, run in runs.items()}
    p50 = interleaved(calls, rounds)
    products, ceiling = 6 * math.prod(shape[:3]) ** 2 * shape[3], ceilings.matmul()
    return [
        {
            **environment(), "allocator": allocator, "op": "token_contrast", "backend": key, "shape": name,
            "sizes": dict(zip(("views", "volumes", "positions", "dim"), shape, strict=True)), "weight": weight,
            "pass": "forward + backward", "dtype": "float32", "ms_p50": round(value, 2), "rounds": rounds,
            "ratio": round(p50["dense"] / value, 2), "ratio_to": "dense",
            "of_matmul": round(products / value / ceiling, 2), "peak_extra_mib": ceilings.peak_extra(calls[key]),
        }
        for key, value in p50.items()
    ]  # fmt: skip


def memory(name: str, n: int) -> list[dict]:
    step(CONTENDERS[name]((2, 2, 4, 8), 5.0), tokens((2, 2, 4, 8)))
    z, run = tokens(MEMORY[n]), CONTENDERS[name](MEMORY[n], 5.0)
    extra = ceilings.peak_extra(lambda: step(run, z))
    row = {"op": "token_contrast", "backend": name, "tokens": n, "dim": 128, "weight": 5.0, "dtype": "float32"}
    return [{**environment(), **row, "pass": "forward + backward", "peak_extra_mib": extra}]


def fits(name: str, n: int) -> bool:
    needed, free = (5 * 4 * n * n if name == "dense" else 0), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        print(f"{n} tokens  {name}: no row, it needs {needed / 2**30:.0f} GiB and {free / 2**30:.0f} are free")
    return needed <= free


def main() -> None:
    parser = argparse.ArgumentParser(description="Token-wise contrast on CPU, forward and backward.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(MEMORY), choices=list(MEMORY))
    parser.add_argument("--one", nargs=3, metavar=("SHAPE", "WEIGHT", "ALLOCATOR"), help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=2, metavar=("BACKEND", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return print(json.dumps(measure(options.one[0], float(options.one[1]), options.rounds, options.one[2])))
    if options.memory:
        return print(json.dumps(memory(options.memory[0], int(options.memory[1]))))
    for shape in options.shapes:
        for weight in ("1", "5"):
            for allocator in ALLOCATORS:
                arguments = "--one", shape, weight, allocator, "--rounds", options.rounds
                rows = apart(__file__, *arguments, allocator=allocator)
                for row in rows:
                    print(f"{shape:<13} weight {weight} {allocator:<8} {row['backend']:<8} {row['ms_p50']:8.1f} ms  "
                          f"x{row['ratio']}  {row['of_matmul']} of matmul")  # fmt: skip
                append("token_contrast", rows)
    for n in options.tokens:
        for name in CONTENDERS:
            if fits(name, n):
                (row,) = apart(__file__, "--memory", name, n)
                print(f"{n} tokens  {name:<8} {row['peak_extra_mib']} MiB")
                append("token_contrast", [row])


if __name__ == "__main__":
    main()
