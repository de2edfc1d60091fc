"""FLOPs and peak memory of every architecture at 96^3 and 128^3, batch 1: rows of benchmarks/results/models.jsonl.

    python benchmarks/models.py                       # all, on CPU
    python benchmarks/models.py --models swin vit     # some
    python benchmarks/models.py --device cuda

FLOPs are counted on shapes alone, of one forward pass, with the plain PyTorch definition of each operator, whose matrix
products the counter sees. Memory is that of a process of its own that runs forward and backward in fp32: what it adds
to the resident memory of one that has imported the same things (CPU), or the most that tensors took (CUDA). A model
that does not fit has a row without memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from typing import Any

import torch
from rows import ROOT, append, environment
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import medfast_kernels as mk
from medfast.models import MODELS, SIZES, Model, count

BY_LABEL = {model.label: model for model in MODELS}


def volume(net: torch.nn.Module, model: Model, size: int, device: str) -> torch.Tensor:
    channels: Any = getattr(net, "encoder", net).in_channels
    return torch.randn(1, channels, *(size,) * (2 if model.flat else 3), device=device)


def gflop(model: Model, size: int) -> float:
    """Of one forward pass, on shapes alone."""
    with torch.device("meta"):  # initialisation looks at values, which shapes alone do not have
        net = build(model, size).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), mk.backend("reference"):
        net = net.to_empty(device="cpu")
        x = volume(net, model, size, "cpu")
        with FlopCounterMode(display=False) as counter:
            net(x)
    return counter.get_total_flops() / 1e9


def build(model: Model, size: int) -> torch.nn.Module:
    """The table of positions belongs to a size, and is no part of what is compared."""
    sized = {"size": size} if model.name in ("vit", "unetr") else {}
    return model.build(**sized)


def peak_gb(model: Model, size: int, device: str) -> float:
    """Forward and backward, weights and gradients included."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    net = build(model, size).to(device)
    made = net(volume(net, model, size, device))
    outputs = [made] if isinstance(made, torch.Tensor) else [made.stages[-1], made.summary]
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def peak_apart(model: Model, size: int, device: str) -> float | None:
    """``peak_gb`` in a process of its own; None where it does not fit."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, __file__, "--one", model.label, str(size), "--device", device]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=False)
    return float(done.stdout) if done.returncode == 0 else None


def measure(model: Model, size: int, device: str) -> dict:
    """A row. ValueError, with the model's own reason, for a size that it does not take."""
    counted = round(gflop(model, size), 2)
    peak = peak_apart(model, size, device)
    return {
        **environment(device), "device": device, "model": model.label, "size": size, "batch": 1,
        "parameters": count(model), "gflop": counted,
        "peak_gb": None if peak is None else round(peak, 3), "pass": "forward + backward, fp32",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="FLOPs and peak memory of every architecture.")
    parser.add_argument("--models", nargs="*", default=list(BY_LABEL), choices=list(BY_LABEL), metavar="LABEL")
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--one", nargs=2, metavar=("LABEL", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(peak_gb(BY_LABEL[options.one[0]], int(options.one[1]), options.device))
        return
    for label in options.models:
        for size in options.sizes:
            try:
                row = measure(BY_LABEL[label], size, options.device)
            except ValueError as reason:
                print(f"no row for {label} at {size}: {reason}", file=sys.stderr)
                continue
            print(json.dumps({key: row[key] for key in ("model", "size", "parameters", "gflop", "peak_gb")}))
            append("models", [row])


if __name__ == "__main__":
    main()
