"""The Triton kernels of every operator but window attention, on a GPU: the definition's bits, or fp64 on the CPU.

python benchmarks/gpu_check_operators.py      exits 1 at the first thing that is wrong; ``gpu_check`` runs it too
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

import medfast_kernels as mk
from medfast_kernels.masking import nan_seen

Made = TypeVar("Made", bound=Sequence[Tensor | None])

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest entry


def on_triton(call: Callable[[], Made]) -> Made:
    with mk.backend("triton"):
        return call()


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Of the same bits, or both absent."""
    return a is b if a is None or b is None else torch.equal(a.cpu(), b.cpu())


def refuse(what: str, device: str) -> None:
    sys.exit(f"{what} on {device}: wrong")


def hold(what: str, got: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype) -> None:
    for i, (a, truth) in enumerate(zip(got, exact, strict=True)):
        error = ((a.cpu().double() - truth).abs().max() / truth.abs().max()).item()
        if not error < TOLERANCE[dtype]:
            sys.exit(f"{what} in {dtype}, result {i}: relative error {error:.1e}, allowed {TOLERANCE[dtype]:.0e}")


def both(what: str, device: str, call: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]) -> None:
    """Values and gradients of ``call(operators, *tensors)`` in each dtype against fp64; and the same bits again."""
    for dtype in TOLERANCE:
        rounded = [x.to(dtype) for x in tensors]

        def run(operators, device: str, dtype: torch.dtype, rounded=rounded) -> list[Tensor]:
            leaves = [x.to(device, dtype).requires_grad_() for x in rounded]
            out = call(operators, *leaves)
            draw = torch.Generator().manual_seed(1)
            cotangents = [torch.randn(x.shape, generator=draw).to(x.device, x.dtype) for x in out]
            return [*out, *torch.autograd.grad(out, leaves, cotangents)]

        got, again = (on_triton(lambda run=run, dtype=dtype: run(mk, device, dtype)) for _ in range(2))
        hold(what, got, run(mk.reference, "cpu", torch.float64), dtype)
        if not all(map(same, got, again)):
            sys.exit(f"{what} in {dtype} on {device} does not repeat")


def draws(device: str) -> None:
    sample = torch.tensor([0, 7, 2**32 - 1])
    key = mk.Key(2**40 + 1, 9, sample).at(mk.Role.MASK, layer=2)
    there = key._replace(sample=sample.to(device))
    for n in (1, 300, 5000, 40000):
        for name, draw in (("philox_words", lambda o, k, n=n: o.philox_words(k, n)),
                           ("random_uniform", lambda o, k, n=n: o.random_uniform(n, key=k)),
                           ("random_ids", lambda o, k, n=n: o.random_ids(n, n // 3, key=k)),
                           ("random_keep", lambda o, k: o.random_keep(0.3, key=k))):  # fmt: skip
            (got,) = on_triton(lambda draw=draw: [draw(mk, there)])
            if not torch.equal(got.cpu(), draw(mk.reference, key)):
                refuse(name, device)
        (got,) = on_triton(lambda n=n: [mk.random_normal(n, key=there)])
        if not (got.cpu() - mk.reference.random_normal(n, key=key)).abs().max() < 1e-6:
            refuse("random_normal", device)


def masks(device: str) -> None:
    for n in (1, 61, 512, 4096, 32768, 50001):
        attention = torch.randn(4, n, generator=torch.Generator().manual_seed(n)).round(decimals=2)
        key = mk.Key(3, 5, torch.arange(4))
        there = key._replace(sample=torch.arange(4, device=device))
        ratios = torch.tensor([0.7, 0.0, 1.0, 0.31])
        cases: tuple[tuple[Any, dict[str, Any]], ...] = (
            (0.7, {"hint": 0.1}),
            (0.7, {"hint": 0.5, "hint_mode": "top"}),
            (0.3, {"order": "low"}),
            (1.0, {"hint": 1.0}),
            (ratios, {"hint": 0.2}),
        )
        for ratio, options in cases:
            share = ratio.to(device) if isinstance(ratio, Tensor) else ratio
            got = on_triton(
                lambda a=attention, s=share, o=options, k=there: mk.attention_mask(a.to(device), s, key=k, **o)
            )
            for a, b in zip(got, mk.reference.attention_mask(attention, ratio, key=key, **options), strict=True):
                if not same(a, b):
                    refuse(f"attention_mask of {n}, {options}", device)
    captured(device)


def captured(device: str) -> None:
    """A mask in a CUDA graph, replayed on other attention; NaN there is noted."""
    attention, key = torch.rand(4, 4096, device=device), mk.Key(3, 5, torch.arange(4, device=device))

    def mask() -> Sequence[Tensor | None]:
        return mk.attention_mask(attention, 0.7, hint=0.1, key=key)

    flag = nan_seen(device).zero_()
    on_triton(mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = on_triton(mask)
    attention.uniform_()
    graph.replay()
    expected = on_triton(mask)
    if not all(map(same, got, expected)) or flag.item():
        refuse("attention_mask in a CUDA graph", device)
    attention[1, 7] = torch.nan
    graph.replay()
    if not flag.item():
        refuse("nan_seen", device)
    flag.zero_()


def class_attention(device: str) -> None:
    draw = torch.Generator().manual_seed(0)
    for b, n, heads, dim in ((1, 1, 1, 1), (2, 300, 3, 24), (4, 4096, 12, 64), (2, 1000, 2, 200)):
        q, k, v = (torch.randn(s, generator=draw).double() for s in ((b, heads, dim), *((b, 1 + n, heads, dim),) * 2))
        both("class_attention", device, lambda o, *x: o.class_attention(*x), (q, k, v))


def tokens(device: str) -> None:
    draw = torch.Generator().manual_seed(0)
    for b, n, count, dim in ((1, 1, 1, 1), (3, 77, 20, 130), (8, 4096, 1228, 384)):
        ids = torch.stack([torch.randperm(n, generator=draw)[:count] for _ in range(b)])
        x, position, y, fill = (
            torch.randn(s, generator=draw).double() for s in ((b, n, dim), (n, dim), (b, count, dim), (dim,))
        )
        both("drop_tokens", device, lambda o, x, p, i=ids: [o.drop_tokens(x, i.to(x.device), p)], (x, position))
        both(
            "restore_tokens", device, lambda o, y, f, i=ids, n=n: [o.restore_tokens(y, i.to(y.device), n, f)], (y, fill)
        )


def token_contrast(device: str) -> None:
    draw = torch.Generator().manual_seed(0)
    modes: tuple[dict[str, Any], ...] = (
        {"weight": 5.0},
        {"weight": 5.0, "weight_mode": "logit"},
        {"temperature": 0.01, "anchors": (1, 1)},
    )
    for shape in ((2, 2, 1, 3), (2, 3, 70, 24), (2, 4, 256, 128), (2, 3, 100, 256)):
        z = torch.nn.functional.normalize(torch.randn(shape, generator=draw).double(), dim=-1)
        for options in modes:
            both(f"token_contrast, {options},", device, lambda o, z, m=options: [o.token_contrast(z, **m)], (z,))


CHECKS = (draws, masks, class_attention, tokens, token_contrast)


def main(device: str = "cuda") -> None:
    for checked in CHECKS:
        checked(device)
        print(f"triton, {checked.__name__}: right on {device}", flush=True)


if __name__ == "__main__":
    main()
