"""Class attention as a Triton operator: launches, fake implementation, autograd, the way there from a checked call."""

from __future__ import annotations

import torch
from torch import Tensor

from .._class_token import Problem
from .registration import no_derivative, operator

_PROGRAMS = 1024  # to fill a GPU: a function of shape alone, so that sums are the same on every device
_TILE = 1024  # logits


def attend(problem: Problem) -> tuple[Tensor, Tensor]:
    """out (b, heads * dim) in the dtype of v, computed in fp32, and attention (b, n) fp32."""
    out, attention, _, _ = class_attention(problem.q, problem.k, problem.v, problem.scale)
    return out.to(problem.v.dtype), attention


def _power(x: int) -> int:
    return 1 << (x - 1).bit_length()


def _block(dim: int) -> int:
    """Tokens that a program holds at a time."""
    return max(8, min(64, 4096 // _power(dim)))


def _split(rows: int, tokens: int, block: int) -> tuple[int, int]:
    """Splits of the tokens of a row, and tokens of each."""
    blocks = -(-tokens // block)
    each = -(-blocks // max(1, _PROGRAMS // rows))
    return -(-blocks // each), each * block


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import class_token_kernels as kernels

    out, attention, logits, lse = outputs = _fake(q, k, v, scale)
    batch, tokens, heads, dim = k.shape
    rows = batch * heads
    if not rows:
        return outputs
    q, k, v = q.contiguous(), _dense(k), _dense(v)
    splits, chunk = _split(rows, tokens, _block(dim))
    high, total, part = (lse.new_empty((rows, splits, *last)) for last in ((), (), (dim,)))
    kernels.attend_part[(rows * splits,)](
        q, k, v, logits, high, total, part, scale, *k.stride()[:3], *v.stride()[:3], tokens, heads, dim, splits, chunk,
        _block(dim), _power(dim),
    )  # fmt: skip
    kernels.combine[(rows,)](high, total, part, out, lse, dim, splits, _power(splits), _power(dim))
    programs = -(-(tokens - 1) // _TILE)
    kernels.mean_over_heads[(batch * programs,)](logits, lse, attention, tokens, heads, programs, _TILE)
    return outputs


def _launch_backward(
    grad_out: Tensor, grad_attention: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logits: Tensor,
    lse: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from . import class_token_kernels as kernels

    grads = _fake_backward(grad_out, grad_attention, q, k, v, out, logits, lse, scale)
    batch, tokens, heads, dim = k.shape
    rows = batch * heads
    if not rows:
        return grads
    q, k, v = q.contiguous(), _dense(k), _dense(v)
    grad_out, grad_attention = grad_out.contiguous(), grad_attention.contiguous()
    splits, chunk = _split(rows, tokens, _block(dim))
    mean, part = torch.empty_like(lse), lse.new_empty((rows, splits, dim))
    kernels.mean_gradient[(rows,)](
        grad_out, grad_attention, out, logits, lse, mean, tokens, heads, dim, _TILE, _power(dim)
    )
    kernels.attend_part_backward[(rows * splits,)](
        grad_out, grad_attention, q, k, v, logits, lse, mean, part, *grads[1:], scale, *k.stride()[:3],
        *v.stride()[:3], tokens, heads, dim, splits, chunk, _block(dim), _power(dim),
    )  # fmt: skip
    grads[0].copy_(part.sum(1).view(q.shape))
    return grads


def _fake(q, k, v, scale):
    batch, tokens, heads, dim = k.shape
    shapes = ((batch, heads * dim), (batch, tokens - 1), (batch, heads, tokens), (batch, heads))
    return tuple(q.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _fake_backward(grad_out, grad_attention, q, k, v, *rest):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.scale = inputs
    out, _, logits, lse = output
    ctx.save_for_backward(q, k, v, out, logits, lse)
    ctx.mark_non_differentiable(logits, lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_attention, *_):
    q, k, v, out, logits, lse = ctx.saved_tensors
    if grad_out is None and grad_attention is None:
        return None, None, None, None
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if grad_attention is None:
        grad_attention = out.new_zeros((k.shape[0], k.shape[1] - 1))
    return *class_attention_backward(grad_out, grad_attention, q, k, v, out, logits, lse, ctx.scale), None


class_attention = operator(
    "class_attention_triton",
    "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _fake,
    save=_save,
    backward=_backward,
)
class_attention_backward = operator(
    "class_attention_triton_backward",
    "(Tensor grad_out, Tensor grad_attention, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logits, Tensor lse, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
    backward=no_derivative("class_attention"),
)
