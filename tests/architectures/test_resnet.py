"""ResNet-50: anchors of Med3D, equality with MONAI's plain one, dilation, refusals."""

import pytest
import torch
from weights import assert_same, count, share_weights

from medfast.architectures import BACKBONES
from medfast.architectures.names import RESNET, rename
from medfast.types import Mask


def test_parameters_maps_and_names_are_med3ds():
    with torch.device("meta"):
        net = BACKBONES["resnet50"]()
        maps = net(torch.empty(1, 1, 96, 96, 96)).stages
    assert count(net) == 46_155_072
    assert [tuple(x.shape[1:]) for x in maps] == [
        (24, 24, 24, 256), (12, 12, 12, 512), (12, 12, 12, 1024), (12, 12, 12, 2048)
    ]  # fmt: skip
    theirs = {name: tuple(x.shape) for name, x in rename(net.state_dict(), RESNET, export=True).items()}
    assert theirs["conv1.weight"] == (64, 1, 7, 7, 7)
    assert theirs["layer1.0.downsample.0.weight"] == (256, 64, 1, 1, 1)
    assert theirs["layer4.2.conv2.weight"] == (512, 512, 3, 3, 3)
    assert {"bn1.running_mean", "layer2.0.downsample.1.bias", "layer3.5.bn3.weight"} <= theirs.keys()
    assert not [name for name in theirs if "norm" in name or "stage" in name or "shortcut" in name]


def test_the_last_stages_look_further_apart():
    net = BACKBONES["resnet50"](width=2)
    seen = [(stage[0].conv2.stride[0], stage[0].conv2.dilation[0], stage[1].conv2.padding[0]) for stage in net.stages]
    assert seen == [(1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 4, 4)]


def test_equals_monai_in_values_and_gradients_without_dilation():
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    theirs = nets.ResNet(
        "bottleneck", [1, 2, 1, 1], [4, 8, 16, 32], n_input_channels=2, conv1_t_stride=2, feed_forward=False,
        bias_downsample=False,
    ).double()  # fmt: skip
    ours = BACKBONES["resnet50"](2, width=4, depths=(1, 2, 1, 1), dilated=False).double()
    share_weights(ours, theirs, RESNET)
    volume = torch.randn(2, 2, 33, 20, 16, dtype=torch.float64)
    features = ours(volume)
    assert [tuple(x.shape[1:-1]) for x in features.stages] == [(9, 5, 4), (5, 3, 2), (3, 2, 1), (2, 1, 1)]
    assert_same(ours, theirs, RESNET, [features.summary], [theirs(volume)], 1e-8)


def test_masks_single_tokens_and_wrong_depths_are_refused():
    net = BACKBONES["resnet50"](width=2, depths=(1, 1, 1, 1))
    assert net.embed == 0
    volume = torch.zeros(1, 1, 8, 8, 8)
    with pytest.raises(ValueError, match="no token embedding.*'swin'"):
        net(volume, Mask(torch.zeros(1, 2, 2, 2, dtype=torch.bool)))
    with pytest.raises(ValueError, match="backbone with tokens"):
        net(volume, fill=torch.zeros(2))
    with pytest.raises(ValueError, match="batch norm leaves nothing"):
        net(volume)
    assert net.eval()(volume).stages[-1].isfinite().all()
    with pytest.raises(ValueError, match="four stages"):
        BACKBONES["resnet50"](depths=(3, 4, 6))
