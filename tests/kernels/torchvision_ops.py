"""Importing torchvision and timm where torchvision's compiled operators do not load (it was built for another torch).

Its Python registers fakes and gradients for operators that must exist then; the Swin models use none of them, so their
names are enough.
"""

import importlib
import importlib.util

import pytest
import torch

_NAMES = ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")
_OPERATORS = ("nms", "qnms", "qroi_align", *_NAMES, *(f"_{name}_backward" for name in _NAMES))
_library = None


def load(name):
    """Module ``name`` of torchvision or timm; skips the test where its package is not installed."""
    global _library
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name.partition('.')[0]} is not installed")
    if _library is None:
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            _library = torch.library.Library("torchvision", "DEF")
            for operator in _OPERATORS:
                _library.define(f"{operator}(Tensor x) -> Tensor")
    return importlib.import_module(name)
