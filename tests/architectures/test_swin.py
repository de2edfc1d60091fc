"""The 3D Swin: anchors, equality with MONAI's, masks, gradients, one graph."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from medfast.architectures import BACKBONES, Swin
from medfast.types import Backbone, Features, Key, Mask

TINY = {"embed": 8, "depths": (2, 2), "heads": (2, 4), "window": 2, "sa_heads": 4}


def count(module):
    return sum(p.numel() for p in module.parameters())


def tensors(features: Features):
    found = [*features.stages, features.summary, *features.extra.get("taps", ())]
    return found if features.attention is None else [*found, features.attention]


def weighted_sum(outputs):
    generator = torch.Generator().manual_seed(7)
    return sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)


def test_parameter_counts_are_the_papers():
    swin = BACKBONES["swin"]()
    assert count(swin) == 10_571_968
    assert count(swin.patch_embed) == 528
    assert [count(stage) for stage in swin.stages] == [96_920, 375_416, 4_173_760, 5_925_344]
    assert [count(stage.merge) for stage in swin.stages] == [37_632, 148_992, 592_896, 2_365_440]
    assert count(BACKBONES["swin"](semantic_attention=3)) == 14_122_816
    assert count(BACKBONES["swin"](taps="smit")) == 10_573_408
    assert count(BACKBONES["swin"](taps="monai")) == 10_571_968
    smit = BACKBONES["swin"](depths=(2, 2, 4, 2), heads=(4, 4, 4, 4), qkv_bias=False, taps="smit")
    assert count(smit) == 8_763_784


def test_shapes_of_smart_at_128():
    swin = Swin(semantic_attention=3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        features = swin(torch.empty(2, 1, 128, 128, 128))
    assert [tuple(x.shape[1:]) for x in features.stages] == [
        (32, 32, 32, 96), (16, 16, 16, 192), (8, 8, 8, 384), (4, 4, 4, 768)
    ]  # fmt: skip
    assert features.summary.shape == (2, 384)
    assert features.attention.shape == (2, 512)
    assert isinstance(swin, Backbone)
    assert swin.channels == (96, 192, 384, 768) and swin.strides == (4, 8, 16, 32) and swin.embed == 48


@pytest.mark.parametrize("size", [(8, 8, 8), (16, 12, 8), (9, 13, 11)])
def test_maps_follow_channels_and_strides(size):
    swin = Swin(**TINY, in_channels=2, taps="monai")
    features = swin(torch.randn(1, 2, *size))
    for stage, channels, stride in zip(features.stages, swin.channels, swin.strides, strict=True):
        assert stage.shape == (1, *(-(-s // stride) for s in size), channels)
    torch.testing.assert_close(features.summary, features.stages[-1].mean(dim=(1, 2, 3)))
    assert features.attention is None
    assert [x.shape[-1] for x in features.extra["taps"]] == [8, 16, 32]


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_semantic_attention_reads_the_stage_it_is_told(stage):
    torch.manual_seed(0)
    swin = Swin(embed=12, depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), semantic_attention=stage, sa_heads=4).double()
    features = swin(torch.randn(2, 1, 32, 16, 24, dtype=torch.float64))
    read = features.stages[stage - 1]
    assert features.summary.shape == (2, swin.channels[stage - 1])
    assert features.attention.shape == (2, read[0, ..., 0].numel())
    cls, attention = swin.semantic(read)
    assert torch.equal(features.summary, cls) and torch.equal(features.attention, attention)


def test_sa_type_and_sa_heads_reach_the_module_and_leave_the_stages_alone():
    torch.manual_seed(0)
    nets = [Swin(**{**TINY, **s}, semantic_attention=1) for s in ({}, {"sa_type": "vit"}, {"sa_heads": 8})]
    assert len({count(net) for net in nets}) == 1
    with torch.no_grad():
        for block in nets[0].semantic.blocks:
            block.gamma1.fill_(0.5)
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    volume = torch.randn(1, 1, 16, 16, 16)
    seen = [net(volume) for net in nets]
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other.stages, seen[0].stages, strict=True))
        assert not torch.allclose(other.summary, seen[0].summary)
        assert other.attention.shape == seen[0].attention.shape


def monai_name(name):
    """Our parameter name -> MONAI's."""
    parts = name.split(".")
    if parts[0] == "stages":
        parts = [f"layers{int(parts[1]) + 1}", "0", *parts[2:]]
    renamed = {"merge": "downsample", "fc1": "linear1", "fc2": "linear2"}
    return ".".join(renamed.get(part, part) for part in parts)


@pytest.mark.parametrize(
    "merge, window, size",
    [
        ("monai", 2, (32, 32, 32)),  # the last stage is clipped
        ("monai", 2, (48, 24, 40)),
        ("monai", 4, (32, 32, 32)),  # clipped at two stages
        ("monai", 3, (23, 30, 17)),  # odd, padded, clipped on some axes only
        ("monai_v2", 3, (23, 30, 17)),
    ],
)
def test_equals_monai_in_values_and_gradients(merge, window, size):
    nets = pytest.importorskip("monai.networks.nets.swin_unetr")
    torch.manual_seed(0)
    kwargs = {"patch_norm": True, "spatial_dims": 3, "downsample": {"monai": "merging", "monai_v2": "mergingv2"}[merge]}
    theirs = nets.SwinTransformer(2, 8, (window,) * 3, (2,) * 3, (2, 1, 2, 2), (1, 2, 4, 2), **kwargs).double()
    ours = Swin(
        2, 8, (2, 1, 2, 2), (1, 2, 4, 2), window, merge=merge, clip=True, bias_index="sliced", taps="monai"
    ).double()
    weights = dict(theirs.named_parameters())
    for parameter in weights.values():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict({name: weights[monai_name(name)] for name in ours.state_dict()})
    assert count(ours) == count(theirs)

    volume = torch.randn(2, 2, *size, dtype=torch.float64)
    features = ours(volume)
    raw = [x.movedim(1, -1) for x in theirs(volume, normalize=False)]
    hidden = [x.movedim(1, -1) for x in theirs(volume, normalize=True)]
    for got, expected in zip((*features.stages, *features.extra["taps"]), (*raw[1:], *hidden), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    weighted_sum([*features.stages, *features.extra["taps"]]).backward()
    weighted_sum([*raw[1:], *hidden]).backward()
    for name, parameter in ours.named_parameters():
        expected = weights[monai_name(name)].grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_smit_taps_are_the_maps_before_each_merge():
    torch.manual_seed(0)
    swin = Swin(**TINY, taps="smit").double()
    taps = swin(torch.randn(1, 1, 16, 16, 16, dtype=torch.float64)).extra["taps"]
    assert [tuple(x.shape[1:]) for x in taps] == [(8, 8, 8, 8), (4, 4, 4, 16), (2, 2, 2, 32)]
    stage = swin.stages[0]
    volume = torch.randn(1, 1, 16, 16, 16, dtype=torch.float64)
    torch.nn.init.normal_(swin.tap_norms[0].weight)
    features = swin(volume)
    x = swin.patch_embed(volume)
    for block in stage.blocks:
        x = block(x, None)
    first = F.layer_norm(x, (8,)) * swin.tap_norms[0].weight
    torch.testing.assert_close(features.extra["taps"][0], first)
    assert torch.equal(features.extra["taps"][-1], features.stages[-1])


def test_default_windows_are_padded_not_clipped():
    """SMIT's 6^3 stage is padded to 8^3 by windows of 4; clipping differs where an axis is shorter than the window."""
    torch.manual_seed(0)
    padded, clipped = Swin(**{**TINY, "window": 4}), Swin(**{**TINY, "window": 4}, clip=True)
    clipped.load_state_dict(padded.state_dict())
    small, large = torch.randn(1, 1, 4, 4, 4), torch.randn(1, 1, 32, 32, 32)
    assert not torch.allclose(padded(small).stages[0], clipped(small).stages[0], atol=1e-4)
    torch.testing.assert_close(padded(large).stages[0], clipped(large).stages[0])


def test_fill_replaces_exactly_the_hidden_tokens():
    torch.manual_seed(0)
    swin = Swin(**TINY, taps="monai").double()
    volume, fill = torch.randn(2, 1, 18, 16, 12, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    where = torch.rand(2, 3, 2, 2) < 0.5  # tokens (9, 8, 6), cells of 4: the first and last axis are cut
    seen, masked = (swin(volume, m, fill).extra["taps"][0] for m in (None, Mask(where)))
    hidden = torch.stack([where[:, i // 4, j // 4, k // 4] for i in range(9) for j in range(8) for k in range(6)], 1)
    hidden = hidden.reshape(2, 9, 8, 6)
    torch.testing.assert_close(masked[hidden], F.layer_norm(fill, (8,)).expand(int(hidden.sum()), -1))
    assert torch.equal(masked[~hidden], seen[~hidden])


def test_voxels_of_hidden_cells_do_not_matter_and_others_do():
    torch.manual_seed(0)
    swin = Swin(**TINY)
    volume, fill = torch.randn(1, 1, 16, 16, 16), torch.randn(8)
    where = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    where[0, 0, 1, 0] = True
    first = swin(volume, Mask(where), fill).stages[-1]
    volume[:, :, :8, 8:, :8] += 1.0
    assert torch.equal(swin(volume, Mask(where), fill).stages[-1], first)
    volume[:, :, 8, 8, 8] += 1.0
    assert not torch.equal(swin(volume, Mask(where), fill).stages[-1], first)


@pytest.mark.parametrize("taps", [None, "monai", "smit"])
@pytest.mark.parametrize("semantic_attention, sa_type", [(None, "class"), (1, "class"), (1, "vit")])
def test_gradients_reach_every_parameter_and_the_fill(taps, semantic_attention, sa_type):
    torch.manual_seed(0)
    swin = Swin(**TINY, taps=taps, semantic_attention=semantic_attention, sa_type=sa_type).double()
    for parameter in swin.parameters():  # a [CLS] of zeros is a query of zeros: at first its weights get no gradient
        torch.nn.init.normal_(parameter, std=0.3)
    fill = torch.randn(8, dtype=torch.float64, requires_grad=True)
    volume = torch.randn(2, 1, 16, 16, 16, dtype=torch.float64)
    weighted_sum(tensors(swin(volume, Mask(torch.rand(2, 4, 4, 4) < 0.5), fill))).backward()
    for name, parameter in [*swin.named_parameters(), ("fill", fill)]:
        assert parameter.grad is not None, name
        # softmax does not see what is added to every key: this bias has no effect in any class attention
        assert name.endswith(".k.bias") or parameter.grad.abs().max() > 1e-12, name


def test_initialisation_is_seeded_and_forward_draws_from_the_key_alone():
    def build():
        torch.manual_seed(11)
        return Swin(**TINY, semantic_attention=2, drop_path=0.5)

    first, second = build(), build()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    table = Swin().stages[3].blocks[0].attn.relative_position_bias_table
    assert table.std().item() == pytest.approx(0.02, rel=0.05)
    state = torch.get_rng_state()
    first(torch.randn(2, 1, 8, 8, 8, generator=torch.Generator()), key=Key(0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sa_type", ["class", "vit"])
def test_compiles_into_one_graph(sa_type):
    torch.manual_seed(0)
    swin = Swin(
        embed=8, depths=(2,), heads=(2,), window=2, semantic_attention=1, sa_heads=4, sa_type=sa_type, drop_path=0.5
    )
    volume, fill = torch.randn(2, 1, 6, 8, 9), torch.randn(8, requires_grad=True)
    mask = Mask(torch.rand(2, 2, 2, 3) < 0.5)
    key = Key(1, torch.tensor(4), torch.tensor([3, 9]))
    compiled = torch.compile(swin, fullgraph=True, backend="aot_eager")
    results = []
    for run in (swin, compiled):
        outputs = tensors(run(volume, mask, fill, key))
        results.append((*outputs, *torch.autograd.grad(weighted_sum(outputs), [fill, *swin.parameters()])))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-5)


VOLUME = torch.zeros(2, 1, 8, 8, 8)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"depths": (2, 2, 2)}, "one entry per stage"),
        ({"heads": (3, 4)}, "heads must divide"),
        ({"drop_path": 1.0}, r"in \[0, 1\)"),
        ({"merge": "conv"}, "merge must be one of 'smit', 'monai', 'monai_v2', 'monai_legacy', got 'conv'"),
        ({"bias_index": "flat"}, "bias_index must be one of"),
        ({"taps": "unet"}, "taps must be one of"),
        ({"semantic_attention": 3}, "semantic_attention must be one of None, 1, 2, got 3"),
        ({"semantic_attention": True}, "got True"),
        ({"semantic_attention": 1, "sa_heads": 5}, "sa_heads must divide"),
        ({"sa_type": "cait"}, "sa_type must be one of 'class', 'vit', got 'cait'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Swin(**{**TINY, **settings})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((VOLUME[0],), r"expected a volume \(b, 1, d, h, w\)"),
        ((VOLUME.repeat(1, 2, 1, 1, 1),), r"\(2, 2, 8, 8, 8\)"),
        ((VOLUME[:, :, :3],), r"\(3, 8, 8\) voxels are too few .* at least \(4, 4, 4\)"),
        ((VOLUME, Mask(torch.zeros(2, 3, 4, 4).bool()), torch.zeros(8)), r"\(3, 4, 4\) cells does not fit"),
        ((VOLUME, Mask(torch.zeros(1, 4, 4, 4).bool()), torch.zeros(8)), "mask.where must be bool"),
        ((VOLUME, Mask(torch.zeros(2, 4, 4, 4)), torch.zeros(8)), "torch.float32"),
        ((VOLUME, Mask(torch.zeros(2, 4, 4, 4).bool())), "a mask needs a fill"),
        ((VOLUME, Mask(torch.zeros(2, 4, 4, 4).bool()), torch.zeros(9)), r"of shape \(8,\), got \(9,\)"),
        ((VOLUME, None, None, Key(0, 0, torch.arange(3))), r"\(2,\) for this batch, got \(3,\)"),
    ],
)
def test_input_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Swin(**TINY)(*arguments)
