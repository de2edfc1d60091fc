"""UNETR: anchors, equality with MONAI's, patches that differ by axis, any size."""

import pytest
import torch
from weights import assert_same, count, share_weights

from medfast.architectures import NETWORKS
from medfast.architectures.names import MONAI_UNETR
from medfast.types import Network

TINY = {"size": 32, "embed": 12, "heads": 2, "width": 4}


@pytest.mark.parametrize("size, parameters", [(96, 92_802_478), (128, 93_029_806)])
def test_parameter_counts_are_monais_with_the_norms_it_never_reads_and_without(size, parameters):
    with torch.device("meta"):
        assert count(NETWORKS["unetr"](size=size, unread_norms=True)) == parameters
        net = NETWORKS["unetr"](size=size)
    assert count(net) == parameters - 12 * 2 * 768
    assert count(net.encoder) == {96: 88_359_168, 128: 88_586_496}[size] - 12 * 2 * 768


@pytest.mark.parametrize(
    "settings, theirs_too",
    [({"norm": "batch", "qkv_bias": True, "unread_norms": True}, {"norm_name": "batch", "qkv_bias": True}), ({}, {})],
)
def test_equals_monai_in_values_and_gradients(settings, theirs_too):
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    theirs = nets.UNETR(2, 3, (32, 16, 32), 4, 12, 48, 2, **theirs_too).double()
    ours = NETWORKS["unetr"](2, 3, **{**TINY, "size": (32, 16, 32)}, **settings).double()
    share_weights(ours, theirs, MONAI_UNETR)
    volume = torch.randn(1, 2, 32, 16, 32, dtype=torch.float64)
    assert_same(ours, theirs, MONAI_UNETR, [ours(volume)], [theirs(volume)])


@pytest.mark.parametrize(
    "patch, size", [(16, (33, 16, 21)), ((8, 16, 16), (24, 32, 16)), ((2, 1, 4), (3, 4, 9)), (16, (16, 16, 16))]
)
def test_any_patch_and_size_gives_logits_of_the_volumes_size(patch, size):
    net = NETWORKS["unetr"](2, 3, **TINY, depth=4, taps=(0, 1, 2), patch=patch)
    assert isinstance(net, Network)
    volume = torch.randn(1, 2, *size)
    assert net(volume).shape == (1, 3, *size)
    features = net.features(volume)
    assert features.extra["decoder"].shape == (1, *size, 4)
    strides = net.encoder.strides[0] if isinstance(patch, tuple) else net.encoder.strides * 3
    assert features.stages[0].shape == (1, *(-(-s // p) for s, p in zip(size, strides, strict=True)), 12)


def test_an_axis_of_a_smaller_patch_grows_in_the_coarse_steps_only():
    net = NETWORKS["unetr"](**TINY, patch=(8, 16, 16))  # fidelity A50
    assert [up.up.stride for up in net.ups] == [(2, 2, 2)] * 3 + [(1, 2, 2)]
    assert [net.ladders[0].first.stride, *(up.stride for up in net.ladders[0].ups)] == [(2, 2, 2)] * 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"patch": 12}, "patch must be powers of two up to 16, not all 1, got"),
        ({"patch": 1}, "not all 1"),
        ({"taps": (3, 6)}, "reads 3 blocks beside the last"),
        ({"taps": (3, 6, 12)}, r"in 0..11"),
        ({"norm": "group"}, "norm must be one of"),
        ({"classes": 0}, "classes must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NETWORKS["unetr"](**{**TINY, **settings})


def test_without_classes_it_gives_features_and_refuses_to_segment():
    net = NETWORKS["unetr"](classes=None, **TINY)
    with pytest.raises(ValueError, match="has no head"):
        net(torch.zeros(1, 1, 16, 16, 16))
