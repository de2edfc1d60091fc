"""timm's Swin and Swin V2 give the same after ``swin.accelerate``, and roll before they pad."""

import pytest
import torch
from swin_parity import assert_same, randomise
from torchvision_ops import load

import medfast_kernels as mk

SIZES = {"patch_size": 4, "in_chans": 3, "num_classes": 3, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4),
         "drop_path_rate": 0.0}  # fmt: skip


def build(cosine, size, **options):
    name, model = ("swin_transformer_v2", "SwinTransformerV2") if cosine else ("swin_transformer", "SwinTransformer")
    made = getattr(load(f"timm.models.{name}"), model)(img_size=size, **{**SIZES, **options})
    return randomise(made)


def volume(size, batch=1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("cosine", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize(
    ("size", "window"),
    [((32, 48), 4), ((200, 232), 7), ((56, 40), (4, 3)), ((40, 16), 4), ((16, 24), (6, 5))],
    ids=["divides", "200 x 232", "odd", "clipped on one axis", "smaller than a window"],
)
def test_parity(cosine, size, window):
    assert_same(build(cosine, size, window_size=window), (volume(size),), attentions=4)


@pytest.mark.parametrize("cosine", [False, True], ids=["v1", "v2"])
def test_any_size(cosine):
    model = build(cosine, (32, 32), window_size=3, strict_img_size=False)
    assert_same(model, (volume((40, 56), batch=2),), attentions=4)


def test_head_width_of_its_own():
    assert_same(build(False, (32, 48), window_size=4, head_dim=3), (volume((32, 48)),), attentions=4)


def test_no_qkv_bias():
    for cosine in (False, True):
        assert_same(build(cosine, (40, 40), window_size=4, qkv_bias=False), (volume((40, 40)),), attentions=4)


def test_another_input_size_after_it_was_accelerated():
    expected = build(False, (32, 48), window_size=4)
    model = build(False, (32, 48), window_size=4)
    mk.swin.accelerate(model)
    for either in (expected, model):
        either.set_input_size((56, 40), window_size=(5, 4))
    torch.testing.assert_close(model(volume((56, 40))), expected(volume((56, 40))), rtol=0, atol=1e-9)


def test_the_operators_own_order_would_be_wrong():
    """Guards the guard: at 200 x 232 padding before rolling gives something else."""
    model = build(False, (200, 232), window_size=7)
    expected = model(volume((200, 232)))
    mk.swin.accelerate(model)
    block = model.layers[0].blocks[1]
    block._attn = lambda x: block.attn(x, block.window_size, block.shift_size, clip=False)
    assert (model(volume((200, 232))) - expected).abs().max() > 1e-3


def test_res_post_norm_cousin_is_left_alone():
    cousin = load("timm.models.swin_transformer_v2_cr").SwinTransformerV2Cr(img_size=64, **{**SIZES, "window_size": 4})
    report = mk.swin.accelerate(cousin)
    assert len(report) == 4 and all(row.new is None and "no layout known" in row.reason for row in report)
