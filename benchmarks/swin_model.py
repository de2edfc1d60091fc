"""A whole MONAI SwinTransformer on CPU, forward and backward, before and after ``mk.swin.accelerate``.

    python benchmarks/swin_model.py              # appends rows to benchmarks/results/swin_model.jsonl
    python benchmarks/swin_model.py --profile    # where the time of a step goes, before and after; writes nothing

SMART's sizes: embedding 48, depths 2-2-8-2, heads 4-4-8-16, window 4, patch 2, at 64^3 with batch 2. Each row is one
process with the allocator as it comes or told to keep its pages ("tuned"). Before a row is written, the accelerated
model's output and gradients are compared with MONAI's in fp64, on a smaller volume. ``of_matmul``: the products of
MONAI's model over the time, as a part of what torch's own product of two large matrices reaches in the same process;
``peak_extra_mib``: memory beside the inputs.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys

import ceilings
import torch
from apart import ALLOCATORS, apart
from interleaved import interleaved
from monai.networks.nets.swin_unetr import SwinTransformer
from rows import append, environment
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import medfast_kernels as mk

SIZES = {"in_chans": 1, "embed_dim": 48, "window_size": (4, 4, 4), "patch_size": (2, 2, 2), "depths": (2, 2, 8, 2),
         "num_heads": (4, 4, 8, 16), "drop_path_rate": 0.0}  # fmt: skip
BATCH, SIDE = 2, 64


def step(model: nn.Module, volume: Tensor) -> list[Tensor]:
    """The five maps of one forward pass and the gradients of a backward pass from all of them.

    The cotangent of a map is its own square: one that is constant would end at the last LayerNorm.
    """
    maps = model(volume)
    model.zero_grad(set_to_none=True)
    torch.autograd.backward(maps, [m.detach() ** 2 for m in maps])
    return [*maps, *[p.grad for p in model.parameters() if p.grad is not None]]


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    theirs = SwinTransformer(**SIZES)
    ours = copy.deepcopy(theirs)
    left = [row for row in mk.swin.accelerate(ours) if row.new is None]
    if left:
        sys.exit(f"MONAI's attention was not swapped everywhere, no row is written: {left}")
    return {"monai": theirs, "accelerated": ours}


def check(contenders: dict[str, nn.Module]) -> None:
    small = torch.randn(1, 1, 34, 32, 20, dtype=torch.float64)
    expected, got = (step(copy.deepcopy(model).double(), small) for model in contenders.values())
    for a, b in zip(got, expected, strict=True):
        error = ((a - b).abs().max() / b.abs().max().clamp_min(1e-6)).item()
        if error > 1e-8:
            sys.exit(f"the accelerated model is wrong: relative error {error:.1e} in fp64; no row is written")


def measure(rounds: int, allocator: str) -> list[dict]:
    contenders = models()
    check(contenders)
    volume = torch.randn(BATCH, 1, SIDE, SIDE, SIDE)
    calls = {name: lambda model=model: step(model, volume) for name, model in contenders.items()}
    p50, ceiling = interleaved(calls, rounds), ceilings.matmul()
    with FlopCounterMode(display=False) as counted:
        calls["monai"]()
    return [
        {
            **environment(), "allocator": allocator, "op": "swin_model", "backend": name,
            "sizes": {"batch": BATCH, "volume": [SIDE] * 3, **SIZES}, "pass": "forward + backward", "dtype": "float32",
            "ms_p50": round(value, 1), "rounds": rounds, "ratio": round(p50["monai"] / value, 3), "ratio_to": "monai",
            "of_matmul": round(counted.get_total_flops() / value / ceiling, 2),
            "peak_extra_mib": ceilings.peak_extra(calls[name]),
        }
        for name, value in p50.items()
    ]  # fmt: skip


def show_profile() -> None:
    for name, model in models().items():
        volume = torch.randn(BATCH, 1, SIDE, SIDE, SIDE)
        step(model, volume)
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            step(model, volume)
        print(name, trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=22), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="MONAI's SwinTransformer on CPU, before and after accelerate.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--one", metavar="ALLOCATOR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.profile:
        show_profile()
    elif options.one:
        print(json.dumps(measure(options.rounds, options.one)))
    else:
        for allocator in ALLOCATORS:
            one = "--one", allocator, "--rounds", options.rounds, "--threads", options.threads
            rows = apart(__file__, *one, allocator=allocator)
            for row in rows:
                speed = f"{row['ms_p50']:8.1f} ms  x{row['ratio']}"
                print(f"{allocator:<8} {row['backend']:<12} {speed}  {row['peak_extra_mib']} MiB")
            append("swin_model", rows)


if __name__ == "__main__":
    main()
