"""The operators as ``nn.Module``s: each holds its parameters and settings, and its forward is one call of an operator.

What can be wrong with arguments is said by the operators when they are called; constructors check only what would make
parameters of a wrong shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import reference
from .class_token import class_attention
from .contrast import token_contrast
from .key import Key
from .masking import attention_mask
from .tokens import drop_tokens, restore_tokens
from .window import window_attention


class WindowAttention(nn.Module):
    """Shifted window attention on a channels-last map (b, *grid, width) -> the same shape (Swin, Liu et al. 2021).

    Parameters are named as in MONAI, timm, torchvision and Video-Swin: ``qkv``, ``relative_position_bias_table``
    (prod(2 * window - 1), heads), ``proj``. QKV runs on the map itself, neither rolled nor partitioned. Windows that
    reach over the grid hold pad tokens that attend and are attended to; they hold the QKV bias, what padding before QKV
    would give them.

    width: a multiple of ``heads`` (ValueError). axes: of the grid, 2 or 3. window, shift, clip, bias_index, dropout: as
    in ``window_attention``; dropout is drawn only in calls with a key.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        window: int | Sequence[int],
        shift: int | Sequence[int] = 0,
        *,
        axes: int = 3,
        qkv_bias: bool = True,
        clip: bool = True,
        bias_index: str = "geometric",
        dropout: float = 0.0,
    ):
        super().__init__()
        _check_heads(width, heads)
        self.heads, self.window, self.shift = heads, window, shift
        self.clip, self.bias_index, self.dropout = clip, bias_index, dropout
        sizes = (window,) * axes if isinstance(window, int) else tuple(window)
        if len(sizes) != axes:
            raise ValueError(f"window must be an int or have one entry per grid axis ({axes}), got {window}")
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.relative_position_bias_table = nn.Parameter(torch.empty(math.prod(2 * w - 1 for w in sizes), heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, keep: Tensor | None = None, key: Key | None = None) -> Tensor:
        """keep (b,) bool or None: samples with False come back as the bias of ``proj``; the caller drops them."""
        dropout = 0.0 if key is None else self.dropout
        return self.proj(window_attention(**self._call(x), dropout=dropout, keep=keep, key=key))

    def attention_weights(self, x: Tensor) -> Tensor:
        """What tokens attend to in ``forward``, see ``reference.window_attention_weights``: for gauges and pictures."""
        return reference.window_attention_weights(**self._call(x))

    def _call(self, x: Tensor) -> dict[str, Any]:
        shape = (3, self.heads, -1)
        return {
            "qkv": self.qkv(x).unflatten(-1, shape), "bias": self.bias_table(), "window": self.window,
            "shift": self.shift, "pad_value": None if self.qkv.bias is None else self.qkv.bias.view(shape),
            "clip": self.clip, "bias_index": self.bias_index,
        }  # fmt: skip

    def bias_table(self) -> Tensor:
        """The rows as the operator wants them; subclasses may keep theirs in another order."""
        return self.relative_position_bias_table


class ClassAttention(nn.Module):
    """A [CLS] token reads all tokens (CaiT, Touvron et al. 2021, eq. 5-7): x (b, 1 + n, width), [CLS] first.

    Returns what it read, (b, width), and its attention to the n tokens, (b, n), mean over heads.
    width: a multiple of ``heads`` (ValueError).
    """

    def __init__(self, width: int, heads: int, qkv_bias: bool = True):
        super().__init__()
        _check_heads(width, heads)
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=qkv_bias) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.q(x[:, 0]), self.k(x), self.v(x)))
        out, attention = class_attention(q, k, v)
        return self.proj(out), attention


class AttentionMask(nn.Module):
    """Settings of ``attention_mask``: attention (b, n) and a key -> where, hidden, visible."""

    def __init__(self, ratio: float, hint: float = 0.0, hint_mode: str = "random", order: str = "high"):
        super().__init__()
        self.ratio, self.hint, self.hint_mode, self.order = ratio, hint, hint_mode, order

    def forward(self, attention: Tensor, key: Key) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return attention_mask(
            attention, self.ratio, hint=self.hint, hint_mode=self.hint_mode, order=self.order, key=key
        )  # fmt: skip


class DropTokens(nn.Module):
    """x (b, n, width) and ids (b, count) -> (b, count, width), learned positions (n, width) added first (MAE)."""

    def __init__(self, n: int, width: int):
        super().__init__()
        self.position = nn.Parameter(torch.empty(n, width))
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return drop_tokens(x, ids, self.position)


class RestoreTokens(nn.Module):
    """y (b, count, width) and its ids of n -> (b, n, width); a learned mask token (width,) elsewhere (MAE)."""

    def __init__(self, width: int):
        super().__init__()
        self.fill = nn.Parameter(torch.empty(width))
        nn.init.trunc_normal_(self.fill, std=0.02)

    def forward(self, y: Tensor, ids: Tensor, n: int) -> Tensor:
        return restore_tokens(y, ids, n, self.fill)


class TokenContrast(nn.Module):
    """Settings of ``token_contrast``: z (2 views, volumes, positions, dim), of any length, -> a scalar.

    z is L2-normalised along dim here. volume, anchors: as in ``token_contrast``.
    """

    def __init__(self, temperature: float = 0.5, weight: float = 1.0, weight_mode: str = "exp"):
        super().__init__()
        self.temperature, self.weight, self.weight_mode = temperature, weight, weight_mode

    def forward(self, z: Tensor, volume: Tensor | None = None, anchors: tuple[int, int] | None = None) -> Tensor:
        return token_contrast(
            F.normalize(z, dim=-1), temperature=self.temperature, weight=self.weight, weight_mode=self.weight_mode,
            volume=volume, anchors=anchors,
        )  # fmt: skip


def _check_heads(width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise ValueError(f"heads must divide the width, got {heads} heads for width {width}")
