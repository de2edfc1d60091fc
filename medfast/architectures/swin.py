"""The 3D Swin of SMIT and SMART, windows attended to by ``medfast_kernels.window_attention``.

Sources: Liu et al., "Swin Transformer", ICCV 2021; SMIT (arXiv 2205.10342) and SMART (arXiv 2310.01209) with their
public code, which merges patches after every stage, the last included; MONAI's SwinTransformer of
``patch_norm=True``, which it equals with ``clip=True, bias_index="sliced", merge="monai"``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import medfast_kernels as mk
from medfast.types import Features, Key, Mask

from .blocks import MERGE_ORDERS, MLP, PatchEmbedding, PatchMerging, add_branch, cells_to_tokens, init_weights
from .semantic_attention import SA_TYPES, SemanticAttention


class WindowAttention(nn.Module):
    """Shifted window attention on a channels-last map (b, *grid, width), with a relative position bias table.

    Windows that reach over the grid hold pad tokens that attend and are attended; QKV runs on the map itself, so a pad
    token holds the QKV bias, what padding before QKV (MONAI, SMIT) gives it.
    """

    def __init__(self, width: int, heads: int, window: int, shift: int, qkv_bias: bool, clip: bool, bias_index: str):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.clip, self.bias_index = clip, bias_index
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 3, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """keep (b,) bool or None: samples with False come back as the bias of ``proj``; the caller drops them."""
        shape = (3, self.heads, -1)
        out = mk.window_attention(
            self.qkv(x).unflatten(-1, shape),
            self.relative_position_bias_table,
            window=self.window,
            shift=self.shift,
            pad="bias",
            pad_value=None if self.qkv.bias is None else self.qkv.bias.view(shape),
            clip=self.clip,
            bias_index=self.bias_index,
            keep=keep,
        )
        return self.proj(out)


class SwinBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x), each branch dropped for a whole sample with probability ``rate``.

    layer: number of the first of the two branches in the whole network, which its draws are addressed by.
    """

    def __init__(self, attention: WindowAttention, width: int, mlp_ratio: float, rate: float, layer: int):
        super().__init__()
        self.rate, self.layer = rate, layer
        self.norm1 = nn.LayerNorm(width)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(mlp_ratio * width))

    def forward(self, x: Tensor, key: Key | None) -> Tensor:
        keep = self._keep(key, self.layer)
        x = add_branch(x, self.attn(self.norm1(x), keep), keep, self.rate)
        return add_branch(x, self.mlp(self.norm2(x)), self._keep(key, self.layer + 1), self.rate)

    def _keep(self, key: Key | None, layer: int) -> Tensor | None:
        if key is None or self.rate == 0.0:
            return None
        return mk.random_keep(self.rate, key=key.at(mk.Role.DROP_PATH, layer=layer))


class SwinStage(nn.Module):
    """Blocks at one resolution, every second one shifted by half a window, and the merge that closes the stage."""

    def __init__(self, blocks: Sequence[SwinBlock], merge: PatchMerging):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.merge = merge

    def forward(self, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        """x (b, *grid, c) -> the map before the merge, same shape, and after it, (b, *ceil(grid / 2), 2c)."""
        for block in self.blocks:
            x = block(x, key)
        return x, self.merge(x)


class Swin(nn.Module):
    """``medfast.types.Backbone``. Without arguments: SMART's encoder, 10,571,968 parameters.

    in_channels: of the volume. embed: width after the patch embedding, doubled by each merge. depths, heads: blocks and
    attention heads of each stage. window: tokens per axis of a window; every second block shifts by half of it.
    patch: voxels per axis of a token. mlp_ratio: hidden width of the MLPs. qkv_bias: SMIT's public code has none.
    drop_path: rate of the last block; it rises linearly from 0 at the first. merge: order of the neighbours in patch
    merging, a name in ``blocks.MERGE_ORDERS``. clip, bias_index: as in ``mk.window_attention``.
    semantic_attention: after the merge of which stage (1 is the first) a [CLS] token reads the tokens, or None;
    sa_heads: its heads. sa_type: "class", [CLS] alone attends (SMART eq. 1, the author's code), or "vit", patch tokens
    attend and are updated on the way to [CLS] too; the stages that come back are the Swin's own either way.
    taps: "monai" or "smit" puts the maps that a U-Net reads into ``Features.extra["taps"]``.

    ``embed`` is also the width of ``fill``. Raises ValueError for settings that do not fit each other.
    """

    def __init__(
        self,
        in_channels: int = 1,
        embed: int = 48,
        depths: Sequence[int] = (2, 2, 8, 2),
        heads: Sequence[int] = (4, 4, 8, 16),
        window: int = 4,
        patch: int = 2,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.1,
        merge: str = "smit",
        clip: bool = False,
        bias_index: str = "geometric",
        semantic_attention: int | None = None,
        sa_heads: int = 12,
        sa_type: str = "class",
        taps: str | None = None,
    ):
        super().__init__()
        widths = [embed * 2**i for i in range(len(depths))]
        _check_settings(widths, depths, heads, drop_path, merge, bias_index, semantic_attention, sa_type, taps)
        self.in_channels, self.embed, self.patch = in_channels, embed, patch
        self.channels = tuple(2 * width for width in widths)
        self.strides = tuple(patch * 2 ** (i + 1) for i in range(len(depths)))
        self.taps = taps
        self.semantic_attention = semantic_attention

        self.patch_embed = PatchEmbedding(in_channels, embed, patch)
        self.stages = nn.ModuleList()
        done, last = 0, max(sum(depths) - 1, 1)
        for width, depth, num_heads in zip(widths, depths, heads, strict=True):
            blocks = [
                SwinBlock(
                    WindowAttention(width, num_heads, window, i % 2 * (window // 2), qkv_bias, clip, bias_index),
                    width,
                    mlp_ratio,
                    rate=drop_path * (done + i) / last,
                    layer=2 * (done + i),
                )
                for i in range(depth)
            ]
            self.stages.append(SwinStage(blocks, PatchMerging(width, merge)))
            done += depth
        # only where they are read: a parameter without gradient would stall engines that count gradients
        self.tap_norms = nn.ModuleList(nn.LayerNorm(width) for width in widths) if taps == "smit" else None
        self.semantic = None
        if semantic_attention is not None:
            self.semantic = SemanticAttention(self.channels[semantic_attention - 1], sa_heads, mlp_ratio, kind=sa_type)
        self.apply(init_weights)

    def forward(
        self, volume: Tensor, mask: Mask | None = None, fill: Tensor | None = None, key: Key | None = None
    ) -> Features:
        """volume (b, in_channels, d, h, w) -> Features; every stage is (b, *ceil(tokens / 2**stage), c).

        mask: cells whose tokens, after the patch embedding and its LayerNorm, become ``fill`` (embed,), which is needed
        then. key: addresses the drops of whole branches; ``key.sample`` is (b,), or None for 0 ... b - 1. Raises
        ValueError for volumes, masks and keys that do not fit.
        """
        self._check_volume(volume)
        key = _for_batch(key, volume)
        x = self.patch_embed(volume)
        if mask is not None:
            x = _hide(x, mask, fill)
        embedded, before, after = x, [], []
        for stage in self.stages:
            wide, x = stage(x, key)
            before.append(wide)
            after.append(x)
        attention = None
        if self.semantic is None or self.semantic_attention is None:
            summary = x.flatten(1, -2).mean(dim=1)
        else:
            summary, attention = self.semantic(after[self.semantic_attention - 1])
        extra = {} if self.taps is None else {"taps": self._taps(embedded, before, after)}
        return Features(tuple(after), summary, attention, extra)

    def _taps(self, embedded: Tensor, before: list[Tensor], after: list[Tensor]) -> tuple[Tensor, ...]:
        """Maps for a U-Net, fine to coarse, one more than there are stages, strides from ``patch`` on.

        "monai": the embedding and each stage after its merge, under a LayerNorm without weights. "smit": each stage
        before its merge under a LayerNorm with weights, and the last stage after its merge as it is.
        """
        if self.tap_norms is None:
            return tuple(F.layer_norm(x, x.shape[-1:]) for x in (embedded, *after))
        return (*(norm(x) for norm, x in zip(self.tap_norms, before, strict=True)), after[-1])

    def _check_volume(self, volume: Tensor) -> None:
        if volume.ndim != 5 or volume.shape[1] != self.in_channels:
            raise ValueError(f"expected a volume (b, {self.in_channels}, d, h, w), got {tuple(volume.shape)}")
        smallest = self.strides[-1] // 2
        if min(volume.shape[2:]) < smallest:
            raise ValueError(
                f"{tuple(volume.shape[2:])} voxels are too few for {len(self.stages)} stages of patch {self.patch}: "
                f"every axis needs at least {smallest}; pad the volume or build the Swin with fewer stages"
            )


def _for_batch(key: Key | None, volume: Tensor) -> Key | None:
    """The key with one global slot per sample, where the volume is."""
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


def _hide(x: Tensor, mask: Mask, fill: Tensor | None) -> Tensor:
    """x (b, *grid, c) with the tokens of hidden cells replaced by ``fill`` (c,)."""
    where = mask.where
    if where.dtype != torch.bool or where.ndim != x.ndim - 1 or len(where) != len(x):
        raise ValueError(
            f"mask.where must be bool (b, *cells) with b = {len(x)} and {x.ndim - 2} axes of cells, got "
            f"{tuple(where.shape)} of {where.dtype}"
        )
    if fill is None or fill.shape != x.shape[-1:]:
        got = None if fill is None else tuple(fill.shape)
        raise ValueError(f"a mask needs a fill, what hidden tokens become, of shape ({x.shape[-1]},), got {got}")
    return torch.where(cells_to_tokens(where, x.shape[1:-1]).unsqueeze(-1), fill.to(x.dtype), x)


def _check_settings(
    widths: Sequence[int], depths: Sequence[int], heads: Sequence[int], drop_path: float, merge: str, bias_index: str,
    semantic_attention: int | None, sa_type: str, taps: str | None,
) -> None:  # fmt: skip
    if not depths or len(depths) != len(heads):
        raise ValueError(f"depths and heads need one entry per stage, got depths={depths} and heads={heads}")
    for width, num_heads in zip(widths, heads, strict=True):
        if width % num_heads:
            raise ValueError(f"heads must divide the width of their stage, got {num_heads} heads for width {width}")
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"drop_path is the last block's probability of being dropped, in [0, 1), got {drop_path}")
    choices = {"merge": (merge, (*MERGE_ORDERS,)), "bias_index": (bias_index, ("geometric", "sliced")),
               "sa_type": (sa_type, (*SA_TYPES,)), "taps": (taps, (None, "monai", "smit")),
               "semantic_attention": (semantic_attention, (None, *range(1, len(depths) + 1)))}  # fmt: skip
    for name, (value, accepted) in choices.items():
        if value not in accepted or isinstance(value, bool):  # True would pass for stage 1
            raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")
