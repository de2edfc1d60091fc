"""The token-wise contrast in C++ as a torch operator: fake implementation, autograd, and the way there."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import NAMESPACE
from .._contrast import Problem
from .registration import no_derivative, register

_OPERATORS = getattr(torch.ops, NAMESPACE)


def contrast(problem: Problem) -> Tensor:
    """The mean over anchors, a scalar; memory grows with the number of tokens, never with its square."""
    p = problem
    loss, _ = _OPERATORS.token_contrast(
        p.z.to(p.dtype), p.volume, p.temperature, p.factor, p.offset, p.first, p.count
    )  # fmt: skip
    return loss


def _fake(z, volume, *rest):
    return z.new_empty(()), z.new_empty((z.shape[0] * z.shape[1] * z.shape[2],))


def _fake_backward(grad, lse, z, volume, *rest):
    return torch.empty(z.shape, dtype=z.dtype, device=z.device)


def _save(ctx, inputs, output) -> None:
    z, volume, *ctx.rest = inputs
    ctx.save_for_backward(output[1], z, volume)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    grads = None if grad is None else _OPERATORS.token_contrast_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return grads, None, *(None for _ in ctx.rest)


register("token_contrast", _fake, save=_save, backward=_backward, fp32=True)
register("token_contrast_backward", _fake_backward, backward=no_derivative("token_contrast_backward"))
