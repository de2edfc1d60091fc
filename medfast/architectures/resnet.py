"""The 3D ResNet-50 of Med3D: a convolutional baseline, dilated in its last two stages.

Sources: Chen et al., Med3D (arXiv 1904.00625) with its public code, which keeps stride 8 by dilation for the sake of
segmentation; Hara et al., CVPR 2018 (arXiv 1711.09577), for the plain 3D ResNet, MONAI's, which it equals with
``dilated=False``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from medfast.types import Features, Key, Mask

from .blocks import check_volume
from .unet_blocks import BatchNorm, Conv

EXPANSION = 4  # what a bottleneck multiplies its inner width by
REFUSAL = (
    "a ResNet has no token embedding, so no mask token (fill) can stand for hidden voxels: use an objective without "
    "masks on it, or a backbone with tokens such as 'swin' or 'vit'"
)


class Bottleneck(nn.Module):
    """(b, *grid, width) -> (b, *ceil(grid / stride), 4 * inner): 1^3, 3^3 and 1^3 convolutions beside a shortcut.

    The shortcut is the map itself, or a normalised 1^3 convolution where shapes differ (type B).
    """

    def __init__(self, width: int, inner: int, stride: int, dilation: int):
        super().__init__()
        out = EXPANSION * inner
        self.conv1, self.norm1 = Conv(width, inner, 1), BatchNorm(inner)
        self.conv2, self.norm2 = Conv(inner, inner, 3, stride=stride, dilation=dilation), BatchNorm(inner)
        self.conv3, self.norm3 = Conv(inner, out, 1), BatchNorm(out)
        self.shortcut, self.shortcut_norm = None, None
        if stride != 1 or width != out:
            self.shortcut, self.shortcut_norm = Conv(width, out, 1, stride=stride), BatchNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x), 0.0)  # a slope of zero is ReLU
        y = self.norm2(self.conv2(y), 0.0)
        y = self.norm3(self.conv3(y))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return F.relu(y + x, inplace=True)


class ResNet50(nn.Module):
    """``medfast.types.Backbone`` without masks. As it stands: Med3D's, 46,155,072 parameters, output stride 8.

    in_channels: of the volume. width: channels of the stem; the stages have 4, 8, 16 and 32 times as many. depths:
    bottlenecks of each stage. dilated: the last two stages keep stride 8 and look 2 and 4 tokens apart instead; False:
    they have stride 16 and 32, as in the plain ResNet.

    ``embed`` is 0: there are no tokens to hide, and a mask or fill is refused (ValueError).
    """

    def __init__(
        self, in_channels: int = 1, width: int = 64, depths: Sequence[int] = (3, 4, 6, 3), dilated: bool = True
    ):
        super().__init__()
        if len(depths) != 4 or min(depths) < 1:
            raise ValueError(f"depths are the bottlenecks of four stages, at least 1 each, got {depths}")
        self.in_channels, self.embed = in_channels, 0
        self.channels = tuple(EXPANSION * width * 2**i for i in range(4))
        self.strides: tuple[int, ...] = (4, 8, 8, 8) if dilated else (4, 8, 16, 32)
        self.semantic_attention: int | None = None
        self.conv1, self.norm1 = Conv(in_channels, width, 7, stride=2), BatchNorm(width)
        strides, dilations = ((1, 2, 1, 1), (1, 1, 2, 4)) if dilated else ((1, 2, 2, 2), (1, 1, 1, 1))
        self.stages = nn.ModuleList()
        before = width
        for i, (depth, out) in enumerate(zip(depths, self.channels, strict=True)):
            blocks = [
                Bottleneck(out if j else before, width * 2**i, 1 if j else strides[i], dilations[i])
                for j in range(depth)
            ]
            self.stages.append(nn.Sequential(*blocks))
            before = out
        for module in self.modules():
            if isinstance(module, Conv):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self, volume: Tensor, mask: Mask | None = None, fill: Tensor | None = None, key: Key | None = None
    ) -> Features:
        """volume (b, in_channels, d, h, w) of any size -> Features; summary is the mean of the last stage.

        key: nothing here is random. In training mode batch norm makes the samples of a batch depend on each other.
        Raises ValueError for masks, for volumes that do not fit, and in training for a volume of a single token.
        """
        if mask is not None or fill is not None:
            raise ValueError(REFUSAL)
        check_volume(volume, self.in_channels, (1, 1, 1))
        if self.training and len(volume) == 1 and all(size <= self.strides[-1] for size in volume.shape[2:]):
            raise ValueError(
                f"the last map of one volume of {tuple(volume.shape[2:])} voxels has one token, of which batch norm "
                f"leaves nothing: make an axis longer than {self.strides[-1]} voxels, or the batch larger than 1"
            )
        x = self.norm1(self.conv1(volume.movedim(1, -1)), 0.0)
        x = F.max_pool3d(x.movedim(-1, 1), 3, stride=2, padding=1).movedim(1, -1)
        stages = []
        for stage in self.stages:
            x = stage(x)
            stages.append(x)
        return Features(tuple(stages), x.mean(dim=(1, 2, 3)))
