"""Heads on top of backbone features: projection to prototypes (DINO, iBOT) and voxels from tokens (SMIT)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfast.objectives.losses import at_least_fp32


class Trunk(nn.Sequential):
    """MLP ``width -> *hidden`` with GELU between its layers, then L2-normalisation: (..., width) -> (..., hidden[-1]).

    SMIT, SMART: 384 -> 2048 -> 2048 -> 256, no batch norm. Weights start truncated normal 0.02, biases zero.
    """

    def __init__(self, width: int, hidden: tuple[int, ...] = (2048, 2048, 256)):
        layers: list[nn.Module] = []
        for wide, narrow in pairwise((width, *hidden)):
            linear = nn.Linear(wide, narrow)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.GELU()]
        super().__init__(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(at_least_fp32(super().forward(x)), dim=-1)


class Prototypes(nn.Module):
    """Last layer: cosine of a normalised vector with each prototype, (..., width) -> (..., count), in fp32 at least.

    It is the weight-normalised linear layer of DINO with its magnitudes fixed at 1. Fixed magnitudes are no
    parameters, so a head of width 384 has 7,606,528 of them where counts with the 8,192 magnitudes say 7,614,720.
    """

    def __init__(self, width: int, count: int):
        super().__init__()
        self.direction = nn.Parameter(torch.empty(count, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        # cosines divided by a temperature of 0.04 do not survive 8 bits of mantissa
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(at_least_fp32(x), F.normalize(at_least_fp32(self.direction), dim=-1))


class Voxels(nn.Module):
    """One linear layer from the tokens of a stage to the voxels under them (SMART h^Pred: 768 -> 32^3, 25,198,592).

    (b, *grid, width) -> (b, channels, *size), cut at the far ends where the grid covers more than ``size``.
    """

    def __init__(self, width: int, stride: int, channels: int = 1, axes: int = 3):
        super().__init__()
        self.stride, self.channels = stride, channels
        self.linear = nn.Linear(width, channels * stride**axes)

    def forward(self, tokens: Tensor, size: tuple[int, ...]) -> Tensor:
        grid, axes = tokens.shape[1:-1], len(size)
        blocks = self.linear(tokens).unflatten(-1, (self.channels, *(self.stride,) * axes))
        # (b, g1..gn, c, s1..sn) -> (b, c, g1, s1, .., gn, sn)
        order = [0, 1 + axes, *(axis for i in range(axes) for axis in (1 + i, 2 + axes + i))]
        volume = blocks.permute(order).reshape(len(tokens), self.channels, *(g * self.stride for g in grid))
        return volume[(..., *(slice(0, length) for length in size))]
