"""SMIT's and SMART's segmentation network: anchors, norms of skips and convolutions."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from weights import count

from medfast.architectures import NETWORKS
from medfast.types import Network

TINY = {"embed": 8, "depths": (1, 1), "heads": (2, 2), "window": 2}
SMIT = {"classes": 14, "depths": (2, 2, 4, 2), "heads": (4, 4, 4, 4), "qkv_bias": False}


@pytest.mark.parametrize("settings, parameters", [({}, 64_707_377), ({"classes": 2}, 64_707_426), (SMIT, 62_898_390)])
def test_parameter_counts_are_the_authors(settings, parameters):
    with torch.device("meta"):
        assert count(NETWORKS["smit_unet"](**settings)) == parameters
        plain = NETWORKS["smit_unet"](**settings, skip_norm="plain", norm="instance")
    skips = 2 * (48 + 96 + 192 + 384)
    convolutions = 2 * (3 * 48 + 2 * (48 + 96 + 192 + 768) + 3 * (384 + 192 + 96 + 48 + 48))
    assert count(plain) == parameters - skips - convolutions


def test_the_decoder_reads_maps_before_each_merge_and_the_last_one_after_it():
    torch.manual_seed(0)
    net = NETWORKS["smit_unet"](**TINY).double()
    assert isinstance(net, Network)
    volume = torch.randn(1, 1, 16, 12, 16, dtype=torch.float64)
    seen = {}
    for i, block in enumerate((*net.decoder.skips, net.decoder.bottleneck)):
        block.register_forward_pre_hook(lambda module, given, i=i: seen.update({i: given[0]}))
    net(volume)
    features = net.encoder(volume)
    x = net.encoder.patch_embed(volume)
    wide, _ = net.encoder.stages[0](x, None)
    torch.testing.assert_close(seen[0], F.layer_norm(wide, (8,)))
    assert torch.equal(seen[1], features.stages[-1])


def test_skips_pass_a_layer_norm_with_weights_or_without():
    torch.manual_seed(0)
    affine, plain = (NETWORKS["smit_unet"](**TINY, skip_norm=kind).eval() for kind in ("affine", "plain"))
    missing = plain.load_state_dict(affine.state_dict(), strict=False)
    assert missing.unexpected_keys == [f"encoder.tap_norms.{i}.{w}" for i in range(2) for w in ("weight", "bias")]
    volume = torch.randn(1, 1, 16, 16, 16)
    torch.testing.assert_close(affine(volume), plain(volume))  # weights are still ones, biases zeros
    with torch.no_grad():
        affine.encoder.tap_norms[0].weight.fill_(2.0)
    assert not torch.allclose(affine(volume), plain(volume), atol=1e-3)


def test_batch_norm_keeps_statistics_and_instance_norm_has_none():
    batch, instance = (NETWORKS["smit_unet"](**TINY, norm=norm) for norm in ("batch", "instance"))
    assert any(isinstance(m, nn.BatchNorm3d) for m in batch.modules())
    volume = torch.randn(2, 1, 16, 16, 16) * 3
    before = batch.decoder.image.norm1.running_var.clone()
    batch(volume)
    assert not torch.equal(batch.decoder.image.norm1.running_var, before)
    assert not [name for name, _ in instance.named_buffers() if "running" in name]
    torch.testing.assert_close(instance(volume)[1:], instance(volume[1:]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(batch(volume)[1:], batch(volume[1:]), atol=1e-3)


def test_one_token_cannot_be_normalised_over_a_batch_of_one_while_training():
    net = NETWORKS["smit_unet"](**TINY)
    with pytest.raises(ValueError, match="one token, of which batch norm leaves zero.*or the batch larger than 1"):
        net(torch.zeros(1, 1, 8, 8, 8))
    assert net(torch.zeros(2, 1, 8, 8, 8)).shape == (2, 1, 8, 8, 8)
    assert net.eval()(torch.zeros(1, 1, 8, 8, 8)).shape == (1, 1, 8, 8, 8)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="skip_norm must be one of 'affine', 'plain', got 'none'"):
        NETWORKS["smit_unet"](**TINY, skip_norm="none")
