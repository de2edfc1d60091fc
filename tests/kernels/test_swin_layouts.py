"""SMIT's and Video-Swin's layouts give the same after ``swin.accelerate``; what is unlike them is left, and why."""

import copy
import pickle

import pytest
import swin_layouts
import torch
from swin_layouts import SMIT, VideoSwin
from swin_parity import assert_same, randomise
from torch import nn

import medfast_kernels as mk


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize(
    ("grid", "window"),
    [
        ((8, 8, 8), (2, 2, 2)),
        ((8, 4, 4), (3, 3, 3)),
        ((4, 8, 12), (4, 4, 4)),
        ((4, 4, 4), (5, 5, 5)),
        ((4, 8, 8), (1, 2, 4)),
    ],
    ids=["divides", "odd", "one window on an axis", "smaller than a window", "one axis without a shift"],
)
def test_smit(grid, window, qkv_bias):
    report = assert_same(randomise(SMIT(window, qkv_bias=qkv_bias)), (draw(2, *grid, 8),), attentions=4)
    assert [row.name for row in report] == [f"layers.{i}.blocks.{j}.attn" for i in (0, 1) for j in (0, 1)]


def test_smit_with_a_reverse_that_is_one(monkeypatch):
    block = swin_layouts.SwinTransformerBlock
    scrambled = randomise(SMIT())(draw(1, 8, 8, 8, 8))[-1]
    monkeypatch.setattr(block, "reverse_order", (0, 1, 4, 2, 5, 3, 6, 7))
    assert not torch.allclose(randomise(SMIT())(draw(1, 8, 8, 8, 8))[-1], scrambled)
    for grid in ((8, 8, 8), (8, 4, 4)):
        assert_same(randomise(SMIT((3, 3, 3))), (draw(2, *grid, 8),), attentions=4)


def test_smit_that_puts_tokens_anywhere_else_is_left(monkeypatch):
    monkeypatch.setattr(swin_layouts.SwinTransformerBlock, "reverse_order", (0, 1, 5, 2, 4, 3, 6, 7))
    model = SMIT()
    kept = [dict(block._modules) for block in model.layers[0].blocks]
    report = mk.swin.accelerate(model)
    assert len(report) == 4 and all(row.new is None and "puts its tokens neither" in row.reason for row in report)
    assert kept == [dict(block._modules) for block in model.layers[0].blocks]
    assert all(block.H is None for block in model.layers[0].blocks)


@pytest.mark.parametrize("use_checkpoint", [False, True])
@pytest.mark.parametrize("size", [(4, 12, 16), (5, 7, 9), (2, 6, 3), (1, 2, 2)], ids=str)
def test_video_swin(size, use_checkpoint):
    assert_same(randomise(VideoSwin(use_checkpoint=use_checkpoint)), (draw(2, 8, *size),), attentions=4)


def test_a_scale_of_its_own():
    for model, shape in ((VideoSwin(), (8, 4, 7, 9)), (SMIT(), (4, 4, 8, 8))):
        for module in model.modules():
            if isinstance(module, swin_layouts.Attention):
                module.scale = 0.3  # qk_scale of both projects
        assert_same(randomise(model), (draw(1, *shape),), attentions=4)


class Odd(swin_layouts.SwinTransformerBlock3D):
    """A subclass."""


def left(model):
    """The reasons why a model's four attentions were all left as they are."""
    classes = [type(module) for module in model.modules()]
    report = mk.swin.accelerate(model)
    assert len(report) == 4 and all(row.new is None and row.reason for row in report)
    assert [type(module) for module in model.modules()] == classes
    return {row.reason for row in report}


def test_reasons():
    assert "attention dropout 0.1" in str(left(VideoSwin(attn_drop=0.1)))

    def each(change):
        model = VideoSwin()
        for block in (block for layer in model for block in layer.blocks):
            change(block)
        return str(left(model))

    assert "gate added" in each(lambda block: setattr(block.attn, "gate", nn.Linear(8, 8)))
    assert "mlp missing" in each(lambda block: delattr(block, "mlp"))
    for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
        hook = lambda block, kind=kind: getattr(block.attn, f"register_{kind}_hook")(lambda *_: None)  # noqa: E731
        assert "hooks are registered" in each(hook)
    watched = lambda block: block.attn.softmax.register_forward_hook(lambda *_: None)  # noqa: E731  attention rollout
    assert "hooks are registered on softmax" in each(watched)
    assert "attn_drop is a Tanh" in each(lambda block: setattr(block.attn, "attn_drop", nn.Tanh()))
    assert "relative_position_index is not" in each(lambda block: block.attn.relative_position_index.add_(1))
    assert "qkv is a Bilinear" in each(lambda block: setattr(block.attn, "qkv", nn.Bilinear(8, 8, 24)))
    assert "an entry per axis" in each(lambda block: setattr(block, "window_size", 4))
    assert "no layout known here fits WindowAttention3D inside Odd" in each(
        lambda block: setattr(block, "__class__", Odd)
    )


def test_an_identity_in_the_place_of_dropout():
    model = VideoSwin()
    for layer in model:
        for block in layer.blocks:
            block.attn.attn_drop = nn.Identity()
    assert all(row.new is not None for row in mk.swin.accelerate(model))


def test_tokens_that_do_not_come_back(monkeypatch):
    original = swin_layouts.SwinTransformerBlock3D.forward_part1
    turned = lambda self, x, mask_matrix: original(self, x, mask_matrix).flip(1)  # noqa: E731
    monkeypatch.setattr(swin_layouts.SwinTransformerBlock3D, "forward_part1", turned)
    assert "does not put its tokens back" in str(left(VideoSwin()))


def test_blocks_that_ask_more_of_their_parts_than_to_be_called(monkeypatch):
    original = swin_layouts.SwinTransformerBlock.forward
    asking = lambda self, x, mask_matrix: original(self, x * self.norm1.weight.mean(), mask_matrix)  # noqa: E731
    monkeypatch.setattr(swin_layouts.SwinTransformerBlock, "forward", asking)
    assert "puts its tokens neither" in str(left(SMIT()))


def test_twice_is_once():
    model = VideoSwin()
    mk.swin.accelerate(model)
    assert {row.reason for row in mk.swin.accelerate(model)} == {"it is accelerated already"}
    mk.swin.restore(model)
    mk.swin.restore(model)
    assert type(model[0].blocks[0]) is swin_layouts.SwinTransformerBlock3D


def test_nothing_to_do_and_nothing_that_could_be():
    assert mk.swin.accelerate(nn.Linear(2, 2)) == []
    for function in (mk.swin.accelerate, mk.swin.restore):
        with pytest.raises(TypeError, match="torch.nn.Module"):
            function({"weights": 1})


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(through):
    model, x = randomise(VideoSwin()), draw(1, 8, 4, 7, 9)
    mk.swin.accelerate(model)
    copied = through(model)
    assert torch.equal(copied(x), model(x)) and type(copied[0].blocks[0]) is type(model[0].blocks[0])
    with torch.no_grad():
        copied[0].blocks[0].attn.relative_position_bias_table.add_(1.0)[0] = 3
    assert not torch.equal(copied(x), model(x))
