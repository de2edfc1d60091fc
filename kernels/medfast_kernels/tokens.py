"""Dropping hidden tokens before an encoder and putting them back after it: MAE's way of skipping their cost."""

from __future__ import annotations

from torch import Tensor

from ._cpp import tokens as cpp
from ._dispatch import choose
from ._tokens import check_drop, check_restore
from ._triton import tokens as triton
from ._triton.registration import unfit
from .reference import tokens as reference


def drop_tokens(x: Tensor, ids: Tensor, position: Tensor | None = None) -> Tensor:
    """The tokens ``ids`` of every sample, with their positions added (MAE, He et al. 2022, sec. 3).

    x: (b, n, d) floating, any strides. ids: (b, count) int64, distinct in [0, n), in any order; ``random_ids`` and the
    ``visible`` of ``attention_mask`` are. position: (n, d), added before the tokens are taken; with 16-bit x it may be
    fp32 (the sum is rounded once). Returns (b, count, d) in the dtype of x. Differentiable, twice too, in x and
    position: the gradient of a token that is not in ids is zero, that of a position is summed over the batch, in fp32
    for 16 bits, in the order of the samples.

    Raises ValueError for shapes, devices and dtypes that do not fit, and, on a CPU, for ids that are repeated or
    outside [0, n) (on a GPU what such ids give is undefined, never an access out of bounds in our kernels); TypeError
    for other kinds.
    """
    problem = check_drop(x, ids, position)
    run = {"reference": reference.drop, "cpp": cpp.drop, "triton": triton.drop}
    return run[choose("drop_tokens", x.device, unfit(x))](problem)


def restore_tokens(y: Tensor, ids: Tensor, n: int, fill: Tensor) -> Tensor:
    """The inverse of ``drop_tokens``: ``y[b, j]`` goes to place ``ids[b, j]`` of n, all other places hold ``fill``.

    y: (b, count, d) floating, any strides. ids: (b, count) int64, distinct in [0, n). fill: (d,), MAE's mask token;
    with 16-bit y it may be fp32. A decoder's positions are added afterwards, to all tokens alike. Returns (b, n, d) in
    the dtype of y. Differentiable, twice too, in y and fill; that of fill is summed over all places that it took, in
    fp32 for 16 bits, in one fixed order.

    Raises what ``drop_tokens`` raises, and ValueError for n smaller than count.
    """
    problem = check_restore(y, ids, n, fill)
    run = {"reference": reference.restore, "cpp": cpp.restore, "triton": triton.restore}
    return run[choose("restore_tokens", y.device, unfit(y))](problem)
