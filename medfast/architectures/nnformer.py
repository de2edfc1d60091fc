"""nnFormer: a Swin with convolutions between its stages, and a decoder whose skips are windowed cross-attention.

Source: Zhou et al., nnFormer (arXiv 2109.03201, IEEE TIP 2023) with its public code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from medfast.types import Backbone, Features, Key, Mask

from .blocks import blank_voxels, check_volume, hide_tokens, init_weights, key_for_batch, per_axis, run
from .nnformer_blocks import BIAS_INDICES, GROWTH, ConvDown, ConvEmbedding, DecoderStage, attention
from .swin import SwinBlock
from .unet_blocks import Up


class NNFormerStage(nn.Module):
    """Blocks at one resolution, every second one shifted by half a window; ``down`` leads to the next stage."""

    def __init__(self, blocks: Sequence[SwinBlock], down: ConvDown | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.down = down

    def forward(self, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        """-> the map after the blocks, and what the next stage reads: the same where there is none."""
        for block in self.blocks:
            x = block(x, key)
        return x, x if self.down is None else self.down(x)


class NNFormerEncoder(nn.Module):
    """``medfast.types.Backbone``. As it stands: Synapse's, 119,045,772 parameters.

    BraTS's, 29,839,734: in_channels 4, patch 4, embed 96, heads (3, 6, 12, 24). in_channels: of the volume. patch: 1, 2
    or 4 voxels of a token, one number or three. embed: width of the first stage, doubled by each next. depths, heads,
    windows: blocks, attention heads, tokens per axis of a window of each stage. drop_path: rate of the last block; it
    rises linearly from 0 at the first. bias_index: "geometric", or "legacy", the public code's row of the bias table,
    which several offsets share: only for weights that were trained with it. every_norm: LayerNorm over the map of every
    stage, as its decoder needs; False: over the last alone, for objectives that read no other. checkpoint: stages are
    computed again in the backward pass instead of being kept.

    ``Features.stages`` are the maps of the stages before they are halved, so the first stride is ``patch``. Raises
    ValueError for settings that do not fit each other.
    """

    def __init__(
        self,
        in_channels: int = 1,
        patch: int | Sequence[int] = (2, 4, 4),
        embed: int = 192,
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (6, 12, 24, 48),
        windows: Sequence[int] = (4, 4, 8, 4),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.2,
        bias_index: str = "geometric",
        every_norm: bool = True,
        checkpoint: bool = False,
    ):
        super().__init__()
        _check_settings(embed, depths, heads, windows, drop_path, bias_index)
        self.patch = per_axis(patch)
        self.in_channels, self.embed, self.checkpoint = in_channels, embed, checkpoint
        self.semantic_attention: int | None = None
        self.windows = tuple(windows)
        self.channels = tuple(embed * GROWTH**i for i in range(len(depths)))
        strides = [tuple(p * GROWTH**i for p in self.patch) for i in range(len(depths))]
        self.strides: tuple[Any, ...] = tuple(s[0] if len(set(s)) == 1 else s for s in strides)
        self.patch_embed = ConvEmbedding(in_channels, embed, self.patch)
        self.stages = nn.ModuleList()
        rate = drop_path / max(sum(depths) - 1, 1)
        for i, (width, depth) in enumerate(zip(self.channels, depths, strict=True)):
            done = sum(depths[:i])
            blocks = [
                SwinBlock(
                    attention(width, heads[i], windows[i], j % 2 * (windows[i] // 2), qkv_bias, bias_index),
                    width, mlp_ratio, rate * (done + j), layer=2 * (done + j),
                )
                for j in range(depth)
            ]  # fmt: skip
            self.stages.append(NNFormerStage(blocks, ConvDown(width) if i + 1 < len(depths) else None))
        normed = range(0 if every_norm else len(depths) - 1, len(depths))
        self.norms = nn.ModuleDict({str(i): nn.LayerNorm(self.channels[i]) for i in normed})
        self.apply(init_weights)

    def forward(
        self, volume: Tensor, mask: Mask | None = None, fill: Tensor | None = None, key: Key | None = None
    ) -> Features:
        """volume (b, in_channels, d, h, w) -> Features; summary is the mean of the last stage.

        mask: cells whose tokens become ``fill`` (embed,) after the embedding. Its convolutions overlap, so the voxels
        of hidden cells are zeroed before. key: addresses the drops of whole branches. Raises ValueError for volumes,
        masks and keys that do not fit.
        """
        check_volume(volume, self.in_channels, self.patch)
        key = key_for_batch(key, volume)
        x = hide_tokens(self.patch_embed(blank_voxels(volume, mask, self.patch)), mask, fill)
        stages = []
        for i, stage in enumerate(self.stages):
            seen, x = run(stage, x, key, recompute=self.checkpoint)
            stages.append(self.norms[str(i)](seen) if str(i) in self.norms else seen)
        return Features(tuple(stages), stages[-1].mean(dim=(1, 2, 3)))


class NNFormer(nn.Module):
    """``medfast.types.Network``. As it stands: Synapse's with deep supervision, 150,054,210 parameters.

    BraTS's, 37,606,726: in_channels 4, classes 4, patch 4, embed 96, heads (3, 6, 12, 24), decoder_heads (6, 12, 24),
    deep_supervision False. classes: None for a network that is only pretrained: it has no head. decoder_heads: heads of
    the decoder's stages, fine to coarse, or None for those of the encoder; the public code for BraTS has twice as many
    as its encoder. deep_supervision: a head over each stage of the decoder, which ``deep_logits`` gives, instead of
    over the finest alone. The rest as in ``NNFormerEncoder``.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int | None = 14,
        patch: int | Sequence[int] = (2, 4, 4),
        embed: int = 192,
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (6, 12, 24, 48),
        windows: Sequence[int] = (4, 4, 8, 4),
        decoder_heads: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.2,
        bias_index: str = "geometric",
        deep_supervision: bool = True,
        checkpoint: bool = False,
    ):
        super().__init__()
        encoder = NNFormerEncoder(
            in_channels, patch, embed, depths, heads, windows, mlp_ratio, qkv_bias, drop_path, bias_index,
            checkpoint=checkpoint,
        )  # fmt: skip
        stages = len(encoder.channels) - 1
        if decoder_heads is None:
            decoder_heads = heads[:stages]
        if len(decoder_heads) != stages or stages < 1:
            raise ValueError(f"decoder_heads need one entry per stage but the last, {stages}, got {decoder_heads}")
        self.encoder: Backbone = encoder
        self.decoder_stride = encoder.patch
        self.checkpoint = checkpoint
        blocks, before = sum(depths[:-1]), sum(depths)
        self.decoder = nn.ModuleList()  # fine to coarse; rates rise and layers count in the order they run, from coarse
        for i in range(stages):
            done = sum(depths[i + 1 : stages])
            rates = [drop_path * (done + j) / max(blocks - 1, 1) for j in range(depths[i])]
            self.decoder.append(
                DecoderStage(
                    encoder.channels[i], decoder_heads[i], windows[i], mlp_ratio, qkv_bias, bias_index, rates,
                    layer=2 * (before + done),
                )
            )  # fmt: skip
        heads_over = [] if classes is None else encoder.channels[: stages if deep_supervision else 1]
        if classes is not None and classes < 1:
            raise ValueError(f"classes must be at least 1, or null for a network without a head, got {classes}")
        self.heads = nn.ModuleList(Up(width, classes or 1, encoder.patch, bias=True) for width in heads_over)
        self.apply(init_weights)

    def forward(self, volume: Tensor) -> Tensor:
        """(b, in_channels, d, h, w) -> logits (b, classes, d, h, w), which lie channels-last in memory."""
        return self._lift(volume, self._decode(self.encoder(volume), None)[:1])[0]

    def deep_logits(self, volume: Tensor) -> tuple[Tensor, ...]:
        """Logits for deep supervision, fine to coarse: (b, classes, *ceil(size / 2**i)) of the i-th, the first as
        ``forward`` gives. ValueError for a network without deep supervision."""
        if len(self.heads) != len(self.decoder):
            raise ValueError("this network was built without deep supervision: call it for its logits instead")
        return self._lift(volume, self._decode(self.encoder(volume), None))

    def features(
        self, volume: Tensor, mask: Mask | None = None, fill: Tensor | None = None, key: Key | None = None
    ) -> Features:
        """The encoder's Features; extra["decoder"] is the map before the head, (b, *ceil(size / patch), embed).

        Raises ValueError for volumes, masks and keys that do not fit.
        """
        seen = self.encoder(volume, mask, fill, key)
        return replace(seen, extra={**seen.extra, "decoder": self._decode(seen, key_for_batch(key, volume))[0]})

    def _decode(self, seen: Features, key: Key | None) -> list[Tensor]:
        """The decoder's maps, fine to coarse."""
        maps = [seen.stages[-1]]
        for stage, skip in zip(reversed(self.decoder), reversed(seen.stages[:-1]), strict=True):
            maps.insert(0, run(stage, maps[0], skip, key, recompute=self.checkpoint))
        return maps[:-1]

    def _lift(self, volume: Tensor, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logits of maps, fine to coarse, the first map cut to the volume, each next to half of the one before."""
        if not self.heads:
            raise ValueError("this network was built with classes=None and has no head: read features(volume) instead")
        logits = []
        for i, (head, x) in enumerate(zip(self.heads, maps, strict=False)):
            d, h, w = (-(-size // GROWTH**i) for size in volume.shape[2:])
            logits.append(head(x)[:, :d, :h, :w].movedim(-1, 1))
        return tuple(logits)


def _check_settings(
    embed: int, depths: Sequence[int], heads: Sequence[int], windows: Sequence[int], drop_path: float, bias_index: str
) -> None:
    if not depths or not len(depths) == len(heads) == len(windows) or min(depths) < 1:
        raise ValueError(
            f"depths, heads and windows need one entry per stage, got depths={depths}, heads={heads}, windows={windows}"
        )
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"drop_path is the last block's probability of being dropped, in [0, 1), got {drop_path}")
    if bias_index not in BIAS_INDICES:
        raise ValueError(f"bias_index must be one of {', '.join(map(repr, BIAS_INDICES))}, got {bias_index!r}")
