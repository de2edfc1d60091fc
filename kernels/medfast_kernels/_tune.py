"""Times launch configurations of the Triton kernels on a GPU and keeps the best: ``python -m medfast_kernels tune``.

Nothing is tried out when an operator is called: the kernels read what was found here, from the user's cache folder and
from the file that is shipped (copy the one to the other to ship it).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import backend
from ._evidence import cache_folder, device_name, store
from ._qualify import milliseconds
from ._triton import window_config
from ._triton.window_config import Config, shape_class
from .window import window_attention

FORWARD, BACKWARD = "window_attention", "window_attention_backward"


class Shape(NamedTuple):
    """A class of calls and a problem of it: batch and grid, window, heads and channels of a head."""

    batch: int
    grid: tuple[int, ...]
    window: int
    heads: int
    dim: int


SHAPES = (  # SMIT's and SwinUNETR's stages at 128^3 and 96^3, Swin's in two dimensions
    Shape(8, (64, 64, 64), 4, 4, 12), Shape(8, (32, 32, 32), 4, 4, 24), Shape(8, (16, 16, 16), 4, 8, 24),
    Shape(4, (48, 48, 48), 7, 3, 16), Shape(4, (48, 48, 48), 4, 3, 16), Shape(4, (64, 64, 64), 4, 6, 8),
    Shape(64, (56, 56), 7, 3, 32), Shape(8, (32, 32, 32), 4, 2, 48), Shape(8, (32, 32, 32), 4, 2, 64),
    Shape(8, (32, 32, 32), 4, 1, 96),
)  # fmt: skip
TYPES = (torch.bfloat16, torch.float16, torch.float32)
CANDIDATES = tuple(Config(*each) for each in product((4, 8), (1, 2, 3), (1, 2, 3, 4, 6)))


def tune(
    device: torch.device,
    shapes: Iterable[Shape] = SHAPES,
    types: Iterable[torch.dtype] = TYPES,
    candidates: Iterable[Config] = CANDIDATES,
) -> Path:
    """Time every candidate on every shape and type; the file that the best were added to."""
    path, name = cache_folder() / window_config.FILE, device_name(device) if device.type == "cuda" else device.type
    for shape, dtype in product(shapes, types):
        best = _best(shape, dtype, device, tuple(candidates))
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for operator, config in best.items():
            classes = kept.setdefault(name, {}).setdefault(operator, {})
            classes[shape_class(shape.dim, shape.window ** len(shape.grid), dtype)] = config._asdict()
            print(f"  {operator:<26} {shape}, {dtype}: {config}", flush=True)
        store(path, kept)
        window_config.forget()
    return path


def _best(shape: Shape, dtype: torch.dtype, device: torch.device, candidates: tuple[Config, ...]) -> dict[str, Config]:
    rows = (2 * shape.window - 1) ** len(shape.grid)
    qkv = torch.randn(shape.batch, *shape.grid, 3, shape.heads, shape.dim, device=device, dtype=dtype)
    bias = torch.zeros(rows, shape.heads, device=device, dtype=torch.float32)
    inputs = [qkv.requires_grad_(), bias.requires_grad_()]

    def forward() -> Tensor:
        with backend("triton"):
            return window_attention(qkv, bias, window=shape.window, shift=shape.window // 2)

    out = forward()
    grad = torch.randn_like(out)
    runs = {FORWARD: forward, BACKWARD: lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)}
    return {operator: _fastest(operator, run, device, candidates) for operator, run in runs.items()}


def _fastest(operator: str, run, device: torch.device, candidates: tuple[Config, ...]) -> Config:
    """The candidate that takes least time; one that the device has too little room for is passed over."""
    took = {}
    for config in candidates:
        window_config.trials[operator] = config
        try:
            took[config] = milliseconds({"run": run}, device, seconds=0.1)["run"]
        except Exception as error:  # of Triton's own kind, whose place differs by version
            if "out of resource" not in str(error):
                raise
        finally:
            del window_config.trials[operator]
    if not took:
        raise RuntimeError(f"no configuration of {operator} fits {device}: {', '.join(map(str, candidates))}")
    return min(took, key=lambda config: took.get(config, math.inf))
