"""torchvision's Swin, Swin V2 and Swin3D give the same after ``swin.accelerate``."""

import pytest
import torch
from swin_parity import assert_same, randomise
from torchvision_ops import load

import medfast_kernels as mk

FLAT = {"patch_size": [2, 2], "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": [3, 5]}


def flat(cosine):
    swin = load("torchvision.models.swin_transformer")
    parts = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if cosine else {}
    return randomise(swin.SwinTransformer(**FLAT, num_classes=3, stochastic_depth_prob=0.0, **parts))


@pytest.mark.parametrize("cosine", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("size", [(24, 40), (26, 34), (10, 12), (6, 34)], ids=["divides", "odd", "one window", "flat"])
def test_flat(cosine, size):
    assert_same(flat(cosine), (torch.randn(2, 3, *size, dtype=torch.float64),), attentions=4)


def test_scale_is_capped():
    model = flat(cosine=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                parameter.fill_(6.0)[0] = 3.0
    assert_same(model, (torch.randn(2, 3, 6, 10, dtype=torch.float64),), attentions=4)  # one window: no mask


@pytest.mark.parametrize("size", [(4, 16, 24), (6, 10, 22), (2, 10, 6), (2, 6, 6)], ids=str)
def test_video(size):
    video = load("torchvision.models.video.swin_transformer")
    model = video.SwinTransformer3d(
        patch_size=[1, 2, 2], embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=[2, 4, 3],
        stochastic_depth_prob=0.0, num_classes=3,
    )  # fmt: skip
    assert_same(randomise(model), (torch.randn(2, 3, *size, dtype=torch.float64),), attentions=4)


def test_middle_third_of_a_cosine_bias_gets_no_gradient():
    model = flat(cosine=True)
    mk.swin.accelerate(model)
    model(torch.randn(1, 3, 24, 40, dtype=torch.float64)).sum().backward()
    grad = model.get_submodule("features.1.0.attn").qkv.bias.grad.reshape(3, -1)
    assert grad[1].abs().max() == 0 and grad[0].abs().max() > 0


def test_dropout_of_attention_is_left_alone():
    swin = load("torchvision.models.swin_transformer")
    model = swin.SwinTransformer(**FLAT, attention_dropout=0.1)
    report = mk.swin.accelerate(model)
    assert len(report) == 4 and all(row.new is None and "dropout 0.1" in row.reason for row in report)
