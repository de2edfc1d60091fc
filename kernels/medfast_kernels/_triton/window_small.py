"""Window attention, forward and backward, for windows that fit one tile: scores and weights never reach memory.

A program owns one head and strides over windows. So the bias waits in registers as the accumulator of q k^T, and the
gradient of the bias is summed in registers over the program's windows: one partial per program, no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .window_tile import (
    LN2,
    advance,
    bias_tile,
    channels,
    read,
    scored_key,
    scored_query,
    seen,
    split_scale,
    survivors,
    through_norm,
    token_rows,
    tokens,
    unravel,
    wanted,
)


@triton.jit
def weigh(q, k, start, magnitude, z, y, x, geo, MODE: tl.constexpr):
    """exp2 of the scores less their row's maximum, and 1 / the sum of each row."""
    scores = tl.dot(q, tl.trans(k), start, input_precision="ieee")
    n = tl.arange(0, MODE.tile)
    scores = seen(scores, n, n, z, y, x, geo, MODE)
    top = tl.max(scores, axis=1)
    weight = tl.exp2(scores * magnitude - (top * magnitude)[:, None])
    return weight, 1.0 / tl.sum(weight, axis=1)


@triton.jit
def attend(q, k, v, start, sign, magnitude, draw, b, z, y, x, head, geo, MODE: tl.constexpr):
    """The output of one window and head."""
    low_q = scored_query(q, sign, MODE)[0]
    low_k = scored_key(k, MODE)[0]
    weight, share = weigh(low_q, low_k, start, magnitude, z, y, x, geo, MODE)
    if MODE.drop:
        n = tl.arange(0, MODE.tile)
        weight = tl.where(survivors(draw, b, z, y, x, head, n, n, geo, MODE), weight, 0.0)
        share = share / (1.0 - draw[2])
    return tl.dot(weight.to(MODE.compute), v, input_precision="ieee") * share[:, None]


@triton.jit
def forward(out, qkv, bias, scale, pad_value, keep, strides, geo, draw, step, windows, MODE: tl.constexpr):
    """out (b, grid, heads, dim). A program takes every (programs / heads)-th window; ``step`` is that many windows."""
    head, first = tl.program_id(0) % MODE.heads, tl.program_id(0) // MODE.heads
    n = tl.arange(0, MODE.tile)
    factor, sign, magnitude = split_scale(scale, head, MODE)
    start = bias_tile(bias, head, n, n, magnitude, MODE)
    b, z, y, x = unravel(first, geo.counts)
    for _ in range(first, windows, tl.num_programs(0) // MODE.heads):
        here = tokens(n, z, y, x, geo, MODE)
        number, present = here[3], here[4]
        result = tl.full((MODE.tile, MODE.width), 0.0, tl.float32)
        if wanted(keep, b, MODE):
            q = read(qkv, strides, pad_value, b, here, head, 0, MODE)
            k = read(qkv, strides, pad_value, b, here, head, 1, MODE)
            v = read(qkv, strides, pad_value, b, here, head, 2, MODE)
            result = attend(q, k, v, start, sign, magnitude, draw, b, z, y, x, head, geo, MODE)
        at = token_rows(out, b, number, head, geo, MODE, 1)
        tl.store(at, result.to(out.dtype.element_ty), mask=channels(present, MODE))
        b, z, y, x = advance(b, z, y, x, step, geo.counts)


@triton.jit
def put(rows, PART: tl.constexpr, grad, mask, MODE: tl.constexpr):
    """Stores the gradient of q, k or v (part 0, 1, 2); ``rows`` is where that of q lies."""
    tl.store(rows + PART * (MODE.heads * MODE.dim), grad.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def differentiate(
    rows, mask, q, k, v, grad_out, start, factor, sign, magnitude, draw, b, z, y, x, head, geo, MODE: tl.constexpr
):
    """Gradients of k, v, the scores (the bias) and the scale (a number), of one window and head.

    Those of q, k and v go to ``rows`` as soon as they are made: held to the end, they would spill other registers.
    """
    low_q, unit_q, inverse_q = scored_query(q, sign, MODE)
    low_k, unit_k, inverse_k = scored_key(k, MODE)
    weight, share = weigh(low_q, low_k, start, magnitude, z, y, x, geo, MODE)
    weight *= share[:, None]
    used = weight
    if MODE.drop:  # the sign says which weights are dropped: no tile of its own has to wait for grad_weight
        n = tl.arange(0, MODE.tile)
        weight = tl.where(survivors(draw, b, z, y, x, head, n, n, geo, MODE), weight, -weight)
        used = tl.maximum(weight, 0.0, propagate_nan=tl.PropagateNan.ALL) * (1.0 / (1.0 - draw[2]))
    grad_v = tl.dot(tl.trans(used.to(MODE.compute)), grad_out, input_precision="ieee")
    put(rows, 2, grad_v, mask, MODE)
    grad_weight = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
    if MODE.drop:
        grad_weight *= used
        grad_scores = grad_weight - tl.abs(weight) * tl.sum(grad_weight, axis=1)[:, None]
    else:
        grad_scores = weight * (grad_weight - tl.sum(weight * grad_weight, axis=1)[:, None])
    rounded = grad_scores.to(MODE.compute)
    grad_q = tl.dot(rounded, low_k, input_precision="ieee")
    grad_scale = tl.sum(tl.sum(grad_q * unit_q, axis=1), axis=0) if MODE.scales else 0.0
    grad_q *= factor
    if MODE.cosine:
        grad_q = through_norm(grad_q, unit_q, inverse_q)
    put(rows, 0, grad_q, mask, MODE)
    grad_k = tl.dot(tl.trans(rounded), low_q, input_precision="ieee") * (magnitude * LN2)
    if MODE.cosine:
        grad_k = through_norm(grad_k, unit_k, inverse_k)
    put(rows, 1, grad_k, mask, MODE)
    return grad_k, grad_v, grad_scores, grad_scale


@triton.jit
def backward(
    grad_qkv, grad_bias, grad_pads, grad_scale, grad_out, qkv, bias, scale, pad_value, keep, strides, geo, draw, step,
    windows, MODE: tl.constexpr,
):  # fmt: skip
    """grad_qkv (b, grid, 3, heads, dim), and of each program its sums: bias (tile, tile), pads (2, width), scale."""
    program, head = tl.program_id(0), tl.program_id(0) % MODE.heads
    first = program // MODE.heads
    n = tl.arange(0, MODE.tile)
    factor, sign, magnitude = split_scale(scale, head, MODE)
    start = bias_tile(bias, head, n, n, magnitude, MODE)
    sum_bias = tl.full((MODE.tile, MODE.tile), 0.0, tl.float32)
    sum_k, sum_v = tl.full((MODE.width,), 0.0, tl.float32), tl.full((MODE.width,), 0.0, tl.float32)
    sum_scale = 0.0
    b, z, y, x = unravel(first, geo.counts)
    # what the generator needs of each window would fill the registers if it was made before the loop
    for _ in tl.range(first, windows, tl.num_programs(0) // MODE.heads, disable_licm=MODE.drop):
        here = tokens(n, z, y, x, geo, MODE)
        number, present = here[3], here[4]
        mask = channels(present, MODE)
        rows = token_rows(grad_qkv, b, number, head, geo, MODE, 3)
        if wanted(keep, b, MODE):
            q = read(qkv, strides, pad_value, b, here, head, 0, MODE)
            k = read(qkv, strides, pad_value, b, here, head, 1, MODE)
            v = read(qkv, strides, pad_value, b, here, head, 2, MODE)
            grad = tl.load(token_rows(grad_out, b, number, head, geo, MODE, 1), mask=mask, other=0.0).to(MODE.compute)
            grad_k, grad_v, grad_scores, of_scale = differentiate(
                rows, mask, q, k, v, grad, start, factor, sign, magnitude, draw, b, z, y, x, head, geo, MODE
            )
            if MODE.biased:
                sum_bias += grad_scores
            if MODE.scales:
                sum_scale += of_scale
            if MODE.live:
                pads = ((n < MODE.tokens) & ~present)[:, None]
                sum_k += tl.sum(tl.where(pads, grad_k, 0.0), axis=0)
                sum_v += tl.sum(tl.where(pads, grad_v, 0.0), axis=0)
        else:
            nothing = tl.full((MODE.tile, MODE.width), 0.0, tl.float32)
            put(rows, 0, nothing, mask, MODE)
            put(rows, 1, nothing, mask, MODE)
            put(rows, 2, nothing, mask, MODE)
        b, z, y, x = advance(b, z, y, x, step, geo.counts)
    if MODE.biased:
        here = (n < MODE.tokens)[:, None] & (n < MODE.tokens)[None, :]
        at = grad_bias + program.to(tl.int64) * (MODE.tokens * MODE.tokens)
        tl.store(at + n[:, None] * MODE.tokens + n[None, :], sum_bias, mask=here)
    if MODE.scales:
        tl.store(grad_scale + program, sum_scale)
    if MODE.live:
        channel = tl.arange(0, MODE.width)
        at = grad_pads + program * (2 * MODE.dim) + channel
        tl.store(at, sum_k, mask=channel < MODE.dim)
        tl.store(at + MODE.dim, sum_v, mask=channel < MODE.dim)
