"""Window attention on each backend that the device has, in each of its dtypes: values and gradients against fp64.

python benchmarks/gpu_check_window.py [--cases "stage one" ...]      exits 1 at the first thing that is wrong
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

import medfast_kernels as mk
from medfast_kernels import _dispatch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KEY = mk.Key(2**40 + 3, 7).at(mk.Role.DROPOUT)
CASES = {  # heads, dim, then options; tensors among them are drawn by ``problem``
    "stage one": (4, 12, {"grid": (8, 8, 8), "window": 4, "shift": 2}),
    "padded": (2, 24, {"grid": (9, 7, 6), "window": 4, "shift": 1, "pad_value": True}),
    "masked": (3, 16, {"grid": (5, 9, 6), "window": 4, "shift": 2, "pad": "mask", "clip": False}),
    "clipped": (2, 32, {"grid": (9, 3, 8), "window": 4, "shift": 2, "bias_index": "sliced"}),
    "cosine": (4, 8, {"grid": (10, 12), "window": 5, "shift": 2, "cosine": True, "scale": True}),
    "dropout": (2, 48, {"grid": (8, 8), "window": 8, "dropout": 0.3, "key": KEY, "keep": torch.tensor([True, False])}),
    "window 7": (3, 16, {"grid": (9, 14, 7), "window": 7, "shift": 3, "pad_value": True}),
    "window 12 x 12": (2, 96, {"grid": (14, 24), "window": 12, "shift": 6, "dropout": 0.1, "key": KEY}),
}


def problem(heads: int, dim: int, given: dict) -> tuple[dict[str, Tensor], dict]:
    """fp64 tensors with a gradient, and the other options."""
    options = dict(given)
    grid, draw = options.pop("grid"), torch.Generator().manual_seed(3)
    shapes = {"qkv": (2, *grid, 3, heads, dim), "bias": ((2 * options["window"] - 1) ** len(grid), heads)}
    shapes |= {"pad_value": (3, heads, dim)} if options.pop("pad_value", None) else {}
    shapes |= {"scale": (heads,)} if options.pop("scale", None) else {}
    return {name: torch.randn(shape, generator=draw).double() for name, shape in shapes.items()}, options


def run(tensors: dict[str, Tensor], options: dict, device: str) -> list[Tensor]:
    tensors = {name: x.to(device).detach().requires_grad_() for name, x in tensors.items()}
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    out = mk.window_attention(**tensors, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return [out.detach(), *torch.autograd.grad(out, list(tensors.values()), grad)]


def errors(got: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Largest difference over largest entry, per tensor."""
    return [((a.cpu().double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, truth, strict=True)]


def window_kernels(device: str, cases: Iterable[str] = tuple(CASES)) -> None:
    """Exits where a backend is more than twice (gradients: three times) as far from fp64 as the reference there."""
    backends = [name for name in ("triton", "cuda", "cpp")
                if _dispatch.why_not("window_attention", name, torch.device(device)) is None]  # fmt: skip
    for name in cases:
        heads, dim, given = CASES[name]
        tensors, options = problem(heads, dim, given)
        for dtype in DTYPES:
            low = {key: x.to(dtype) if key == "qkv" else x.float() for key, x in tensors.items()}
            with mk.backend("reference"):
                truth = run({key: x.double() for key, x in low.items()}, options, "cpu")
                eager = errors(run(low, options, device), truth)
            for backend in backends:
                try:
                    with mk.backend(backend):
                        found, again = errors(run(low, options, device), truth), run(low, options, device)
                        same = all(torch.equal(a, b) for a, b in zip(again, run(low, options, device), strict=True))
                except _dispatch.Refused as reason:
                    print(f"{name}, {dtype}: {backend} refuses: {reason}")
                    continue
                least = 4 * torch.finfo(dtype).eps
                allowed = [(2 if i == 0 else 3) * max(error, least) for i, error in enumerate(eager)]
                if not same or any(not a <= b for a, b in zip(found, allowed, strict=True)):
                    sys.exit(f"{name}, {dtype}: {backend} is off by {found}, allowed {allowed}; repeatable: {same}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Window attention of every backend against fp64.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    window_kernels(options.device, options.cases)
    print(f"window attention, {', '.join(options.cases)}: right on {options.device}")


if __name__ == "__main__":
    main()
