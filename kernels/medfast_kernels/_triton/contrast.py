"""Token-wise contrast as a Triton operator: launches, fake implementation, autograd, the way from a checked call."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._contrast import Problem
from . import registration
from .registration import no_derivative, operator

MAX_DIM = 256  # a program holds whole rows
_PROGRAMS = 512  # to fill a GPU: a function of shape alone, so that sums are the same on every device
_SPAN = 80.0  # nats that fp32 holds on either side of a fixed shift


def unfit(z: Tensor) -> dict[str, str]:
    """For ``choose``: why no kernel takes ``z``, if so."""
    if z.shape[3] > MAX_DIM:
        return {"triton": f"a program holds rows of at most {MAX_DIM} channels, z has {z.shape[3]}"}
    return registration.unfit(z)


def contrast(problem: Problem) -> Tensor:
    loss, _ = token_contrast(
        problem.z, problem.volume, problem.temperature, problem.factor, problem.offset, problem.first, problem.count
    )
    return loss


class Plan(NamedTuple):
    """Constants of a launch: tile of a program, warps, and the arithmetic of the logits, base 2."""

    rows: int
    columns: int
    warps: int
    wide: int
    scale: float
    shift: float
    offset: float
    fixed: bool
    precision: str


def plan(dtype: torch.dtype, dim: int, temperature: float, factor: float, offset: float) -> Plan:
    """Rows of length 1 have logits of at most 1 / temperature, or that and the offset: a fixed shift, if in reach."""
    bound = 1 / temperature + max(0.0, offset)
    rows, columns, warps = (64, 64, 8) if dim > 128 else (128, 64, 8)
    if dtype == torch.float32:
        rows, columns, warps = (32, 32, 4) if dim > 128 else (64, 32, 4)  # more in either direction spills registers
    nats = 1 / math.log(2)
    return Plan(
        rows, columns, warps, max(16, 1 << (dim - 1).bit_length()), nats / temperature, nats * bound,
        nats * offset, factor == 1.0 and 2 * bound < _SPAN, "ieee" if dtype == torch.float32 else "tf32",
    )  # fmt: skip


def split(tokens: int, n: int, tile: Plan) -> tuple[int, int, int]:
    """Blocks of ``tokens`` rows, splits of the n columns that each walks, and columns of a split."""
    blocks, columns = -(-tokens // tile.rows), -(-n // tile.columns)
    each = -(-columns // max(1, _PROGRAMS // blocks))
    return blocks, -(-columns // each), each * tile.columns


def _rows(z: Tensor) -> Tensor:
    """(n, dim), dense; the interpreter has no product of bf16."""
    z = z.float() if z.dtype == torch.bfloat16 and z.device.type == "cpu" else z
    return z.flatten(0, 2).contiguous()


def _launch(
    z: Tensor, volume: Tensor | None, temperature: float, factor: float, offset: float, first: int, count: int
) -> tuple[Tensor, Tensor]:
    from . import contrast_kernels as kernels

    (_, volumes, positions, dim), z = z.shape, _rows(z)
    n, anchors, tile = len(z), 2 * count * positions, plan(z.dtype, dim, temperature, factor, offset)
    blocks, splits, chunk = split(anchors, n, tile)
    high, total = (z.new_empty((splits, anchors), dtype=torch.float32) for _ in range(2))
    lse, loss = (z.new_empty((n,), dtype=torch.float32) for _ in range(2))
    kernels.sum_part[(blocks * splits,)](
        z, volume, high, total, tile.scale, tile.shift, factor, tile.offset, n, positions, volumes, first, count,
        splits, chunk, dim, tile.wide, tile.rows, tile.columns, tile.fixed, tile.precision, num_warps=tile.warps,
    )  # fmt: skip
    kernels.combine[(-(-n // 32),)](
        z, high, total, lse, loss, tile.scale, n, positions, volumes, first, count, splits, dim, tile.wide, 32
    )
    return loss.sum() / anchors, lse


def _launch_backward(
    grad: Tensor, z: Tensor, volume: Tensor | None, lse: Tensor, temperature: float, factor: float, offset: float,
    first: int, count: int,
) -> Tensor:  # fmt: skip
    from . import contrast_kernels as kernels

    given, (_, volumes, positions, dim) = z, z.shape
    z = _rows(z)
    n, tile = len(z), plan(z.dtype, dim, temperature, factor, offset)
    blocks, splits, chunk = split(n, n, tile)
    part = z.new_empty((splits, n, dim), dtype=torch.float32)
    kernels.gradient_part[(blocks * splits,)](
        grad, z, volume, lse, part, tile.scale, tile.shift, factor, tile.offset,
        1 / (2 * count * positions * temperature), n, positions, volumes, splits, chunk, dim, tile.wide, tile.rows,
        tile.columns, tile.fixed, tile.precision, num_warps=tile.warps,
    )  # fmt: skip
    return part.sum(0).to(given.dtype).view(given.shape)


def _fake(z, volume, temperature, factor, offset, first, count):
    return z.new_empty((), dtype=torch.float32), z.new_empty((z.shape[:3].numel(),), dtype=torch.float32)


def _fake_backward(grad, z, *rest):
    return torch.empty(z.shape, dtype=z.dtype, device=z.device)


def _save(ctx, inputs, output) -> None:
    z, volume, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(z, volume, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    z, volume, lse = ctx.saved_tensors
    grad_z = None if grad is None else token_contrast_backward(grad, z, volume, lse, *ctx.rest)
    return grad_z, *(None,) * 6


token_contrast = operator(
    "token_contrast_triton",
    "(Tensor z, Tensor? volume, float temperature, float factor, float offset, SymInt first, SymInt count) -> "
    "(Tensor, Tensor)",
    _launch,
    _fake,
    save=_save,
    backward=_backward,
)
token_contrast_backward = operator(
    "token_contrast_triton_backward",
    "(Tensor grad, Tensor z, Tensor? volume, Tensor lse, float temperature, float factor, float offset, "
    "SymInt first, SymInt count) -> Tensor",
    _launch_backward,
    _fake_backward,
    backward=no_derivative("token_contrast"),
)
