"""nnFormer: anchors, the row that a bias has, cross-attention to a skip, deep supervision, refusals."""

import pytest
import torch
from torch.nn import functional as F
from weights import count

from medfast.architectures import BACKBONES, NETWORKS
from medfast.architectures.nnformer_blocks import SkipAttention, attention, legacy_rows

BRATS = {"in_channels": 4, "patch": 4, "embed": 96, "heads": (3, 6, 12, 24)}
TINY = {"patch": (2, 4, 4), "embed": 8, "depths": (1, 1, 1), "heads": (1, 2, 4), "windows": (2, 2, 2), "drop_path": 0.0}


def test_parameter_counts_are_the_public_codes():
    with torch.device("meta"):
        synapse = NETWORKS["nnformer"]()
        brats = NETWORKS["nnformer"](classes=4, decoder_heads=(6, 12, 24), deep_supervision=False, **BRATS)
        alone = BACKBONES["nnformer"](every_norm=False)
    assert count(synapse) == 150_054_210 and count(brats) == 37_606_726
    assert count(synapse.encoder) == 119_045_772 and count(brats.encoder) == 29_839_734
    assert count(synapse.decoder) == 30_406_284
    assert count(alone) == 119_045_772 - 2 * (192 + 384 + 768)
    assert synapse.encoder.strides == ((2, 4, 4), (4, 8, 8), (8, 16, 16), (16, 32, 32))
    assert brats.encoder.strides == (4, 8, 16, 32) and synapse.encoder.channels == (192, 384, 768, 1536)


def test_the_legacy_rows_count_eleven_on_the_first_axis_and_offsets_share_them():
    rows = legacy_rows(4).view(7, 7, 7)
    assert rows[1, 0, 0] == 11 and rows[0, 1, 0] == 7 and rows[0, 0, 1] == 1 and rows.max() < 343
    assert len(rows.unique()) < 343 and rows[1, 0, 3] == rows[0, 2, 0]


def test_legacy_attention_is_the_correct_one_with_its_table_reordered():
    torch.manual_seed(0)
    correct, legacy = (attention(8, 2, 2, 1, True, index) for index in ("geometric", "legacy"))
    legacy.load_state_dict(correct.state_dict())  # the same names and shapes
    x = torch.randn(1, 4, 4, 2, 8)
    torch.nn.init.normal_(legacy.relative_position_bias_table)
    with torch.no_grad():
        correct.relative_position_bias_table.copy_(legacy.relative_position_bias_table)
        assert not torch.allclose(correct(x), legacy(x), atol=1e-5)
        correct.relative_position_bias_table.copy_(legacy.relative_position_bias_table[legacy_rows(2)])
        torch.testing.assert_close(correct(x), legacy(x))


def test_a_skip_is_read_by_queries_that_are_not_projected():
    torch.manual_seed(0)
    module = SkipAttention(8, 2, 3, True, "geometric").double()
    torch.nn.init.zeros_(module.relative_position_bias_table)
    x, skip = torch.randn(2, 1, 3, 3, 3, 8, dtype=torch.float64)
    k, v = module.kv(skip).view(27, 2, 2, 4).permute(1, 2, 0, 3)
    q = x.view(27, 2, 4).transpose(0, 1)
    expected = module.proj(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(1, 3, 3, 3, 8))
    torch.testing.assert_close(module(x, skip), expected)


def test_pad_tokens_hold_what_padding_before_the_projection_gives():
    torch.manual_seed(0)
    module = SkipAttention(8, 2, 2, True, "legacy").double()
    torch.nn.init.normal_(module.kv.bias)
    x, skip = torch.randn(2, 1, 3, 3, 2, 8, dtype=torch.float64)
    padded = [F.pad(y, (0, 0, 0, 0, 0, 1, 0, 1)) for y in (x, skip)]
    torch.testing.assert_close(module(x, skip), module(*padded)[:, :3, :3])


def test_deep_supervision_gives_logits_at_every_scale_of_the_decoder_and_trains_every_head():
    net = NETWORKS["nnformer"](2, 3, **TINY)
    volume = torch.randn(1, 2, 9, 14, 30)
    logits = net.deep_logits(volume)
    assert [tuple(x.shape) for x in logits] == [(1, 3, 9, 14, 30), (1, 3, 5, 7, 15)]
    torch.testing.assert_close(net(volume), logits[0])
    sum(x.square().mean() for x in logits).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_what_does_not_fit_is_refused():
    make, encoder = NETWORKS["nnformer"], BACKBONES["nnformer"]
    for settings, message in (
        ({"patch": 3}, "patch must be 1, 2 or 4"),
        ({"heads": (1, 2)}, "one entry per stage"),
        ({"bias_index": "sliced"}, "must be one of 'geometric', 'legacy'"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"heads": (3, 2, 4)}, "heads must divide"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder(**{**TINY, **settings})
    for settings, message in (({"decoder_heads": (1,)}, "decoder_heads"), ({"classes": 0}, "classes must be")):
        with pytest.raises(ValueError, match=message):
            make(**{**TINY, **settings})
    with pytest.raises(ValueError, match="has no head"):
        make(classes=None, **TINY)(torch.zeros(1, 1, 8, 8, 8))
    with pytest.raises(ValueError, match="without deep supervision"):
        make(deep_supervision=False, **TINY).deep_logits(torch.zeros(1, 1, 8, 8, 8))
    with pytest.raises(ValueError, match="every axis needs at least"):
        encoder(**TINY)(torch.zeros(1, 1, 1, 8, 8))
