"""Masks from attention: hide what is attended most, show some of it again as hints."""

from __future__ import annotations

from torch import Tensor

from ._cpp import masking as cpp
from ._cuda import masking as cuda
from ._dispatch import choose
from ._masking import check, nan_seen
from ._triton import masking as triton
from ._triton.registration import unfit
from .key import Key
from .reference import masking as reference

__all__ = ["attention_mask", "nan_seen"]


def attention_mask(
    attention: Tensor,
    ratio: float | Tensor,
    *,
    hint: float = 0.0,
    hint_mode: str = "random",
    order: str = "high",
    hint_ratio: float | Tensor | None = None,
    key: Key = Key(0),  # noqa: B008 - an immutable tuple
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Hide the most attended tokens of every sample (AttMask, Kakogeorgiou et al., ECCV 2022, sec. 3.2; SMART).

    attention: (b, n) floating. Hides the int(ratio * n) highest entries (``order="low"``: lowest), the lowest index
    first among equals; then of the top int(hint * n) shows again int(hint * hint_ratio * n) at random, each sample its
    own (``hint_mode="random"``), or all of them ("top"). hint_ratio: ratio if None. Counts are those of exact
    arithmetic: 0.29 of 100 is 29, though 0.29 * 100 < 29 in floating point. ``key`` draws the hints: number i of a
    sample's draw belongs to token i, and the top tokens with the smallest numbers are shown, the lowest index first
    among equals; its samples are 0, 1, ... if it has none.

    ratio and hint_ratio may be (b,) tensors of fp32 or fp64, one share per sample; 0 leaves a sample whole. A ratio of
    these that is below hint is no error, since a GPU would have to be waited for.

    Returns where (b, n) bool, True = hidden, and hidden and visible, (b, count) ascending int64 ids, or None and None
    if ratio is a tensor, or hint_ratio where hints are drawn, since counts then differ between samples.

    Raises ValueError for shares outside [0, 1], hints with order="low", hint > ratio, and, on a CPU, NaN in attention
    (on a GPU NaN ranks last and sets ``nan_seen``); TypeError for what is no floating tensor.
    """
    problem = check(
        attention, ratio, hint=hint, hint_mode=hint_mode, order=order, hint_ratio=hint_ratio, key=key
    )  # fmt: skip
    run = {"reference": reference.mask, "cpp": cpp.mask, "triton": triton.mask, "cuda": cuda.mask}
    return run[choose("attention_mask", attention.device, {**unfit(attention), **cuda.unfit(problem)})](problem)
