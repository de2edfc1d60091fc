"""DAE-Former: anchors and names, what it attends to, cost, skips on and off, blanking, refusals."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from weights import count

from medfast.architectures import BACKBONES, NETWORKS
from medfast.architectures.dual_attention import ChannelAttention, SkipCrossAttention, efficient_attention
from medfast.architectures.names import DAE_FORMER, rename
from medfast.types import Mask

TINY = {"widths": (8, 16), "depths": (1, 1)}


def test_parameter_counts_are_the_public_codes_with_what_it_never_reads_and_smaller_without():
    make = NETWORKS["dae_former"]
    with torch.device("meta"):
        assert count(make(unread=True)) == 48_073_065 and count(make(classes=2, unread=True)) == 48_072_162
        assert count(BACKBONES["dae_former"](unread=True)) == 20_441_328
        norms = 2 * 2 * 4  # of two LayerNorms of four times the width, weight and bias
        assert count(BACKBONES["dae_former"]()) == 20_441_328 - 2 * 2 * norms * (128 + 320 + 512)
        assert count(make()) < count(make(unread=True))


def test_names_and_shapes_are_the_public_codes():
    with torch.device("meta"):
        state = NETWORKS["dae_former"](unread=True).state_dict()
    theirs = {name: tuple(x.shape) for name, x in rename(state, DAE_FORMER, export=True).items()}
    assert rename(rename(state, DAE_FORMER, export=True), DAE_FORMER).keys() == state.keys()
    assert {name.split(".")[0] for name in theirs} == {"backbone", "decoder_0", "decoder_1", "decoder_2"}
    for name, shape in {
        "backbone.patch_embed1.proj.weight": (128, 3, 7, 7),
        "backbone.block2.1.attn.keys.weight": (320, 320, 1, 1),
        "backbone.block3.0.channel_attn.temperature": (8, 1, 1),
        "backbone.block1.0.mlp2.dwconv.dwconv.weight": (512, 1, 3, 3),
        "backbone.block1.0.mlp1.norm3.weight": (512,),
        "backbone.norm3.bias": (512,),
        "decoder_2.x1_linear.weight": (512, 512),
        "decoder_2.cross_attn.attn.reprojection.weight": (1024, 512, 1, 1),
        "decoder_2.cross_attn.mlp.norm2.weight": (2048,),
        "decoder_2.layer_former_1.attn.reprojection.bias": (512,),
        "decoder_1.x1_linear.weight": (320, 256),
        "decoder_1.concat_linear.weight": (320, 640),
        "decoder_1.layer_up.norm.weight": (160,),
        "decoder_0.layer_up.expand.weight": (2048, 128),
        "decoder_0.last_layer.weight": (9, 128, 1, 1),
    }.items():
        assert theirs[name] == shape, name


def test_cost_is_linear_in_pixels():
    with torch.device("meta"):
        net = NETWORKS["dae_former"]()

        def flops(h, w):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                net(torch.empty(1, 3, h, w))
            return counter.get_total_flops()

        once = flops(128, 128)
        assert once > 1e9
        assert flops(256, 256) == 4 * once and flops(64, 512) == 2 * once


def test_efficient_attention_is_the_full_matrix_reordered():
    q, k, v = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    full = q.softmax(dim=-1) @ k.softmax(dim=1).transpose(1, 2) @ v  # (5, 5) first
    torch.testing.assert_close(efficient_attention(q, k, v), full)


def test_a_skip_gives_keys_and_queries_and_the_coarse_map_values():
    torch.manual_seed(0)
    module = SkipCrossAttention(8, unread=False).double()
    torch.nn.init.zeros_(module.mlp.fc2.weight)
    x, skip = torch.randn(2, 1, 2, 3, 8, dtype=torch.float64)
    value, key = module.norm1(x).flatten(1, 2), module.norm1(skip).flatten(1, 2)
    read = key.softmax(dim=-1) @ key.softmax(dim=1).transpose(1, 2) @ value
    expected = torch.cat((x, skip), dim=-1) + module.norm(module.reprojection(read.view(1, 2, 3, 8)))
    torch.testing.assert_close(module(x, skip) - module.mlp.fc2.bias, expected)


def test_channels_attend_to_channels_of_their_head():
    torch.manual_seed(0)
    module = ChannelAttention(8, heads=2).double()
    torch.nn.init.normal_(module.temperature)
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    q, k, v = module.qkv(x.view(6, 8)).view(6, 3, 2, 4).permute(1, 2, 3, 0)
    out = []
    for head in range(2):
        similarity = torch.cosine_similarity(q[head][:, None], k[head][None], dim=-1)
        out.append((similarity * module.temperature[head]).softmax(dim=-1) @ v[head])
    torch.testing.assert_close(module(x), module.proj(torch.cat(out).T).view(1, 2, 3, 8))


def test_a_network_without_skips_is_part_of_one_with_them():
    bare, full = (NETWORKS["dae_former"](skips=skips, **TINY) for skips in (False, True))
    mine, whole = bare.state_dict(), full.state_dict()
    assert all(whole[name].shape == x.shape for name, x in mine.items())
    assert all(".cross." in name or ".narrow." in name for name in whole.keys() - mine.keys())
    image, other = torch.randn(2, 1, 3, 32, 32)
    seen, unlike = bare.encoder(image), bare.encoder(other)
    swapped = type(seen)((unlike.stages[0], seen.stages[1]), seen.summary)
    assert torch.equal(bare._decode(seen), bare._decode(swapped))
    assert not torch.allclose(full._decode(seen), full._decode(swapped), atol=1e-5)


@pytest.mark.parametrize("blank", [True, False])
def test_overlapping_patches_show_hidden_pixels_unless_they_are_blanked(blank):
    torch.manual_seed(0)
    net = BACKBONES["dae_former"](1, **TINY, blank=blank)
    where = torch.zeros(1, 2, 2, dtype=torch.bool)
    where[0, 0, 0] = True  # cells of 16 pixels
    image = torch.randn(1, 1, 32, 32)
    other = image.clone()
    other[..., 15, 15] += 5.0  # hidden, beside a visible token
    a, b = (net(x, Mask(where), torch.zeros(8)).summary for x in (image, other))
    assert torch.equal(a, b) == blank


def test_what_does_not_fit_is_refused():
    make, encoder = NETWORKS["dae_former"], BACKBONES["dae_former"]
    with pytest.raises(ValueError, match="patch_embed must be one of 'overlap', 'merge'"):
        encoder(patch_embed="conv")
    with pytest.raises(ValueError, match="one entry per stage"):
        encoder(widths=(8, 16))
    with pytest.raises(ValueError, match="multiples of 8"):
        encoder(widths=(12,), depths=(1,))
    with pytest.raises(ValueError, match=r"expected a volume \(b, 3, h, w\), got \(1, 3, 4, 4, 4\)"):
        encoder(**TINY)(torch.zeros(1, 3, 4, 4, 4))
    with pytest.raises(ValueError, match="classes must be"):
        make(classes=0, **TINY)
    with pytest.raises(ValueError, match="has no head"):
        make(classes=None, **TINY)(torch.zeros(1, 3, 16, 16))
