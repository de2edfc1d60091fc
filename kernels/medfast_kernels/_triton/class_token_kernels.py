"""Class attention: the tokens are split among programs, each with a running softmax, and the parts combined.

One program works for one head of one sample; ``row`` is sample * heads + head throughout. ``logits``
(b, heads, tokens) are kept, because the mean over heads needs the normaliser of every head first.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tokens(x, sample, head, token, channel, stride_b, stride_n, stride_h, tokens, dim):
    """A tile (token, channel) of k or v in fp32."""
    x += sample.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    address = x + token[:, None].to(tl.int64) * stride_n + channel[None, :]
    return tl.load(address, mask=(token[:, None] < tokens) & (channel[None, :] < dim), other=0.0).to(tl.float32)


@triton.jit
def attend_part(
    q, k, v, logits, part_max, part_sum, part_out, scale,
    k_b, k_n, k_h, v_b, v_n, v_h, tokens, heads, dim, splits, chunk, BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """logits, and the largest logit, the sum and the weighted v of every chunk: (rows, splits[, dim])."""
    row, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    sample, head = row // heads, row % heads
    channel = tl.arange(0, DIM)
    query = tl.load(q + row.to(tl.int64) * dim + channel, mask=channel < dim, other=0.0).to(tl.float32) * scale
    high = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    out = tl.zeros((DIM,), tl.float32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        key = load_tokens(k, sample, head, token, channel, k_b, k_n, k_h, tokens, dim)
        logit = tl.sum(key * query[None, :], 1)
        tl.store(logits + row.to(tl.int64) * tokens + token, logit, mask=token < tokens)
        logit = tl.where(token < tokens, logit, -float("inf"))
        above = tl.maximum(high, tl.max(logit, 0))
        shrink = tl.exp(high - above)
        weight = tl.exp(logit - above)
        value = load_tokens(v, sample, head, token, channel, v_b, v_n, v_h, tokens, dim)
        out = out * shrink + tl.sum(weight[:, None] * value, 0)
        total = total * shrink + tl.sum(weight, 0)
        high = above
    part = row.to(tl.int64) * splits + split
    tl.store(part_max + part, high)
    tl.store(part_sum + part, total)
    tl.store(part_out + part * dim + channel, out, mask=channel < dim)


@triton.jit
def combine(part_max, part_sum, part_out, out, lse, dim, splits, SPLITS: tl.constexpr, DIM: tl.constexpr):
    """out (rows, dim) fp32 and lse (rows,), the logarithm of the sum of exp(logit)."""
    row = tl.program_id(0).to(tl.int64)
    split, channel = tl.arange(0, SPLITS), tl.arange(0, DIM)
    high = tl.load(part_max + row * splits + split, mask=split < splits, other=-float("inf"))
    above = tl.max(high, 0)
    share = tl.exp(high - above)
    total = tl.sum(share * tl.load(part_sum + row * splits + split, mask=split < splits, other=0.0), 0)
    parts = part_out + (row * splits + split[:, None]) * dim + channel[None, :]
    value = tl.load(parts, mask=(split[:, None] < splits) & (channel[None, :] < dim), other=0.0)
    tl.store(out + row * dim + channel, tl.sum(share[:, None] * value, 0) / total, mask=channel < dim)
    tl.store(lse + row, above + tl.log(total))


@triton.jit
def mean_over_heads(logits, lse, attention, tokens, heads, programs, BLOCK: tl.constexpr):
    """attention (b, tokens - 1): the weights of all tokens but the first, averaged over heads."""
    sample, part = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    token = 1 + part * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for head in range(heads):
        row = sample * heads + head
        logit = tl.load(logits + row * tokens + token, mask=token < tokens, other=-float("inf"))
        total += tl.exp(logit - tl.load(lse + row))
    tl.store(attention + sample * (tokens - 1) + token - 1, total / heads, mask=token < tokens)


@triton.jit
def mean_gradient(
    grad_out, grad_attention, out, logits, lse, mean, tokens, heads, dim, BLOCK: tl.constexpr, DIM: tl.constexpr
):
    """mean (rows,): sum over tokens of weight * gradient of weight, which the softmax subtracts."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, DIM)
    grad = tl.load(grad_out + row * dim + channel, mask=channel < dim, other=0.0)
    total = tl.sum(grad * tl.load(out + row * dim + channel, mask=channel < dim, other=0.0), 0)
    norm = tl.load(lse + row)
    from_mean = tl.zeros((BLOCK,), tl.float32)
    for start in range(1, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logit = tl.load(logits + row * tokens + token, mask=token < tokens, other=-float("inf"))
        above = tl.load(grad_attention + row // heads * (tokens - 1) + token - 1, mask=token < tokens, other=0.0)
        from_mean += tl.exp(logit - norm) * above
    tl.store(mean + row, total + tl.sum(from_mean, 0) / heads)


@triton.jit
def attend_part_backward(
    grad_out, grad_attention, q, k, v, logits, lse, mean, part_q, grad_k, grad_v, scale,
    k_b, k_n, k_h, v_b, v_n, v_h, tokens, heads, dim, splits, chunk, BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v (b, tokens, heads, dim) of one chunk, and its part of grad_q, (rows, splits, dim)."""
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    sample, head = row // heads, row % heads
    channel = tl.arange(0, DIM)
    query = tl.load(q + row * dim + channel, mask=channel < dim, other=0.0).to(tl.float32) * scale
    grad = tl.load(grad_out + row * dim + channel, mask=channel < dim, other=0.0)
    norm, average = tl.load(lse + row), tl.load(mean + row)
    sum_q = tl.zeros((DIM,), tl.float32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < tokens
        logit = tl.load(logits + row * tokens + token, mask=inside, other=-float("inf"))
        weight = tl.exp(logit - norm)
        value = load_tokens(v, sample, head, token, channel, v_b, v_n, v_h, tokens, dim)
        above = grad_attention + sample * (tokens - 1) + token - 1
        grad_weight = tl.sum(value * grad[None, :], 1) + tl.load(above, mask=inside & (token > 0), other=0.0) / heads
        grad_logit = weight * (grad_weight - average)
        place = ((sample * tokens + token[:, None]) * heads + head) * dim + channel[None, :]
        written = inside[:, None] & (channel[None, :] < dim)
        tl.store(grad_v + place, weight[:, None] * grad[None, :], mask=written)
        tl.store(grad_k + place, grad_logit[:, None] * query[None, :], mask=written)
        key = load_tokens(k, sample, head, token, channel, k_b, k_n, k_h, tokens, dim)
        sum_q += tl.sum(grad_logit[:, None] * key, 0)
    tl.store(part_q + (row * splits + split) * dim + channel, sum_q * scale, mask=channel < dim)
