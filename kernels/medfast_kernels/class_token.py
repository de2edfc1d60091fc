"""Attention of one [CLS] token per sample: what the semantic attention module and attention masks are made of."""

from __future__ import annotations

import torch
from torch import Tensor


def class_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of the [CLS] query over itself and all tokens.

    q: (b, heads, dim). k, v: (b, 1 + n, heads, dim), [CLS] first. scale: dim**-0.5 if None.
    Returns out (b, heads * dim) in the dtype of v, and attention (b, n): mean over heads, the [CLS] entry dropped and
    the rest not renormalised. Logits and softmax are fp32 (fp64 for fp64) under any autocast, because 16 bits reorder
    the tokens. Both outputs are differentiable. Source: CaiT class attention (Touvron et al. 2021, sec. 3); SMART.

    Raises TypeError for what is no floating tensor, ValueError for shapes that do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if q.dim() != 3 or k.dim() != 4 or k.shape != v.shape or q.shape != (k.shape[0], *k.shape[2:]) or k.shape[1] < 2:
        raise ValueError(
            "q must be (b, heads, dim) and k, v (b, 1 + n, heads, dim) with n >= 1, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        logits = torch.einsum("bhd,bnhd->bhn", q.to(dtype) * factor, k.to(dtype))
        weights = logits.softmax(dim=-1)
        out = torch.einsum("bhn,bnhd->bhd", weights, v.to(dtype)).flatten(1)
        return out.to(v.dtype), weights.mean(dim=1)[:, 1:]
