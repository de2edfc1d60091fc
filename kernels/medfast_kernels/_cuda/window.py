"""Window attention in CUDA C++: which calls it has a kernel for, and the way there from a checked call.

A block of four warps owns one head, walks over windows and computes on tensor cores (mma.sync); all that is kept for
the backward is its input. Windows of at most 64 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import NAMESPACE
from .._dispatch import built_with_cuda
from .._window import Problem, bias_rows

MOST_TOKENS, MOST_CHANNELS = 64, 96


def unfit(problem: Problem) -> dict[str, str]:
    """For ``choose``: why there is no kernel for this call, if so."""
    reason = _why_unfit(problem)
    return {"cuda": reason} if reason else {}


def _why_unfit(problem: Problem) -> str | None:
    dim, dtype = problem.qkv.shape[-1], problem.qkv.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes on 16-bit tensor cores, qkv is {dtype}: float16 or bfloat16 (autocast)"
    if problem.tokens > MOST_TOKENS:
        return f"it takes windows of at most {MOST_TOKENS} tokens, this one has {problem.tokens}"
    if dim % 4 or dim > MOST_CHANNELS:
        return f"it takes head dims that are multiples of 4 and at most {MOST_CHANNELS}, this one is {dim}"
    if problem.cosine:
        return "it has no kernel of cosine attention"
    if problem.dropout:
        return "it has no kernel with dropout of attention weights"
    return None


def attend(problem: Problem, namespace: str = NAMESPACE) -> Tensor:
    """(b, *grid, heads * dim) in the dtype of qkv; products of 16-bit numbers, sums and softmax in fp32."""
    qkv, bias, scale, pad_value = problem.qkv, problem.bias, problem.scale, problem.pad_value
    if bias is not None:
        bias = bias.float()
        bias = bias[bias_rows(problem, qkv.device)].permute(2, 0, 1) if bias.dim() == 2 else bias
    heads = qkv.shape[-2]
    scale = scale.float() if isinstance(scale, Tensor) else torch.full((heads,), scale, device=qkv.device)
    return getattr(torch.ops, namespace).window_attention_cuda(
        qkv, bias, scale, None if pad_value is None else pad_value.float(), problem.keep, problem.window, problem.shift,
        problem.pad == "bias",
    )  # fmt: skip


def _fake(qkv, bias, scale, pad_value, keep, window, shift, live_pads):
    axes = len(window)
    return qkv.new_empty((*qkv.shape[: 1 + axes], qkv.shape[-2] * qkv.shape[-1]))


def _fake_backward(grad, qkv, bias, scale, pad_value, *rest):
    heads, dim = qkv.shape[-2:]
    return (
        torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device),
        scale.new_empty((0,) if bias is None else bias.shape),
        scale.new_empty((3, heads, dim)),
        scale.new_empty((heads,)),
    )


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "window_attention_cuda_backward has no derivative; for second derivatives run the forward under "
        'medfast_kernels.backend("reference")'
    )


def register(namespace: str) -> None:
    """Fake implementations and autograd of the operators under torch.ops.``namespace``."""

    def backward(ctx, grad):
        qkv, bias, scale, pad_value, keep = ctx.saved_tensors
        run = getattr(torch.ops, namespace).window_attention_cuda_backward
        grad_qkv, table, pads, grad_scale = run(grad, qkv, bias, scale, pad_value, keep, *ctx.rest)
        grads = (grad_qkv, None if bias is None else table, grad_scale, None if pad_value is None else pads)
        return *grads, *(None,) * (1 + len(ctx.rest))

    torch.library.register_fake(f"{namespace}::window_attention_cuda", _fake)
    torch.library.register_fake(f"{namespace}::window_attention_cuda_backward", _fake_backward)
    torch.library.register_autograd(f"{namespace}::window_attention_cuda", backward, setup_context=_save)
    torch.library.register_autograd(f"{namespace}::window_attention_cuda_backward", _no_second_derivative)


if built_with_cuda():
    register(NAMESPACE)
