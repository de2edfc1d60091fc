"""Class attention in plain PyTorch: the definition that every other backend is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import no_autocast
from .._class_token import Problem, check


def class_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """``medfast_kernels.class_attention`` in plain PyTorch, whatever backend is asked for."""
    return attend(check(q, k, v, scale=scale))


def attend(problem: Problem) -> tuple[Tensor, Tensor]:
    """out (b, heads * dim) and attention (b, n)."""
    q, k, v, scale, dtype = problem
    with no_autocast(q.device):
        logits = torch.einsum("bhd,bnhd->bhn", q.to(dtype) * scale, k.to(dtype))
        weights = logits.softmax(dim=-1)
        out = torch.einsum("bhn,bnhd->bhd", weights, v.to(dtype)).flatten(1)
        return out.to(v.dtype), weights.mean(dim=1)[:, 1:]
