"""Attention masks and random ids on CPU: this package against what a masked-image model would use otherwise.

    python benchmarks/masking.py            # appends rows to benchmarks/results/masking.jsonl

Masks, ids and hints are compared with the definition first, and the baselines with both: no row on a red check, and
none of a working tree that differs from its commit. Each row is one process, with the allocator as it comes or told to
keep its pages ("tuned"). The rounds of all contenders are interleaved. Ours gives the mask, the ids that are hidden and
those that are visible; ``topk + scatter`` gives the mask alone. ``fraction_of_copy``: the bytes of attention and mask,
or of the ids, over the time, as a part of what torch copies; ``peak_extra_mib``: memory beside the inputs.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial

import ceilings
import torch
from apart import ALLOCATORS, apart
from interleaved import interleaved
from rows import append, environment
from torch import Tensor

import medfast_kernels as mk

BATCH, RATIO, HINT = 8, 0.7, 0.1
TOKENS = (512, 4096, 32768)


def topk_scatter(attention: Tensor) -> Tensor:
    n = attention.shape[1]
    where = torch.zeros(attention.shape, dtype=torch.bool)
    return where.scatter_(1, attention.topk(int(RATIO * n), dim=1).indices, True)


def attmask(attention: Tensor) -> Tensor:
    """The sequence of AttMask with hints: two sorts, a draw without replacement from the top, two writes."""
    batch, n = attention.shape
    order = attention.argsort(dim=1, descending=True)
    where = torch.zeros(batch, n, dtype=torch.bool).scatter_(1, order[:, : int(RATIO * n)], True)
    top = order[:, : int(HINT * n)]
    shown = torch.multinomial(torch.ones(top.shape), int(HINT * RATIO * n))
    return where.scatter_(1, top.gather(1, shown), False)


def argsort_ids(draw: Tensor, count: int) -> Tensor:
    """MAE's random choice: the ids of the smallest of n uniform numbers."""
    return draw.argsort(dim=1)[:, :count].sort(dim=1).values


def on(name: str, function):
    def run():
        with mk.backend(name):
            return function()

    return run


def check(n: int, attention: Tensor, key: mk.Key) -> None:
    """Everything that is timed gives what it should, or nothing is written."""
    for options in ({}, {"hint": HINT, "key": key}, {"hint": HINT, "hint_mode": "top"}):
        with mk.backend("cpp"):
            ours = mk.attention_mask(attention, RATIO, **options)
        theirs = mk.reference.attention_mask(attention, RATIO, **options)
        if not all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            sys.exit(f"attention_mask in C++ is not the definition at n = {n}, {options}; no row is written")
    with mk.backend("cpp"):
        ids = mk.random_ids(n, n // 4, key=key)
    if not torch.equal(ids, mk.reference.random_ids(n, n // 4, key=key)):
        sys.exit(f"random_ids in C++ is not the definition at n = {n}; no row is written")
    if not torch.equal(topk_scatter(attention), mk.reference.attention_mask(attention, RATIO)[0]):
        sys.exit(f"topk + scatter makes another mask at n = {n}: the contenders do not do the same")
    if not torch.equal(attmask(attention).sum(1), mk.reference.attention_mask(attention, RATIO, hint=HINT)[0].sum(1)):
        sys.exit(f"AttMask's sequence hides another number at n = {n}: the contenders do not do the same")


def measure(n: int, rounds: int, allocator: str) -> list[dict]:
    torch.manual_seed(0)
    attention = torch.randn(BATCH, n).softmax(dim=1)
    key = mk.Key(0, sample=torch.arange(BATCH)).at(mk.Role.HINTS)
    check(n, attention, key)
    plain = partial(mk.attention_mask, attention, RATIO)
    hints = partial(mk.attention_mask, attention, RATIO, hint=HINT, key=key)
    ids = partial(mk.random_ids, n, n // 4, key=key)
    cases = {  # operator: the baseline first
        "attention_mask": {"topk + scatter": lambda: topk_scatter(attention), "reference": on("reference", plain),
                           "cpp": on("cpp", plain)},
        "attention_mask with hints": {"attmask": lambda: attmask(attention), "reference": on("reference", hints),
                                      "cpp": on("cpp", hints)},
        "random_ids": {"rand + argsort": lambda: argsort_ids(torch.rand(BATCH, n), n // 4),
                       "reference": on("reference", ids), "cpp": on("cpp", ids)},
    }  # fmt: skip
    moved = {"attention_mask": 5 * n, "attention_mask with hints": 5 * n, "random_ids": 8 * (n // 4)}
    rows, ceiling = [], ceilings.copy(BATCH * n)
    for operator, runs in cases.items():
        times = interleaved(runs, rounds)
        baseline = next(iter(runs))
        rows += [
            {
                **environment(), "allocator": allocator, "op": operator, "backend": name, "shape": f"n = {n}",
                "sizes": {"batch": BATCH, "tokens": n, "ratio": RATIO, "hint": HINT}, "dtype": "float32",
                "ms_p50": round(value, 4), "rounds": rounds, "ratio": round(times[baseline] / value, 2),
                "ratio_to": baseline, "fraction_of_copy": round(BATCH * moved[operator] / value / ceiling, 3),
                "peak_extra_mib": ceilings.peak_extra(runs[name]),
            }
            for name, value in times.items()
        ]  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention masks and random ids on CPU.")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--one", nargs=2, metavar=("TOKENS", "ALLOCATOR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(int(options.one[0]), options.rounds, options.one[1])))
        return
    for n in options.tokens:
        for allocator in ALLOCATORS:
            rows = apart(__file__, "--one", n, allocator, "--rounds", options.rounds, allocator=allocator)
            for row in rows:
                where = f"{row['op']:<26} {row['shape']:<10} {allocator:<8} {row['backend']:<15}"
                print(f"{where} {row['ms_p50']:9.3f} ms  x{row['ratio']}")
            append("masking", rows)


if __name__ == "__main__":
    main()
