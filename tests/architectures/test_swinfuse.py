"""SwinFUSE: anchors, eq. 1 held against PyTorch's attention, pairs, the code's variant, tokens in windows, refusals."""

import pytest
import torch
from torch import nn
from weights import count

from medfast.architectures import BACKBONES, SwinFUSE, SwinUNet
from medfast.architectures.names import SWINFUSE, rename
from medfast.types import EncodesPairs, Key

TINY = {"embed": 4, "depths": (1, 1), "heads": (1, 2), "window": 3}
PLANES = {**TINY, "dim_width": 12, "dim_heads": (2, 3)}  # planes of 3 x 4 tokens
SIZE = (4, 6, 8)


def volumes(count, batch=2):
    return torch.randn(count, batch, 1, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def build(**settings):
    torch.manual_seed(0)
    net = SwinFUSE(**settings).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net


def theirs(layer, batch_first):
    """PyTorch's module with the weights of a layer."""
    module = nn.MultiheadAttention(layer.out_proj.in_features, layer.heads, batch_first=batch_first).double()
    module.in_proj_weight.data, module.in_proj_bias.data = layer.in_proj.weight.data, layer.in_proj.bias.data
    module.out_proj.load_state_dict(layer.out_proj.state_dict())
    return lambda query, x: module(query, x, x, need_weights=False)[0]


def rows(x):
    """Channel and first axis by second and third."""
    b, d, h, w, c = x.shape
    return x.permute(0, 4, 1, 2, 3).reshape(b, c * d, h * w)


def test_parameter_counts():
    with torch.device("meta"):
        paper, code, tokens = BACKBONES["swinfuse"](), SwinFUSE(dim="code"), SwinFUSE(dim_width=48)
    assert count(paper.encoder) == 8_062_002
    assert [count(branch) for branch in paper.dim.branches] == [4 * 21_242_880] * 2
    assert [count(branch) for branch in code.dim.branches] == [21_242_880] * 2
    assert count(tokens) == 8_062_002 + 2 * (195 * 48 * 15 + 4 * 48) == 8_343_186
    assert [layer.heads for layer in paper.dim.branches[0]] == [3, 6, 12, 24]


def test_names_and_shapes_of_the_codes_variant_are_the_public_codes():
    with torch.device("meta"):
        state = SwinFUSE(dim="code").state_dict()
    theirs = {name: tuple(x.shape) for name, x in rename(state, SWINFUSE, export=True).items()}
    assert rename(rename(state, SWINFUSE, export=True), SWINFUSE).keys() == state.keys()
    assert {name.split(".")[0] for name in theirs} == {
        "patch_embed",
        "mh1",
        "mh2",
        *(f"layers{i}" for i in range(1, 5)),
    }
    assert theirs["mh1.in_proj_weight"] == (6912, 2304) and theirs["mh2.out_proj.bias"] == (2304,)
    assert theirs["layers4.0.downsample.reduction.weight"] == (768, 3072)
    assert theirs["layers1.0.blocks.1.mlp.linear1.weight"] == (192, 48)


def test_queries_come_from_the_other_branch_and_the_embedding_is_multiplied():
    net = build(**PLANES)
    assert isinstance(net, EncodesPairs)
    a, b = volumes(2)
    e, f = (rows(net.encoder.patch_embed(v)) for v in (a, b))
    x, y = e, f
    for first, second in zip(*net.dim.branches, strict=True):
        x, y = theirs(first, True)(y, x), theirs(second, True)(x, y)
    for features, found, embedding in zip(net.encode_pair(a, b), (x, y), (e, f), strict=True):
        torch.testing.assert_close(features.extra["dim"], found)
        mixed = (found * embedding).view(2, 4, 2, 3, 4).movedim(1, -1)
        torch.testing.assert_close(features.summary, net.encoder.encode(mixed, None).summary)
        assert len(features.stages) == 2 and len(features.summary) == 2


def test_one_view_alone_gives_the_mean_of_what_the_pair_of_it_with_itself_gives():
    net = build(**PLANES)
    (a,) = volumes(1)
    first, second = net.encode_pair(a, a)
    found = net(a).extra["dim"]
    torch.testing.assert_close(found, (first.extra["dim"] + second.extra["dim"]) / 2)
    assert not torch.allclose(first.summary, second.summary)


@pytest.mark.parametrize("settings", [PLANES, {**TINY, "dim_width": 4, "dim_heads": (2, 4)}])
def test_a_pair_does_not_depend_on_who_else_is_in_the_batch_nor_is_its_drop_path(settings):
    net = build(**settings, drop_path=0.5)
    a, b = volumes(2)
    sample = torch.tensor([5, 11])
    whole = net.encode_pair(a, b, Key(3, 1, sample))
    for i in range(2):
        alone = net.encode_pair(a[i : i + 1], b[i : i + 1], Key(3, 1, sample[i : i + 1]))
        for x, y in zip(whole, alone, strict=True):
            torch.testing.assert_close(x.summary[i : i + 1], y.summary)
    same = [net.encode_pair(a, a, Key(seed, 1, sample)) for seed in range(4)]
    assert any(not torch.allclose(x.summary, same[0][0].summary) for x, _ in same[1:])


def test_the_codes_variant_lets_the_samples_of_a_batch_attend_to_each_other():
    net = build(**{**PLANES, "dim_heads": (2,)}, dim="code")
    a, b = volumes(2)
    e = rows(net.encoder.patch_embed(a))
    found = sum(theirs(branch[0], False)(e, e) for branch in net.dim.branches) / 2
    features = net(a)
    torch.testing.assert_close(features.extra["dim"], found)
    embedding = found.view(2, 4, 2, 3, 4).movedim(1, -1)  # not multiplied
    torch.testing.assert_close(features.summary, net.encoder.encode(embedding, None).summary)
    assert not torch.allclose(net(a[:1]).summary, features.summary[:1])
    torch.testing.assert_close(net.encode_pair(a, b)[0].summary, features.summary)


def test_tokens_read_the_other_views_window_and_nothing_beyond():
    net = build(**{**TINY, "window": 2}, dim_width=4, dim_heads=(2,))
    a, b = volumes(2)
    other = b.clone()
    other[..., :4, :4, 4:] += 1.0  # the last two tokens of the last axis
    before, after = (net.encode_pair(a, y)[0].extra["dim"].view(2, 2, 3, 4, 4) for y in (b, other))
    assert torch.equal(before[:, :, :, :2], after[:, :, :, :2])
    assert not torch.allclose(before[:, :, :2, 2:], after[:, :, :2, 2:])


def test_a_decoder_takes_it_as_its_encoder():
    net = SwinUNet(SwinFUSE(**PLANES, taps="monai"), 2, "instance")
    assert net(torch.randn(1, 1, 10, *SIZE[1:])).shape == (1, 2, 10, *SIZE[1:])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"planes of 12 tokens.*got 4 x 4.*set dim_width to 16, or"):
        SwinFUSE(**PLANES)(torch.zeros(1, 1, 4, 8, 8))
    with pytest.raises(ValueError, match="one layer"):
        SwinFUSE(**PLANES, dim="code")
    with pytest.raises(ValueError, match="not on tokens"):
        SwinFUSE(**TINY, dim="code", dim_width=4)
    with pytest.raises(ValueError, match="dim must be one of"):
        SwinFUSE(dim="text")
    with pytest.raises(ValueError, match="dim_heads must divide"):
        SwinFUSE(**{**PLANES, "dim_heads": (5,)})
    with pytest.raises(ValueError, match="need one size"):
        SwinFUSE(**PLANES).encode_pair(torch.zeros(1, 1, 4, 6, 8), torch.zeros(1, 1, 6, 6, 8))
