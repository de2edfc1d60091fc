"""Attention of one [CLS] token per sample: what the semantic attention module and attention masks are made of."""

from __future__ import annotations

from torch import Tensor

from ._class_token import check
from ._cpp import class_token as cpp
from ._dispatch import choose
from ._triton import class_token as triton
from ._triton.registration import unfit
from .reference import class_token as reference


def class_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of the [CLS] query over itself and all tokens.

    q: (b, heads, dim). k, v: (b, 1 + n, heads, dim), [CLS] first, any strides. scale: dim**-0.5 if None.
    Returns out (b, heads * dim) in the dtype of v, and attention (b, n): mean over heads, the [CLS] entry dropped and
    the rest not renormalised. Logits and softmax are fp32 (fp64 for fp64) under any autocast, because 16 bits reorder
    the tokens; attention is in that dtype. Both outputs are differentiable, once, in q, k and v.
    Source: CaiT class attention (Touvron et al. 2021, sec. 3); SMART.

    Raises TypeError for what is no floating tensor, ValueError for shapes, devices and dtypes that do not fit.
    """
    problem = check(q, k, v, scale=scale)
    run = {"reference": reference.attend, "cpp": cpp.attend, "triton": triton.attend}
    return run[choose("class_attention", q.device, unfit(q))](problem)
