"""Contrast, masks, tokens and class attention on a GPU: each backend beside what one would use otherwise.

    python benchmarks/operators_gpu.py [token_contrast attention_mask drop_tokens restore_tokens class_attention]
    python benchmarks/operators_gpu.py --device cpu --rounds 1 --small       # only that it runs

A contender that is wrong (against fp64, or the definition's bits), or does not run, has no row and says why.
``fraction_of_copy``: bytes that must move, over the time, as a part of what a copy moves in the same process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import masking
import torch
from gpu_check_operators import same as same_bits
from on_gpu import TOLERANCE, copied, graphed, milliseconds, no_row, on, peak_extra, why_no_row, write, wrong
from token_contrast import TEMPERATURE, Chunked, Dense
from tokens import einsum_attention
from torch import Tensor

import medfast_kernels as mk

BATCH = 8


class Case(NamedTuple):
    """runs: contender -> function of ``tensors``, the baseline first; truth: on them in fp64; moved: fewest bytes."""

    op: str
    shape: str
    dtype: torch.dtype
    tensors: tuple[Tensor, ...]
    runs: dict[str, Callable[..., Any]]
    truth: Callable[..., Any]
    moved: int | None = None


def token_contrast(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    for n in (64,) if small else (32768, 8192, 100352):
        shape = (2, 8, n // 16, 128)
        z = torch.nn.functional.normalize(torch.randn(shape), dim=-1).to(dtype)
        ours = on("triton", lambda z: mk.token_contrast(z, temperature=TEMPERATURE))
        dense, chunked = Dense(shape, 1.0), Chunked(shape, 1.0)
        runs = {**({"dense": dense} if n < 65536 else {}), "chunked": chunked, "triton": ours}
        yield Case("token_contrast", f"n = {n}", dtype, (z,), runs, chunked)


def drop_tokens(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    n, kept, d, ids, _ = _tokens(small)
    index = ids[..., None].expand(-1, -1, d)
    runs = {"gather": lambda x: x.gather(1, index), "triton": on("triton", lambda x: mk.drop_tokens(x, ids))}
    x = torch.randn(BATCH, n, d).to(dtype)
    yield Case("drop_tokens", f"{n} to {kept}, d = {d}", dtype, (x,), runs, runs["gather"],
               BATCH * d * (3 * kept + n) * x.element_size())  # fmt: skip


def restore_tokens(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    n, kept, d, ids, inverse = _tokens(small)

    def mae(y: Tensor, fill: Tensor) -> Tensor:
        whole = torch.cat((y, fill.expand(BATCH, n - kept, -1)), dim=1)
        return whole.gather(1, inverse[..., None].expand(-1, -1, d))

    runs = {"mae": mae, "triton": on("triton", lambda y, fill: mk.restore_tokens(y, ids, n, fill))}
    y, fill = torch.randn(BATCH, kept, d).to(dtype), torch.randn(d).to(dtype)
    yield Case("restore_tokens", f"{kept} to {n}, d = {d}", dtype, (y, fill), runs, mae,
               BATCH * d * (2 * n + 2 * kept) * y.element_size())  # fmt: skip


def _tokens(small: bool) -> tuple[int, int, int, Tensor, Tensor]:
    n, kept, d = (64, 32, 16) if small else (32768, 16384, 384)
    order = torch.rand(BATCH, n).argsort(dim=1)
    order = torch.cat((order[:, :kept].sort(1).values, order[:, kept:].sort(1).values), dim=1)
    return n, kept, d, order[:, :kept].contiguous(), order.argsort(dim=1)


def class_attention(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    n, heads, dim = (32, 2, 8) if small else (4096, 12, 64)
    q, k, v = torch.randn(BATCH, heads, dim), *torch.randn(2, BATCH, 1 + n, heads, dim)
    tensors = tuple(x.to(dtype) for x in (q, k, v))
    runs = {"einsum": einsum_attention, "triton": on("triton", mk.class_attention)}
    moved = 6 * tensors[1].nbytes  # forward reads k and v, backward both again and writes their gradients
    yield Case("class_attention", f"n = {n}, ViT-B", dtype, tensors, runs, mk.reference.class_attention, moved)


def step(run: Callable[..., Any], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Values, and gradients of fixed cotangents."""
    out = run(*tensors)
    out = out if isinstance(out, tuple) else (out,)
    cotangents = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) if x.dim() else None for x in out]
    return [*(x.detach() for x in out), *torch.autograd.grad(out, tensors, cotangents)]


def measure(case: Case, device: str, rounds: int, copy: float) -> None:
    tensors = tuple(x.requires_grad_() for x in case.tensors)
    truth = step(case.truth, tuple(x.detach().double().requires_grad_() for x in tensors))
    base: dict[str, float] = {}
    for backend, run in case.runs.items():
        reason = why_no_row(lambda run=run: wrong(step(run, tensors), truth, TOLERANCE[case.dtype]))
        if reason is not None:
            no_row(f"{case.op}, {case.shape}, {case.dtype}", backend, reason)
            continue
        took = milliseconds(lambda run=run: step(run, tensors), device, rounds)
        base.setdefault(backend, took)
        row: dict[str, Any] = {"op": case.op, "backend": backend, "shape": case.shape, "pass": "forward + backward",
                               "dtype": str(case.dtype)[6:], "ms_p50": round(took, 4), "rounds": rounds}  # fmt: skip
        first = next(iter(base))
        row |= {"ratio": round(base[first] / took, 2), "ratio_to": first}
        row |= {"peak_extra_mib": peak_extra(lambda run=run: step(run, tensors), device)}
        if case.op == "token_contrast":
            n, d = case.tensors[0].shape[:3].numel(), case.tensors[0].shape[3]
            row |= {"tflop_per_s": round(6 * n * n * d / took / 1e9, 1)}
        write(
            "operators_gpu",
            device,
            row | ({"fraction_of_copy": round(case.moved / copy / took, 3)} if case.moved else {}),
        )


def attention_mask(n: int, device: str, rounds: int) -> None:
    """With hints; ours eager and as a CUDA graph, with the definition's bits. AttMask's own cannot be captured."""
    attention = torch.randn(BATCH, n).softmax(dim=1)
    key = mk.Key(0, sample=torch.arange(BATCH)).at(mk.Role.HINTS)
    options = {"hint": masking.HINT, "key": key}
    truth = mk.reference.attention_mask(attention, masking.RATIO, **options)
    theirs = {"attmask": lambda: masking.attmask(attention), "topk + scatter": lambda: masking.topk_scatter(attention)}

    def mask():
        return mk.attention_mask(attention, masking.RATIO, **options)

    ours = {name: on(name, mask) for name in ("triton", "cuda")}
    base = milliseconds(theirs["attmask"], device, rounds)
    for backend, call in (theirs | ours).items():

        def right(call=call, bits=backend in ours) -> str | None:
            same = not bits or all(map(same_bits, call(), truth))
            return None if same else "other bits than the definition"

        reason = why_no_row(right)
        if reason is not None:
            no_row(f"attention_mask, n = {n}", backend, reason)
            continue
        for which in ("eager", "graph") if backend in ours else ("eager",):
            took = milliseconds(graphed(call, device) if which == "graph" else call, device, rounds)
            row = {"op": "attention_mask, hints", "backend": backend, "shape": f"n = {n}", "pass": which}
            row |= {"dtype": "float32", "ms_p50": round(took, 5), "rounds": rounds}
            write("operators_gpu", device, {**row, "ratio": round(base / took, 2), "ratio_to": "attmask"})


CASES = {f.__name__: f for f in (token_contrast, drop_tokens, restore_tokens, class_attention)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Contrast, masks, tokens and class attention on a GPU.")
    parser.add_argument("operators", nargs="*", default=["token_contrast", "attention_mask", *CASES])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--small", action="store_true", help="tiny sizes: does it run at all")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_device(options.device)
    copy = copied(options.device)
    for operator in dict.fromkeys(options.operators):
        if operator == "attention_mask":
            for n in (64,) if options.small else (4096, 512, 32768):
                attention_mask(n, options.device, options.rounds)
            continue
        for dtype in options.dtypes:
            for case in CASES[operator](getattr(torch, dtype), options.small):
                measure(case, options.device, options.rounds, copy)


if __name__ == "__main__":
    main()
