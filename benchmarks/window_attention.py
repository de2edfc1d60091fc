"""Window attention on CPU, forward with backward and forward alone: this package against what a Swin would use else.

    python benchmarks/window_attention.py            # appends rows to benchmarks/results/window_attention.jsonl

Both sides include the QKV projection. Each row is one process, with the allocator as it comes or told to keep its pages
("tuned"), because page faults are half the time of what allocates much. Outputs and gradients are compared with the
reference in fp64 first: no row on a red check, and none of a working tree that differs from its commit. The rounds of
all contenders are interleaved. FlexAttention has no backward on CPU, so it is in the forward alone. ``of_matmul``: the
products that the operation is made of, none of them made twice, over the time, as a part of what torch's own product of
two large matrices reaches in the same process; ``peak_extra_mib``: memory beside the inputs.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import ceilings
import torch
from apart import ALLOCATORS, apart
from baselines import Partitioned, eager, flex, sdpa
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


PASSES = {True: "forward + backward, QKV projection included", False: "forward, QKV projection included"}


def contenders(grid: int, backward: bool) -> dict:
    def ours(name: str):
        def run(qkv, table):
            with mk.backend(name):
                return mk.window_attention(qkv, table, window=WINDOW, shift=SHIFT)

        return run

    runs = {
        "monai eager": Partitioned(grid, WINDOW, SHIFT, eager),
        "monai compiled": torch.compile(Partitioned(grid, WINDOW, SHIFT, eager), dynamic=False),
        "sdpa + mask": Partitioned(grid, WINDOW, SHIFT, sdpa),
        "reference": ours("reference"),
        "cpp": ours("cpp"),
    }
    return runs if backward else {**runs, "flex attention": Partitioned(grid, WINDOW, SHIFT, flex)}


def step(run, x: Tensor, weight: Tensor, table: Tensor, heads: int, grad: Tensor | None) -> list[Tensor]:
    with torch.set_grad_enabled(grad is not None):
        qkv = torch.nn.functional.linear(x, weight).unflatten(-1, (3, heads, -1))
        out = run(qkv, table)
    return [out] if grad is None else [out, *torch.autograd.grad(out, (x, weight, table), grad)]


def problem(shape: str) -> tuple[list[Tensor], Tensor]:
    """x, projection and table, and a gradient of the output."""
    batch, grid, channels, heads = SHAPES[shape]
    torch.manual_seed(0)
    x = torch.randn(batch, grid, grid, grid, channels)
    inputs = [x, torch.randn(3 * channels, channels) * channels**-0.5, torch.randn(343, heads)]
    return [t.requires_grad_() for t in inputs], torch.randn_like(x)


def measure(shape: str, rounds: int, allocator: str, backward: bool) -> list[dict]:
    batch, grid, channels, heads = SHAPES[shape]
    inputs, grad = problem(shape)
    runs = contenders(grid, backward)
    given: tuple[Any, ...] = (*inputs, heads, grad if backward else None)
    x, weight, table = (t.detach().double().requires_grad_() for t in inputs)
    truth = step(runs["reference"], x, weight, table, heads, grad.double() if backward else None)
    for name, run in runs.items():
        for got, expected in zip(step(run, *given), truth, strict=True):
            error = ((got - expected).abs().max() / expected.abs().max()).item()
            if error > 2e-5:
                sys.exit(f"{name} is wrong at {shape}: relative error {error:.1e}; no row is written")
    calls = {name: lambda run=run: step(run, *given) for name, run in runs.items()}
    p50 = interleaved(calls, rounds)
    ceiling, tokens = ceilings.matmul(), batch * grid**3
    products = 2 * tokens * channels * (3 * channels + 2 * WINDOW**3) * (3 if backward else 1)
    extra = {name: ceilings.peak_extra(call) for name, call in calls.items()}
    return [
        {
            **environment(), "allocator": allocator, "op": "window_attention", "backend": name, "shape": shape,
            "sizes": {"batch": batch, "grid": [grid] * 3, "channels": channels, "heads": heads, "window": WINDOW,
                      "shift": SHIFT},
            "pass": PASSES[backward], "dtype": "float32", "ms_p50": round(value, 2),
            "rounds": rounds, "ratio": round(p50["monai eager"] / value, 2), "ratio_to": "monai eager",
            "of_matmul": round(products / value / ceiling, 2), "peak_extra_mib": extra[name],
        }
        for name, value in p50.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Window attention on CPU.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--one", nargs=3, metavar=("SHAPE", "ALLOCATOR", "BACKWARD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        shape, allocator, backward = options.one
        print(json.dumps(measure(shape, options.rounds, allocator, backward == "True")))
        return
    for shape in options.shapes:
        for allocator in ALLOCATORS:
            for backward in PASSES:
                one = ("--one", shape, allocator, backward, "--rounds", options.rounds)
                rows = apart(__file__, *one, allocator=allocator)
                for row in rows:
                    told = f"{row['backend']:<14} {row['ms_p50']:8.1f} ms  x{row['ratio']}  {row['peak_extra_mib']} MiB"
                    print(f"{shape}  {allocator:<8} {'both' if backward else 'forward':<8} {told}", flush=True)
                append("window_attention", rows)


if __name__ == "__main__":
    main()
