"""Dropping and restoring tokens in C++ as torch operators: each is linear, and the backward of the other's backward."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import NAMESPACE, wide
from .._tokens import Drop, Restore
from .registration import register

_OPERATORS = getattr(torch.ops, NAMESPACE)


def drop(problem: Drop) -> Tensor:
    x, ids, position = problem
    return _OPERATORS.drop_tokens(x, ids, None if position is None else position.to(wide(x.dtype)))


def restore(problem: Restore) -> Tensor:
    y, ids, n, fill = problem
    return _OPERATORS.restore_tokens(y, ids, n, fill.to(wide(y.dtype)))


def _save_drop(ctx, inputs, output) -> None:
    x, ids, position = inputs
    ctx.save_for_backward(ids)
    ctx.n, ctx.position = x.shape[1], position is not None


def _drop_backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    grad_x, grad_position = _OPERATORS.drop_tokens_backward(grad, ids, ctx.n, ctx.position)
    return grad_x, None, grad_position if ctx.position else None


def _save_drop_backward(ctx, inputs, output) -> None:
    _, ids, _, ctx.position = inputs
    ctx.save_for_backward(ids)


def _drop_twice_backward(ctx, grad_x, grad_position):
    (ids,) = ctx.saved_tensors
    return _OPERATORS.drop_tokens(grad_x, ids, grad_position if ctx.position else None), None, None, None


def _save_restore(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _restore_backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    grad_y, grad_fill = _OPERATORS.restore_tokens_backward(grad, ids)
    return grad_y, None, None, grad_fill


def _save_restore_backward(ctx, inputs, output) -> None:
    grad, ids = inputs
    ctx.save_for_backward(ids)
    ctx.n = grad.shape[1]


def _restore_twice_backward(ctx, grad_y, grad_fill):
    (ids,) = ctx.saved_tensors
    return _OPERATORS.restore_tokens(grad_y, ids, ctx.n, grad_fill), None


def _fake_drop(x, ids, position):
    return x.new_empty((x.shape[0], ids.shape[1], x.shape[2]))


def _fake_drop_backward(grad, ids, n, position):
    batch, _, d = grad.shape
    return grad.new_empty((batch, n, d)), grad.new_empty((n if position else 0, d), dtype=wide(grad.dtype))


def _fake_restore(y, ids, n, fill):
    return y.new_empty((y.shape[0], n, y.shape[2]))


def _fake_restore_backward(grad, ids):
    batch, _, d = grad.shape
    return grad.new_empty((batch, ids.shape[1], d)), grad.new_empty((d,), dtype=wide(grad.dtype))


register("drop_tokens", _fake_drop, save=_save_drop, backward=_drop_backward)
register("drop_tokens_backward", _fake_drop_backward, save=_save_drop_backward, backward=_drop_twice_backward)
register("restore_tokens", _fake_restore, save=_save_restore, backward=_restore_backward)
register(
    "restore_tokens_backward", _fake_restore_backward, save=_save_restore_backward, backward=_restore_twice_backward
)  # fmt: skip
