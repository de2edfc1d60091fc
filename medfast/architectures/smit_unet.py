"""The segmentation network of SMIT and SMART: the U-Net of Swin UNETR over maps taken before each merge.

Source: SMIT (arXiv 2205.10342) and SMART (arXiv 2310.01209) with their public code. Two things differ from Swin UNETR:
every skip passes a LayerNorm with weights, and the convolutions are followed by batch norm unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

from .swin import Swin
from .swin_unetr import SwinUNet


def smit_unet(
    in_channels: int = 1,
    classes: int | None = 1,
    embed: int = 48,
    depths: Sequence[int] = (2, 2, 8, 2),
    heads: Sequence[int] = (4, 4, 8, 16),
    window: int = 4,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    drop_path: float = 0.1,
    norm: str = "batch",
    skip_norm: str = "affine",
    window_order: str = "inverse",
    checkpoint: bool = False,
) -> SwinUNet:
    """SMART's network, 64,707,377 parameters as it stands.

    SMIT's, 62,898,390: depths (2, 2, 4, 2), heads (4, 4, 4, 4), no QKV bias, 14 classes. norm: "batch" or "instance".
    skip_norm: "affine", LayerNorm with weights over each map before its merge, or "plain", the same without weights, as
    Swin UNETR has it. window_order: "smit_code" for weights of the public code. The rest as in ``Swin`` and
    ``SwinUNet``.
    """
    taps = {"affine": "smit", "plain": "smit_plain"}
    if skip_norm not in taps:
        raise ValueError(f"skip_norm must be one of 'affine', 'plain', got {skip_norm!r}")
    encoder = Swin(
        in_channels, embed, depths, heads, window, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, drop_path=drop_path,
        window_order=window_order, taps=taps[skip_norm], checkpoint=checkpoint,
    )  # fmt: skip
    return SwinUNet(encoder, classes, norm)
