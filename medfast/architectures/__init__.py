"""Encoders and segmentation networks by name: ``BACKBONES["swin"](depths=[2, 2, 8, 2])``.

A backbone is a ``medfast.types.Backbone``, a network a ``medfast.types.Network``. A new one is a file and a line here.
"""

from collections.abc import Callable, Mapping
from typing import Any

from medfast.types import Backbone, Network

from .dae_former import DAEEncoder, DAEFormer
from .nnformer import NNFormer, NNFormerEncoder
from .resnet import ResNet50
from .smit_unet import smit_unet
from .swin import Swin
from .swin_unetr import SwinUNet, swin_unetr
from .swinfuse import SwinFUSE
from .unetr import UNETR
from .vit import ViT

__all__ = [
    "ARCHITECTURES", "BACKBONES", "ENCODERS", "NETWORKS", "UNETR", "DAEEncoder", "DAEFormer", "NNFormer",
    "NNFormerEncoder", "ResNet50", "Swin", "SwinFUSE", "SwinUNet", "ViT",
]  # fmt: skip

BACKBONES: dict[str, Callable[..., Backbone]] = {
    "swin": Swin,
    "swinfuse": SwinFUSE,
    "vit": ViT,
    "nnformer": NNFormerEncoder,
    "dae_former": DAEEncoder,
    "resnet50": ResNet50,
}
NETWORKS: dict[str, Callable[..., Network]] = {
    "swin_unetr": swin_unetr,
    "smit_unet": smit_unet,
    "unetr": UNETR,
    "nnformer": NNFormer,
    "dae_former": DAEFormer,
}
# names that mean an encoder to one caller and a network to another; these mean the encoder to everybody
ENCODERS = {f"{name}_encoder": BACKBONES[name] for name in BACKBONES if name in NETWORKS}
ARCHITECTURES: Mapping[str, Callable[..., Any]] = {**BACKBONES, **ENCODERS, **NETWORKS}
