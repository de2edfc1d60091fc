"""Class attention in C++ as a torch operator: fake implementation, autograd, and the way there from a checked call."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import NAMESPACE
from .._class_token import Problem
from .registration import no_derivative, register

_OPERATORS = getattr(torch.ops, NAMESPACE)


def attend(problem: Problem) -> tuple[Tensor, Tensor]:
    """out (b, heads * dim) and attention (b, n); 16-bit input is computed in fp32."""
    q, k, v, scale, dtype = problem
    out, attention, _ = _OPERATORS.class_attention(q.to(dtype), k.to(dtype), v.to(dtype), scale)
    return out.to(v.dtype), attention


def _fake(q, k, v, scale):
    batch, heads, dim = q.shape
    tokens = k.shape[1]
    return q.new_empty((batch, heads * dim)), q.new_empty((batch, tokens - 1)), q.new_empty((batch, heads, tokens))


def _fake_backward(grad_out, grad_attention, out, weights, q, k, v, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.scale = inputs
    out, _, weights = output
    ctx.save_for_backward(out, weights, q, k, v)
    ctx.mark_non_differentiable(weights)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_attention, _):
    if grad_out is None and grad_attention is None:
        return None, None, None, None
    return *_OPERATORS.class_attention_backward(grad_out, grad_attention, *ctx.saved_tensors, ctx.scale), None


register("class_attention", _fake, save=_save, backward=_backward, fp32=True)
register("class_attention_backward", _fake_backward, backward=no_derivative("class_attention_backward"))
