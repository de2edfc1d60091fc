"""Operators and one objective on the GPU against the CPU: values, gradients in fp32 against fp64, random bits exactly.

python benchmarks/gpu_check.py [--device cuda] [--quick]      exits 1 at the first thing that is wrong
"""

from __future__ import annotations

import argparse
import sys

import gpu_check_operators
import gpu_check_window
import torch
from step import batch_of, check

import medfast_kernels as mk
from medfast import config as configuration


def window_attention(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for grid, window, shift, clip in (((9, 8, 7), 4, 2, False), ((3, 10, 12), 4, 2, True), ((13, 7), 5, 1, True)):
        tensors = [torch.randn(2, *grid, 3, 4, 12, generator=generator).double(),
                   torch.randn((2 * window - 1) ** len(grid), 4, generator=generator).double()]  # fmt: skip
        results = []
        for where, dtype in (("cpu", torch.float64), (device, torch.float32)):
            qkv, table = (x.to(where, dtype).requires_grad_() for x in tensors)
            out = mk.window_attention(qkv, table, window=window, shift=shift, clip=clip)
            results.append([out, *torch.autograd.grad(out.square().sum(), (qkv, table))])
        for truth, got in zip(*results, strict=True):
            error = ((got.cpu().double() - truth).abs().max() / truth.abs().max()).item()
            if not error < 1e-4:
                sys.exit(f"window_attention on {device}, grid {grid}: relative error {error:.1e}")


def random_bits(device: str) -> None:
    sample = torch.arange(5)
    for key in (mk.Key(7, 3, sample), mk.Key(2**40 + 1, torch.tensor(9), sample).at(mk.Role.MASK, layer=2)):
        there = key._replace(sample=sample.to(device))
        for name, draw in (("random_uniform", lambda k: mk.random_uniform((33,), key=k)),
                           ("random_ids", lambda k: mk.random_ids(512, 359, key=k)),
                           ("random_keep", lambda k: mk.random_keep(0.3, key=k))):  # fmt: skip
            if not torch.equal(draw(key), draw(there).cpu()):
                sys.exit(f"{name} differs between CPU and {device}")


def no_sync(device: str) -> None:
    """A forward that waits for the device raises here (after one that may: allocations, first launches)."""
    config = configuration.load("configs/smart.yaml", tiny=True)
    objective = configuration.build(config).to(device).train()
    assert objective.teacher is not None
    objective.teacher.to(device)
    batch, clock = (
        batch_of(2, config["data"]["size"], objective, device, torch.float32),
        torch.tensor(0.1, device=device),
    )
    objective(batch, clock)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        objective(batch, clock)
        torch.cuda.set_sync_debug_mode("default")


def main() -> None:
    parser = argparse.ArgumentParser(description="Check what runs on the GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="without what gpu_check_window and _operators check")
    options = parser.parse_args()
    device = options.device
    for checked in (random_bits, window_attention, no_sync):
        checked(device)
        print(f"{checked.__name__}: right on {device}", flush=True)
    if not options.quick:
        gpu_check_window.window_kernels(device)
        gpu_check_operators.main(device)
    check("configs/smart.yaml", device)
    print(f"smart: losses right on {device}")


if __name__ == "__main__":
    main()
