"""The generator inside kernels: Philox-4x32-10, four 32-bit numbers to a block; layout and source: ``key``."""

from __future__ import annotations

import triton
import triton.language as tl

UNIT24 = tl.constexpr(2.0**-24)


@triton.jit
def block_of(counter, seed, sample, block):
    """The four words of each ``block`` (index // 4) of one sample. counter: (b, 3) int64, counter words 1 to 3."""
    counter += sample.to(tl.int64) * 3
    word1, word2, word3 = tl.load(counter), tl.load(counter + 1), tl.load(counter + 2)
    return tl.philox(seed, block.to(tl.uint32), word1.to(tl.uint32), word2.to(tl.uint32), word3.to(tl.uint32))


@triton.jit
def word_of(counter, seed, sample, index):
    """Number ``index`` of the draw, for indices that do not come in whole blocks."""
    w0, w1, w2, w3 = block_of(counter, seed, sample, index // 4)
    which = index % 4
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))


@triton.jit
def unit(word):
    """fp32 in [0, 1), from the top 24 bits."""
    return (word >> 8).to(tl.float32) * UNIT24
