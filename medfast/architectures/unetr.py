"""UNETR: a ViT whose tokens are read after four of its blocks and brought up to the image by convolutions.

Source: Hatamizadeh et al., UNETR (arXiv 2103.10504), and MONAI's UNETR, which it equals with the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from medfast.types import Backbone, Features, Key, Mask

from .blocks import per_axis
from .unet_blocks import ResidualBlock, Up, UpBlock, check_norm, make_head, segment
from .vit import ViT

LEVELS = 4  # steps from the tokens to the image


class Ladder(nn.Module):
    """Tokens (b, *grid, width) -> (b, *finer, out): a transposed convolution, then pairs of one and a residual block.

    factors: what each step multiplies the grid by, per axis.
    """

    def __init__(self, width: int, out: int, factors: Sequence[Sequence[int]], norm: str):
        super().__init__()
        self.first = Up(width, out, factors[0])
        self.ups = nn.ModuleList(Up(out, out, factor) for factor in factors[1:])
        self.blocks = nn.ModuleList(ResidualBlock(out, out, norm) for _ in factors[1:])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for up, block in zip(self.ups, self.blocks, strict=True):
            x = block(up(x))
        return x


class UNETR(nn.Module):
    """``medfast.types.Network``. Without arguments: 96^3, 14 classes, the sizes of MONAI and the paper.

    size, embed, depth, heads, mlp_ratio, qkv_bias, positions, drop_path, unread_norms, checkpoint: of the ViT, see
    ``ViT``; volumes of any size from one patch per axis up work, ``size`` is what positions are made for. patch: powers
    of two up to 16, one or three; an axis with a smaller one grows in the coarse steps only (SimTROT: 8, 16, 16). taps:
    three blocks, from 0, whose outputs the decoder reads beside the last. width: channels at the image, doubled by
    every level below. norm: "instance" or "batch". classes: None for a network that is only pretrained: it has no head
    and gives ``features`` alone. Raises ValueError for settings that do not fit each other.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int | None = 14,
        size: int | Sequence[int] = 96,
        patch: int | Sequence[int] = 16,
        embed: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        positions: str = "learned",
        drop_path: float = 0.0,
        taps: Sequence[int] = (3, 6, 9),
        width: int = 16,
        norm: str = "instance",
        unread_norms: bool = False,
        checkpoint: bool = False,
    ):
        super().__init__()
        check_norm(norm)
        factors = _factors(per_axis(patch))
        if len(taps) != LEVELS - 1:
            raise ValueError(f"the decoder reads {LEVELS - 1} blocks beside the last, got taps={taps}")
        self.encoder: Backbone = ViT(
            in_channels, size, patch, embed, depth, heads, mlp_ratio, qkv_bias, positions=positions,
            drop_path=drop_path, taps=taps, unread_norms=unread_norms, checkpoint=checkpoint,
        )  # fmt: skip
        widths = [width * 2**level for level in range(LEVELS)]
        self.image = ResidualBlock(in_channels, width, norm)
        self.ladders = nn.ModuleList(
            Ladder(embed, widths[level], factors[: LEVELS - level], norm) for level in range(1, LEVELS)
        )
        outs = widths[::-1]
        self.ups = nn.ModuleList(
            UpBlock(coarse, out, norm, factor)
            for coarse, out, factor in zip((embed, *outs[:-1]), outs, factors, strict=True)
        )
        self.head = make_head(width, classes)

    def forward(self, volume: Tensor) -> Tensor:
        """(b, in_channels, d, h, w) -> logits (b, classes, d, h, w), which lie channels-last in memory."""
        return segment(self, self.head, volume)

    def features(
        self, volume: Tensor, mask: Mask | None = None, fill: Tensor | None = None, key: Key | None = None
    ) -> Features:
        """The encoder's Features; extra["decoder"] is the map before the head, (b, d, h, w, width).

        The decoder sees the whole volume beside the taps, hidden cells included: its stem is a convolution of the
        image. Raises ValueError for volumes, masks and keys that do not fit.
        """
        seen = self.encoder(volume, mask, fill, key)
        *taps, x = seen.extra["taps"]  # type: ignore[misc]  # extra is of any type
        skips = [self.image(volume.movedim(1, -1)), *(ladder(y) for ladder, y in zip(self.ladders, taps, strict=True))]
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            x = up(x, skip)
        return replace(seen, extra={**seen.extra, "decoder": x})


def _factors(patch: tuple[int, ...]) -> list[tuple[int, ...]]:
    """What each step multiplies the grid by, per axis, coarse to fine: 2 until the patch is used up, then 1."""
    if max(patch) < 2 or any(p not in (1, 2, 4, 8, 16) for p in patch):
        raise ValueError(f"patch must be powers of two up to {2**LEVELS}, not all 1, got {patch}")
    return [tuple(2 if 2**step < p else 1 for p in patch) for step in range(LEVELS)]
