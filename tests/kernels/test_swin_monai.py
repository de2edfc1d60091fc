"""MONAI's SwinTransformer and SwinUNETR give the same after ``swin.accelerate``."""

import pytest
import torch
from monai.networks.nets import swin_unetr
from swin_parity import assert_close, assert_same, forbidden, outputs_and_gradients, randomise

import medfast_kernels as mk

SIZES = {"in_chans": 1, "embed_dim": 8, "patch_size": (2, 2, 2), "depths": (2, 2, 1, 2),
         "num_heads": (2, 4, 1, 2), "drop_path_rate": 0.0}  # fmt: skip


def encoder(window=(4, 4, 4), **options):
    return swin_unetr.SwinTransformer(**{**SIZES, "window_size": window, **options})


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("merging", ["merging", "mergingv2"])
@pytest.mark.parametrize(
    ("size", "window"),
    [((16, 16, 16), (4, 4, 4)), ((18, 13, 9), (4, 3, 4)), ((18, 6, 4), (4, 4, 4)), ((4, 8, 6), (7, 7, 7))],
    ids=["divides", "odd", "clipped", "smaller than a window"],
)
def test_encoder(size, window, merging):
    model = randomise(encoder(window, downsample=merging))
    report = assert_same(model, (draw(2, 1, *size),), attentions=7)
    assert [row.name for row in report[:4]] == [f"layers{i}.0.blocks.{j}.attn" for i in (1, 2) for j in (0, 1)]


def test_flat_encoder():
    options = {"patch_size": (2, 2), "spatial_dims": 2}
    assert_same(randomise(encoder((4, 3), **options)), (draw(2, 1, 18, 21),), attentions=7)


def test_checkpointed_encoder():
    assert_same(randomise(encoder(use_checkpoint=True)), (draw(2, 1, 18, 9, 12),), attentions=7)


def test_unetr():
    model = swin_unetr.SwinUNETR(
        in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), window_size=4,
        norm_name="batch",  # stage 4 leaves one voxel, which instance norm refuses
    )  # fmt: skip
    assert_same(randomise(model), (draw(1, 1, 32, 32, 32),), attentions=4)


def test_residual_convolutions_between_stages():
    assert_same(randomise(encoder(use_v2=True)), (draw(1, 1, 18, 13, 16),), attentions=7)


def test_single_precision():
    model = randomise(encoder()).float()
    assert_same(model, (draw(2, 1, 18, 13, 16).float(),), attentions=7, tolerance=1e-5)


def test_drop_path_and_projection_dropout_stay():
    model = encoder(drop_path_rate=0.5, drop_rate=0.0)
    mk.swin.accelerate(model)
    assert type(model.layers2[0].blocks[1].drop_path) is swin_unetr.DropPath
    x = draw(2, 1, 16, 16, 16).float()
    torch.manual_seed(1)
    first = model(x)[-1]
    torch.manual_seed(1)
    assert torch.equal(model(x)[-1], first) and not torch.equal(model(x)[-1], first)


def test_a_stage_with_a_block_that_was_left_keeps_its_mask():
    model = randomise(encoder())
    model.layers1[0].blocks[1].attn.attn_drop.p = 0.1  # eval: it draws nothing
    before = outputs_and_gradients(model, (draw(1, 1, 18, 13, 9),))
    report = mk.swin.accelerate(model)
    assert [row.new is None for row in report] == [False, True] + [False] * 5
    assert type(model.layers1[0]) is swin_unetr.BasicLayer and type(model.layers2[0]) is not swin_unetr.BasicLayer
    assert_close(outputs_and_gradients(model, (draw(1, 1, 18, 13, 9),)), before, 1e-9)


def test_shift_mask_is_not_built(monkeypatch):
    model = encoder()
    mk.swin.accelerate(model)
    monkeypatch.setattr(swin_unetr, "compute_mask", None)
    with forbidden({swin_unetr.WindowAttention}):
        model(draw(1, 1, 16, 16, 16).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_no_worse_than_theirs(dtype):
    model, x = randomise(encoder()), draw(1, 1, 16, 13, 16)
    exact = model(x)[-1]
    model = model.float()

    def error():
        with torch.autocast("cpu", dtype=dtype):
            out = model(x.float())[-1]
        return (out.double() - exact).abs().mean()

    theirs = error()
    mk.swin.accelerate(model)
    assert error() <= 1.5 * theirs
