"""The 3D ViT: anchors, equality with MONAI's, [CLS] attention, tokens left out, positions at other sizes."""

import pytest
import torch
from torch.nn import functional as F
from weights import assert_same, count, share_weights, weighted_sum

import medfast_kernels as mk
from medfast.architectures import BACKBONES, ViT
from medfast.architectures.names import MONAI_VIT
from medfast.architectures.vit import sincos
from medfast.types import Backbone, DropsTokens, Key, Mask

TINY = {"size": 12, "patch": 4, "embed": 12, "depth": 3, "heads": 2}


def random_vit(**settings):
    torch.manual_seed(0)
    vit = ViT(**{**TINY, **settings}).double()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return vit


def volumes(*size, batch=2):
    return torch.randn(batch, 1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_parameter_counts_are_monais_with_the_norms_it_never_reads_and_without():
    with torch.device("meta"):
        assert count(BACKBONES["vit"](unread_norms=True)) == 88_586_496
        assert count(BACKBONES["vit"](unread_norms=True, qkv_bias=True)) == 88_614_144
        assert count(BACKBONES["vit"]()) == 88_586_496 - 12 * 2 * 768
        assert count(BACKBONES["vit"](cls=True)) == count(BACKBONES["vit"]()) + 768


def test_it_is_a_backbone_that_drops_tokens_and_says_what_it_is():
    vit = ViT(**TINY, cls=True)
    assert isinstance(vit, Backbone) and isinstance(vit, DropsTokens)
    assert vit.channels == (12,) and vit.strides == (4,) and vit.embed == 12 and vit.semantic_attention == 1
    assert ViT(**{**TINY, "patch": (2, 4, 4)}).strides == ((2, 4, 4),)
    assert ViT(**TINY).semantic_attention is None


@pytest.mark.parametrize(
    "settings, theirs_too, size",
    [
        ({}, {}, (12, 8, 16)),
        ({"qkv_bias": True, "cls": True, "unread_norms": True}, {"qkv_bias": True, "classification": True}, (8, 8, 8)),
        ({"positions": "sincos"}, {"pos_embed_type": "sincos"}, (4, 12, 8)),
    ],
)
def test_equals_monai_in_values_and_gradients(settings, theirs_too, size):
    nets = pytest.importorskip("monai.networks.nets.vit")
    theirs = nets.ViT(1, size, 4, 12, 48, 3, 2, **theirs_too).double()
    ours = random_vit(size=size, taps=(0, 2), **settings)
    share_weights(ours, theirs, MONAI_VIT)
    made = []
    theirs.norm.register_forward_hook(lambda module, given, out: made.append(out))
    _, hidden = theirs(volumes(*size))
    features = ours(volumes(*size))
    got, expected = [features.stages[0], *features.extra["taps"][:2]], [made[0], hidden[0], hidden[2]]
    assert got[0].shape == (2, *(s // 4 for s in size), 12)
    if "cls" in settings:
        expected = [made[0][:, 0], *(y[:, 1:] for y in expected)]
        got.insert(0, features.summary)
    got = [y.flatten(1, -2) if y.ndim > 2 else y for y in got]
    assert_same(ours, theirs, MONAI_VIT, got, expected)


def test_fixed_positions_are_monais():
    build = pytest.importorskip("monai.networks.blocks.pos_embed_utils").build_sincos_position_embedding
    torch.testing.assert_close(sincos((2, 3, 5), 24).flatten(0, 2)[None], build([2, 3, 5], 24), rtol=0, atol=1e-5)
    vit = ViT(**TINY, positions="sincos")
    assert torch.equal(vit.position.unflatten(1, (3, 3, 3))[0], sincos((3, 3, 3), 12))
    assert "position" not in dict(vit.named_parameters()) and "position" in vit.state_dict()


@pytest.mark.parametrize("settings", [{"positions": "sincos"}, {"cls": True, "taps": (1,), "qkv_bias": True}])
def test_gradients_reach_every_parameter_and_the_fill(settings):
    vit = random_vit(**settings)
    fill = torch.randn(12, dtype=torch.float64, requires_grad=True)
    features = vit(volumes(8, 12, 16), Mask(torch.rand(2, 2, 3, 4) < 0.5), fill)
    outputs = [*features.stages, features.summary, *features.extra.get("taps", ())]
    weighted_sum(outputs if features.attention is None else [*outputs, features.attention]).backward()
    for name, parameter in [*vit.named_parameters(), ("fill", fill)]:
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-12, name


def test_attention_of_the_last_block_is_what_cls_looks_at():
    """By hand: LayerNorm, QKV and softmax of the first row of the last block, [CLS] dropped, mean over heads."""
    vit = random_vit(cls=True, taps=(1,))
    features = vit(volumes(12, 8, 12))
    assert features.attention.shape == (2, 18)
    block = vit.blocks[-1]
    seen = []
    block.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    vit(volumes(12, 8, 12))
    u = F.layer_norm(seen[0], (12,), block.norm1.weight, block.norm1.bias)
    q, k, _ = (u @ block.attn.qkv.weight.T).view(2, 19, 3, 2, 6).unbind(2)
    expected = torch.softmax(torch.einsum("bhd,bnhd->bhn", q[:, 0], k) / 6**0.5, dim=-1).mean(1)[:, 1:]
    torch.testing.assert_close(features.attention, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cls", [False, True])
def test_leaving_hidden_tokens_out_is_the_network_on_the_visible_ones(cls):
    vit, volume = random_vit(cls=cls, drop_path=0.5), volumes(12, 8, 12)
    ids = mk.random_ids(18, 5, key=Key(1, sample=torch.arange(2)))
    where = torch.ones(2, 18, dtype=torch.bool).scatter(1, ids, False).view(2, 3, 2, 3)
    key = Key(3, sample=torch.tensor([8, 2]))
    got = vit.encode_visible(volume, Mask(where, visible=ids), key)
    assert got.shape == (2, 5 + cls, 12)
    x = vit.patch_embed(volume).flatten(1, 3) + vit._positions((3, 2, 3))
    x = torch.stack([x[b, ids[b]] for b in range(2)])
    x = torch.cat((vit.cls.expand(2, -1, -1), x), dim=1) if cls else x
    for block in vit.blocks:
        x, _ = block(x, key)
    torch.testing.assert_close(got, vit.norm(x), rtol=1e-12, atol=1e-12)
    nothing = Mask(torch.zeros(2, 3, 2, 3, dtype=torch.bool), visible=torch.arange(18).expand(2, -1))
    everything = vit.encode_visible(volume, nothing)
    torch.testing.assert_close(everything[:, int(cls) :].unflatten(1, (3, 2, 3)), vit(volume).stages[0])


def test_hidden_voxels_are_not_read_and_coarse_cells_cover_their_tokens():
    vit, volume = random_vit(), volumes(16, 16, 8)
    where = torch.zeros(2, 2, 2, 1, dtype=torch.bool)
    where[0, 0, 1, 0] = where[1, 1, 1, 0] = True
    mask = Mask(where, visible=(~where).flatten(1).nonzero()[:, 1].view(2, 3))
    got = vit.encode_visible(volume, mask)
    assert got.shape == (2, 24, 12)
    fine = where.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    tokens = (~fine).flatten(1).nonzero()[:, 1].view(2, 24)
    assert torch.equal(vit.encode_visible(volume, Mask(fine, visible=tokens)), got)
    volume[0, 0, :8, 8:] += 5.0
    volume[1, 0, 8:, 8:] += 5.0
    assert torch.equal(vit.encode_visible(volume, mask), got)
    fill = torch.zeros(12, dtype=torch.float64)
    changed = vit(volume, mask, fill).stages[0]
    volume[1, 0, 8:, 8:] -= 5.0
    assert torch.equal(vit(volume, mask, fill).stages[0], changed)


def test_hidden_tokens_become_the_fill_before_positions_are_added():
    vit, seen = random_vit(), []
    vit.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    where, fill = torch.rand(2, 3, 2, 3) < 0.5, torch.randn(12, dtype=torch.float64)
    vit(volumes(12, 8, 12), Mask(where), fill)
    x = vit.patch_embed(volumes(12, 8, 12))
    x[where] = fill
    torch.testing.assert_close(seen[0], x.flatten(1, 3) + vit._positions((3, 2, 3)))


def test_rates_rise_linearly_and_every_branch_draws_for_itself():
    vit = random_vit(drop_path=0.5)
    assert [block.rate for block in vit.blocks] == pytest.approx([0.0, 0.25, 0.5])
    assert [block.layer for block in vit.blocks] == [0, 2, 4]
    block, x, key = vit.blocks[-1], torch.randn(64, 5, 12, dtype=torch.float64), Key(0, 0, torch.arange(64))
    attention, mlp = (mk.random_keep(0.5, key=key.at(mk.Role.DROP_PATH, layer=4 + i)) for i in (0, 1))
    torch.nn.init.zeros_(block.attn.proj.weight), torch.nn.init.zeros_(block.attn.proj.bias)
    changed = (block(x, key)[0] != x).flatten(1).any(dim=1)
    assert torch.equal(changed, mlp) and not torch.equal(attention, mlp)


def test_positions_are_interpolated_for_other_sizes_and_padded_sizes_are_rounded_up():
    vit = random_vit()
    table = vit.position.detach().unflatten(1, (3, 3, 3))[0]
    assert torch.equal(vit._positions((3, 3, 3)), vit.position)
    other = vit._positions((6, 3, 1)).unflatten(1, (6, 3, 1))[0]
    torch.testing.assert_close(other[2, 1, 0], 0.25 * table[0, 1, 1] + 0.75 * table[1, 1, 1])  # centre of cell 2 of 6
    assert vit(volumes(9, 4, 13)).stages[0].shape == (2, 3, 1, 4, 12)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"heads": 5}, "heads must divide embed"),
        ({"depth": 0}, "depth be at least 1"),
        ({"positions": "fourier"}, "positions must be one of 'learned', 'sincos', got 'fourier'"),
        ({"positions": "sincos", "embed": 8}, "multiple of 6, got 8"),
        ({"drop_path": -0.1}, r"in \[0, 1\)"),
        ({"taps": (2, 1)}, r"ascending, in 0..2, got \(2, 1\)"),
        ({"taps": (3,)}, "ascending, in 0..2"),
        ({"patch": (4, 4)}, "one per axis, got"),
        ({"patch": 0}, "one positive number or three"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ViT(**{**TINY, **settings})


def test_input_that_does_not_fit_is_refused():
    vit, volume = ViT(**TINY), torch.zeros(2, 1, 20, 12, 12)
    where = torch.zeros(2, 3, 3, 3, dtype=torch.bool)
    for call, message in (
        (lambda: vit(volume[:, :, :3]), r"\(3, 12, 12\) voxels are too few .* at least \(4, 4, 4\)"),
        (lambda: vit(volume, Mask(where), torch.zeros(12)), r"\(3, 3, 3\) cells does not fit"),
        (lambda: vit(volume, key=Key(0, sample=torch.arange(3))), r"\(2,\) for this batch, got \(3,\)"),
        (lambda: vit.encode_visible(volume, Mask(where[:, :, :, :].new_zeros(2, 5, 3, 3))), "visible=None"),
        (
            lambda: vit.encode_visible(volume, Mask(where.new_zeros(2, 3, 2, 2), visible=torch.zeros(2, 1).long())),
            r"\(3, 2, 2\) cells cut \(5, 3, 3\) tokens unevenly",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
