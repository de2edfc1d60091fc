"""Rows of tokens taken and put back. Both ways are gathers: what is written is walked in order, each element once.

A program holds ROWS rows of one sample, or of all of them where it sums over samples, and COLUMNS columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(programs_r, programs_c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sample, rows and columns of this program."""
    program = tl.program_id(0)
    column = program % programs_c * COLUMNS + tl.arange(0, COLUMNS)
    row = program // programs_c % programs_r * ROWS + tl.arange(0, ROWS)
    return (program // programs_c // programs_r).to(tl.int64), row, column


@triton.jit
def invert(ids, inverse, count, n, TILE: tl.constexpr):
    """inverse (b, n) int32: the place of each token in ids (b, count), or -1. One program per sample."""
    sample = tl.program_id(0).to(tl.int64)
    for start in range(0, n, TILE):
        token = start + tl.arange(0, TILE)
        tl.store(inverse + sample * n + token, -1, mask=token < n)
    tl.debug_barrier()  # before other threads write over it
    for start in range(0, count, TILE):
        place = start + tl.arange(0, TILE)
        token = tl.load(ids + sample * count + place, mask=place < count, other=-1)
        tl.store(inverse + sample * n + token, place, mask=(token >= 0) & (token < n))


@triton.jit
def take(
    x, ids, position, out, stride_b, stride_n, n, count, dim, programs_r, programs_c,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[b, i] = x[b, ids[b, i]] + position[ids[b, i]]; position (n, dim) or None."""
    sample, row, column = tile_of(programs_r, programs_c, ROWS, COLUMNS)
    inside = (row[:, None] < count) & (column[None, :] < dim)
    token = tl.load(ids + sample * count + row, mask=row < count, other=0)[:, None]
    known = inside & (token >= 0) & (token < n)
    value = tl.load(x + sample * stride_b + token * stride_n + column[None, :], mask=known, other=0.0)
    if position is not None:
        value = value.to(tl.float32) + tl.load(position + token * dim + column[None, :], mask=known, other=0.0)
    out += (sample * count + row[:, None]) * dim + column[None, :]
    tl.store(out, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def put(
    y, inverse, fill, out, stride_b, stride_n, n, dim, programs_r, programs_c, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[b, j] = y[b, inverse[b, j]], or fill where that is -1; fill (dim,), or None for zeros."""
    sample, row, column = tile_of(programs_r, programs_c, ROWS, COLUMNS)
    inside = (row[:, None] < n) & (column[None, :] < dim)
    place = tl.load(inverse + sample * n + row, mask=row < n, other=-1).to(tl.int64)[:, None]
    known = inside & (place >= 0)
    value = tl.load(y + sample * stride_b + place * stride_n + column[None, :], mask=known, other=0.0)
    value = value.to(out.dtype.element_ty)
    if fill is not None:
        other = tl.load(fill + column, mask=column < dim, other=0.0).to(out.dtype.element_ty)
        value = tl.where(place >= 0, value, other[None, :])
    tl.store(out + (sample * n + row[:, None]) * dim + column[None, :], value, mask=inside)


@triton.jit
def sum_samples(
    y, inverse, out, stride_b, stride_n, samples, n, dim, programs_r, programs_c,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[j] = sum over samples of y[b, inverse[b, j]] where there is one, in the order of the samples."""
    _, row, column = tile_of(programs_r, programs_c, ROWS, COLUMNS)
    inside = (row[:, None] < n) & (column[None, :] < dim)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(samples):
        place = tl.load(inverse + row, mask=row < n, other=-1).to(tl.int64)[:, None]
        total += tl.load(y + place * stride_n + column[None, :], mask=inside & (place >= 0), other=0.0).to(tl.float32)
        inverse += n
        y += stride_b
    tl.store(out + row[:, None].to(tl.int64) * dim + column[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_missing(
    x, inverse, part, stride_b, stride_n, n, dim, steps, programs_r, programs_c,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """part (b, programs_r, dim): the sum of x over the tokens of ``steps`` tiles of rows that are not in ids."""
    sample, _, column = tile_of(programs_r, programs_c, ROWS, COLUMNS)
    group = tl.program_id(0) // programs_c % programs_r
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(steps):
        token = (group * steps + step) * ROWS + tl.arange(0, ROWS)
        place = tl.load(inverse + sample * n + token, mask=token < n, other=0)[:, None]
        address = x + sample * stride_b + token[:, None].to(tl.int64) * stride_n + column[None, :]
        total += tl.load(address, mask=(place < 0) & (column[None, :] < dim), other=0.0).to(tl.float32)
    tl.store(part + (sample * programs_r + group) * dim + column, tl.sum(total, 0), mask=column < dim)
