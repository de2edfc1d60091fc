"""Window attention as MONAI's Swin does it: pad, roll, partition, attend, and back; tests hold it to MONAI's own block.

A contender for machines that have no MONAI. qkv is given, so that the projection can be inside or outside. The part in
the middle is eager, or one of torch's fused attentions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """With 16-bit q and fp32 bias, as autocast leaves them, the softmax is one of fp32."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    windows, heads, n, _ = scores.shape
    scores = scores.view(-1, len(mask), heads, n, n) + mask[None, :, None]
    return scores.view(windows, heads, n, n).softmax(-1).to(v.dtype) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    both = (bias[None] + mask[:, None]).repeat(len(q) // len(mask), 1, 1, 1)
    return scaled_dot_product_attention(q, k, v, attn_mask=both.to(q.dtype))


compiled_flex = torch.compile(flex_attention, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """FlexAttention, bias and mask added by its score_mod; on CPU it has no backward (torch 2.13) and says so."""

    def add(score, window, head, row, column):
        return score + bias[head, row, column] + mask[window % len(mask), row, column]

    return compiled_flex(q, k, v, score_mod=add)  # pyright: ignore[reportReturnType]: a tuple only with return_lse


class Partitioned:
    """``(qkv, table) -> out`` in windows of w^3; qkv (b, grid^3, 3, heads, dim), table ((2 w - 1)^3, heads)."""

    def __init__(self, grid: int, window: int, shift: int, attend: Attend, device: str = "cpu") -> None:
        self.window, self.shift, self.attend = window, shift, attend
        self.pads = -grid % window
        self.mask = shift_mask(grid + self.pads, window, shift).to(device)
        self.rows = offsets(window).to(device)

    def __call__(self, qkv: Tensor, table: Tensor) -> Tensor:
        heads, w, (grid, *_) = qkv.shape[-2], self.window, qkv.shape[1:4]
        x = pad(qkv.flatten(4), (0, 0, *(0, self.pads) * 3))
        x = _windows(torch.roll(x, (-self.shift,) * 3, (1, 2, 3)), w).unflatten(-1, (3, heads, -1))
        bias = table[self.rows].permute(2, 0, 1)
        q, k, v = x.permute(2, 0, 3, 1, 4)
        out = self.attend(q, k, v, bias, self.mask.to(table.dtype))
        n, side = (grid + self.pads) // w, grid + self.pads
        out = out.transpose(1, 2).reshape(-1, n, n, n, w, w, w, heads * qkv.shape[-1])
        out = out.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, side, side, side, heads * qkv.shape[-1])
        return torch.roll(out, (self.shift,) * 3, (1, 2, 3))[:, :grid, :grid, :grid].contiguous()


def _windows(x: Tensor, w: int) -> Tensor:
    """(windows, w^3, channels) of (b, grid^3, channels)."""
    b, n = len(x), x.shape[1] // w
    return x.view(b, n, w, n, w, n, w, -1).permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(b * n**3, w**3, -1)


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """(windows, N, N): 0 where two tokens see each other, -100 where only the wrap brings them together."""
    late = (torch.arange(side, device="cpu") + shift >= side).long()
    region = late[:, None, None] * 4 + late[:, None] * 2 + late
    region = _windows(region[None, ..., None], window)[..., 0]
    return (region[:, :, None] != region[:, None, :]) * -100.0


def offsets(window: int) -> Tensor:
    """Rows of the table, (N, N)."""
    at, side = torch.cartesian_prod(*[torch.arange(window, device="cpu")] * 3), 2 * window - 1
    return ((at[:, None] - at[None] + window - 1) * torch.tensor([side * side, side, 1], device="cpu")).sum(-1)
