"""Encoders and segmentation networks by name: ``BACKBONES["swin"](depths=[2, 2, 8, 2])``.

A backbone is a ``medfast.types.Backbone``, a network a ``medfast.types.Network``. A new one is a file and a line here.
"""

from collections.abc import Callable

from medfast.types import Backbone, Network

from .swin import Swin

__all__ = ["BACKBONES", "NETWORKS", "Swin"]

BACKBONES: dict[str, Callable[..., Backbone]] = {"swin": Swin}
NETWORKS: dict[str, Callable[..., Network]] = {}
