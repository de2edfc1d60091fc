"""Shifted window attention on the un-rolled, un-partitioned token grid."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._cpp import window as cpp
from ._cuda import window as cuda
from ._dispatch import choose
from ._triton import window as triton
from ._window import check
from .key import Key
from .reference.window import attend


def window_attention(
    qkv: Tensor,
    bias: Tensor | None = None,
    *,
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    scale: float | Tensor | None = None,
    cosine: bool = False,
    pad: str = "bias",
    pad_value: Tensor | None = None,
    clip: bool = True,
    bias_index: str = "geometric",
    dropout: float = 0.0,
    keep: Tensor | None = None,
    key: Key | None = None,
) -> Tensor:
    """Attention inside windows of a 2D or 3D token grid (Swin, Liu et al. 2021; cosine: Swin V2).

    qkv: (b, *grid, 3, heads, dim), floating, any strides. Returns (b, *grid, heads * dim) in its dtype; 16-bit input is
    computed in fp32. bias, pad_value and scale are on its device and of its dtype, or fp32 beside 16 bits (or the other
    way round). Differentiable, once, in qkv, bias, pad_value and scale.

    window, shift: int or one per axis, 0 <= shift < window. Windows start at shift on the padded, cyclic grid; two
        tokens see each other only if they would without wrapping round.
    bias: table (prod(2 * window - 1), heads), row = sum_i (q_i - k_i + w_i - 1) * prod_{j > i} (2 w_j - 1), first axis
        slowest; or dense (heads, N, N) of the effective window; or None.
    scale: of the scores; dim**-0.5 (1 with cosine) if None, a float, or (heads,). cosine: q and k are divided by
        max(norm, 1e-12) first.
    clip: an axis no longer than its window gets a window of its own length and no shift (MONAI, timm); False pads it.
    pad: the grid is padded at its far ends to whole windows, before the shift. "bias": pad tokens are live and hold
        pad_value (3, heads, dim), zeros if None (MONAI: the QKV bias); "mask": nobody sees them.
    bias_index: row of the table in a clipped window. "geometric": of the true offset; "sliced": the top-left block of
        the full window's index (MONAI, torchvision).
    dropout: of attention weights, survivors scaled by 1 / (1 - p), drawn by ``key`` at index
        ((window * heads + head) * N + query) * N + key token.
    keep: (b,) bool. Samples with False are neither read nor computed: zeros come back and no gradient.

    Raises ValueError for values and shapes, TypeError for kinds that no backend accepts.
    """
    problem = check(
        qkv, bias, window=window, shift=shift, scale=scale, cosine=cosine, pad=pad, pad_value=pad_value, clip=clip,
        bias_index=bias_index, dropout=dropout, keep=keep, key=key,
    )  # fmt: skip
    run = {"reference": attend, "cpp": cpp.attend, "triton": triton.attend, "cuda": cuda.attend}
    return run[choose("window_attention", qkv.device, {**cuda.unfit(problem), **triton.unfit(problem)})](problem)
