"""SwinFUSE: two views meet in a domain-invariance module between the embedding and the Swin that encodes each.

Source: Talasila et al., SwinFUSE (arXiv 2405.12963), eq. 1, and its public code. The two differ: the paper exchanges
queries between two views over four layers, the code lets one view attend to itself in one layer. ``dim="paper"`` is the
former, ``dim="code"`` the latter, kept for weights that were trained with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import medfast_kernels as mk
from medfast.types import Features, Key, Mask

from .blocks import key_for_batch, run
from .swin import Swin

DIMS = ("paper", "code")


class CoAttention(nn.Module):
    """Multi-head attention of one sequence or map to another, both (b, *rows, width); parameters as in PyTorch's.

    inner: width of queries, keys and values. window: tokens per axis of a window of a map (b, d, h, w, width), which
    shifts by ``shift``; None for a sequence (b, rows, width), every row of which attends to every other.
    """

    def __init__(self, width: int, inner: int, heads: int, window: int | None = None, shift: int = 0):
        super().__init__()
        if heads < 1 or inner % heads:
            raise ValueError(f"dim_heads must divide the width of their layer, got {heads} heads for width {inner}")
        self.heads, self.window, self.shift = heads, window, shift
        self.in_proj = nn.Linear(width, 3 * inner)
        self.out_proj = nn.Linear(inner, width)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        """What ``query`` finds in x: keys and values are x's. Same shape as both."""
        qkv = self._qkv(query, x)
        if self.window is not None:
            return self.out_proj(mk.window_attention(qkv, window=self.window, shift=self.shift, pad="mask"))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def attention_weights(self, query: Tensor, x: Tensor) -> Tensor:
        """(b, windows, heads, N, N), for gauges; a sequence is one window."""
        qkv = self._qkv(query, x)
        if self.window is not None:
            return mk.reference.window_attention_weights(qkv, window=self.window, shift=self.shift, pad="mask")
        return mk.reference.window_attention_weights(qkv.unsqueeze(1), window=(1, qkv.shape[1]))

    def _qkv(self, query: Tensor, x: Tensor) -> Tensor:
        weight, bias = self.in_proj.weight, self.in_proj.bias
        inner = len(weight) // 3
        q = F.linear(query, weight[:inner], bias[:inner])
        kv = F.linear(x, weight[inner:], bias[inner:])
        return torch.cat((q, kv), dim=-1).unflatten(-1, (3, self.heads, -1))


class DomainInvariance(nn.Module):
    """Two stacks of ``CoAttention`` over two embeddings (b, d, h, w, embed); a layer's query is the other stack's.

    width: of a row. Equal to ``embed``: rows are the tokens, in windows, every second layer shifted by half of one, and
    layer l works embed * 2**l wide, as the paper's text has it ("increase by an exponent of 2 with the base layer
    having 48"). Else, as in the public code: rows are (channel, first axis) and hold the (second, third) plane,
    so h * w must be ``width``: 48 * 48 = 2304 at 96 voxels and patches of 2. heads: of each layer. across_samples: the
    rows of a sample do not attend to each other, equal rows of the samples of a batch do.
    """

    def __init__(self, embed: int, width: int, heads: Sequence[int], window: int, across_samples: bool):
        super().__init__()
        self.width, self.tokens, self.across_samples = width, width == embed, across_samples
        self.branches = nn.ModuleList(
            nn.ModuleList(
                CoAttention(width, width * 2**i, n, window, i % 2 * (window // 2))
                if self.tokens
                else CoAttention(width, width, n)
                for i, n in enumerate(heads)
            )
            for _ in range(2)
        )

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """-> what each branch found in its view, as embeddings. Layer l of one reads layer l - 1 of the other."""
        x, y = self._sequences(a), self._sequences(b)
        for first, second in zip(*self.branches, strict=True):  # type: ignore[arg-type]  # a ModuleList of two lists
            x, y = first(y, x), second(x, y)
        return self._embedding(x, a), self._embedding(y, b)

    def rows(self, x: Tensor) -> Tensor:
        """(b, d, h, w, c) -> (b, rows, width). ValueError for planes of another size than ``width``."""
        if self.tokens:
            return x.flatten(1, 3)
        h, w = x.shape[2:-1]
        if h * w != self.width:
            side = math.isqrt(self.width)
            raise ValueError(
                f"dim_width={self.width} attends to planes of {self.width} tokens on the last two axes, for example "
                f"{side} x {self.width // side}, got {h} x {w}: use volumes of that size, set dim_width to {h * w}, or "
                f"to the width of the embedding, {x.shape[-1]}, which takes any size"
            )
        return x.movedim(-1, 1).reshape(len(x), -1, self.width)

    def _sequences(self, x: Tensor) -> Tensor:
        """What attends: the map itself in windows, the rows of a sample, or the samples of a row."""
        if self.tokens:
            return x
        return self.rows(x).transpose(0, 1) if self.across_samples else self.rows(x)

    def _embedding(self, found: Tensor, like: Tensor) -> Tensor:
        """Undoes ``_sequences``."""
        if self.tokens:
            return found
        b, d, h, w, c = like.shape
        rows = found.transpose(0, 1) if self.across_samples else found
        return rows.reshape(b, c, d, h, w).movedim(1, -1)


class SwinFUSE(nn.Module):
    """``medfast.types.Backbone`` and ``EncodesPairs``: Swin UNETR's encoder behind a domain-invariance module.

    As it stands: 178,005,042 parameters, of which the encoder has 8,062,002; 96^3 volumes. in_channels, embed, depths,
    heads, window, patch_norm, mlp_ratio, qkv_bias, drop_path, merge, taps, checkpoint: of the Swin, see ``Swin``; the
    public code's merge order is "monai_legacy".

    dim: "paper", two views exchange queries and each embedding is multiplied with what its branch found (eq. 1); or
    "code", 50,547,762 parameters: each view meets itself alone, one layer deep, the mean of both branches takes the
    embedding's place, and what attends to each other are the samples of a batch, row by row: outputs depend on who is
    in the batch. dim_width: 2304, or another number of tokens of a plane, or ``embed`` for attention among tokens in
    windows, 8,343,186 parameters, for volumes of any size (see ``DomainInvariance``). dim_heads: heads of each layer,
    None for (3, 6, 12, 24), and for (3,) with "code".

    Raises ValueError for settings that do not fit each other.
    """

    def __init__(
        self,
        in_channels: int = 1,
        embed: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        patch_norm: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        merge: str = "monai",
        dim: str = "paper",
        dim_width: int = 2304,
        dim_heads: Sequence[int] | None = None,
        taps: str | None = None,
        checkpoint: bool = False,
    ):
        super().__init__()
        if dim not in DIMS:
            raise ValueError(f"dim must be one of {', '.join(map(repr, DIMS))}, got {dim!r}")
        if dim_heads is None:
            dim_heads = (3,) if dim == "code" else (3, 6, 12, 24)
        if not dim_heads or (dim == "code" and (len(dim_heads) > 1 or dim_width == embed)):
            raise ValueError(
                "dim_heads needs one entry per layer, dim='code' has one layer and works on planes, not on tokens: got "
                f"dim={dim!r}, dim_heads={dim_heads}, dim_width={dim_width}"
            )
        self.encoder = Swin(
            in_channels, embed, depths, heads, window, patch_norm=patch_norm, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias,
            drop_path=drop_path, merge=merge, clip=True, taps=taps, checkpoint=checkpoint,
        )  # fmt: skip
        self.code = dim == "code"
        self.dim = DomainInvariance(embed, dim_width, dim_heads, window, across_samples=self.code)
        self.in_channels, self.embed = in_channels, embed
        self.semantic_attention: int | None = None
        self.channels, self.strides = self.encoder.channels, self.encoder.strides
        self.taps, self.checkpoint = taps, checkpoint

    def forward(
        self, volume: Tensor, mask: Mask | None = None, fill: Tensor | None = None, key: Key | None = None
    ) -> Features:
        """volume (b, in_channels, d, h, w) -> the Swin's Features of one view that meets itself (fine-tuning).

        extra["dim"]: the mean of what both branches found, (b, rows, width), rows as in ``DomainInvariance``. mask,
        fill, key: as in ``Swin``. Raises ValueError for volumes, masks and keys that do not fit.
        """
        x = self.encoder.tokens(volume, mask, fill)
        return self._encode(x, self._alone(x), key_for_batch(key, volume))

    def encode_pair(self, a: Tensor, b: Tensor, key: Key | None = None) -> tuple[Features, Features]:
        """Two views (b, in_channels, d, h, w) of one size -> the Features of each; extra["dim"] is its own branch's.

        key: draws for a as for view 0 and for b as for view 1, as ``Key.stack`` numbers them. With dim="code" the views
        do not meet. Raises ValueError for volumes and keys that do not fit, or views of different sizes.
        """
        if a.shape != b.shape:
            raise ValueError(f"two views meet token by token and need one size, got {tuple(a.shape)}, {tuple(b.shape)}")
        key = key_for_batch(key, a)
        x, y = self.encoder.tokens(torch.cat((a, b)), None, None).chunk(2)
        found = (self._alone(x), self._alone(y)) if self.code else run(self.dim, x, y, recompute=self.checkpoint)
        both = self._encode(torch.cat((x, y)), torch.cat(found), key and key.stack(2))
        return _half(both, 0), _half(both, 1)

    def _alone(self, x: Tensor) -> Tensor:
        """What an embedding finds in itself: the mean of both branches."""
        first, second = run(self.dim, x, x, recompute=self.checkpoint)
        return (first + second) / 2

    def _encode(self, x: Tensor, found: Tensor, key: Key | None) -> Features:
        features = self.encoder.encode(found if self.code else x * found, key)
        return replace(features, extra={**features.extra, "dim": self.dim.rows(found)})


def _half(features: Features, index: int) -> Features:
    """The first (0) or second (1) half of the batch."""

    def cut(value: Any) -> Any:
        return value.chunk(2)[index] if isinstance(value, Tensor) else tuple(map(cut, value))

    return Features(
        cut(features.stages), cut(features.summary), None, {name: cut(value) for name, value in features.extra.items()}
    )
