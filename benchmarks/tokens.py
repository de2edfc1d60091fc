"""Dropping and restoring tokens, and class attention, on CPU: this package against plain torch.

    python benchmarks/tokens.py             # appends rows to benchmarks/results/tokens.jsonl

Each row is one process, with the allocator as it comes or told to keep its pages ("tuned"). Outputs and gradients are
compared with the reference in fp64 first: no row on a red check, and none of a working tree that differs from its
commit. The rounds of all contenders are interleaved. ``fraction_of_copy``: the bytes that must move, over the time, as
a part of what torch copies in the same process; ``peak_extra_mib``: memory beside the inputs.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import NamedTuple

import ceilings
import torch
from apart import ALLOCATORS, apart
from interleaved import interleaved
from rows import append, environment
from torch import Tensor

import medfast_kernels as mk

BATCH, TOKENS, KEPT = 8, 4096, 1024
WIDTHS = (192, 768)
HEADS = 12


class Case(NamedTuple):
    """tensors: leaves with gradients; runs: contender -> function of them, the baseline first; floats: of the floor."""

    tensors: tuple[Tensor, ...]
    runs: dict
    floats: int


def ours(name: str, function):
    def run(*tensors):
        with mk.backend(name):
            return function(*tensors)

    return run


def mae_restore(y: Tensor, fill: Tensor, inverse: Tensor) -> Tensor:
    """MAE's decoder: mask tokens behind the visible ones, then all of them gathered into place."""
    whole = torch.cat((y, fill.expand(y.shape[0], TOKENS - KEPT, -1)), dim=1)
    return whole.gather(1, inverse[..., None].expand(-1, -1, y.shape[2]))


def einsum_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (torch.einsum("bhd,bnhd->bhn", q, k) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return torch.einsum("bhn,bnhd->bhd", weights, v).flatten(1), weights.mean(1)[:, 1:]


def cases(d: int, dtype: torch.dtype) -> dict[str, Case]:
    draw = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(TOKENS, generator=draw) for _ in range(BATCH)])
    order = torch.cat((order[:, :KEPT].sort(1).values, order[:, KEPT:].sort(1).values), dim=1)
    ids, inverse = order[:, :KEPT].contiguous(), order.argsort(dim=1)
    index = ids[..., None].expand(-1, -1, d)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()

    x, y, fill = made(BATCH, TOKENS, d), made(BATCH, KEPT, d), made(d)
    heads = made(BATCH, HEADS, d // HEADS), *(made(BATCH, 1 + KEPT, HEADS, d // HEADS) for _ in range(2))
    drop, restore = lambda x: mk.drop_tokens(x, ids), lambda y, fill: mk.restore_tokens(y, ids, TOKENS, fill)
    row = BATCH * d
    return {
        "drop_tokens": Case((x,), {"gather": lambda x: x.gather(1, index), "reference": ours("reference", drop),
                                   "cpp": ours("cpp", drop)}, row * (4 * KEPT + TOKENS - KEPT)),
        "restore_tokens": Case((y, fill), {"mae": lambda y, fill: mae_restore(y, fill, inverse),
                                           "reference": ours("reference", restore), "cpp": ours("cpp", restore)},
                               row * (2 * TOKENS + 2 * KEPT)),
        "class_attention": Case(heads, {"einsum": einsum_attention, "reference": ours("reference", mk.class_attention),
                                        "cpp": ours("cpp", mk.class_attention)}, row * 6 * KEPT),
    }  # fmt: skip


def step(run, tensors: tuple[Tensor, ...], cotangents: list[Tensor]) -> list[Tensor]:
    out = run(*tensors)
    out = out if isinstance(out, tuple) else (out,)
    return [*out, *torch.autograd.grad(out, tensors, cotangents)]


def check(name: str, case: Case, exact: Case, cotangents: list[Tensor]) -> None:
    truth = step(exact.runs["reference"], exact.tensors, [c.double() for c in cotangents])
    for contender, run in case.runs.items():
        for got, expected in zip(step(run, case.tensors, cotangents), truth, strict=True):
            error = ((got - expected).abs().max() / expected.abs().max()).item()
            if not error < 1e-5:
                sys.exit(f"{contender} is wrong in {name}: relative error {error:.1e}; no row is written")


def measure(d: int, rounds: int, allocator: str) -> list[dict]:
    rows, doubles = [], cases(d, torch.float64)
    ceiling = ceilings.copy(BATCH * TOKENS * d)
    for name, case in cases(d, torch.float32).items():
        with torch.no_grad():
            out = case.runs["reference"](*case.tensors)
        cotangents = [torch.randn_like(x) for x in (out if isinstance(out, tuple) else (out,))]
        check(name, case, doubles[name], cotangents)
        runs = {key: lambda run=run, c=case, g=cotangents: step(run, c.tensors, g) for key, run in case.runs.items()}
        times = interleaved(runs, rounds)
        baseline = next(iter(runs))
        rows += [
            {
                **environment(), "allocator": allocator, "op": name, "backend": key, "shape": f"d = {d}",
                "sizes": {"batch": BATCH, "tokens": TOKENS, "kept": KEPT, "dim": d}, "pass": "forward + backward",
                "dtype": "float32", "ms_p50": round(value, 3), "rounds": rounds,
                "ratio": round(times[baseline] / value, 2), "ratio_to": baseline,
                "fraction_of_copy": round(4 * case.floats / value / ceiling, 2),
                "peak_extra_mib": ceilings.peak_extra(runs[key]),
            }
            for key, value in times.items()
        ]  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Dropping and restoring tokens, class attention, on CPU.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--widths", nargs="*", type=int, default=list(WIDTHS))
    parser.add_argument("--one", nargs=2, metavar=("WIDTH", "ALLOCATOR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(int(options.one[0]), options.rounds, options.one[1])))
        return
    for d in options.widths:
        for allocator in ALLOCATORS:
            rows = apart(__file__, "--one", d, allocator, "--rounds", options.rounds, allocator=allocator)
            for row in rows:
                print(f"{row['op']:<16} {row['shape']:<8} {allocator:<8} {row['backend']:<10} {row['ms_p50']:8.2f} ms  "
                      f"x{row['ratio']}  {row['fraction_of_copy']:.0%} of copy")  # fmt: skip
            append("tokens", rows)


if __name__ == "__main__":
    main()
