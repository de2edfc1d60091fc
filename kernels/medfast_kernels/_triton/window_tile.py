"""What the kernels of window attention share: where tokens of a window lie, whom they see, how their rows are read.

GEO and MODE are ``window_plan.Geometry`` and ``Mode``. Scores are in units of log 2: exp2 makes the softmax of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import block_of, unit, word_of

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
BEYOND = tl.constexpr(1 << 29 | 1 << 19 | 1 << 9)
NORM_FLOOR = tl.constexpr(1e-12)
SCALE_FLOOR = tl.constexpr(1e-20)  # a bias divided by it is still finite in fp32


@triton.jit
def unravel(index, counts):
    """(sample, z, y, x) of window ``index`` of the whole batch."""
    line = index // counts[2]
    plane = line // counts[1]
    return plane // counts[0], plane % counts[0], line % counts[1], index % counts[2]


@triton.jit
def advance(b, z, y, x, step, counts):
    """The window ``step`` (sample, z, y, x) further on: additions and carries, no division in the loop."""
    x += step[3]
    carry = (x >= counts[2]).to(tl.int32)
    x -= carry * counts[2]
    y += step[2] + carry
    carry = (y >= counts[1]).to(tl.int32)
    y -= carry * counts[1]
    z += step[1] + carry
    carry = (z >= counts[0]).to(tl.int32)
    return b + step[0] + carry, z - carry * counts[0], y, x


@triton.jit
def at_edge(z, y, x, geo, MODE: tl.constexpr):
    """Whether the window holds tokens that must not see each other."""
    beyond_z = (z + 1) * MODE.window[0] + geo.shift[0] > geo.limit[0]
    beyond_y = (y + 1) * MODE.window[1] + geo.shift[1] > geo.limit[1]
    beyond_x = (x + 1) * MODE.window[2] + geo.shift[2] > geo.limit[2]
    return beyond_z | beyond_y | beyond_x


@triton.jit
def places(n, MODE: tl.constexpr):
    """(z, y, x) of tokens ``n`` inside their window."""
    return n // (MODE.window[1] * MODE.window[2]), n // MODE.window[2] % MODE.window[1], n % MODE.window[2]


@triton.jit
def cyclic(at, end):
    """``at`` in [0, 2 end) modulo ``end``: what is below zero is large without its sign."""
    return tl.minimum(at.to(tl.uint32, bitcast=True), (at - end).to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)


@triton.jit
def locate(n, z, y, x, geo, MODE: tl.constexpr):
    """Place on the grid of tokens ``n`` of window (z, y, x)."""
    iz, iy, ix = places(n, MODE)
    z, y, x = z * MODE.window[0] + iz, y * MODE.window[1] + iy, x * MODE.window[2] + ix
    if MODE.shifted:
        z, y, x = z + geo.shift[0], y + geo.shift[1], x + geo.shift[2]
        z, y, x = cyclic(z, geo.padded[0]), cyclic(y, geo.padded[1]), cyclic(x, geo.padded[2])
    return z, y, x


@triton.jit
def inside(z, y, x, geo):
    return (z < geo.grid[0]) & (y < geo.grid[1]) & (x < geo.grid[2])


@triton.jit
def tokens(n, z, y, x, geo, MODE: tl.constexpr):
    """Of tokens ``n``: place on the grid, number within the sample, and whether there is one to read."""
    z, y, x = locate(n, z, y, x, geo, MODE)
    present = n < MODE.tokens
    if MODE.padded:
        present = present & inside(z, y, x, geo)
    if MODE.wide:
        z, y, x = z.to(tl.int64), y.to(tl.int64), x.to(tl.int64)
    return z, y, x, (z * geo.grid[1] + y) * geo.grid[2] + x, present


@triton.jit
def wrapped(n, reach, MODE: tl.constexpr):
    """In the bits BEYOND, one per axis: whether tokens ``n`` of a window lie beyond the end of the grid.

    reach: of each axis 512 - window + shift, in ten bits, so that one addition carries all three into their bit.
    """
    iz, iy, ix = places(n, MODE)
    return (iz << 20 | iy << 10 | ix) + reach


@triton.jit
def seen(scores, i, j, z, y, x, geo, MODE: tl.constexpr):
    """Scores of queries ``i`` and keys ``j`` of a window, -inf where the one must not see the other.

    Queries beyond the window see what its last token sees, those that are masked pads themselves: no row is empty.
    """
    if MODE.shifted or MODE.masked:  # noqa: SIM102, decided when compiled, the other at run time
        if at_edge(z, y, x, geo, MODE):
            i = tl.minimum(i, MODE.tokens - 1)
            # the shift of the last windows, 0 of the others: nothing that registers could hold from window to window
            reach_z = 512 - MODE.window[0] + geo.shift[0] * (z + 1 == geo.counts[0]).to(tl.int32)
            reach_y = 512 - MODE.window[1] + geo.shift[1] * (y + 1 == geo.counts[1]).to(tl.int32)
            reach_x = 512 - MODE.window[2] + geo.shift[2] * (x + 1 == geo.counts[2]).to(tl.int32)
            reach = (reach_z << 20) + (reach_y << 10) + reach_x
            blind = (wrapped(i, reach, MODE)[:, None] ^ wrapped(j, reach, MODE)[None, :]) & BEYOND != 0
            if MODE.masked:
                jz, jy, jx = locate(j, z, y, x, geo, MODE)
                blind = blind | (~inside(jz, jy, jx, geo)[None, :] & (i[:, None] != j[None, :]))
            scores = tl.where(blind, float("-inf"), scores)
    return scores


@triton.jit
def wanted(keep, b, MODE: tl.constexpr):
    """Whether sample ``b`` is computed at all."""
    if MODE.choosy:
        return tl.load(keep + b) != 0
    return True


@triton.jit
def read(qkv, strides, pad_value, b, here, head, PART: tl.constexpr, MODE: tl.constexpr):
    """q, k or v (part 0, 1, 2) of the ``tokens`` that ``here`` describes, pads filled in."""
    z, y, x, number, present = here
    qkv += b.to(tl.int64) * strides[0]
    channel = tl.arange(0, MODE.width)[None, :]
    if MODE.dense:
        at = qkv + (PART * MODE.heads + head) * MODE.dim + (number[:, None] * (3 * MODE.heads * MODE.dim) + channel)
    else:
        row = z * strides[1] + y * strides[2] + x * strides[3]
        at = qkv + PART * strides[4] + head * strides[5] + (row[:, None] + channel * strides[6])
    values = tl.load(at, mask=channels(present, MODE), other=0.0).to(MODE.compute)
    if MODE.live and PART > 0:
        held = pad_value + (PART * MODE.heads + head) * MODE.dim + channel
        held = tl.load(held, mask=channel < MODE.dim, other=0.0).to(MODE.compute)
        values = tl.where(present[:, None], values, held)
    return values


@triton.jit
def token_rows(pointer, b, number, head, geo, MODE: tl.constexpr, PARTS: tl.constexpr):
    """Pointers to rows of a contiguous (b, tokens, PARTS, heads, dim)."""
    pointer += b.to(tl.int64) * geo.tokens * (PARTS * MODE.heads * MODE.dim) + head * MODE.dim
    return pointer + (number[:, None] * (PARTS * MODE.heads * MODE.dim) + tl.arange(0, MODE.width)[None, :])


@triton.jit
def channels(present, MODE: tl.constexpr):
    """Mask of the tile of rows ``present`` and channels below dim."""
    return present[:, None] & (tl.arange(0, MODE.width) < MODE.dim)[None, :]


@triton.jit
def normalised(x):
    """Rows of ``x`` divided by max(norm, 1e-12) in fp32, and 1 / that."""
    x = x.to(tl.float32)
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), NORM_FLOOR)
    return x * inverse[:, None], inverse


@triton.jit
def through_norm(grad, unit_rows, inverse):
    """Gradient of the rows that ``normalised`` divided: ``grad`` is that of its result."""
    along = tl.sum(grad * unit_rows, axis=1)
    along = tl.where(inverse < 1.0 / NORM_FLOOR, along, 0.0)
    return (grad - unit_rows * along[:, None]) * inverse[:, None]


@triton.jit
def scored_query(q, sign, MODE: tl.constexpr):
    """(q as the product takes it, q as the scale is multiplied to, 1 / its norm with cosine)."""
    units, inverse = q, 1.0
    if MODE.cosine:
        units, inverse = normalised(q)
    low = (units * sign).to(MODE.compute) if MODE.cosine or MODE.scales else q
    return low, units, inverse


@triton.jit
def scored_key(k, MODE: tl.constexpr):
    """(k as the product takes it, normalised k, 1 / its norm with cosine)."""
    units, inverse = k, 1.0
    if MODE.cosine:
        units, inverse = normalised(k)
    return units.to(MODE.compute), units, inverse


@triton.jit
def split_scale(scale, head, MODE: tl.constexpr):
    """(scale, sign, magnitude): q is multiplied by sign, the scores in the exponent by magnitude, which is positive.

    With cosine the whole scale goes into q, which is rounded there anyway. A scale that is no tensor is above zero.
    """
    factor = tl.load(scale + head) if MODE.scales else scale
    if MODE.cosine:
        return factor, factor * LOG2E, 1.0
    if not MODE.scales:
        return factor, 1.0, factor * LOG2E
    magnitude = tl.abs(factor) * LOG2E
    tiny = magnitude < SCALE_FLOOR
    return factor, tl.where(tiny, 0.0, tl.where(factor < 0, -1.0, 1.0)), tl.where(tiny, 1.0, magnitude)


@triton.jit
def bias_tile(bias, head, i, j, magnitude, MODE: tl.constexpr):
    """Where the scores of queries ``i`` and keys ``j`` begin: the bias, and -inf for keys beyond the window."""
    start = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    if MODE.biased:
        here = (i < MODE.tokens)[:, None] & (j < MODE.tokens)[None, :]
        at = bias + (head * MODE.tokens + i[:, None]) * MODE.tokens + j[None, :]
        start = tl.load(at, mask=here, other=0.0) * (LOG2E / magnitude)
    return tl.where((j < MODE.tokens)[None, :], start, float("-inf"))


@triton.jit
def survivors(draw, sample, z, y, x, head, i, j, geo, MODE: tl.constexpr):
    """Whether the weights of queries ``i`` and keys ``j`` stay: numbers ((window heads + head) N + i) N + j."""
    counter, seed, dropout = draw
    window = (z * geo.counts[1] + y) * geo.counts[2] + x
    first = (window.to(tl.int64) * MODE.heads + head) * (MODE.tokens * MODE.tokens)
    if MODE.tokens % 4 == 0:  # four neighbours in a row are one block; j begins at a multiple of 4
        four = tl.min(j, axis=0) // 4 + tl.arange(0, MODE.tile // 4)
        block = (i * (MODE.tokens // 4))[:, None] + four[None, :]
        w0, w1, w2, w3 = block_of(counter, seed, sample, block.to(tl.uint32) + (first // 4).to(tl.uint32))
        word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (MODE.tile, MODE.tile))
    else:
        word = word_of(counter, seed, sample, first + (i * MODE.tokens)[:, None] + j[None, :])
    return unit(word) >= dropout
