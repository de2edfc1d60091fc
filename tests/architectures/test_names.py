"""Maps of names: both ways, no two weights under one name, whole segments only."""

import pytest
import torch

from medfast.architectures import NETWORKS, Swin, ViT
from medfast.architectures.names import MONAI_SWIN, MONAI_SWIN_UNETR, MONAI_UNETR, MONAI_VIT, Names, rename


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: Swin(residual_convs=True), MONAI_SWIN),
        (lambda: NETWORKS["swin_unetr"](residual_convs=True), MONAI_SWIN_UNETR),
        (lambda: ViT(cls=True, unread_norms=True), MONAI_VIT),
        (lambda: NETWORKS["unetr"](unread_norms=True), MONAI_UNETR),
    ],
)
def test_there_and_back_again(make, names):
    with torch.device("meta"):
        state = make().state_dict()
    theirs = rename(state, names, export=True)
    assert rename(theirs, names) == state
    assert all(theirs[name] is not None for name in theirs) and len(theirs) == len(state)
    assert not {name for name in theirs if name.split(".")[0] in ("encoder", "decoder", "stages", "ups", "ladders")}


def test_some_names():
    names = {
        "encoder.stages.0.blocks.1.mlp.fc1.weight": "swinViT.layers1.0.blocks.1.mlp.linear1.weight",
        "encoder.stages.3.conv.conv2.weight": "swinViT.layers4c.0.layer.conv2.conv.weight",
        "encoder.stages.2.merge.reduction.weight": "swinViT.layers3.0.downsample.reduction.weight",
        "decoder.skips.2.conv1.weight": "encoder4.layer.conv1.conv.weight",
        "decoder.ups.4.block.norm3.bias": "decoder1.conv_block.norm3.bias",
        "decoder.ups.0.up.weight": "decoder5.transp_conv.conv.weight",
        "head.bias": "out.conv.conv.bias",
    }
    assert list(rename(dict.fromkeys(names), MONAI_SWIN_UNETR, export=True)) == list(names.values())
    assert list(rename(dict.fromkeys(names.values()), MONAI_SWIN_UNETR)) == list(names)


def test_pairs_touch_whole_segments_in_their_order_and_clashes_are_refused():
    names = Names((("a.b", "x"), ("c", "y.z")))
    assert rename({"x.w": 1, "xx.y.z.1": 2, "ya.z": 3}, names) == {"a.b.w": 1, "xx.c.1": 2, "ya.z": 3}
    assert rename({"x.1.x": 1}, names) == {"a.b.1.x": 1}
    with pytest.raises(ValueError, match="two weights would be called 'a.b.w'.* another network"):
        rename({"x.w": 1, "a.b.w": 2}, names)
