"""Token-wise contrast in tiles: a program owns ROWS tokens and walks over all others, forward and backward.

Logits are in base 2. ``shift`` is a bound of all of them where FIXED, so that sums need no running maximum. Tokens at
one position meet in few tiles alone, and only those, and the last one, take the path with weights and exclusions.
"""

from __future__ import annotations

import triton
import triton.language as tl

BOOST = tl.constexpr(2.0**10)  # keeps probabilities of about 1 / n among the normal numbers of fp16
UNBOOST = tl.constexpr(2.0**-10)


@triton.jit
def load_rows(z, row, channel, n, DIM: tl.constexpr):
    inside = (row[:, None] < n) & (channel[None, :] < DIM)
    return tl.load(z + row[:, None].to(tl.int64) * DIM + channel[None, :], mask=inside, other=0.0)


@triton.jit
def volume_of(volume, row, n, positions, volumes):
    """The id of the volume of each token."""
    crop = row // positions % volumes
    return crop if volume is None else tl.load(volume + crop, mask=row < n, other=-1)


@triton.jit
def meet(row, column, positions, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether tokens at one position can be among the rows and columns that start there."""
    ahead = (column % positions - row % positions + positions) % positions
    return (ahead < ROWS) | (positions - ahead < COLUMNS)


@triton.jit
def weighted(volume, row, column, n, positions, volumes):
    """Which pairs are at one position of two volumes."""
    same = (row % positions)[:, None] == (column % positions)[None, :]
    mine, theirs = volume_of(volume, row, n, positions, volumes), volume_of(volume, column, n, positions, volumes)
    return same & (mine[:, None] != theirs[None, :])


@triton.jit
def logits_of(
    mine, theirs, volume, row, column, special, n, positions, volumes, scale, factor, offset, PRECISION: tl.constexpr
):
    """Logits of a tile, weighted, -inf for a token with itself and beyond the last; ``special``: whether any is."""
    logit = tl.dot(mine, tl.trans(theirs), input_precision=PRECISION) * scale
    if special:
        pairs = weighted(volume, row, column, n, positions, volumes)
        logit = tl.where(pairs, logit * factor + offset, logit)
        out = (row[:, None] == column[None, :]) | (column[None, :] >= n)
        logit = tl.where(out, -float("inf"), logit)
    return logit


@triton.jit
def anchor_row(anchor, first, count, positions, volumes):
    """The token that is anchor number ``anchor``."""
    each = count * positions
    return anchor // each * (volumes * positions) + first * positions + anchor % each


@triton.jit
def sum_part(
    z, volume, part_max, part_sum, scale, shift, factor, offset, n, positions, volumes, first, count, splits, chunk,
    DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FIXED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Per anchor, over one chunk of tokens: the largest logit and the sum of exp2(logit - it), (splits, anchors)."""
    block, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    anchor, anchors = block * ROWS + tl.arange(0, ROWS), 2 * count * positions
    row = tl.where(anchor < anchors, anchor_row(anchor, first, count, positions, volumes), n)
    channel = tl.arange(0, WIDE)
    mine = load_rows(z, row, channel, n, DIM)
    high = tl.full((ROWS,), shift, tl.float32) if FIXED else tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, n), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        theirs = load_rows(z, column, channel, n, DIM)
        special = meet(block * ROWS, start, positions, ROWS, COLUMNS) | (start + COLUMNS > n)
        logit = logits_of(
            mine, theirs, volume, row, column, special, n, positions, volumes, scale, factor, offset, PRECISION
        )
        if not FIXED:
            above = tl.maximum(high, tl.max(logit, 1))
            known = tl.where(above == -float("inf"), 0.0, above)  # a chunk may hold the anchor alone
            total *= tl.exp2(high - known)
            high = above
            total += tl.sum(tl.exp2(logit - known[:, None]), 1)
        else:
            total += tl.sum(tl.exp2(logit - shift), 1)
    part = split.to(tl.int64) * anchors + anchor
    tl.store(part_max + part, high, mask=anchor < anchors)
    tl.store(part_sum + part, total, mask=anchor < anchors)


@triton.jit
def combine(
    z, part_max, part_sum, lse, loss, scale, n, positions, volumes, first, count, splits,
    DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Per token: lse, base 2, and lse - logit of the positive in nats; inf and 0 where it is no anchor."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    view, crop = row // (volumes * positions), row // positions % volumes
    anchors = (row < n) & (crop >= first) & (crop < first + count)
    anchor = (view * count + crop - first) * positions + row % positions
    high = tl.full((ROWS,), -float("inf"), tl.float32)
    for split in range(splits):
        here = part_max + tl.full((), split, tl.int64) * (2 * count * positions)
        high = tl.maximum(high, tl.load(here + anchor, mask=anchors, other=0.0))
    total = tl.zeros((ROWS,), tl.float32)
    for split in range(splits):
        part = tl.full((), split, tl.int64) * (2 * count * positions) + anchor
        share = tl.exp2(tl.load(part_max + part, mask=anchors, other=0.0) - high)
        total += share * tl.load(part_sum + part, mask=anchors, other=1.0)
    norm = tl.where(anchors, high + tl.log2(total), float("inf"))
    channel = tl.arange(0, WIDE)
    mine = load_rows(z, row, channel, n, DIM).to(tl.float32)
    positive = load_rows(z, tl.where(row < n // 2, row + n // 2, row - n // 2), channel, n, DIM).to(tl.float32)
    logit = tl.sum(mine * positive, 1) * scale
    tl.store(lse + row, norm, mask=row < n)
    tl.store(loss + row, tl.where(anchors, (norm - logit) * 0.6931471805599453, 0.0), mask=row < n)


@triton.jit
def gradient_part(
    grad, z, volume, lse, part, scale, shift, factor, offset, over, n, positions, volumes, splits, chunk,
    DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FIXED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """part (splits, n, DIM) fp32 of the gradient of z: every pair counts for both of its tokens, as anchors.

    ``over``: 1 / (anchors * temperature).
    """
    block, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    row = block * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDE)
    mine = load_rows(z, row, channel, n, DIM)
    norm = tl.load(lse + row, mask=row < n, other=float("inf"))
    if FIXED:
        share = tl.exp2(shift - norm) * BOOST
    sums = tl.zeros((ROWS, WIDE), tl.float32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, n), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        theirs = load_rows(z, column, channel, n, DIM)
        their_norm = tl.load(lse + column, mask=column < n, other=float("inf"))
        special = meet(block * ROWS, start, positions, ROWS, COLUMNS) | (start + COLUMNS > n)
        logit = logits_of(
            mine, theirs, volume, row, column, special, n, positions, volumes, scale, factor, offset, PRECISION
        )
        if FIXED:
            weight = tl.exp2(logit - shift) * (share[:, None] + (tl.exp2(shift - their_norm) * BOOST)[None, :])
        else:
            weight = (tl.exp2(logit - norm[:, None]) + tl.exp2(logit - their_norm[None, :])) * BOOST
            if special:
                weight = tl.where(weighted(volume, row, column, n, positions, volumes), weight * factor, weight)
        sums = tl.dot(weight.to(theirs.dtype), theirs, sums, input_precision=PRECISION)
    sums *= UNBOOST
    if split == 0:
        positive = load_rows(z, tl.where(row < n // 2, row + n // 2, row - n // 2), channel, n, DIM).to(tl.float32)
        sums -= tl.where(norm < float("inf"), 2.0, 0.0)[:, None] * positive
    address = part + (tl.full((), split, tl.int64) * n + row[:, None]) * DIM + channel[None, :]
    inside = (row[:, None] < n) & (channel[None, :] < DIM)
    tl.store(address, sums * (tl.load(grad) * over), mask=inside)
