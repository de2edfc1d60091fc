"""Window attention on a GPU, forward and backward: each backend beside what a Swin would use otherwise.

    python benchmarks/window_attention_gpu.py [--dtype bfloat16] [--shapes "stage 1" ...] [--contenders triton ...]
    python benchmarks/window_attention_gpu.py --device cpu --batch 1 --rounds 1 --shapes "stage 4"  # only that it runs

SMIT's stages at 128^3, window 4, and MONAI SwinUNETR's, window 7, both shifted (kernels.md, section 5). The attention
core alone: qkv is given. A contender that is wrong against fp64, or does not run, has no row and says why.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from baselines import Partitioned, eager, sdpa
from on_gpu import TOLERANCE, copied, milliseconds, no_row, on, peak_extra, why_no_row, write, wrong
from torch import Tensor
from torch.nn.attention import flex_attention as flex

import medfast_kernels as mk


class Shape(NamedTuple):
    grid: int
    heads: int
    dim: int
    window: int
    shift: int


SHAPES = {
    **{f"stage {i + 1}": Shape(64 >> i, heads, dim, 4, 2) for i, (heads, dim) in enumerate(
        ((4, 12), (4, 24), (8, 24), (16, 24)))},
    **{f"stage {i + 1}, window 7": Shape(64 >> i, 3 << i, 16, 7, 3) for i in range(4)},
}  # fmt: skip
BASELINE = "monai eager"
PASSES = {"forward": 4, "forward + backward": 11}  # reads and writes of the activation that cannot be avoided


def flexible(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    windows = len(mask)

    def score(value, b, h, i, j):
        return value + bias[h, i, j] + mask[b % windows, i, j]

    return flex.flex_attention(q, k, v, score_mod=score)  # type: ignore[return-value]  # no auxiliary output asked for


def contenders(shape: Shape, device: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    theirs = {name: Partitioned(shape.grid, shape.window, shape.shift, attend, device)
              for name, attend in (("eager", eager), ("sdpa", sdpa), ("flex", flexible))}  # fmt: skip

    def ours(qkv: Tensor, table: Tensor) -> Tensor:
        return mk.window_attention(qkv, table, window=shape.window, shift=shape.shift, clip=False)

    return {
        BASELINE: theirs["eager"],
        **{name: on(name, ours) for name in ("triton", "cuda", "reference", "cpp")},
        "sdpa + mask": theirs["sdpa"],
        "monai compiled": torch.compile(theirs["eager"], dynamic=False),
        "flex": torch.compile(theirs["flex"], dynamic=False),
    }


def step(run: Callable, qkv: Tensor, table: Tensor, grad: Tensor) -> list[Tensor]:
    out = run(qkv, table)
    return [out.detach(), *torch.autograd.grad(out, (qkv, table), grad)]


def truth_of(run: Callable, qkv: Tensor, table: Tensor, grad: Tensor) -> list[Tensor]:
    """In fp64, sample by sample: the weights of all of them may not fit."""
    parts = []
    for i in range(len(qkv)):
        one, exact = (x.detach().double().requires_grad_() for x in (qkv[i : i + 1], table))
        parts.append(step(run, one, exact, grad[i : i + 1].double()))
    outs, grads, tables = zip(*parts, strict=True)
    return [torch.cat(outs), torch.cat(grads), torch.stack(tables).sum(0)]


def measure(name: str, options: argparse.Namespace) -> None:
    shape, dtype, device = SHAPES[name], getattr(torch, options.dtype), options.device
    torch.manual_seed(0)
    cells = (options.batch, *[shape.grid] * 3)
    qkv = torch.randn(*cells, 3, shape.heads, shape.dim, device=device, dtype=dtype).requires_grad_()
    table = torch.randn((2 * shape.window - 1) ** 3, shape.heads, device=device).requires_grad_()
    grad = torch.randn(*cells, shape.heads * shape.dim, device=device, dtype=dtype)
    runs, copy, base = contenders(shape, device), copied(device), {}
    truth = truth_of(runs["reference"], qkv, table, grad)
    for backend in [BASELINE, *[one for one in options.contenders if one != BASELINE]]:
        run = runs[backend]

        def right(run=run) -> str | None:
            return wrong(step(run, qkv, table, grad), truth, TOLERANCE[dtype])

        reason = why_no_row(right)
        if reason is not None:
            no_row(name, backend, reason)
            continue
        calls = {"forward": lambda run=run: torch.no_grad()(run)(qkv, table),
                 "forward + backward": lambda run=run: step(run, qkv, table, grad)}  # fmt: skip
        for which, call in calls.items():
            took = milliseconds(call, device, options.rounds)
            if backend == BASELINE:
                base[which] = took
            sizes = {**shape._asdict(), "batch": options.batch}
            row = {"op": "window_attention", "backend": backend, "shape": name, "sizes": sizes, "pass": which}
            row |= {"dtype": options.dtype, "ms_p50": round(took, 4), "rounds": options.rounds}
            row |= {"peak_extra_mib": peak_extra(call, device)}
            row |= {"ratio": round(base[which] / took, 2), "ratio_to": BASELINE} if which in base else {}
            floor = PASSES[which] * grad.nbytes
            write("window_attention_gpu", device, {**row, "fraction_of_copy": round(floor / copy / took, 3)})


def main() -> None:
    names = list(contenders(SHAPES["stage 4"], "cpu"))
    parser = argparse.ArgumentParser(description="Window attention on a GPU, forward and backward.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--contenders", nargs="*", default=names, choices=names, help=f"beside {BASELINE}")
    options = parser.parse_args()
    for shape in options.shapes:
        measure(shape, options)


if __name__ == "__main__":
    main()
