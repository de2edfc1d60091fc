"""Encoders and segmentation networks by name: ``BACKBONES["swin"](depths=[2, 2, 8, 2])``.

A backbone is a ``medfast.types.Backbone``, a network a ``medfast.types.Network``. A new one is a file and a line here.
"""

from collections.abc import Callable

from medfast.types import Backbone, Network

from .smit_unet import smit_unet
from .swin import Swin
from .swin_unetr import SwinUNet, swin_unetr
from .unetr import UNETR
from .vit import ViT

__all__ = ["BACKBONES", "NETWORKS", "UNETR", "Swin", "SwinUNet", "ViT"]

BACKBONES: dict[str, Callable[..., Backbone]] = {"swin": Swin, "vit": ViT}
NETWORKS: dict[str, Callable[..., Network]] = {"swin_unetr": swin_unetr, "smit_unet": smit_unet, "unetr": UNETR}
