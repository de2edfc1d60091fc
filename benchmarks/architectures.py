"""Networks against MONAI's of the same weights on CPU, forward and backward: time and peak memory.

    python benchmarks/architectures.py              # appends rows to benchmarks/results/architectures.jsonl
    python benchmarks/architectures.py --profile    # where the time of a step of ours goes; writes nothing

SMART's Swin at 64^3 with batch 2, all five maps that a U-Net reads; Swin UNETR at 96^3, one volume. MONAI's weights
are ours by ``medfast.architectures.interop``. Before a row is written, outputs and gradients are compared in fp64 on a
smaller volume. The rounds of both contenders take turns in one process whose allocator keeps its pages ("tuned");
memory is what one step adds to a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from apart import apart
from interleaved import interleaved
from monai.networks.nets.swin_unetr import SwinTransformer, SwinUNETR
from rows import append, environment
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from medfast.architectures import interop

SWIN = {"name": "swin", "merge": "monai", "clip": True, "bias_index": "sliced", "drop_path": 0.0, "taps": "monai"}
UNETR = {"name": "swin_unetr", "bias_index": "sliced"}


@dataclass(frozen=True)
class Case:
    """kind: format of MONAI's weights. small: a volume for the comparison. goal: times faster than MONAI."""

    section: dict[str, Any]
    kind: str
    theirs: Callable[[], nn.Module]
    batch: int
    side: int
    small: tuple[int, int, int]
    goal: float


CASES = {
    "SMART's Swin": Case(
        SWIN, "monai_swin",
        lambda: SwinTransformer(1, 48, (4,) * 3, (2,) * 3, (2, 2, 8, 2), (4, 4, 8, 16), patch_norm=True),
        batch=2, side=64, small=(34, 32, 20), goal=1.3,
    ),
    "Swin UNETR": Case(
        UNETR, "monai_swin_unetr", lambda: SwinUNETR(1, 2, feature_size=48), batch=1, side=96, small=(64, 32, 32),
        goal=1.15,
    ),
}  # fmt: skip


def network(case: Case, who: str) -> nn.Module:
    torch.manual_seed(0)
    theirs = case.theirs()
    if who == "monai":
        return theirs
    ours = interop.ARCHITECTURES[case.section["name"]](**{k: v for k, v in case.section.items() if k != "name"})
    interop.fill(ours, interop.to_ours(theirs.state_dict(), case.kind, case.section["name"])[0])
    return ours


def maps(net: nn.Module, volume: Tensor) -> list[Tensor]:
    """Logits, or the five maps of an encoder, channels first."""
    made = net(volume)
    if isinstance(made, Tensor):
        return [made]
    return list(made) if isinstance(made, list) else [x.movedim(-1, 1) for x in made.extra["taps"]]


def step(net: nn.Module, volume: Tensor) -> list[Tensor]:
    """Forward and backward. The cotangent of a map is its square: a constant one would end at the last LayerNorm."""
    made = maps(net, volume)
    net.zero_grad(set_to_none=True)
    torch.autograd.backward(made, [m.detach() ** 2 for m in made])
    return made


def check(case: Case) -> None:
    """Exits where outputs or gradients differ in fp64."""
    nets = {who: network(case, who).double() for who in ("monai", "ours")}
    small = torch.randn(1, 1, *case.small, dtype=torch.float64)
    found = {who: step(net, small) for who, net in nets.items()}
    grads = {who: {n: p.grad for n, p in net.named_parameters() if p.grad is not None} for who, net in nets.items()}
    grads["monai"], _ = interop.to_ours(grads["monai"], case.kind, case.section["name"])
    if set(grads["monai"]) != set(grads["ours"]):
        sys.exit("the two networks have gradients for different weights; no row is written")
    pairs = [
        *zip(found["monai"], found["ours"], strict=True),
        *((grads["monai"][n], g) for n, g in grads["ours"].items()),
    ]
    largest = max(a.abs().max() for a, _ in pairs[len(found["ours"]) :])
    for expected, got in pairs:
        error = ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-6 * largest)).item()
        if error > 1e-7:
            sys.exit(f"our network is not MONAI's: relative error {error:.1e} in fp64; no row is written")


def measure(name: str, rounds: int) -> list[dict]:
    case = CASES[name]
    check(case)
    volume = torch.randn(case.batch, 1, *(case.side,) * 3)
    nets = {who: network(case, who) for who in ("monai", "ours")}
    times = interleaved({who: lambda net=net: step(net, volume) for who, net in nets.items()}, rounds)
    return [
        {
            **environment(), "allocator": "tuned", "op": name, "backend": who,
            "sizes": {"batch": case.batch, "side": case.side}, "pass": "forward + backward", "dtype": "float32",
            "ms_p50": round(ms, 1), "rounds": rounds, "ratio": round(times["monai"] / ms, 3), "ratio_to": "monai",
            "goal": case.goal,
        }
        for who, ms in times.items()
    ]  # fmt: skip


def peak(name: str, who: str) -> int:
    """MB that one step adds to the resident memory of this process."""
    case = CASES[name]
    net, volume = network(case, who), torch.randn(case.batch, 1, *(case.side,) * 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(net, volume)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def profiles(name: str) -> str:
    """Where the time of a step goes, in both."""
    case, tables = CASES[name], []
    volume = torch.randn(case.batch, 1, *(case.side,) * 3)
    for who in ("monai", "ours"):
        net = network(case, who)
        step(net, volume)
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            step(net, volume)
        tables.append(f"{name} {who}\n{trace.key_averages().table(sort_by='self_cpu_time_total', row_limit=24)}")
    return "\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description="Networks against MONAI's of the same weights on CPU.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--one", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--peak", metavar="WHO", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        name = options.one
        made = profiles(name) if options.profile else peak(name, options.peak) if options.peak else None
        print(json.dumps(measure(name, options.rounds) if made is None else made))
        return
    for name in options.cases:
        shared = [__file__, "--one", name, "--rounds", options.rounds, "--threads", options.threads]
        if options.profile:
            print(apart(*shared, "--profile", allocator="tuned"))
            continue
        rows = apart(*shared, allocator="tuned")
        for row in rows:
            row["peak_mb"] = apart(*shared, "--peak", row["backend"])
            print(f"{name:<14} {row['backend']:<6} {row['ms_p50']:9.1f} ms  x{row['ratio']}  {row['peak_mb']} MB")
        append("architectures", rows)


if __name__ == "__main__":
    main()
