"""Window attention on a GPU, forward and backward: each backend beside what a Swin would use otherwise.

    python benchmarks/window_attention_gpu.py [--dtype bfloat16] [--shapes "stage 1" ...]
    python benchmarks/window_attention_gpu.py --device cpu --batch 1 --rounds 1 --shapes "stage 4"  # only that it runs

SMIT's stages at 128^3, window 4, shift 2 (kernels.md, section 5). The attention core alone: qkv is given. A contender
that is wrong against fp64 of the first sample, or does not run, has no row and says why.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rows import append, environment
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from window_attention import SHIFT, WINDOW, eager, partitioned, sdpa, shift_mask

import medfast_kernels as mk

SHAPES = {"stage 1": (64, 48, 4), "stage 2": (32, 96, 4), "stage 3": (16, 192, 8), "stage 4": (8, 384, 16)}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def contenders(grid: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    mask = shift_mask(grid).to(device, dtype)

    def ours(name: str):
        def run(qkv, table):
            with mk.backend(name):
                return mk.window_attention(qkv, table, window=WINDOW, shift=SHIFT)

        return run

    def monai(qkv, table):
        return partitioned(qkv, table.to(dtype), mask, eager)

    def flexible(q, k, v, bias, mask):
        windows = len(mask)

        def score(value, b, h, i, j):
            return value + bias[h, i, j] + mask[b % windows, i, j]

        return flex.flex_attention(q, k, v, score_mod=score)

    return {
        "monai eager": monai,
        "monai compiled": torch.compile(monai),
        "sdpa + mask": lambda qkv, table: partitioned(qkv, table.to(dtype), mask, sdpa),
        "flex": torch.compile(lambda qkv, table: partitioned(qkv, table.to(dtype), mask, flexible)),
        **{name: ours(name) for name in ("reference", "triton", "cuda", "cpp")},
    }


def step(run: Callable, qkv: Tensor, table: Tensor, grad: Tensor) -> list[Tensor]:
    out = run(qkv, table)
    return [out.detach(), *torch.autograd.grad(out, (qkv, table), grad)]


def wrong(got: list[Tensor], truth: list[Tensor], allowed: float) -> str | None:
    errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, truth, strict=True)]
    return None if all(error <= allowed for error in errors) else f"relative errors {errors}, allowed {allowed}"


def milliseconds(call: Callable[[], object], device: str) -> float:
    if device != "cuda":
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(shape: str, batch: int, dtype: torch.dtype, device: str, rounds: int) -> list[dict]:
    grid, channels, heads = SHAPES[shape]
    torch.manual_seed(0)
    qkv = torch.randn(batch, grid, grid, grid, 3, heads, channels // heads, device=device, dtype=dtype)
    table = torch.randn(343, heads, device=device)
    grad = torch.randn(batch, grid, grid, grid, channels, device=device, dtype=dtype)
    few = [qkv[:1].clone().requires_grad_(), table.requires_grad_(), grad[:1]]
    exact = [x.detach().double().requires_grad_() for x in few]
    truth = step(contenders(grid, torch.float64, device)["reference"], *exact)
    qkv.requires_grad_()
    times: dict[str, dict[str, float]] = {}
    for name, run in contenders(grid, dtype, device).items():
        try:
            reason = wrong(step(run, *few), truth, TOLERANCE[dtype])
        except Exception as error:  # noqa: BLE001, a contender may fail in ways of its own; the row says nothing then
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if reason is not None:
            print(f"{shape}  {name:<16} no row: {reason}", flush=True)
            continue
        for _ in range(2):
            step(run, qkv, table, grad)
        with torch.no_grad():
            ahead = [milliseconds(lambda run=run: run(qkv, table), device) for _ in range(rounds)]
        both = [milliseconds(lambda run=run: step(run, qkv, table, grad), device) for _ in range(rounds)]
        times[name] = {"forward": statistics.median(ahead), "forward + backward": statistics.median(both)}
    sizes = {"batch": batch, "grid": [grid] * 3, "channels": channels, "heads": heads, "window": WINDOW, "shift": SHIFT}
    return [
        {
            **environment(device), "op": "window_attention", "backend": name, "shape": shape, "sizes": sizes,
            "pass": which, "dtype": str(dtype).removeprefix("torch."), "ms_p50": round(value, 4), "rounds": rounds,
            "ratio": round(times["monai eager"][which] / value, 2), "ratio_to": "monai eager",
            "GB_per_s_of_floor": round((4 if which == "forward" else 11) * grad.nbytes / value / 1e6, 1),
        }
        for name, row in times.items() for which, value in row.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Window attention on a GPU, forward and backward.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    options = parser.parse_args()
    for shape in options.shapes:
        rows = measure(shape, options.batch, getattr(torch, options.dtype), options.device, options.rounds)
        for row in rows:
            print(
                f"{shape}  {row['backend']:<16} {row['pass']:<18} {row['ms_p50']:9.3f} ms  x{row['ratio']}", flush=True
            )
        if options.device == "cuda":
            append("window_attention_gpu", rows)


if __name__ == "__main__":
    main()
