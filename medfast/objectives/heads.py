"""Heads on top of backbone features: projection to prototypes (DINO, iBOT) and voxels from tokens (SMIT)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfast.objectives.losses import at_least_fp32
from medfast.objectives.patches import Stride, from_patches, per_axis, voxels_of_patch


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

    (b, *grid, width) -> (b, channels, *size), cut at the far ends where the grid covers more than ``size``. stride:
    voxels of a token, one number or one per axis.
    """

    def __init__(self, width: int, stride: Stride, channels: int = 1, axes: int = 3):
        super().__init__()
        self.stride, self.channels = stride, channels
        self.linear = nn.Linear(width, channels * voxels_of_patch(stride, axes))

    def forward(self, tokens: Tensor, size: tuple[int, ...]) -> Tensor:
        return from_patches(self.linear(tokens), self.stride, self.channels, size)


class ConvVoxels(nn.Module):
    """Three convolutions from the tokens of a stage to the voxels under them: what a voxel becomes depends on its
    neighbours' tokens too (MST's global image decoder, whose public description gives no sizes: these are ours).

    (b, *grid, width) -> (b, channels, *size). A 3^3 convolution on the tokens, trilinear up-sampling by ``factor``, a
    second one, then one linear layer to the stride / factor voxels per axis of each place. stride: voxels of a token,
    one number or one per axis, multiples of factor.
    """

    def __init__(self, width: int, stride: Stride, channels: int = 1, hidden: int = 128, factor: int = 4):
        super().__init__()
        lengths = per_axis(stride, 3)
        if any(length % factor for length in lengths):
            raise ValueError(f"the voxels of a token, {lengths}, must be multiples of the decoder's factor, {factor}")
        self.factor = factor
        self.coarse = nn.Conv3d(width, hidden, 3, padding=1)
        self.fine = nn.Conv3d(hidden, hidden // 2, 3, padding=1)
        self.voxels = Voxels(hidden // 2, tuple(length // factor for length in lengths), channels)

    def forward(self, tokens: Tensor, size: tuple[int, ...]) -> Tensor:
        x = F.gelu(self.coarse(tokens.movedim(-1, 1)))
        x = F.interpolate(x, scale_factor=self.factor, mode="trilinear", align_corners=False)
        return self.voxels(F.gelu(self.fine(x)).movedim(1, -1), size)


class Upsampler(nn.Module):
    """Tokens of the last stage to voxels, doubling by doubling: (b, *grid, width) -> (b, channels, *size).

    As often as the stride doubles: 3^3 convolution to half the width, never below a sixteenth, instance norm,
    LeakyReLU .01, trilinear x 2; then a 1^3 convolution (RCR's "vae" decoder). stride: a power of two. ValueError.
    """

    def __init__(self, width: int, stride: int, channels: int = 1):
        super().__init__()
        if not isinstance(stride, int) or stride < 2 or stride & (stride - 1):
            raise ValueError(f"this decoder doubles the grid, so the stride must be one power of two, got {stride}")
        widths = [max(width >> i, width >> 4, 1) for i in range(stride.bit_length())]
        self.steps = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv3d(wide, narrow, 3, padding=1),
                    nn.InstanceNorm3d(narrow),
                    nn.LeakyReLU(0.01),
                    nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False),
                )
                for wide, narrow in pairwise(widths)
            )
        )
        self.last = nn.Conv3d(widths[-1], channels, 1)

    def forward(self, tokens: Tensor, size: tuple[int, ...]) -> Tensor:
        volume = self.last(self.steps(tokens.movedim(-1, 1)))
        return volume[(..., *(slice(0, length) for length in size))]
