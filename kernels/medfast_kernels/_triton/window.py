"""Window attention in Triton as a torch operator: schema, fake implementation, autograd, and the way to the kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._window import Problem
from ..key import address, signed
from . import window_launch as launch
from .registration import no_derivative, operator

DIMS = (8, 12, 16, 24, 32, 48, 64, 96)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LONGEST = 511  # axis of a window whose mask the kernels can tell
_SMALLEST_SCALE = 1e-6  # of a float: below it, and below zero, the kernels need to look at the sign
_OPTIONS = (
    "Tensor qkv, Tensor? bias, Tensor? scale, Tensor? pad_value, Tensor? keep, Tensor? counter, "
    "int[] window, int[] full, int[] shift, float factor, bool cosine, bool live_pads, bool sliced, float dropout, "
    "int seed"
)


def unfit(problem: Problem) -> dict[str, str]:
    """For ``choose``: why there is no kernel for this call, if so."""
    dim, dtype = problem.qkv.shape[-1], problem.qkv.dtype
    if dtype not in DTYPES:
        return {"triton": f"it computes in float32, float16 and bfloat16, qkv is {str(dtype).removeprefix('torch.')}"}
    if dim not in DIMS:
        return {"triton": f"it has kernels of head dims {', '.join(map(str, DIMS))}, this one is {dim}"}
    if max(problem.window) > _LONGEST:
        return {"triton": f"it takes windows of at most {_LONGEST} tokens along an axis, this one is {problem.window}"}
    return {}


def attend(problem: Problem) -> Tensor:
    """(b, *grid, heads * dim) in the dtype of qkv; softmax and sums in fp32."""
    return _forward(*arguments(problem))[0]


def arguments(problem: Problem) -> tuple:
    """What the operator takes of a checked call. A float scale that is not well above zero goes as a tensor."""
    qkv, bias, scale, pad_value = problem.qkv, problem.bias, problem.scale, problem.pad_value
    factor = 1.0
    if not isinstance(scale, Tensor):
        factor, scale = (
            (scale, None) if scale > _SMALLEST_SCALE else (1.0, torch.full((qkv.shape[-2],), scale, device=qkv.device))
        )
    bias, scale, pad_value = (None if x is None else x.float() for x in (bias, scale, pad_value))
    draw = None if problem.key is None else address(problem.key, qkv.device)
    seed = 0 if problem.key is None else signed(problem.key.seed)
    return (
        qkv, bias, scale, pad_value, problem.keep, draw, problem.window, problem.full, problem.shift, factor,
        problem.cosine, problem.pad == "bias", problem.bias_index == "sliced", problem.dropout, seed,
    )  # fmt: skip


def _fake(qkv, bias, scale, pad_value, keep, counter, window, *rest):
    axes = len(window)
    batch, grid, (heads, dim) = qkv.shape[0], qkv.shape[1 : 1 + axes], qkv.shape[-2:]
    saved = qkv.new_empty((0,), dtype=torch.float32)
    if math.prod(window) > launch.LARGEST:
        windows = math.prod([-(-g // w) for g, w in zip(grid, window, strict=True)])
        saved = qkv.new_empty((batch, windows, heads, math.prod(window)), dtype=torch.float32)
    return qkv.new_empty((batch, *grid, heads * dim)), saved


def _fake_backward(grad, out, lse, qkv, bias, scale, pad_value, *rest):
    heads, dim = qkv.shape[-2:]
    return (
        torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device),
        qkv.new_empty((0,) if bias is None else bias.shape, dtype=torch.float32),
        qkv.new_empty((heads,), dtype=torch.float32),
        qkv.new_empty((3, heads, dim), dtype=torch.float32),
    )


def _save(ctx, inputs, output) -> None:
    tensors, ctx.rest = inputs[:6], inputs[6:]
    out, lse = output
    tiled = math.prod(ctx.rest[0]) > launch.LARGEST  # a window in one tile is computed again from qkv alone
    ctx.save_for_backward(*tensors, *((out, lse) if tiled else (None, None)))
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, _):
    *tensors, out, lse = ctx.saved_tensors
    nothing = (None,) * (2 + len(ctx.rest))
    if grad is None:
        return (None,) * 4 + nothing
    qkv, *others = _backward(grad, out, lse, *tensors, *ctx.rest)
    return qkv, *(None if x is None else y for x, y in zip(tensors[1:4], others, strict=True)), *nothing


_backward = operator(
    "window_attention_triton_backward",
    f"(Tensor grad, Tensor? out, Tensor? lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    launch.backward, _fake_backward, backward=no_derivative("window_attention"),
)  # fmt: skip
_forward = operator(
    "window_attention_triton", f"({_OPTIONS}) -> (Tensor, Tensor)", launch.forward, _fake, save=_save,
    backward=_gradients,
)  # fmt: skip
