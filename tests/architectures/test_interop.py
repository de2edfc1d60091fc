"""Formats: round trips of every one, SMIT's and nnFormer's names as their public code has them, window indices."""

import pytest
import torch

from medfast import cards
from medfast.architectures import interop
from medfast.architectures.blocks import PatchMerging
from medfast.architectures.interop import ARCHITECTURES, FORMATS, bias_index, match, reorder_merges, to_ours, to_theirs

SWIN = {"embed": 8, "depths": (1, 1, 1, 1), "heads": (1, 2, 2, 4), "window": 3}
VIT = {"size": 32, "embed": 12, "depth": 12, "heads": 2}
SMALL = {
    "swin": {**SWIN, "taps": "smit", "semantic_attention": 2, "sa_heads": 4},
    "swin_unetr": {**SWIN, "residual_convs": True},
    "smit_unet": SWIN,
    "vit": {**VIT, "cls": True},
    "unetr": {**VIT, "width": 2},
    "nnformer": {"embed": 12, "heads": (1, 1, 2, 2)},
    "nnformer_encoder": {"embed": 12, "heads": (1, 1, 2, 2)},
    "swinfuse": {"embed": 4, "depths": (1, 1), "heads": (1, 2), "window": 3, "dim": "code", "merge": "monai_legacy"},
    "dae_former": {"widths": (8, 16, 24)},
    "dae_former_encoder": {"widths": (8, 16, 24)},
    "resnet50": {"width": 4},
}
PAIRS = [(kind, name) for kind, layouts in FORMATS.items() for name in layouts if kind != "medfast"]


def section(name):
    return {"name": name, **SMALL.get(name, {})}


def weights(name):
    with torch.device("meta"):
        state = ARCHITECTURES[name](**SMALL.get(name, {})).state_dict()
    generator = torch.Generator().manual_seed(1)
    return {
        n: torch.randn(x.shape, generator=generator) if x.is_floating_point() else torch.zeros(x.shape)
        for n, x in state.items()
    }


@pytest.mark.parametrize("kind, name", PAIRS)
def test_there_and_back_again(kind, name):
    ours = weights(name)
    theirs, held = to_theirs(ours, kind, section(name))
    assert len({id(x) for x in theirs.values()}) == len(theirs)
    back, outside = to_ours(theirs, kind, name)
    merges = FORMATS[kind][name].merges
    order = interop.arguments(section(name)).get("merge")
    if merges and order is not None and order not in merges:
        back = reorder_merges(back, merges[0], order)
    assert set(back) & set(ours) == set(held.matched) == set(ours) - set(held.unread) and not outside
    assert all(torch.equal(back[n], ours[n]) for n in held.matched)
    assert not match(ours, back, outside, FORMATS[kind][name].names.unread).unread


def test_every_architecture_has_a_plain_format():
    assert set(FORMATS["medfast"]) == set(ARCHITECTURES)


def test_every_format_has_code_that_loads_it():
    assert set(cards._LOADERS) == set(FORMATS)


def test_nnformers_names_are_those_of_its_public_code():
    with torch.device("meta"):
        state = ARCHITECTURES["nnformer"]().state_dict()
    tables = {n: torch.zeros(x.shape, device="meta") for n, x in state.items()}
    theirs, held = to_theirs(tables, "nnformer", {"name": "nnformer"})
    expected = {
        "model_down.patch_embed.proj1.conv1.weight": (96, 1, 3, 3, 3),
        "model_down.patch_embed.proj2.conv2.bias": (192,),
        "model_down.patch_embed.norm.weight": (192,),
        "model_down.layers.2.blocks.1.attn.relative_position_bias_table": (15**3, 24),
        "model_down.layers.2.downsample.reduction.weight": (1536, 768, 3, 3, 3),
        "model_down.layers.0.blocks.0.mlp.fc2.weight": (192, 768),
        "model_down.norm3.weight": (1536,),
        "decoder.layers.0.blocks.0.attn.kv.weight": (384, 192),
        "decoder.layers.2.Upsample.up.weight": (1536, 768, 2, 2, 2),
        "decoder.layers.1.Upsample.norm.weight": (768,),
        "final.0.up.weight": (192, 14, 2, 4, 4),
    }
    assert {n: tuple(theirs[n].shape) for n in expected} == expected
    assert {n.split(".")[0] for n in theirs} == {"model_down", "decoder", "final"} and held.share == 1.0
    back, _ = to_ours(theirs, "nnformer", "nnformer")
    assert set(state) <= set(back)


def test_smits_names_are_those_of_its_public_code():
    with torch.device("meta"):
        state = ARCHITECTURES["smit_unet"](
            classes=14, depths=(2, 2, 4, 2), heads=(4, 4, 4, 4), qkv_bias=False
        ).state_dict()
    theirs, held = to_theirs(state, "smit", {"name": "smit_unet"})
    expected = {
        "transformer.patch_embed.norm.weight": (48,),
        "transformer.layers.2.blocks.3.attn.relative_position_bias_table": (343, 4),
        "transformer.layers.3.downsample.reduction.weight": (768, 3072),
        "transformer.norm3.bias": (384,),
        "encoder10.layer.norm2.running_mean": (768,),
        "decoder5.transp_conv.conv.weight": (768, 384, 2, 2, 2),
        "decoder1.conv_block.conv3.conv.weight": (48, 96, 1, 1, 1),
        "out.conv.conv.bias": (14,),
    }
    assert {n: tuple(theirs[n].shape) for n in expected} == expected and held.share == 1.0
    wrapped = {f"module.backbone.{n}": x for n, x in theirs.items()} | {
        "module.backbone.transformer.mask_token": torch.zeros(1)
    }
    back, outside = to_ours(wrapped, "smit", "smit_unet")
    assert set(state) <= set(back) and not outside


def test_the_index_of_a_window_is_monais():
    nets = pytest.importorskip("monai.networks.nets.swin_unetr")
    theirs = nets.WindowAttention(6, 2, (3, 3, 3), False)
    assert torch.equal(bias_index(3), theirs.relative_position_index)


def test_what_matches_is_counted_in_numbers():
    wanted = {"a": torch.zeros(6), "b": torch.zeros(3), "c": torch.zeros(1)}
    found = match(wanted, {"a": torch.ones(6), "b": torch.ones(4), "d": torch.ones(2)}, outside=("e",))
    assert found.matched == ("a",) and found.missing == ("b", "c") and found.unread == ("b", "d", "e")
    assert found.share == pytest.approx(0.6)
    module = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="1 missing or of another shape .weight.*under 95% is refused"):
        interop.fill(module, {"bias": torch.ones(2)})
    interop.fill(module, {"bias": torch.ones(2)}, partial=True)
    assert module.bias.tolist() == [1, 1]


@pytest.mark.parametrize("old, new", [("smit", "monai"), ("smit", "monai_v2"), ("monai_v2", "monai")])
def test_merges_in_another_order_give_the_same_outputs(old, new):
    torch.manual_seed(0)
    one, other = PatchMerging(3, old).double(), PatchMerging(3, new).double()
    torch.nn.init.normal_(one.norm.weight), torch.nn.init.normal_(one.norm.bias)
    state = {f"stages.0.merge.{name}": x for name, x in one.state_dict().items()}
    turned = reorder_merges(state, old, new)
    other.load_state_dict({name.removeprefix("stages.0.merge."): x for name, x in turned.items()})
    x = torch.randn(1, 4, 2, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(other(x), one(x))
