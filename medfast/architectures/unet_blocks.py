"""Convolutional parts of the U-Nets: normalisation with activation, residual block, up-sampling block, decoder.

Sources: Hatamizadeh et al., UNETR (arXiv 2103.10504) and Swin UNETR (arXiv 2201.01266); the residual block is
dynamic U-Net's (Isensee et al., arXiv 1809.10486). With instance norm all equal MONAI's blocks of these networks.
Maps are channels-last, (b, *grid, c): convolutions read them as they lie and return maps that lie the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from medfast.types import Network

from .blocks import per_axis

SLOPE = 0.01  # of LeakyReLU, everywhere


class Conv(nn.Conv3d):
    """Convolution of a channels-last map (b, *grid, width) -> (b, *ceil(grid / stride), out), no bias unless asked."""

    def __init__(
        self, width: int, out: int, kernel: int, bias: bool = False, stride: int | Sequence[int] = 1, dilation: int = 1
    ):
        super().__init__(width, out, kernel, per_axis(stride), dilation * (kernel // 2), dilation, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        depth = x.shape[1]
        if depth == 2 and self.kernel_size[0] == 3:
            # oneDNN's weight gradient in bf16 reads memory nobody wrote where a kernel of 3 meets a depth of 2 (torch
            # 2.13, CPU): NaN now and then. A plane of the zeros that the padding adds anyway changes no output.
            x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1))
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)[:, : -(-depth // self.stride[0])]


class Up(nn.ConvTranspose3d):
    """Transposed convolution of a channels-last map: every token becomes a block of ``factor`` tokens."""

    def __init__(self, width: int, out: int, factor: int | Sequence[int] = 2, bias: bool = False):
        super().__init__(width, out, per_axis(factor), per_axis(factor), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class _InstanceNorm(torch.autograd.Function):
    """leaky_relu((x - mean) / std, slope) of each sample and channel over the grid; statistics in at least fp32.

    LeakyReLU can be undone, so the output is all that is kept: neither the input nor the normalised map before the
    activation stays in memory (Rota Bulo et al., "In-place activated batch norm", CVPR 2018).
    """

    @staticmethod
    def forward(ctx, x: Tensor, slope: float) -> Tensor:
        axes = tuple(range(1, x.ndim - 1))
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y - y.mean(axes, keepdim=True)
        rstd = (y.square().mean(axes, keepdim=True) + 1e-5).rsqrt_()
        y.mul_(rstd)
        if slope != 1.0:
            F.leaky_relu_(y, slope)
        y = y.to(x.dtype)
        ctx.slope = slope
        ctx.save_for_backward(y, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        y, rstd = ctx.saved_tensors
        axes = tuple(range(1, y.ndim - 1))
        normed = y.to(rstd.dtype)
        g = gradient.to(rstd.dtype)
        if ctx.slope != 1.0:
            g = torch.ops.aten.leaky_relu_backward(g, normed, ctx.slope, True)
            normed = F.leaky_relu(normed, 1.0 / ctx.slope)
        along = (g * normed).mean(axes, keepdim=True)
        g = g - g.mean(axes, keepdim=True)
        return g.addcmul_(normed, -along).mul_(rstd).to(y.dtype), None


class InstanceNorm(nn.Module):
    """Each channel of each sample to mean 0, variance 1 over the grid, then LeakyReLU of ``slope`` (1: none)."""

    def __init__(self, width: int):
        super().__init__()

    def forward(self, x: Tensor, slope: float = 1.0) -> Tensor:
        return _InstanceNorm.apply(x, slope)


class BatchNorm(nn.BatchNorm3d):
    """Batch norm of a channels-last map, then LeakyReLU of ``slope`` (1: none)."""

    def forward(self, x: Tensor, slope: float = 1.0) -> Tensor:
        x = super().forward(x.movedim(-1, 1)).movedim(1, -1)
        return x if slope == 1.0 else F.leaky_relu(x, slope, inplace=True)


NORMS: dict[str, Callable[[int], nn.Module]] = {"instance": InstanceNorm, "batch": BatchNorm}


class ResidualBlock(nn.Module):
    """(b, *grid, width) -> (b, *grid, out): two 3^3 convolutions beside a shortcut, each normalised.

    The shortcut is the map itself, or a 1^3 convolution where ``out`` differs from ``width``. norm: name in ``NORMS``.
    """

    def __init__(self, width: int, out: int, norm: str):
        super().__init__()
        make = NORMS[norm]
        self.conv1, self.norm1 = Conv(width, out, 3), make(out)
        self.conv2, self.norm2 = Conv(out, out, 3), make(out)
        self.conv3 = Conv(width, out, 1) if width != out else None
        self.norm3 = make(out) if width != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x), SLOPE)
        y = self.norm2(self.conv2(y))
        if self.conv3 is not None and self.norm3 is not None:
            x = self.norm3(self.conv3(x))
        return F.leaky_relu(y + x, SLOPE, inplace=True)


class UpBlock(nn.Module):
    """A coarse map and a skip of ``out`` channels -> (b, *grid of the skip, out).

    factor: tokens per axis that a coarse one becomes. Where the skip's axes are no multiple of it (odd sizes, which the
    encoder padded at the far end), what reaches over is cut off.
    """

    def __init__(self, width: int, out: int, norm: str, factor: int | Sequence[int] = 2):
        super().__init__()
        self.up = Up(width, out, factor)
        self.block = ResidualBlock(2 * out, out, norm)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        d, h, w = skip.shape[1:-1]
        return self.block(torch.cat((self.up(x)[:, :d, :h, :w], skip), dim=-1))


class Decoder(nn.Module):
    """U-Net over the taps of a Swin: (b, *size, channels) and its taps, fine to coarse -> (b, *size, embed).

    The image and every tap but the last two pass a residual block, the last but one is used as it is, and the last is
    the bottleneck. channels: of the image; embed: of the finest tap, each next one has twice as many; taps: their
    number, at least 3. norm: name in ``NORMS``.
    """

    def __init__(self, channels: int, embed: int, taps: int, norm: str):
        super().__init__()
        check_norm(norm)
        widths = [embed * 2**i for i in range(taps)]
        self.image = ResidualBlock(channels, embed, norm)
        self.skips = nn.ModuleList(ResidualBlock(width, width, norm) for width in widths[:-2])
        self.bottleneck = ResidualBlock(widths[-1], widths[-1], norm)
        ups = [UpBlock(width, width // 2, norm) for width in reversed(widths[1:])]
        self.ups = nn.ModuleList([*ups, UpBlock(embed, embed, norm)])

    def forward(self, image: Tensor, taps: Sequence[Tensor]) -> Tensor:
        skips = [block(tap) for block, tap in zip(self.skips, taps[:-2], strict=True)]
        x = self.bottleneck(taps[-1])
        for up, skip in zip(self.ups[:-1], (taps[-2], *reversed(skips)), strict=True):
            x = up(x, skip)
        return self.ups[-1](x, self.image(image))


def make_head(width: int, classes: int | None) -> Conv | None:
    """1^3 convolution to ``classes``; None for None. ValueError for fewer than one class."""
    if classes is None:
        return None
    if classes < 1:
        raise ValueError(f"classes must be at least 1, or null for a network without a head, got {classes}")
    return Conv(width, classes, 1, bias=True)


def segment(network: Network, head: Conv | None, volume: Tensor) -> Tensor:
    """Logits (b, classes, d, h, w) from the decoder's map. ValueError where the network has no head."""
    if head is None:
        raise ValueError("this network was built with classes=None and has no head: read features(volume) instead")
    decoded = network.features(volume).extra["decoder"]
    assert isinstance(decoded, Tensor)
    return head(decoded).movedim(-1, 1)


def check_norm(norm: str) -> None:
    """ValueError for a norm that is not there."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")


def check_bottleneck(grid: Sequence[int], batch: int, network: nn.Module, norm: str, least: int) -> None:
    """ValueError where the coarsest map has too little to be normalised: one token has no variance, its norm is zero.

    least: voxels of one token of that map.
    """
    values = math.prod(grid) * (batch if norm == "batch" else 1)
    if values == 1 and (norm == "instance" or network.training):
        raise ValueError(
            f"the coarsest map has one token, of which {norm} norm leaves zero: make at least one axis longer than "
            f"{least} voxels" + (", or the batch larger than 1" if norm == "batch" else "")
        )
