"""Window attention for windows of more tokens than one tile: tiles of scores, with the log-sum-exp of rows and the
output saved for the backward (FlashAttention 2, Dao 2023).

``forward``, ``backward_queries`` and ``backward_keys`` take one tile of one window and head per program;
``backward_bias`` takes one tile of the bias and strides over windows, so that nothing is added by two programs.
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

LOWEST = tl.constexpr(-1e30)  # below every score, and finite: a row without a key yet is no NaN


@triton.jit
def my_tile(keep, geo, MODE: tl.constexpr):
    """Of this program: window number, sample, window, head, its tokens, tokens to go through (0 if not wanted)."""
    tiles: tl.constexpr = (MODE.tokens + MODE.tile - 1) // MODE.tile
    tile, line = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, index = line % MODE.heads, line // MODE.heads
    b, z, y, x = unravel(index, geo.counts)
    end = MODE.tokens
    if MODE.choosy:
        end = tl.where(wanted(keep, b, MODE), MODE.tokens, 0)
    return line, b, z, y, x, head, tile * MODE.tile + tl.arange(0, MODE.tile), end


@triton.jit
def if_wanted(here, end, MODE: tl.constexpr):
    """``tokens`` of which none is read if the sample is not wanted."""
    z, y, x, number, present = here
    if MODE.choosy:
        present = present & (end > 0)
    return z, y, x, number, present


@triton.jit
def row_at(pointer, line, i, MODE: tl.constexpr):
    return pointer + line.to(tl.int64) * MODE.tokens + i


@triton.jit
def forward(out, lse, qkv, bias, scale, pad_value, keep, strides, geo, draw, MODE: tl.constexpr):
    """out (b, grid, heads, dim); lse (b, windows, heads, N), in units of log 2."""
    line, b, z, y, x, head, i, end = my_tile(keep, geo, MODE)
    factor, sign, magnitude = split_scale(scale, head, MODE)
    here = tokens(i, z, y, x, geo, MODE)
    q = scored_query(read(qkv, strides, pad_value, b, if_wanted(here, end, MODE), head, 0, MODE), sign, MODE)[0]
    top = tl.full((MODE.tile,), LOWEST, tl.float32)
    total = tl.full((MODE.tile,), 0.0, tl.float32)
    result = tl.full((MODE.tile, MODE.width), 0.0, tl.float32)
    for first in range(0, end, MODE.tile):
        j = first + tl.arange(0, MODE.tile)
        there = tokens(j, z, y, x, geo, MODE)
        k = scored_key(read(qkv, strides, pad_value, b, there, head, 1, MODE), MODE)[0]
        v = read(qkv, strides, pad_value, b, there, head, 2, MODE)
        scores = tl.dot(q, tl.trans(k), bias_tile(bias, head, i, j, magnitude, MODE), input_precision="ieee")
        scores = seen(scores, i, j, z, y, x, geo, MODE)
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weight = tl.exp2(scores * magnitude - (higher * magnitude)[:, None])
        shrink = tl.exp2((top - higher) * magnitude)
        total = total * shrink + tl.sum(weight, axis=1)
        if MODE.drop:
            weight = tl.where(survivors(draw, b, z, y, x, head, i, j, geo, MODE), weight / (1.0 - draw[2]), 0.0)
        result = tl.dot(weight.to(MODE.compute), v, result * shrink[:, None], input_precision="ieee")
        top = higher
    result = result * tl.where(total > 0, 1.0 / total, 0.0)[:, None]
    tl.store(row_at(lse, line, i, MODE), top * magnitude + tl.log2(total), mask=i < MODE.tokens)
    at = token_rows(out, b, here[3], head, geo, MODE, 1)
    tl.store(at, result.to(out.dtype.element_ty), mask=channels(here[4], MODE))


@triton.jit
def pair(q, k, v, grad, lse, delta, i, j, bias, magnitude, draw, b, z, y, x, head, geo, MODE: tl.constexpr):
    """Of a tile of queries and keys: the weights that multiply v, and the gradient of the scores."""
    scores = tl.dot(q, tl.trans(k), bias_tile(bias, head, i, j, magnitude, MODE), input_precision="ieee")
    weight = tl.exp2(seen(scores, i, j, z, y, x, geo, MODE) * magnitude - lse[:, None])
    grad_weight = tl.dot(grad, tl.trans(v), input_precision="ieee")
    used = weight
    if MODE.drop:
        stays = survivors(draw, b, z, y, x, head, i, j, geo, MODE)
        used = tl.where(stays, weight / (1.0 - draw[2]), 0.0)
        grad_weight = tl.where(stays, grad_weight / (1.0 - draw[2]), 0.0)
    return used.to(MODE.compute), weight * (grad_weight - delta[:, None])


@triton.jit
def read_grad(grad_out, b, here, head, geo, MODE: tl.constexpr):
    at = token_rows(grad_out, b, here[3], head, geo, MODE, 1)
    return tl.load(at, mask=channels(here[4], MODE), other=0.0).to(MODE.compute)


@triton.jit
def backward_queries(
    grad_qkv, grad_scale, delta, grad_out, out, lse, qkv, bias, scale, pad_value, keep, strides, geo, draw,
    MODE: tl.constexpr,
):  # fmt: skip
    """Gradients of q; delta (as lse), the products of output and its gradient; each program's share of the scale's."""
    line, b, z, y, x, head, i, end = my_tile(keep, geo, MODE)
    factor, sign, magnitude = split_scale(scale, head, MODE)
    everyone = tokens(i, z, y, x, geo, MODE)
    here = if_wanted(everyone, end, MODE)
    q, unit_q, inverse = scored_query(read(qkv, strides, pad_value, b, here, head, 0, MODE), sign, MODE)
    grad = read_grad(grad_out, b, here, head, geo, MODE)
    along = tl.sum(grad.to(tl.float32) * read_grad(out, b, here, head, geo, MODE).to(tl.float32), axis=1)
    tl.store(row_at(delta, line, i, MODE), along, mask=i < MODE.tokens)
    rows = tl.load(row_at(lse, line, i, MODE), mask=(i < MODE.tokens) & (end > 0), other=float("inf"))
    grad_q = tl.full((MODE.tile, MODE.width), 0.0, tl.float32)
    for first in range(0, end, MODE.tile):
        j = first + tl.arange(0, MODE.tile)
        there = tokens(j, z, y, x, geo, MODE)
        k = scored_key(read(qkv, strides, pad_value, b, there, head, 1, MODE), MODE)[0]
        v = read(qkv, strides, pad_value, b, there, head, 2, MODE)
        grad_scores = pair(q, k, v, grad, rows, along, i, j, bias, magnitude, draw, b, z, y, x, head, geo, MODE)[1]
        grad_q = tl.dot(grad_scores.to(MODE.compute), k, grad_q, input_precision="ieee")
    if MODE.scales:
        tl.store(grad_scale + tl.program_id(0), tl.sum(tl.sum(grad_q * unit_q, axis=1), axis=0))
    grad_q *= factor
    if MODE.cosine:
        grad_q = through_norm(grad_q, unit_q, inverse)
    at = token_rows(grad_qkv, b, here[3], head, geo, MODE, 3)
    tl.store(at, grad_q.to(grad_qkv.dtype.element_ty), mask=channels(everyone[4], MODE))


@triton.jit
def backward_keys(
    grad_qkv, grad_pads, delta, grad_out, lse, qkv, bias, scale, pad_value, keep, strides, geo, draw,
    MODE: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v, and of each program the sums of those of its pads, (2, dim)."""
    line, b, z, y, x, head, j, end = my_tile(keep, geo, MODE)
    factor, sign, magnitude = split_scale(scale, head, MODE)
    everyone = tokens(j, z, y, x, geo, MODE)
    here = if_wanted(everyone, end, MODE)
    k, unit_k, inverse = scored_key(read(qkv, strides, pad_value, b, here, head, 1, MODE), MODE)
    v = read(qkv, strides, pad_value, b, here, head, 2, MODE)
    grad_k = tl.full((MODE.tile, MODE.width), 0.0, tl.float32)
    grad_v = tl.full((MODE.tile, MODE.width), 0.0, tl.float32)
    for first in range(0, end, MODE.tile):
        i = first + tl.arange(0, MODE.tile)
        there = tokens(i, z, y, x, geo, MODE)
        q = scored_query(read(qkv, strides, pad_value, b, there, head, 0, MODE), sign, MODE)[0]
        grad = read_grad(grad_out, b, there, head, geo, MODE)
        rows = tl.load(row_at(lse, line, i, MODE), mask=i < MODE.tokens, other=float("inf"))
        along = tl.load(row_at(delta, line, i, MODE), mask=i < MODE.tokens, other=0.0)
        used, grad_scores = pair(q, k, v, grad, rows, along, i, j, bias, magnitude, draw, b, z, y, x, head, geo, MODE)
        grad_v = tl.dot(tl.trans(used), grad, grad_v, input_precision="ieee")
        grad_k = tl.dot(tl.trans(grad_scores.to(MODE.compute)), q, grad_k, input_precision="ieee")
    grad_k *= magnitude * LN2
    if MODE.cosine:
        grad_k = through_norm(grad_k, unit_k, inverse)
    if MODE.live:
        pads = ((j < MODE.tokens) & ~everyone[4])[:, None]
        channel = tl.arange(0, MODE.width)
        at = grad_pads + tl.program_id(0).to(tl.int64) * (2 * MODE.dim) + channel
        tl.store(at, tl.sum(tl.where(pads, grad_k, 0.0), axis=0), mask=channel < MODE.dim)
        tl.store(at + MODE.dim, tl.sum(tl.where(pads, grad_v, 0.0), axis=0), mask=channel < MODE.dim)
    at = token_rows(grad_qkv, b, here[3], head, geo, MODE, 3) + MODE.heads * MODE.dim
    mask = channels(everyone[4], MODE)
    tl.store(at, grad_k.to(grad_qkv.dtype.element_ty), mask=mask)
    tl.store(at + MODE.heads * MODE.dim, grad_v.to(grad_qkv.dtype.element_ty), mask=mask)


@triton.jit
def backward_bias(
    grad_bias, delta, grad_out, lse, qkv, bias, scale, pad_value, keep, strides, geo, draw, step, windows,
    MODE: tl.constexpr,
):  # fmt: skip
    """grad_bias (splits, heads, N, N): program (split, head, tile) adds up one tile over every splits-th window."""
    tiles: tl.constexpr = (MODE.tokens + MODE.tile - 1) // MODE.tile
    tile, line = tl.program_id(0) % (tiles * tiles), tl.program_id(0) // (tiles * tiles)
    head, split = line % MODE.heads, line // MODE.heads
    i = tile // tiles * MODE.tile + tl.arange(0, MODE.tile)
    j = tile % tiles * MODE.tile + tl.arange(0, MODE.tile)
    factor, sign, magnitude = split_scale(scale, head, MODE)
    total = tl.full((MODE.tile, MODE.tile), 0.0, tl.float32)
    b, z, y, x = unravel(split, geo.counts)
    for index in range(split, windows, tl.num_programs(0) // (tiles * tiles * MODE.heads)):
        if wanted(keep, b, MODE):
            of_i, of_j = tokens(i, z, y, x, geo, MODE), tokens(j, z, y, x, geo, MODE)
            q = scored_query(read(qkv, strides, pad_value, b, of_i, head, 0, MODE), sign, MODE)[0]
            k = scored_key(read(qkv, strides, pad_value, b, of_j, head, 1, MODE), MODE)[0]
            v = read(qkv, strides, pad_value, b, of_j, head, 2, MODE)
            grad = read_grad(grad_out, b, of_i, head, geo, MODE)
            row = index * MODE.heads + head
            rows = tl.load(row_at(lse, row, i, MODE), mask=i < MODE.tokens, other=float("inf"))
            along = tl.load(row_at(delta, row, i, MODE), mask=i < MODE.tokens, other=0.0)
            grad_scores = pair(q, k, v, grad, rows, along, i, j, bias, magnitude, draw, b, z, y, x, head, geo, MODE)[1]
            total += grad_scores
        b, z, y, x = advance(b, z, y, x, step, geo.counts)
    at = grad_bias + line.to(tl.int64) * (MODE.tokens * MODE.tokens) + i[:, None] * MODE.tokens + j[None, :]
    tl.store(at, total, mask=(i < MODE.tokens)[:, None] & (j < MODE.tokens)[None, :])
