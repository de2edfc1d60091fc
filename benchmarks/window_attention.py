"""Window attention on CPU, forward and backward: this package against what a Swin would use otherwise.

    python benchmarks/window_attention.py            # appends rows to benchmarks/results/window_attention.jsonl

Both sides include the QKV projection. Each row is one process, with the allocator as it comes or told to keep its pages
("tuned"), because page faults are half the time of what allocates much. Outputs and gradients are compared with the
reference in fp64 first: no row on a red check, and none of a working tree that differs from its commit. The rounds of
all contenders are interleaved.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
from apart import ALLOCATORS, apart
from baselines import Partitioned, eager, sdpa
from interleaved import interleaved
from rows import append, environment
from torch import Tensor

import medfast_kernels as mk

SHAPES = {  # batch, grid, channels, heads: the stages of SMART's Swin at 64^3
    "stage 1": (2, 32, 48, 4),
    "stage 2": (2, 16, 96, 4),
    "stage 3": (2, 8, 192, 8),
}
WINDOW, SHIFT = 4, 2


def contenders(grid: int) -> dict:
    def ours(name: str):
        def run(qkv, table):
            with mk.backend(name):
                return mk.window_attention(qkv, table, window=WINDOW, shift=SHIFT)

        return run

    return {
        "monai eager": Partitioned(grid, WINDOW, SHIFT, eager),
        "sdpa + mask": Partitioned(grid, WINDOW, SHIFT, sdpa),
        "reference": ours("reference"),
        "cpp": ours("cpp"),
    }


def step(run, x: Tensor, weight: Tensor, table: Tensor, heads: int, grad: Tensor) -> list[Tensor]:
    qkv = torch.nn.functional.linear(x, weight).unflatten(-1, (3, heads, -1))
    out = run(qkv, table)
    return [out, *torch.autograd.grad(out, (x, weight, table), grad)]


def measure(shape: str, rounds: int, allocator: str) -> list[dict]:
    batch, grid, channels, heads = SHAPES[shape]
    torch.manual_seed(0)
    made = [torch.randn(batch, grid, grid, grid, channels), torch.randn(3 * channels, channels) * channels**-0.5,
            torch.randn(343, heads)]  # fmt: skip
    x, weight, table = (t.requires_grad_() for t in made)
    grad = torch.randn(batch, grid, grid, grid, channels)
    runs = contenders(grid)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, table)]
    truth = step(runs["reference"], exact[0], exact[1], exact[2], heads, grad.double())
    for name, run in runs.items():
        for got, expected in zip(step(run, x, weight, table, heads, grad), truth, strict=True):
            error = ((got - expected).abs().max() / expected.abs().max()).item()
            if error > 2e-5:
                sys.exit(f"{name} is wrong at {shape}: relative error {error:.1e}; no row is written")
    p50 = interleaved({n: lambda run=run: step(run, x, weight, table, heads, grad) for n, run in runs.items()}, rounds)
    return [
        {
            **environment(), "allocator": allocator, "op": "window_attention", "backend": name, "shape": shape,
            "sizes": {"batch": batch, "grid": [grid] * 3, "channels": channels, "heads": heads, "window": WINDOW,
                      "shift": SHIFT},
            "pass": "forward + backward, QKV projection included", "dtype": "float32", "ms_p50": round(value, 2),
            "rounds": rounds, "ratio": round(p50["monai eager"] / value, 2), "ratio_to": "monai eager",
        }
        for name, value in p50.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Window attention on CPU, forward and backward.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--one", nargs=2, metavar=("SHAPE", "ALLOCATOR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], options.rounds, options.one[1])))
        return
    for shape in options.shapes:
        for allocator in ALLOCATORS:
            rows = apart(__file__, "--one", shape, allocator, "--rounds", options.rounds, allocator=allocator)
            for row in rows:
                print(f"{shape}  {allocator:<8} {row['backend']:<12} {row['ms_p50']:8.1f} ms  x{row['ratio']}")
            append("window_attention", rows)


if __name__ == "__main__":
    main()
