"""Swin UNETR, and the network it shares with SMIT's and SMART's: a Swin that a convolutional decoder reads.

Source: Hatamizadeh et al., "Swin UNETR", BrainLes 2021 (arXiv 2201.01266), and MONAI's SwinUNETR, which it equals
with ``bias_index="sliced"``; v2: He et al., MICCAI 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from medfast.types import Backbone, Features, Key, Mask

from .swin import Swin
from .unet_blocks import Decoder, check_bottleneck, make_head, segment


class SwinUNet(nn.Module):
    """``medfast.types.Network``: a Swin with taps, a U-Net over them, and a 1^3 convolution to ``classes``.

    encoder: of at least two stages, patch 2, built with taps. norm: "instance" or "batch". classes: None for a network
    that is only pretrained: it has no head, which nothing would train, and gives ``features`` alone.
    """

    def __init__(self, encoder: Swin, classes: int | None, norm: str):
        super().__init__()
        if encoder.taps is None or len(encoder.strides) < 2 or encoder.strides[0] != 4:
            raise ValueError(
                f"the decoder reads a Swin built with taps, patch 2 and at least two stages, got taps={encoder.taps!r} "
                f"and strides={encoder.strides}"
            )
        self.encoder: Backbone = encoder
        self.norm = norm
        self.decoder = Decoder(encoder.in_channels, encoder.embed, len(encoder.strides) + 1, norm)
        self.head = make_head(encoder.embed, classes)

    def forward(self, volume: Tensor) -> Tensor:
        """(b, in_channels, d, h, w) -> logits (b, classes, d, h, w), which lie channels-last in memory."""
        return segment(self, self.head, volume)

    def features(
        self, volume: Tensor, mask: Mask | None = None, fill: Tensor | None = None, key: Key | None = None
    ) -> Features:
        """The encoder's Features; extra["decoder"] is the map before the head, (b, d, h, w, embed).

        The decoder sees the whole volume beside the taps, hidden cells included: its stem is a convolution of the
        image. Raises ValueError for volumes, masks and keys that do not fit.
        """
        seen = self.encoder(volume, mask, fill, key)
        taps = seen.extra["taps"]
        assert isinstance(taps, tuple)
        check_bottleneck(taps[-1].shape[1:-1], len(volume), self, self.norm, self.encoder.strides[-1])
        return replace(seen, extra={**seen.extra, "decoder": self.decoder(volume.movedim(1, -1), taps)})


def swin_unetr(
    in_channels: int = 1,
    classes: int | None = 2,
    embed: int = 48,
    depths: Sequence[int] = (2, 2, 2, 2),
    heads: Sequence[int] = (3, 6, 12, 24),
    window: int = 7,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    patch_norm: bool = False,
    drop_path: float = 0.0,
    merge: str = "monai",
    bias_index: str = "geometric",
    residual_convs: bool = False,
    norm: str = "instance",
    checkpoint: bool = False,
) -> SwinUNet:
    """Swin UNETR, 62,186,708 parameters as it stands. Sizes need not be multiples of 32, as they do in MONAI.

    bias_index: "sliced" is what MONAI does where a map is smaller than its window, for weights that were trained there;
    it gives some pairs of tokens the bias of another offset. merge: "monai", "monai_v2" or "monai_legacy" (before
    MONAI 1.5), see ``blocks.MERGE_ORDERS``. residual_convs: Swin UNETR v2. The rest as in ``Swin`` and ``SwinUNet``.
    """
    encoder = Swin(
        in_channels, embed, depths, heads, window, patch_norm=patch_norm, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias,
        drop_path=drop_path, merge=merge, clip=True, bias_index=bias_index, taps="monai",
        residual_convs=residual_convs, checkpoint=checkpoint,
    )  # fmt: skip
    return SwinUNet(encoder, classes, norm)
