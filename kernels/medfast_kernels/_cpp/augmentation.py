"""Views of stored boxes in C++: the way there from a checked call."""

from __future__ import annotations

import torch
from torch import Tensor

from .._augmentation import Augment
from .._checks import NAMESPACE
from ..key import address, signed
from .registration import register

_OPERATORS = getattr(torch.ops, NAMESPACE)


def augment(problem: Augment) -> Tensor:
    boxes, size, window, extent, numbers, key, out = problem
    if out is None:
        out = torch.empty(len(boxes), *size)
    counter = None if key is None else address(key, boxes.device)
    _OPERATORS.augment(out, boxes, extent, numbers, *window, counter, 0 if key is None else signed(key.seed))
    return out


register("augment", lambda out, boxes, extent, numbers, low, high, address, seed: None)
