"""Dropping and restoring tokens as Triton operators. Each is linear, and the gradient of each is made of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from .._tokens import Drop, Restore
from .random import tile
from .registration import operator

_ELEMENTS = 2048  # of the tile of one program
_PROGRAMS = 1024  # to fill a GPU: a function of shape alone, so that sums are the same on every device


def drop(problem: Drop) -> Tensor:
    return take(problem.x, problem.ids, problem.position)


def restore(problem: Restore) -> Tensor:
    return put(problem.y, problem.ids, invert(problem.ids, problem.n), problem.fill)


def _tiles(rows: int, dim: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Programs along rows and columns, and the tile of each."""
    columns = min(128, 1 << (dim - 1).bit_length())
    return (-(-rows // (_ELEMENTS // columns)), -(-dim // columns)), (_ELEMENTS // columns, columns)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch_invert(ids: Tensor, n: int) -> Tensor:
    from . import tokens_kernels as kernels

    inverse = _fake_invert(ids, n)
    if inverse.numel():
        kernels.invert[(len(ids),)](ids.contiguous(), inverse, ids.shape[1], n, tile(n))
    return inverse


def _launch_take(x: Tensor, ids: Tensor, position: Tensor | None) -> Tensor:
    from . import tokens_kernels as kernels

    out = _fake_take(x, ids, position)
    batch, count, dim = out.shape
    if out.numel():
        x, position = _dense(x), None if position is None else position.contiguous()
        programs, shape = _tiles(count, dim)
        kernels.take[(batch * programs[0] * programs[1],)](
            x, ids.contiguous(), position, out, *x.stride()[:2], x.shape[1], count, dim, *programs, *shape
        )
    return out


def _launch_put(y: Tensor, ids: Tensor, inverse: Tensor, fill: Tensor | None) -> Tensor:
    from . import tokens_kernels as kernels

    out = _fake_put(y, ids, inverse, fill)
    batch, n, dim = out.shape
    if out.numel():
        y, fill = _dense(y), None if fill is None else fill.contiguous()
        programs, shape = _tiles(n, dim)
        kernels.put[(batch * programs[0] * programs[1],)](
            y, inverse, fill, out, *y.stride()[:2], n, dim, *programs, *shape
        )
    return out


def _launch_sum_samples(y: Tensor, ids: Tensor, inverse: Tensor) -> Tensor:
    from . import tokens_kernels as kernels

    out = _fake_sum_samples(y, ids, inverse)
    n, dim = out.shape
    if out.numel():
        y = _dense(y)
        programs, shape = _tiles(n, dim)
        kernels.sum_samples[(programs[0] * programs[1],)](
            y, inverse, out, *y.stride()[:2], len(y), n, dim, *programs, *shape
        )
    return out


def _launch_sum_missing(x: Tensor, ids: Tensor, inverse: Tensor) -> Tensor:
    from . import tokens_kernels as kernels

    batch, n, dim = x.shape
    if not x.numel():
        return x.new_zeros((dim,), dtype=torch.float32)
    x = _dense(x)
    (tiles, columns), shape = _tiles(n, dim)
    steps = -(-tiles * batch * columns // _PROGRAMS)
    groups = -(-tiles // steps)
    part = x.new_empty((batch, groups, dim), dtype=torch.float32)
    kernels.sum_missing[(batch * groups * columns,)](
        x, inverse, part, *x.stride()[:2], n, dim, steps, groups, columns, *shape
    )
    return part.sum((0, 1))


def _fake_invert(ids: Tensor, n: int) -> Tensor:
    return ids.new_empty((ids.shape[0], n), dtype=torch.int32)


def _fake_take(x: Tensor, ids: Tensor, position: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], ids.shape[1], x.shape[2]))


def _fake_put(y: Tensor, ids: Tensor, inverse: Tensor, fill: Tensor | None) -> Tensor:
    return y.new_empty((y.shape[0], inverse.shape[1], y.shape[2]))


def _fake_sum_samples(y: Tensor, ids: Tensor, inverse: Tensor) -> Tensor:
    return y.new_empty((inverse.shape[1], y.shape[2]), dtype=torch.float32)


def _fake_sum_missing(x: Tensor, ids: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty((x.shape[2],), dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    """For put and both sums: the first input gives the shape, the next two lead back."""
    ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype
    ctx.save_for_backward(*inputs[1:3])
    ctx.other = inputs[3].dtype if len(inputs) > 3 and inputs[3] is not None else None


def _save_take(ctx, inputs, output) -> None:
    x, ids, position = inputs
    ctx.n, ctx.other = x.shape[1], None if position is None else position.dtype
    ctx.save_for_backward(ids)


def _backward_take(ctx, grad):
    (ids,) = ctx.saved_tensors
    inverse = invert(ids, ctx.n)
    return (
        put(grad, ids, inverse, None) if ctx.needs_input_grad[0] else None,
        None,
        sum_samples(grad, ids, inverse).to(ctx.other) if ctx.needs_input_grad[2] else None,
    )


def _backward_put(ctx, grad):
    ids, inverse = ctx.saved_tensors
    return (
        take(grad, ids, None) if ctx.needs_input_grad[0] else None,
        None,
        None,
        sum_missing(grad, ids, inverse).to(ctx.other) if ctx.needs_input_grad[3] else None,
    )


def _backward_sum_samples(ctx, grad):
    return take(grad.to(ctx.dtype).expand(ctx.shape[0], -1, -1), ctx.saved_tensors[0], None), None, None


def _backward_sum_missing(ctx, grad):
    ids, inverse = ctx.saved_tensors
    nothing = grad.new_zeros((), dtype=ctx.dtype).expand(*ids.shape, ctx.shape[2])
    return put(nothing, ids, inverse, grad), None, None


invert = operator("invert_ids_triton", "(Tensor ids, SymInt n) -> Tensor", _launch_invert, _fake_invert)
take = operator(
    "take_tokens_triton", "(Tensor x, Tensor ids, Tensor? position) -> Tensor", _launch_take, _fake_take,
    save=_save_take, backward=_backward_take,
)  # fmt: skip
put = operator(
    "put_tokens_triton", "(Tensor y, Tensor ids, Tensor inverse, Tensor? fill) -> Tensor", _launch_put, _fake_put,
    save=_save, backward=_backward_put,
)  # fmt: skip
sum_samples = operator(
    "sum_samples_triton", "(Tensor y, Tensor ids, Tensor inverse) -> Tensor", _launch_sum_samples, _fake_sum_samples,
    save=_save, backward=_backward_sum_samples,
)  # fmt: skip
sum_missing = operator(
    "sum_missing_triton", "(Tensor x, Tensor ids, Tensor inverse) -> Tensor", _launch_sum_missing, _fake_sum_missing,
    save=_save, backward=_backward_sum_missing,
)  # fmt: skip
