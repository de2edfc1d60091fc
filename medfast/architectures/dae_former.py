"""DAE-Former, 2D: an encoder of dual attention at three resolutions, and a decoder with or without skips.

Sources: Azad et al., DAE-Former (arXiv 2212.13504) with its public code; SDDA-MAE, which pretrains it without skips and
gives the coarsest stage of the decoder blocks of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from medfast.types import Backbone, Features, Key, Mask

from .blocks import blank_voxels, check_volume, hide_tokens, init_weights, run
from .dual_attention import DualBlock, Pointwise, SkipCrossAttention

PATCH = 4
EMBEDS = ("overlap", "merge")


class OverlapEmbedding(nn.Module):
    """(b, h, w, c) -> (b, *ceil(size / stride), width): convolution whose patches overlap, LayerNorm."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.movedim(-1, 1)).movedim(1, -1))


class MergeEmbedding(nn.Module):
    """(b, h, w, c) -> (b, *ceil(size / stride), width): disjoint patches, zeros at the far end, linear, LayerNorm."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.proj = nn.Conv2d(channels, width, stride, stride)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, -x.shape[2] % self.stride, 0, -x.shape[1] % self.stride))
        return self.norm(self.proj(x.movedim(-1, 1)).movedim(1, -1))


class PatchExpand(nn.Module):
    """(b, h, w, width) -> (b, factor h, factor w, out): linear without bias, a block of tokens for each, LayerNorm."""

    def __init__(self, width: int, out: int, factor: int):
        super().__init__()
        self.factor = factor
        self.expand = nn.Linear(width, factor**2 * out, bias=False)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        f = self.factor
        x = self.expand(x).view(b, h, w, f, f, -1).transpose(2, 3)
        return self.norm(x.reshape(b, f * h, f * w, -1))


class DAEEncoder(nn.Module):
    """``medfast.types.Backbone`` of images (b, c, h, w). As it stands: S3's and DAE-Former's, strides 4, 8 and 16.

    in_channels: of the image; grey images may have one. widths, depths: channels (multiples of 8) and dual blocks of
    each stage. patch_embed: "overlap", convolutions of 7^2 and 3^2, or "merge", disjoint patches of 4^2 and 2^2.
    blank: pixels of hidden cells are zeroed before the embedding, whose overlapping patches would show them at the
    edges of visible tokens; False: they are not. unread: holds the LayerNorms that the public code holds and never
    reads, so that weights, names and counts are its own; they never get a gradient. checkpoint: stages are computed
    again in the backward pass instead of being kept.

    ``embed``, the width of ``fill``, is that of the first stage. Nothing here is random, so keys are not read. Raises
    ValueError for settings that do not fit each other.
    """

    def __init__(
        self,
        in_channels: int = 3,
        widths: Sequence[int] = (128, 320, 512),
        depths: Sequence[int] = (2, 2, 2),
        patch_embed: str = "overlap",
        blank: bool = True,
        unread: bool = False,
        checkpoint: bool = False,
    ):
        super().__init__()
        if not widths or len(widths) != len(depths):
            raise ValueError(f"widths and depths need one entry per stage, got widths={widths} and depths={depths}")
        if patch_embed not in EMBEDS:
            raise ValueError(f"patch_embed must be one of {', '.join(map(repr, EMBEDS))}, got {patch_embed!r}")
        self.in_channels, self.embed = in_channels, widths[0]
        self.semantic_attention: int | None = None
        self.blank, self.checkpoint = blank, checkpoint
        self.channels = tuple(widths)
        self.strides = tuple(PATCH * 2**i for i in range(len(widths)))
        self.embeds = nn.ModuleList()
        for i, (before, width) in enumerate(zip((in_channels, *widths[:-1]), widths, strict=True)):
            stride = 2 if i else PATCH
            overlap = patch_embed == "overlap"
            kernel = 3 if i else 7
            self.embeds.append(
                OverlapEmbedding(before, width, kernel, stride) if overlap else MergeEmbedding(before, width, stride)
            )
        self.stages = nn.ModuleList(
            nn.Sequential(*(DualBlock(width, unread) for _ in range(depth)))
            for width, depth in zip(widths, depths, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.apply(init_weights)

    def forward(
        self, volume: Tensor, mask: Mask | None = None, fill: Tensor | None = None, key: Key | None = None
    ) -> Features:
        """volume (b, in_channels, h, w) -> Features; summary is the mean of the last stage.

        mask: cells whose tokens become ``fill`` (embed,) after the first embedding. Raises ValueError for images and
        masks that do not fit.
        """
        check_volume(volume, self.in_channels, (1, 1))
        if self.blank:
            volume = blank_voxels(volume, mask, (PATCH, PATCH))
        x = volume.movedim(1, -1)
        stages = []
        for i, (embed, stage, norm) in enumerate(zip(self.embeds, self.stages, self.norms, strict=True)):
            x = embed(x) if i else hide_tokens(embed(x), mask, fill)
            x = norm(run(stage, x, recompute=self.checkpoint))
            stages.append(x)
        return Features(tuple(stages), x.mean(dim=(1, 2)))


class DecoderStage(nn.Module):
    """A map of ``before`` channels and the encoder's of the same grid -> (b, h, w, width).

    before: None for the coarsest stage, which begins with the encoder's map itself. skips: the encoder's map is read
    through cross-attention. depth: dual blocks at the end, 0 for none.
    """

    def __init__(self, width: int, before: int | None, skips: bool, depth: int, unread: bool):
        super().__init__()
        self.widen = None if before is None else nn.Linear(before, width)
        self.cross = SkipCrossAttention(width, unread) if skips and before is not None else None
        self.narrow = nn.Linear(2 * width, width) if self.cross is not None else None
        self.blocks = nn.ModuleList(DualBlock(width, unread) for _ in range(depth))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if self.widen is not None:
            x = self.widen(x)
        if self.cross is not None and self.narrow is not None:
            x = self.narrow(self.cross(x, skip))
        for block in self.blocks:
            x = block(x)
        return x


class Head(nn.Module):
    """(b, h, w, width) -> logits (b, 4 h, 4 w, classes)."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.expand = PatchExpand(width, width, PATCH)
        self.conv = Pointwise(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.expand(x))


class DAEFormer(nn.Module):
    """``medfast.types.Network`` of images. With ``unread=True``: the public code's 48,073,065 parameters.

    classes: None for a network that is only pretrained: it has no head. skips: cross-attention to the encoder's maps;
    False, as SDDA-MAE pretrains: no skips at all. coarse_blocks: dual blocks in the coarsest stage of the decoder too
    (SDDA-MAE); False: it only up-samples (DAE-Former's code). unread: as in ``DAEEncoder``, and what the coarsest stage
    holds there beside. The rest as in ``DAEEncoder``.
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int | None = 9,
        widths: Sequence[int] = (128, 320, 512),
        depths: Sequence[int] = (2, 2, 2),
        patch_embed: str = "overlap",
        skips: bool = True,
        coarse_blocks: bool = True,
        blank: bool = True,
        unread: bool = False,
        checkpoint: bool = False,
    ):
        super().__init__()
        if classes is not None and classes < 1:
            raise ValueError(f"classes must be at least 1, or null for a network without a head, got {classes}")
        if any(width % 2 for width in widths):
            raise ValueError(f"widths must be even, for the decoder halves them, got {widths}")
        self.encoder: Backbone = DAEEncoder(in_channels, widths, depths, patch_embed, blank, unread, checkpoint)
        self.decoder_stride, self.checkpoint = PATCH, checkpoint
        self.decoder, self.ups = nn.ModuleList(), nn.ModuleList()  # coarse to fine
        for before, width, depth in zip((None, *widths[:0:-1]), widths[::-1], depths[::-1], strict=True):
            blocks = depth if before is not None or coarse_blocks else 0
            self.decoder.append(DecoderStage(width, before and before // 2, skips, blocks, unread))
        for width in widths[:0:-1]:
            self.ups.append(PatchExpand(width, width // 2, 2))
        self.head = None if classes is None else Head(widths[0], classes)
        self.unread = _never_read(widths[-1]) if unread else None
        self.apply(init_weights)

    def forward(self, volume: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> logits (b, classes, h, w), which lie channels-last in memory."""
        if self.head is None:
            raise ValueError("this network was built with classes=None and has no head: read features(volume) instead")
        h, w = volume.shape[2:]
        return self.head(self._decode(self.encoder(volume)))[:, :h, :w].movedim(-1, 1)

    def features(
        self, volume: Tensor, mask: Mask | None = None, fill: Tensor | None = None, key: Key | None = None
    ) -> Features:
        """The encoder's Features; extra["decoder"] is the map before the head, (b, *ceil(size / 4), widths[0]).

        Raises ValueError for images and masks that do not fit.
        """
        seen = self.encoder(volume, mask, fill, key)
        return replace(seen, extra={**seen.extra, "decoder": self._decode(seen)})

    def _decode(self, seen: Features) -> Tensor:
        x = run(self.decoder[0], seen.stages[-1], seen.stages[-1], recompute=self.checkpoint)
        for up, stage, skip in zip(self.ups, self.decoder[1:], reversed(seen.stages[:-1]), strict=True):
            h, w = skip.shape[1:3]
            x = run(stage, up(x)[:, :h, :w], skip, recompute=self.checkpoint)
        return x


def _never_read(width: int) -> nn.ModuleDict:
    """What the public code's coarsest decoder stage, which has no skip, holds to read one."""
    return nn.ModuleDict(
        {
            "widen": nn.Linear(width, width),
            "cross": SkipCrossAttention(width, unread=True),
            "narrow": nn.Linear(2 * width, width),
        }
    )
