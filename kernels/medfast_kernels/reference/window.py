"""Window attention in plain PyTorch: the definition that every other backend is held to.

Swin (Liu et al., ICCV 2021, eq. 4): softmax(scale * q k^T + bias) v inside windows of a grid that is shifted
cyclically, where tokens that meet only because the grid wraps round do not see each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import no_autocast
from .._window import Problem, bias_rows, check
from ..key import Key
from .random import random_uniform


def window_attention(
    qkv: Tensor,
    bias: Tensor | None = None,
    *,
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    scale: float | Tensor | None = None,
    cosine: bool = False,
    pad: str = "bias",
    pad_value: Tensor | None = None,
    clip: bool = True,
    bias_index: str = "geometric",
    dropout: float = 0.0,
    keep: Tensor | None = None,
    key: Key | None = None,
) -> Tensor:
    """``medfast_kernels.window_attention`` in plain PyTorch, whatever backend is asked for."""
    return attend(
        check(
            qkv,
            bias,
            window=window,
            shift=shift,
            scale=scale,
            cosine=cosine,
            pad=pad,
            pad_value=pad_value,
            clip=clip,
            bias_index=bias_index,
            dropout=dropout,
            keep=keep,
            key=key,
        )  # fmt: skip
    )


def window_attention_weights(
    qkv: Tensor,
    bias: Tensor | None = None,
    *,
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    scale: float | Tensor | None = None,
    cosine: bool = False,
    pad: str = "bias",
    pad_value: Tensor | None = None,
    clip: bool = True,
    bias_index: str = "geometric",
) -> Tensor:
    """The attention weights of ``window_attention``, (b, windows, heads, N, N) in fp32 (fp64 for fp64).

    For gauges and pictures. Windows in raster order, window 0 starts at ``shift``; rows of pad tokens are included.
    """
    problem = check(
        qkv, bias, window=window, shift=shift, scale=scale, cosine=cosine, pad=pad, pad_value=pad_value, clip=clip,
        bias_index=bias_index, dropout=0.0, keep=None, key=None,
    )  # fmt: skip
    with no_autocast(qkv.device):
        q, k, _ = _windows(problem)
        return _weights(problem, q, k)


def attend(problem: Problem) -> Tensor:
    """(b, *grid, heads * dim) in the dtype of qkv; 16-bit input is computed in fp32."""
    with no_autocast(problem.qkv.device):
        q, k, v = _windows(problem)
        weights = _weights(problem, q, k)
        if problem.dropout:
            assert problem.key is not None  # check() has filled it in
            kept = random_uniform(tuple(weights.shape[1:]), key=problem.key, device=weights.device) >= problem.dropout
            weights = weights * kept / (1.0 - problem.dropout)
        out = _reverse(problem, weights @ v)
        if problem.keep is not None:
            out = torch.where(_over_batch(problem.keep, out), out, 0.0)
        return out.to(problem.qkv.dtype)


def _over_batch(keep: Tensor, x: Tensor) -> Tensor:
    return keep.reshape(-1, *[1] * (x.dim() - 1))


def _windows(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as (b, windows, heads, N, dim), padded, shifted, in the dtype of the computation."""
    x = problem.qkv
    dtype = torch.promote_types(x.dtype, torch.float32)
    if problem.keep is not None:  # a dropped sample is not read: what it holds, NaN too, reaches nobody
        x = torch.where(_over_batch(problem.keep, x), x, 0.0)
    x = x.to(dtype)
    fill = x.new_zeros(x.shape[-3:]) if problem.pad_value is None else problem.pad_value.to(dtype)
    for axis, (grid, padded) in enumerate(zip(problem.grid, problem.padded, strict=True), start=1):
        if padded > grid:
            ends = (*x.shape[:axis], padded - grid, *x.shape[axis + 1 :])
            x = torch.cat((x, fill.expand(ends)), dim=axis)
    if any(problem.shift):
        x = torch.roll(x, [-s for s in problem.shift], list(range(1, 1 + len(problem.grid))))
    q, k, v = _partition(problem, x).permute(3, 0, 1, 4, 2, 5).unbind(0)
    return q, k, v


def _partition(problem: Problem, x: Tensor) -> Tensor:
    """(b, *padded, *rest) -> (b, windows, N, *rest)."""
    axes, rest = len(problem.grid), x.shape[1 + len(problem.grid) :]
    sizes = [size for pair in zip(problem.counts, problem.window, strict=True) for size in pair]
    x = x.reshape(len(x), *sizes, *rest)
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), *range(2 * axes + 1, x.dim())]
    return x.permute(order).reshape(len(x), math.prod(problem.counts), problem.tokens, *rest)


def _reverse(problem: Problem, out: Tensor) -> Tensor:
    """(b, windows, heads, N, dim) -> (b, *grid, heads * dim)."""
    axes = len(problem.grid)
    out = out.transpose(2, 3).flatten(3)
    channels = out.shape[-1]
    out = out.reshape(len(out), *problem.counts, *problem.window, channels)
    order = [0, *[axis for i in range(axes) for axis in (1 + i, 1 + axes + i)], 2 * axes + 1]
    out = out.permute(order).reshape(len(out), *problem.padded, channels)
    if any(problem.shift):
        out = torch.roll(out, list(problem.shift), list(range(1, 1 + axes)))
    return out[(slice(None), *[slice(g) for g in problem.grid])]


def _weights(problem: Problem, q: Tensor, k: Tensor) -> Tensor:
    if problem.cosine:
        q, k = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12) for x in (q, k))
    scale = problem.scale
    q = q * (scale.to(q.dtype).reshape(-1, 1, 1) if isinstance(scale, Tensor) else scale)
    scores = q @ k.transpose(-1, -2)
    if problem.bias is not None:
        bias = problem.bias.to(scores.dtype)
        scores = scores + (bias[bias_rows(problem, q.device)].permute(2, 0, 1) if bias.dim() == 2 else bias)
    blind = _blind(problem, q.device)
    if blind is not None:
        scores = scores.masked_fill(blind[:, None], -torch.inf)
    return scores.softmax(dim=-1)


def _blind(problem: Problem, device: torch.device) -> Tensor | None:
    """(windows, N, N) bool, True where query i must not see key j; None where every token sees its whole window."""
    padded = problem.pad == "mask" and problem.padded != problem.grid
    if not padded and not any(problem.shift):
        return None
    region = torch.zeros(1, *problem.padded, dtype=torch.int64, device=device)
    pads = torch.zeros(1, *problem.padded, dtype=torch.bool, device=device)
    for axis, (grid, size, shift) in enumerate(zip(problem.grid, problem.padded, problem.shift, strict=True)):
        at = torch.arange(shift, size + shift, device=device).reshape(-1, *[1] * (len(problem.grid) - 1 - axis))
        region = 2 * region + (at >= size)  # who wrapped round, one bit per axis
        pads = pads | (at % size >= grid)
    region, pads = _partition(problem, region)[0], _partition(problem, pads)[0]
    blind = region[:, :, None] != region[:, None, :]
    if padded:  # a pad token sees itself, so that no row of the softmax is empty
        itself = torch.eye(problem.tokens, dtype=torch.bool, device=device)
        blind = blind | (pads[:, None, :] & ~itself)
    return blind
