"""The 3D Swin of SMIT and SMART, windows attended to by ``medfast_kernels.window_attention``.

Sources: Liu et al., "Swin Transformer", ICCV 2021; SMIT (arXiv 2205.10342) and SMART (arXiv 2310.01209) with their
public code, which merges patches after every stage, the last included; MONAI's SwinTransformer of
``patch_norm=True``, which it equals with ``clip=True, bias_index="sliced", merge="monai"``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from medfast.types import Features, Key, Mask
from medfast_kernels.modules import WindowAttention

from .blocks import (
    MERGE_ORDERS,
    MLP,
    PatchEmbedding,
    PatchMerging,
    add_branch,
    check_volume,
    draw_keep,
    hide_tokens,
    init_weights,
    key_for_batch,
    run,
)
from .semantic_attention import SA_TYPES, SemanticAttention
from .smit_windows import WINDOW_ORDERS
from .unet_blocks import ResidualBlock


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
        keep = draw_keep(self.rate, key, self.layer)
        x = add_branch(x, self.attn(self.norm1(x), keep), keep, self.rate)
        return add_branch(x, self.mlp(self.norm2(x)), draw_keep(self.rate, key, self.layer + 1), self.rate)


class SwinStage(nn.Module):
    """Blocks at one resolution, every second one shifted by half a window, and the merge that closes the stage.

    conv: what the map goes through before the first block (Swin UNETR v2), or None.
    """

    def __init__(self, blocks: Sequence[SwinBlock], merge: PatchMerging, conv: ResidualBlock | None):
        super().__init__()
        self.conv = conv
        self.blocks = nn.ModuleList(blocks)
        self.merge = merge

    def forward(self, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        """x (b, *grid, c) -> the map before the merge, same shape, and after it, (b, *ceil(grid / 2), 2c)."""
        if self.conv is not None:
            x = self.conv(x)
        for block in self.blocks:
            x = block(x, key)
        return x, self.merge(x)


class Swin(nn.Module):
    """``medfast.types.Backbone``. Without arguments: SMART's encoder, 10,571,968 parameters.

    in_channels: of the volume. embed: width after the patch embedding, doubled by each merge. depths, heads: blocks and
    attention heads of each stage. window: tokens per axis of a window; every second block shifts by half of it.
    patch: voxels per axis of a token. patch_norm: LayerNorm over the embedding, which MONAI's Swin UNETR does without.
    mlp_ratio: hidden width of the MLPs. qkv_bias: SMIT's public code has none.
    drop_path: rate of the last block; it rises linearly from 0 at the first. merge: order of the neighbours in patch
    merging, a name in ``blocks.MERGE_ORDERS``. clip, bias_index: as in ``mk.window_attention``. window_order: where
    windows are put back, "inverse", where they were, or "smit_code", where SMIT's and SMART's public code puts them:
    only for weights that were trained with it.
    semantic_attention: after the merge of which stage (1 is the first) a [CLS] token reads the tokens, or None;
    sa_heads: its heads. sa_type: "class", [CLS] alone attends (SMART eq. 1, the author's code), or "vit", patch tokens
    attend and are updated on the way to [CLS] too; the stages that come back are the Swin's own either way.
    taps: "monai", "smit" or "smit_plain" puts the maps that a U-Net reads into ``Features.extra["taps"]``.
    residual_convs: each stage begins with a residual block of convolutions (Swin UNETR v2). checkpoint: stages are
    computed again in the backward pass instead of being kept, which costs time and saves memory.

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
        patch_norm: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.1,
        merge: str = "smit",
        clip: bool = False,
        bias_index: str = "geometric",
        window_order: str = "inverse",
        semantic_attention: int | None = None,
        sa_heads: int = 12,
        sa_type: str = "class",
        taps: str | None = None,
        residual_convs: bool = False,
        checkpoint: bool = False,
    ):
        super().__init__()
        widths = [embed * 2**i for i in range(len(depths))]
        _check_settings(widths, depths, heads, drop_path, semantic_attention)
        _check_choices(merge=merge, bias_index=bias_index, window_order=window_order, sa_type=sa_type, taps=taps)
        self.in_channels, self.embed, self.patch = in_channels, embed, patch
        self.channels = tuple(2 * width for width in widths)
        self.strides = tuple(patch * 2 ** (i + 1) for i in range(len(depths)))
        self.taps, self.checkpoint = taps, checkpoint
        self.semantic_attention = semantic_attention

        self.patch_embed = PatchEmbedding(in_channels, embed, patch, patch_norm)
        self.stages = nn.ModuleList()
        attention = {"qkv_bias": qkv_bias, "clip": clip, "bias_index": bias_index}
        done, last = 0, max(sum(depths) - 1, 1)
        for width, depth, num_heads in zip(widths, depths, heads, strict=True):
            blocks = [
                SwinBlock(
                    WINDOW_ORDERS[window_order](width, num_heads, window, i % 2 * (window // 2), **attention),
                    width,
                    mlp_ratio,
                    rate=drop_path * (done + i) / last,
                    layer=2 * (done + i),
                )
                for i in range(depth)
            ]
            conv = ResidualBlock(width, width, "instance") if residual_convs else None
            self.stages.append(SwinStage(blocks, PatchMerging(width, merge), conv))
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
        return self.encode(self.tokens(volume, mask, fill), key_for_batch(key, volume))

    def tokens(self, volume: Tensor, mask: Mask | None, fill: Tensor | None) -> Tensor:
        """The embedding (b, *tokens, embed), hidden tokens replaced: first half of ``forward``."""
        check_volume(volume, self.in_channels, (self.strides[-1] // 2,) * 3)
        return hide_tokens(self.patch_embed(volume), mask, fill)

    def encode(self, x: Tensor, key: Key | None) -> Features:
        """The stages over an embedding x, whose key holds a slot per sample: second half of ``forward``."""
        embedded, before, after = x, [], []
        for stage in self.stages:
            wide, x = run(stage, x, key, recompute=self.checkpoint)
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
        before its merge under a LayerNorm with weights ("smit_plain": without), and the last after its merge as it is.
        """
        if self.taps == "monai":
            return tuple(F.layer_norm(x, x.shape[-1:]) for x in (embedded, *after))
        if self.tap_norms is None:
            return (*(F.layer_norm(x, x.shape[-1:]) for x in before), after[-1])
        return (*(norm(x) for norm, x in zip(self.tap_norms, before, strict=True)), after[-1])


def _check_settings(
    widths: Sequence[int], depths: Sequence[int], heads: Sequence[int], drop_path: float, semantic_attention: int | None
) -> None:
    if not depths or len(depths) != len(heads):
        raise ValueError(f"depths and heads need one entry per stage, got depths={depths} and heads={heads}")
    for width, num_heads in zip(widths, heads, strict=True):
        if width % num_heads:
            raise ValueError(f"heads must divide the width of their stage, got {num_heads} heads for width {width}")
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"drop_path is the last block's probability of being dropped, in [0, 1), got {drop_path}")
    stages = (None, *range(1, len(depths) + 1))
    if semantic_attention not in stages or isinstance(semantic_attention, bool):  # True would pass for stage 1
        told = ", ".join(map(repr, stages))
        raise ValueError(f"semantic_attention must be one of {told}, got {semantic_attention!r}")


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "merge": (*MERGE_ORDERS,),
    "bias_index": ("geometric", "sliced"),
    "window_order": (*WINDOW_ORDERS,),
    "sa_type": (*SA_TYPES,),
    "taps": (None, "monai", "smit", "smit_plain"),
}


def _check_choices(**settings: str | None) -> None:
    for name, value in settings.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, _CHOICES[name]))}, got {value!r}")
