"""Parts that several encoders are made of: patch embedding, patch merging, MLP, masks on token grids.

Feature maps are channels-last, (b, *grid, c), everywhere but on the image side of the patch embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Which of the 2 x 2 x 2 neighbours fills which eighth of the merged channels: offsets along the three grid axes.
# Only loaded weights care. "monai_legacy" (before MONAI 1.5; SwinFUSE's and SimTROT's code has it) reads two
# neighbours twice and two never: it is here to load such weights, never to train new ones.
MERGE_ORDERS = {
    "smit": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1)),
    "monai": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    "monai_v2": ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)),
    "monai_legacy": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),
}


class PatchEmbedding(nn.Module):
    """(b, c, d, h, w) -> (b, *grid, width): convolution over disjoint patches, then LayerNorm.

    Sizes that are no multiple of the patch are padded with zeros at the far end, so grid = ceil(size / patch).
    """

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(channels, width, kernel_size=patch, stride=patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, volume: Tensor) -> Tensor:
        padding = [p for size in reversed(volume.shape[2:]) for p in (0, -size % self.patch)]
        if any(padding):
            volume = F.pad(volume, padding)
        return self.norm(self.proj(volume).movedim(1, -1))


class PatchMerging(nn.Module):
    """(b, *grid, c) -> (b, *ceil(grid / 2), 2c): eight neighbours side by side, LayerNorm, linear without bias.

    Odd axes are padded with a plane of zeros at the far end. order: a name in ``MERGE_ORDERS``.
    """

    def __init__(self, width: int, order: str):
        super().__init__()
        self.order = MERGE_ORDERS[order]
        self.norm = nn.LayerNorm(8 * width)
        self.reduction = nn.Linear(8 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        padding = [p for size in reversed(x.shape[1:-1]) for p in (0, size % 2)]
        if any(padding):
            x = F.pad(x, [0, 0, *padding])
        return self.reduction(self.norm(torch.cat([x[:, i::2, j::2, k::2] for i, j, k in self.order], dim=-1)))


class MLP(nn.Module):
    """Linear, GELU (exact), linear, on the last axis."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def init_weights(module: nn.Module) -> None:
    """For ``Module.apply``: linear layers as in Swin (timm): truncated normal of std .02, zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def add_branch(x: Tensor, branch: Tensor, keep: Tensor | None, rate: float) -> Tensor:
    """Residual sum with stochastic depth: x + keep / (1 - rate) * branch, keep (b,) bool or None for the plain sum."""
    if keep is None:
        return x + branch
    # 16 bits would round 1 / (1 - rate) by up to .4 % and bias the expectation
    scale = keep.to(torch.promote_types(x.dtype, torch.float32)) / (1.0 - rate)
    return (x + branch * scale.reshape(-1, *(1,) * (x.ndim - 1))).to(x.dtype)


def cell_size(tokens: Sequence[int], cells: Sequence[int]) -> int:
    """How many tokens a mask cell covers per axis: k with ceil(tokens / k) == cells on every axis.

    The smallest such power of two, for a cell is a token of a later stage; else the smallest such integer. ValueError
    where there is none.
    """
    longest = max(tokens)
    powers = [2**e for e in range((longest - 1).bit_length() + 1)]
    for k in (*powers, *range(1, longest + 1)):
        if all(-(-t // k) == c for t, c in zip(tokens, cells, strict=True)):
            return k
    fitting = [tuple(-(-t // k) for t in tokens) for k in powers]
    raise ValueError(
        f"a mask of {tuple(cells)} cells does not fit {tuple(tokens)} tokens: a cell covers k whole tokens per axis, "
        f"ceil(tokens / k) cells. With k a power of two these fit: {', '.join(map(str, fitting))}"
    )


def cells_to_tokens(where: Tensor, tokens: Sequence[int]) -> Tensor:
    """(b, *cells) -> (b, *tokens): every cell repeated over the tokens it covers, the last one cut."""
    k = cell_size(tokens, where.shape[1:])
    for axis, length in enumerate(tokens, start=1):
        where = where.repeat_interleave(k, dim=axis).narrow(axis, 0, length)
    return where
