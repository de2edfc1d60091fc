"""Window attention in C++ as a torch operator: fake implementation, autograd, and the way there from a checked call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import NAMESPACE, wide
from .._window import Problem, bias_rows
from ..key import address, signed
from .registration import no_derivative, register

_OPERATORS = getattr(torch.ops, NAMESPACE)


def attend(problem: Problem) -> Tensor:
    """(b, *grid, heads * dim) in the dtype of qkv; 16-bit input is computed in fp32."""
    dtype = wide(problem.qkv.dtype)
    qkv, bias, scale, pad_value = problem.qkv.to(dtype), problem.bias, problem.scale, problem.pad_value
    rows = bias_rows(problem, qkv.device) if bias is not None and bias.dim() == 2 else None
    bias = None if bias is None else bias.to(dtype)
    heads = qkv.shape[-2]
    scale = scale.to(dtype) if isinstance(scale, Tensor) else torch.full((heads,), scale, dtype=dtype)
    pad_value = None if pad_value is None else pad_value.to(dtype)
    draw = None if problem.key is None else address(problem.key, qkv.device)
    seed = 0 if problem.key is None else signed(problem.key.seed)
    out, _ = _OPERATORS.window_attention(
        qkv, bias, rows, scale, pad_value, problem.keep, draw, problem.window, problem.shift, problem.cosine,
        problem.pad == "bias", problem.dropout, seed,
    )  # fmt: skip
    return out.to(problem.qkv.dtype)


def _fake(qkv, bias, rows, scale, pad_value, keep, draw, window, shift, cosine, live_pads, dropout, seed):
    axes = len(window)
    batch, grid, (heads, dim) = qkv.shape[0], qkv.shape[1 : 1 + axes], qkv.shape[-2:]
    windows = math.prod([-(-g // w) for g, w in zip(grid, window, strict=True)])
    return (
        qkv.new_empty((batch, *grid, heads * dim)),
        qkv.new_empty((batch, windows, heads, 2, math.prod(window))),
    )


def _fake_backward(grad, out, softmax, qkv, bias, rows, scale, pad_value, *rest):
    *_, of_bias = rest
    heads, dim = qkv.shape[-2:]
    return (
        torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device),
        qkv.new_empty(bias.shape if of_bias else (0,)),
        qkv.new_empty((3, heads, dim)),
        qkv.new_empty((heads,)),
    )


def _save(ctx, inputs, output) -> None:
    tensors, ctx.rest = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    *tensors, out, softmax = ctx.saved_tensors
    pad_value, of_bias = tensors[4], ctx.needs_input_grad[1]
    if grad is None:
        return (None,) * (len(tensors) + len(ctx.rest))
    qkv, table, pads, scale = _OPERATORS.window_attention_backward(grad, out, softmax, *tensors, *ctx.rest, of_bias)
    grads = (qkv, table if of_bias else None, None, scale, None if pad_value is None else pads)
    return *grads, *(None,) * (2 + len(ctx.rest))


register("window_attention", _fake, save=_save, backward=_backward, fp32=True)
register("window_attention_backward", _fake_backward, backward=no_derivative("window_attention_backward"))
