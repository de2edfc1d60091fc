"""Launches of window attention: from the operators' arguments to grids of programs, and partial sums to gradients."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .window_config import config, processors
from .window_plan import Axes, Geometry, Mode, geometry_of, mode_of, three

LARGEST = 64  # tokens of a window that is computed in one tile
_PAIRS, _ROWS = 256, 16  # of the bias, per program


class Call(NamedTuple):
    """What every kernel of one call takes.

    bias: dense; stride: of qkv, 3D; draw: counter, seed and rate of dropout; windows: of the whole batch; table: shape
    by which the tokens of the bias table are numbered, and the window it is made for.
    """

    qkv: Tensor
    bias: Tensor | None
    scale: Tensor | float
    pad_value: Tensor | None
    keep: Tensor | None
    stride: tuple[int, ...]
    geometry: Geometry
    draw: tuple[Tensor | None, int, float]
    windows: int
    mode: Mode
    table: tuple[Axes, Axes]

    def inputs(self) -> tuple:
        return self.qkv, self.bias, self.scale, self.pad_value, self.keep, self.stride, self.geometry, self.draw


def call_of(
    qkv: Tensor, bias: Tensor | None, scale: Tensor | None, pad_value: Tensor | None, keep: Tensor | None,
    counter: Tensor | None, window: list[int], full: list[int], shift: list[int], factor: float, cosine: bool,
    live_pads: bool, sliced: bool, dropout: float, seed: int,
) -> Call:  # fmt: skip
    geometry = geometry_of(tuple(qkv.shape[1:-3]), tuple(window), tuple(shift), live_pads)
    mode = mode_of(
        qkv, tuple(window), geometry, live_pads=live_pads, pad_value=pad_value is not None, bias=bias is not None,
        scales=scale is not None, cosine=cosine, drop=dropout > 0, keep=keep is not None, compute=_compute(qkv.dtype),
        largest=LARGEST,
    )  # fmt: skip
    whole = three(tuple(full), 1)
    table = (whole if sliced else mode.window, whole)
    if bias is not None:
        bias = _expand(bias, mode, table) if bias.dim() == 2 else bias.contiguous()
    batch, *axes, part, head, channel = qkv.stride()
    return Call(
        qkv, bias, factor if scale is None else scale.contiguous(), _dense(pad_value), _dense(keep),
        (batch, *three(tuple(axes), 0), part, head, channel), geometry, (_dense(counter), seed, dropout),
        len(qkv) * math.prod(geometry.counts), mode, table,
    )  # fmt: skip


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def forward(qkv: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp of rows), the latter empty for windows of one tile."""
    call = call_of(qkv, *arguments)
    mode, geometry = call.mode, call.geometry
    out = qkv.new_empty((len(qkv), *qkv.shape[1:-3], mode.heads * mode.dim))
    lse = _partials(qkv, len(qkv), math.prod(geometry.counts), mode.heads, mode.tokens) if mode.tiles > 1 else None
    chosen = config("window_attention", mode.dim, mode.tokens, qkv.dtype, qkv.device)
    if call.windows and mode.tiles > 1:
        from . import window_large

        grid = (call.windows * mode.heads * mode.tiles,)
        window_large.forward[grid](out, lse, *call.inputs(), mode, **chosen.options)
    elif call.windows:
        from . import window_small

        splits = _splits(call, chosen.per_processor)
        window_small.forward[(splits * mode.heads,)](
            out, *call.inputs(), _step(splits, geometry), call.windows, mode, **chosen.options
        )
    return out, _partials(qkv, 0) if lse is None else lse


def backward(
    grad: Tensor, out: Tensor | None, lse: Tensor | None, qkv: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, bias, scale and pad_value; zeros or nothing for those that are not there."""
    call = call_of(qkv, bias, *arguments)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    grad = grad.contiguous()
    run = _backward_large if call.mode.tiles > 1 else _backward_small
    of_bias, of_scale, of_pads = run(call, grad_qkv, grad, out, lse)
    return (
        grad_qkv,
        _partials(qkv, 0) if of_bias is None or bias is None else _bias_gradient(of_bias.sum(0), bias, call),
        qkv.new_zeros((call.mode.heads,), dtype=torch.float32) if of_scale is None else of_scale.sum(0),
        _pad_gradient(of_pads, qkv),
    )


def _backward_small(call: Call, grad_qkv: Tensor, grad: Tensor, *_) -> tuple[Tensor | None, ...]:
    """Fills grad_qkv; partial sums of bias, scale and pads."""
    from . import window_small

    mode = call.mode
    chosen = config("window_attention_backward", mode.dim, mode.tokens, grad.dtype, grad.device)
    splits = _splits(call, chosen.per_processor) if call.windows else 0
    of_bias = _partials(grad, splits, mode.heads, mode.tokens, mode.tokens) if mode.biased else None
    of_scale = _partials(grad, splits, mode.heads) if mode.scales else None
    of_pads = _partials(grad, splits, mode.heads, 2, mode.dim) if mode.live else None
    if splits:
        window_small.backward[(splits * mode.heads,)](
            grad_qkv, of_bias, of_pads, of_scale, grad, *call.inputs(), _step(splits, call.geometry), call.windows,
            mode, **chosen.options,
        )  # fmt: skip
    return of_bias, of_scale, of_pads


def _backward_large(call: Call, grad_qkv: Tensor, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor | None, ...]:
    """Fills grad_qkv; partial sums of bias, scale and pads. delta of the first kernel is read by the others."""
    from . import window_large

    mode = call.mode
    chosen = config("window_attention_backward", mode.dim, mode.tokens, grad.dtype, grad.device)
    options = chosen.options
    programs, delta = call.windows * mode.heads * mode.tiles, torch.empty_like(lse)
    splits = _splits(call, -(-chosen.per_processor // mode.tiles**2)) if call.windows else 0
    of_bias = _partials(grad, splits, mode.heads, mode.tokens, mode.tokens) if mode.biased else None
    of_scale = _partials(grad, call.windows, mode.heads, mode.tiles) if mode.scales else None
    of_pads = _partials(grad, call.windows, mode.heads, mode.tiles, 2, mode.dim) if mode.live else None
    if call.windows:
        rest = (*call.inputs(), mode)
        out = out.contiguous()
        window_large.backward_queries[(programs,)](grad_qkv, of_scale, delta, grad, out, lse, *rest, **options)
        window_large.backward_keys[(programs,)](grad_qkv, of_pads, delta, grad, lse, *rest, **options)
    if of_bias is not None and splits:
        window_large.backward_bias[(splits * mode.heads * mode.tiles**2,)](
            of_bias, delta, grad, lse, *call.inputs(), _step(splits, call.geometry), call.windows, mode, **options
        )
    return of_bias, None if of_scale is None else of_scale.sum(-1), None if of_pads is None else of_pads.sum(2)


def _partials(qkv: Tensor, *shape: int) -> Tensor:
    return qkv.new_empty(shape, dtype=torch.float32)


def _splits(call: Call, per_processor: int) -> int:
    """Programs per head. A function of shape and device, so that sums over them are the same bits every time."""
    return min(call.windows, max(1, per_processor * processors(call.qkv.device) // call.mode.heads))


def _step(splits: int, geometry: Geometry) -> tuple[int, int, int, int]:
    """``splits`` windows as (samples, z, y, x)."""
    nz, ny, nx = geometry.counts
    plane = splits // nx // ny
    return plane // nz, plane % nz, splits // nx % ny, splits % nx


def _expand(table: Tensor, mode: Mode, shapes: tuple[Axes, Axes]) -> Tensor:
    from . import window_bias

    dense = table.new_empty((mode.heads, mode.tokens, mode.tokens))
    grid = (-(-(mode.tokens**2) // _PAIRS),)
    window_bias.expand[grid](dense, table.contiguous(), mode.heads, mode.tokens, *shapes, _PAIRS, num_warps=4)
    return dense


def _bias_gradient(dense: Tensor, bias: Tensor, call: Call) -> Tensor:
    from . import window_bias

    if bias.dim() == 3:
        return dense
    mode, table = call.mode, dense.new_empty(bias.shape)
    window_bias.fold[(-(-len(table) // _ROWS) * mode.heads,)](
        table, dense, len(table), mode.heads, mode.tokens, *call.table, _ROWS, mode.tile, num_warps=4
    )
    return table


def _pad_gradient(partials: Tensor | None, qkv: Tensor) -> Tensor:
    """(3, heads, dim): queries of pads reach no output."""
    heads, dim = qkv.shape[-2:]
    grad = qkv.new_zeros((3, heads, dim), dtype=torch.float32)
    if partials is not None:
        grad[1:] = partials.sum(0).transpose(0, 1)
    return grad


def _compute(dtype: torch.dtype) -> Any:
    """What matrix products take. Triton's interpreter has no bf16 product."""
    import triton.language as tl
    from triton import knobs

    if dtype == torch.float32 or (dtype == torch.bfloat16 and knobs.runtime.interpret):
        return tl.float32
    return tl.float16 if dtype == torch.float16 else tl.bfloat16
