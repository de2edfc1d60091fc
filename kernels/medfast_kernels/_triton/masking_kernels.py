"""Attention masks: one program per sample selects by thresholds, and so without sorting.

Nothing here waits for the host and no two threads write to one place (but for the same value of a flag), so a launch
can be captured, and repeats bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import block_of
from .random_kernels import in_order
from .random_selection import among, threshold


@triton.jit
def encode(attention, codes, nan_seen, n, LOW: tl.constexpr, TILE: tl.constexpr):
    """Codes that ascend in the order of hiding: equal for equal numbers (0 and -0 too), NaN ranks as -inf."""
    for start in range(0, n, TILE):
        index = start + tl.arange(0, TILE)
        x = tl.load(attention + index, mask=index < n, other=0.0).to(tl.float32)
        unordered = x != x
        x = -x if LOW else x
        x = tl.where(unordered, -float("inf"), tl.where(x == 0.0, 0.0, x))
        bits = x.to(tl.uint32, bitcast=True)
        code = tl.where((bits >> 31) == 1, bits, bits ^ 0x7FFFFFFF)
        tl.store(codes + index, code.to(tl.int32, bitcast=True), mask=index < n)
        if nan_seen is not None:
            tl.store(nan_seen, True, mask=tl.max(unordered.to(tl.int32), 0) > 0)
    tl.debug_barrier()  # what one thread wrote, others read


@triton.jit
def load_codes(codes, index, n):
    return tl.load(codes + index, mask=index < n, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def gather_words(words, codes, counter, seed, sample, n, limit, ties, TILE: tl.constexpr):
    """The words of the selected tokens, one after another: number i of the draw belongs to token i."""
    tied = 0
    taken = 0
    for start in range(0, n, TILE):
        index = start + tl.arange(0, TILE)
        first, tied = among(load_codes(codes, index, n), index < n, limit, ties, tied)
        w0, w1, w2, w3 = block_of(counter, seed, sample, start // 4 + tl.arange(0, TILE // 4))
        place = taken + tl.cumsum(first.to(tl.int32), 0) - 1
        tl.store(words + place, in_order(w0, w1, w2, w3).to(tl.int32, bitcast=True), mask=first)
        taken += tl.sum(first.to(tl.int32), 0)
    tl.debug_barrier()


@triton.jit
def mask(
    attention, where, hidden_ids, visible_ids, nan_seen, codes, words, counts, shown_counts, counter, seed,
    stride, n, count, top, shown,
    LOW: tl.constexpr, HINTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """where (b, n) bool and, where all samples have one count, ids (b, count - shown) and (b, n - count + shown).

    counts, shown_counts: (b,) int64 in the place of count and shown, or None. HINTS: "none", "top", "random".
    """
    sample = tl.program_id(0)
    row = sample.to(tl.int64)
    where += row * n
    codes += row * n
    words += row * top
    SAME: tl.constexpr = counts is None and shown_counts is None
    if SAME:
        hidden_ids += row * (count - shown)
        visible_ids += row * (n - count + shown)
    if counts is not None:
        count = tl.load(counts + row).to(tl.int32)
    if shown_counts is not None:
        shown = tl.load(shown_counts + row).to(tl.int32)
    encode(attention + row * stride, codes, nan_seen, n, LOW, TILE)
    limit, ties = threshold(codes, n, count, TILE)
    if HINTS != "none":
        top_limit, top_ties = threshold(codes, n, top, TILE)
    if HINTS == "random":
        gather_words(words, codes, counter, seed, sample, n, top_limit, top_ties, TILE)
        word_limit, word_ties = threshold(words, top, shown, TILE)
    tied = 0
    top_tied = 0
    word_tied = 0
    top_before = 0
    hidden_before = 0
    for start in range(0, n, TILE):
        index = start + tl.arange(0, TILE)
        code = load_codes(codes, index, n)
        on, tied = among(code, index < n, limit, ties, tied)
        if HINTS != "none":
            again, top_tied = among(code, index < n, top_limit, top_ties, top_tied)
            if HINTS == "random":
                place = top_before + tl.cumsum(again.to(tl.int32), 0) - 1
                top_before += tl.sum(again.to(tl.int32), 0)
                word = tl.load(words + place, mask=again, other=0).to(tl.uint32, bitcast=True)
                again, word_tied = among(word, again, word_limit, word_ties, word_tied)
            on = on & (again == 0)
        tl.store(where + index, on, mask=index < n)
        if SAME:
            hidden = hidden_before + tl.cumsum(on.to(tl.int32), 0)
            tl.store(hidden_ids + hidden - 1, index.to(tl.int64), mask=on)
            tl.store(visible_ids + index - hidden, index.to(tl.int64), mask=(index < n) & (on == 0))
            hidden_before += tl.sum(on.to(tl.int32), 0)
