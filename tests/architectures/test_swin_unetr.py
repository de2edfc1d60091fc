"""Swin UNETR: anchors, equality with MONAI's (v1, v2, clipped and odd windows), sizes MONAI refuses."""

import pytest
import torch
from weights import assert_same, count, share_weights

from medfast.architectures import NETWORKS, Swin, SwinUNet
from medfast.architectures.names import MONAI_SWIN_UNETR
from medfast.types import Network

TINY = {"embed": 12, "depths": (1, 1, 1, 1), "heads": (1, 2, 3, 4), "window": 3}


@pytest.mark.parametrize(
    "settings, parameters",
    [({}, 62_186_708), ({"classes": 14}, 62_187_296), ({"in_channels": 4, "classes": 3}, 62_191_941)],
)
def test_parameter_counts_are_monais(settings, parameters):
    with torch.device("meta"):
        net = NETWORKS["swin_unetr"](**settings)
    assert count(net) == parameters
    assert count(net.encoder) == (8_062_002 if net.encoder.in_channels == 1 else 8_062_002 + 3 * 8 * 48)
    blocks = (net.decoder.image, *net.decoder.skips, net.decoder.bottleneck, *net.decoder.ups)
    if not settings:  # fidelity 2.5
        assert [count(block) for block in blocks] == [
            63_552, 124_416, 497_664, 1_990_656, 31_850_496, 14_598_144, 3_649_536, 912_384, 228_096, 209_664
        ]  # fmt: skip


@pytest.mark.parametrize(
    "settings, theirs_too, size",
    [
        ({"window": 7}, {"window_size": 7}, (32, 64, 32)),  # padded, and clipped on some axes or all: sliced bias
        (
            {"residual_convs": True, "merge": "monai_v2", "patch_norm": True, "norm": "batch", "qkv_bias": False},
            {"use_v2": True, "downsample": "mergingv2", "patch_norm": True, "norm_name": "batch", "qkv_bias": False},
            (64, 32, 32),
        ),
    ],
)
def test_equals_monai_in_values_and_gradients(settings, theirs_too, size):
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    kwargs = {"feature_size": 12, "depths": TINY["depths"], "num_heads": TINY["heads"], "window_size": 3, **theirs_too}
    theirs = nets.SwinUNETR(1, 3, **kwargs).double()
    ours = NETWORKS["swin_unetr"](1, 3, **{**TINY, **settings}, bias_index="sliced").double()
    share_weights(ours, theirs, MONAI_SWIN_UNETR)
    assert count(ours) == count(theirs)
    volume = torch.randn(1, 1, *size, dtype=torch.float64)
    assert_same(ours, theirs, MONAI_SWIN_UNETR, [ours(volume)], [theirs(volume)])


def test_the_sliced_bias_is_a_switch_and_the_geometric_one_the_default():
    torch.manual_seed(0)
    nets = [NETWORKS["swin_unetr"](**TINY, **switch) for switch in ({}, {"bias_index": "sliced"})]
    nets[1].load_state_dict(nets[0].state_dict())
    small, large = torch.randn(1, 1, 40, 33, 16), torch.randn(1, 1, 96, 48, 33)
    assert not torch.allclose(nets[0](small), nets[1](small), atol=1e-6)
    for a, b in zip(*(net.encoder(large).stages[:1] for net in nets), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [(33, 47, 64), (40, 21, 16)])
def test_sizes_that_are_no_multiple_of_the_strides_come_back_as_they_were(size):
    net = NETWORKS["swin_unetr"](2, 3, **TINY).eval()
    assert isinstance(net, Network)
    volume = torch.randn(1, 2, *size)
    with torch.no_grad():
        assert net(volume).shape == (1, 3, *size)
        features = net.features(volume)
        assert features.extra["decoder"].shape == (1, *size, 12)
        torch.testing.assert_close(net(volume), net.head(features.extra["decoder"]).movedim(-1, 1))
        features = net.encoder(volume)
    for stage, channels, stride in zip(features.stages, net.encoder.channels, net.encoder.strides, strict=True):
        assert stage.shape == (1, *(-(-s // stride) for s in size), channels)


def test_a_network_without_a_head_gives_features_and_refuses_to_segment():
    net = NETWORKS["swin_unetr"](classes=None, **TINY)
    assert net.features(torch.randn(1, 1, 48, 16, 16)).extra["decoder"].shape == (1, 48, 16, 16, 12)
    with pytest.raises(ValueError, match="has no head: read features"):
        net(torch.randn(1, 1, 48, 16, 16))


@pytest.mark.parametrize(
    "settings, size, message",
    [
        ({}, (32, 32, 32), "one token, of which instance norm leaves zero: make at least one axis longer than 32"),
        ({"norm": "batch"}, (32, 32, 32), "or the batch larger than 1"),
        ({}, (64, 64, 15), r"\(64, 64, 15\) voxels are too few .* at least \(16, 16, 16\)"),
        ({"classes": 0}, None, "classes must be at least 1"),
        ({"norm": "layer"}, None, "norm must be one of 'instance', 'batch', got 'layer'"),
        ({"merge": "conv"}, None, "merge must be one of"),
    ],
)
def test_what_does_not_fit_is_refused(settings, size, message):
    with pytest.raises(ValueError, match=message):
        NETWORKS["swin_unetr"](**{**TINY, **settings})(torch.zeros(1, 1, *(size or (64, 64, 64))))


def test_a_decoder_needs_the_encoders_taps():
    with pytest.raises(ValueError, match="built with taps, patch 2 and at least two stages, got taps=None"):
        SwinUNet(Swin(embed=12, depths=(1, 1), heads=(1, 1)), 2, "instance")
