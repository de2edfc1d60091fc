"""The bias of window attention: from the table to (heads, N, N), and gradients of the pairs back into the table."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def places(token, SHAPE: tl.constexpr):
    """(z, y, x) of a token number; SHAPE is that of the window, of the full one where the table's index is sliced."""
    return token // (SHAPE[1] * SHAPE[2]), token // SHAPE[2] % SHAPE[1], token % SHAPE[2]


@triton.jit
def expand(
    dense, table, HEADS: tl.constexpr, TOKENS: tl.constexpr, SHAPE: tl.constexpr, FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dense (heads, N, N) of table (prod(2 FULL - 1), heads): BLOCK pairs of tokens to a program."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = pair < TOKENS * TOKENS
    iz, iy, ix = places(pair // TOKENS, SHAPE)
    jz, jy, jx = places(pair % TOKENS, SHAPE)
    row = (iz - jz + FULL[0] - 1) * (2 * FULL[1] - 1) + iy - jy + FULL[1] - 1
    row = row * (2 * FULL[2] - 1) + ix - jx + FULL[2] - 1
    for head in range(HEADS):
        value = tl.load(table + row * HEADS + head, mask=here)
        tl.store(dense + head * TOKENS * TOKENS + pair, value, mask=here)


@triton.jit
def fold(
    grad_table, grad, entries, HEADS: tl.constexpr, TOKENS: tl.constexpr, SHAPE: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS entries of one head and gathers their pairs from grad (heads, N, N), in the order of keys."""
    head, row = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS * ROWS + tl.arange(0, ROWS)
    line = row // (2 * FULL[2] - 1)
    dz = (line // (2 * FULL[1] - 1) - (FULL[0] - 1))[:, None]
    dy = (line % (2 * FULL[1] - 1) - (FULL[1] - 1))[:, None]
    dx = (row % (2 * FULL[2] - 1) - (FULL[2] - 1))[:, None]
    total = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    for first in range(0, TOKENS, BLOCK):
        j = (first + tl.arange(0, BLOCK))[None, :]
        z, y, x = places(j, SHAPE)
        z, y, x = z + dz, y + dy, x + dx
        i = (z * SHAPE[1] + y) * SHAPE[2] + x
        here = (z >= 0) & (z < SHAPE[0]) & (y >= 0) & (y < SHAPE[1]) & (x >= 0) & (x < SHAPE[2])
        here = here & (j < TOKENS) & (i < TOKENS)
        total += tl.load(grad + (head * TOKENS + i) * TOKENS + j, mask=here, other=0.0)
    tl.store(grad_table + row * HEADS + head, tl.sum(total, axis=1), mask=row < entries)
