"""Draws: words, uniform and normal numbers, stochastic depth."""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import UNIT24, block_of, unit

TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def in_order(x0, x1, x2, x3):
    """Element 4 i + j is element i of x_j."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (4 * x0.shape[0],))


@triton.jit
def cos_sin(x):
    """Of 0 <= x <= 2 pi: Taylor series around the nearest multiple of pi / 2. The library's take any x, and a stack."""
    quarter = (x * 0.63661977236758134 + 0.5).to(tl.int32)
    q = quarter.to(tl.float32)
    r = ((x - q * 1.5703125) - q * 4.83751296997e-4) - q * 7.54978995489e-8
    z = r * r
    c = 1.0 - z * (0.5 - z * (1.0 / 24 - z * (1.0 / 720 - z * (1.0 / 40320))))
    s = r - r * z * (1.0 / 6 - z * (1.0 / 120 - z * (1.0 / 5040 - z * (1.0 / 362880))))
    odd = (quarter & 1) != 0
    along, across = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where(((quarter + 1) & 2) != 0, -along, along), tl.where((quarter & 2) != 0, -across, across)


@triton.jit
def box_muller(word0, word1):
    """Two standard normal numbers."""
    radius = tl.sqrt_rn(-2.0 * tl.log(unit(word0) + UNIT24))  # (0, 1]: log never sees zero
    cos, sin = cos_sin(unit(word1) * TWO_PI)
    return radius * cos, radius * sin


@triton.jit
def draw(out, counter, seed, count, programs, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """out (b, count): words, uniform or normal numbers; ``programs`` per sample, BLOCK blocks of four each."""
    sample, part = tl.program_id(0) // programs, tl.program_id(0) % programs
    block = part * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = block_of(counter, seed, sample, block)
    if KIND == "normal":
        w0, w1 = box_muller(w0, w1)
        w2, w3 = box_muller(w2, w3)
    if KIND == "uniform":
        w0, w1, w2, w3 = unit(w0), unit(w1), unit(w2), unit(w3)
    index = part * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    out += sample.to(tl.int64) * count + index
    tl.store(out, in_order(w0, w1, w2, w3).to(out.dtype.element_ty), mask=index < count)


@triton.jit
def keep(out, counter, seed, samples, rate, BLOCK: tl.constexpr):
    """out (b,) bool: whether the first uniform number of a sample is at least ``rate``."""
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = sample < samples
    counter += sample.to(tl.int64) * 3
    word1, word2 = tl.load(counter, mask=inside), tl.load(counter + 1, mask=inside)
    word3, zero = tl.load(counter + 2, mask=inside), tl.zeros((BLOCK,), tl.uint32)
    word, _, _, _ = tl.philox(seed, zero, word1.to(tl.uint32), word2.to(tl.uint32), word3.to(tl.uint32))
    tl.store(out + sample, unit(word) >= rate, mask=inside)
