"""Parts that several encoders are made of: patch embedding and merging, MLP, drops, recomputation, masks on tokens.

Feature maps are channels-last, (b, *grid, c), everywhere but on the image side of the patch embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import medfast_kernels as mk
from medfast.types import Key, Mask

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
    """(b, c, d, h, w) -> (b, *grid, width): convolution over disjoint patches, then LayerNorm (not with norm=False).

    patch: voxels per axis, or one number for each axis. Sizes that are no multiple of it are padded with zeros at the
    far end, so grid = ceil(size / patch).
    """

    def __init__(self, channels: int, width: int, patch: int | Sequence[int], norm: bool = True):
        super().__init__()
        self.patch = per_axis(patch)
        self.proj = nn.Conv3d(channels, width, kernel_size=self.patch, stride=self.patch)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(self, volume: Tensor) -> Tensor:
        sizes = zip(reversed(volume.shape[2:]), reversed(self.patch), strict=True)
        padding = [p for size, patch in sizes for p in (0, -size % patch)]
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
        return self.reduction(self.norm(_Neighbours.apply(x, self.order)))


class _Neighbours(torch.autograd.Function):
    """x (b, *grid, c), even axes -> (b, *grid / 2, 8c): the neighbours at offsets ``order`` side by side.

    What autograd makes of slices fills a whole map with zeros for each of the eight and adds them up; here every entry
    of the gradient is written once.
    """

    @staticmethod
    def forward(ctx, x: Tensor, order: tuple[tuple[int, int, int], ...]) -> Tensor:
        ctx.order, ctx.shape = order, x.shape
        return torch.cat([x[:, i::2, j::2, k::2] for i, j, k in order], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        parts = gradient.chunk(len(ctx.order), dim=-1)
        once = len(set(ctx.order)) == len(ctx.order)
        whole = gradient.new_empty(ctx.shape) if once else gradient.new_zeros(ctx.shape)
        for (i, j, k), part in zip(ctx.order, parts, strict=True):
            place = whole[:, i::2, j::2, k::2]
            place.copy_(part) if once else place.add_(part)
        return whole, None


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


def draw_keep(rate: float, key: Key | None, layer: int) -> Tensor | None:
    """Which samples keep the branch ``layer`` of a network, (b,) bool; None, all of them, without key or rate."""
    if key is None or rate == 0.0:
        return None
    return mk.random_keep(rate, key=key.at(mk.Role.DROP_PATH, layer=layer))


def run(module: Callable[..., Any], *inputs: Any, recompute: bool) -> Any:
    """module(*inputs); with ``recompute`` its activations are made again in the backward pass instead of being kept.

    Everything random here is drawn from a key, so the second pass needs no generator state to draw what the first did.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)
    return module(*inputs)


def per_axis(value: int | Sequence[int]) -> tuple[int, int, int]:
    """One number per axis of a volume. ValueError for other counts, and for numbers below 1."""
    found = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(found) != 3 or min(found) < 1:
        raise ValueError(f"expected one positive number or three, one per axis, got {value}")
    return found


def check_volume(volume: Tensor, channels: int, smallest: Sequence[int]) -> None:
    """ValueError unless (b, channels, d, h, w), or (b, channels, h, w), and no axis is shorter than ``smallest``."""
    if volume.ndim != 2 + len(smallest) or volume.shape[1] != channels:
        axes = ", ".join("dhw"[-len(smallest) :])
        raise ValueError(f"expected a volume (b, {channels}, {axes}), got {tuple(volume.shape)}")
    if any(size < least for size, least in zip(volume.shape[2:], smallest, strict=True)):
        raise ValueError(
            f"{tuple(volume.shape[2:])} voxels are too few for this network: every axis needs at least "
            f"{tuple(smallest)}; pad the volume, or build the network with a smaller patch or fewer stages"
        )


def key_for_batch(key: Key | None, volume: Tensor) -> Key | None:
    """The key with one global slot per sample, where the volume is. ValueError for another number of slots."""
    if key is None:
        return None
    if key.sample is None:
        return key._replace(sample=torch.arange(len(volume), device=volume.device))
    if key.sample.shape != (len(volume),):
        raise ValueError(
            f"key.sample holds the global slot of every sample, ({len(volume)},) for this batch, got "
            f"{tuple(key.sample.shape)}; for views stacked along the batch use Key.stack"
        )
    return key._replace(sample=key.sample.to(volume.device))


def hide_tokens(x: Tensor, mask: Mask | None, fill: Tensor | None) -> Tensor:
    """x (b, *grid, c) with the tokens of hidden cells replaced by ``fill`` (c,); x itself without a mask."""
    if mask is None:
        return x
    if fill is None or fill.shape != x.shape[-1:]:
        got = None if fill is None else tuple(fill.shape)
        raise ValueError(f"a mask needs a fill, what hidden tokens become, of shape ({x.shape[-1]},), got {got}")
    return torch.where(hidden_tokens(mask, x).unsqueeze(-1), fill.to(x.dtype), x)


def blank_voxels(volume: Tensor, mask: Mask | None, patch: Sequence[int]) -> Tensor:
    """volume (b, c, *size) with zeros where tokens of ``patch`` voxels are hidden; the volume itself without a mask.

    For embeddings whose patches overlap: else hidden voxels show at the edges of visible tokens.
    """
    if mask is None:
        return volume
    grid = [-(-size // p) for size, p in zip(volume.shape[2:], patch, strict=True)]
    where = hidden_tokens(mask, volume.new_empty(len(volume), *grid, 0))
    for axis, (size, p) in enumerate(zip(volume.shape[2:], patch, strict=True), start=1):
        where = where.repeat_interleave(p, dim=axis).narrow(axis, 0, size)
    return volume.masked_fill(where.unsqueeze(1), 0.0)


def hidden_tokens(mask: Mask, x: Tensor) -> Tensor:
    """Which tokens of x (b, *grid, c) lie in hidden cells, (b, *grid) bool. ValueError for masks that do not fit."""
    where = mask.where
    if where.dtype != torch.bool or where.ndim != x.ndim - 1 or len(where) != len(x):
        raise ValueError(
            f"mask.where must be bool (b, *cells) with b = {len(x)} and {x.ndim - 2} axes of cells, got "
            f"{tuple(where.shape)} of {where.dtype}"
        )
    return cells_to_tokens(where, x.shape[1:-1])


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
