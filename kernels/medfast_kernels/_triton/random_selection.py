"""The k smallest of a row of 32-bit codes, the lowest index first among equals, by one program and without sorting."""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import block_of
from .random_kernels import in_order


@triton.jit
def threshold(codes, n, k, TILE: tl.constexpr):
    """(limit, ties): the k smallest of n codes are those below limit and the first ``ties`` that equal it.

    A radix select: each round counts one more byte among the codes that share the bytes found so far.
    """
    left = tl.minimum(k, n).to(tl.int32)
    limit = tl.full((), 0, tl.uint32)
    known = tl.full((), 0, tl.uint32)
    shift = tl.full((), 32, tl.uint32)
    for _ in range(4):
        shift -= 8
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, n, TILE):
            index = start + tl.arange(0, TILE)
            code = tl.load(codes + index, mask=index < n, other=0).to(tl.uint32, bitcast=True)
            like = (index < n) & ((code & known) == limit)
            counts += tl.histogram(((code >> shift) & 255).to(tl.int32), 256, mask=like)
        upto = tl.cumsum(counts, 0)
        byte = tl.sum((upto < left).to(tl.int32), 0)
        left -= tl.max(tl.where(upto < left, upto, 0), 0)
        limit |= byte.to(tl.uint32) << shift
        known |= tl.full((), 255, tl.uint32) << shift
    return limit, left


@triton.jit
def among(code, inside, limit, ties, before):
    """Which of a tile are selected, and the number of ties up to its end; ``before``: up to its start."""
    tied = inside & (code == limit)
    ordinal = before + tl.cumsum(tied.to(tl.int32), 0)
    return inside & ((code < limit) | (tied & (ordinal <= ties))), before + tl.sum(tied.to(tl.int32), 0)


@triton.jit
def write_smallest(out, words, n, count, TILE: tl.constexpr):
    """Ascending indices of the ``count`` smallest words."""
    limit, ties = threshold(words, n, count, TILE)
    tied = 0
    taken = 0
    for start in range(0, n, TILE):
        index = start + tl.arange(0, TILE)
        code = tl.load(words + index, mask=index < n, other=0).to(tl.uint32, bitcast=True)
        selected, tied = among(code, index < n, limit, ties, tied)
        place = taken + tl.cumsum(selected.to(tl.int32), 0) - 1
        tl.store(out + place, index.to(tl.int64), mask=selected)
        taken += tl.sum(selected.to(tl.int32), 0)


@triton.jit
def ids(out, words, counter, seed, n, count, TILE: tl.constexpr):
    """out (b, count): ascending ids of the smallest words, one program per sample."""
    sample = tl.program_id(0)
    words += sample.to(tl.int64) * n
    for start in range(0, n, TILE):
        w0, w1, w2, w3 = block_of(counter, seed, sample, start // 4 + tl.arange(0, TILE // 4))
        index = start + tl.arange(0, TILE)
        tl.store(words + index, in_order(w0, w1, w2, w3).to(tl.int32, bitcast=True), mask=index < n)
    tl.debug_barrier()  # what one thread wrote, others read
    write_smallest(out + sample.to(tl.int64) * count, words, n, count, TILE)
