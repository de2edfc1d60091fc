"""What every encoder and network owes the rest, over both tables: an entry is tested by being there.

A new one needs a line in ``CASES``: constructor arguments that make it tiny, and a size it takes that is neither even
nor the same on every axis.
"""

import inspect
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from weights import weighted_sum

from medfast.architectures import BACKBONES, NETWORKS
from medfast.types import Backbone, Features, Key, Mask, Network


@dataclass(frozen=True)
class Case:
    """settings: constructor arguments, in_channels left out. size: of the volume, odd. silent: ends of the names of
    parameters that no output can depend on (a bias on keys). masks: whether it takes masks at all."""

    table: str
    name: str
    settings: dict = field(default_factory=dict)
    size: tuple[int, ...] = (9, 14, 11)
    silent: tuple[str, ...] = ()
    masks: bool = True


SWIN = {"embed": 8, "depths": (1, 1), "heads": (2, 4), "window": 2, "drop_path": 0.0}
NNFORMER = {"patch": (2, 4, 4), "embed": 8, "depths": (2, 1), "heads": (2, 4), "windows": (2, 2), "drop_path": 0.0}
DAE = {"widths": (16, 24), "depths": (1, 1)}  # two channels for each head at least: one alone has no softmax
VIT = {"size": 16, "patch": 4, "embed": 12, "depth": 2, "heads": 2, "drop_path": 0.0}
CASES = [
    Case("backbones", "swin", {**SWIN, "depths": (2, 1), "drop_path": 0.5}),
    Case("backbones", "swin", {**SWIN, "semantic_attention": 2, "sa_heads": 4, "taps": "smit"}, silent=(".k.bias",)),
    Case("backbones", "vit", {**VIT, "drop_path": 0.5}),
    Case("backbones", "vit", {**VIT, "cls": True, "positions": "sincos", "taps": (0,)}),
    Case("backbones", "swinfuse", {**SWIN, "drop_path": 0.5, "dim_width": 8, "dim_heads": (2, 4)}),
    Case("backbones", "swinfuse", {**SWIN, "dim_width": 42, "dim_heads": (2, 3), "taps": "monai"}),
    Case("backbones", "nnformer", {**NNFORMER, "drop_path": 0.5}),
    Case("backbones", "nnformer", {**NNFORMER, "bias_index": "legacy", "every_norm": False}),
    Case("backbones", "dae_former", DAE, size=(19, 14), silent=(".keys.bias",)),
    Case("backbones", "dae_former", {**DAE, "patch_embed": "merge"}, size=(19, 14), silent=(".keys.bias",)),
    Case("backbones", "resnet50", {"width": 8, "depths": (1, 1, 1, 1)}, masks=False),
    Case("networks", "nnformer", {**NNFORMER, "drop_path": 0.5, "depths": (1, 1), "deep_supervision": False}),
    Case("networks", "nnformer", {**NNFORMER, "depths": (2, 1), "deep_supervision": False, "bias_index": "legacy"}),
    Case("networks", "dae_former", {**DAE, "coarse_blocks": False}, size=(19, 14), silent=(".keys.bias",)),
    Case("networks", "dae_former", {**DAE, "skips": False}, size=(19, 14), silent=(".keys.bias",)),
    Case("networks", "swin_unetr", {**SWIN, "residual_convs": True}),
    Case("networks", "smit_unet", SWIN),
    Case("networks", "smit_unet", {**SWIN, "drop_path": 0.5, "norm": "instance", "skip_norm": "plain"}),
    Case("networks", "unetr", {**VIT, "depth": 4, "taps": (0, 1, 2), "width": 2, "classes": 3}),
]
TABLES = {"backbones": BACKBONES, "networks": NETWORKS}
IDS = [f"{case.name}-{i}" for i, case in enumerate(CASES)]
# compiling is slow: one case of a name, a network where there is one, for its encoder is in it
ONE_EACH = list({c.name: c for c in reversed(sorted(CASES, key=lambda c: c.table == "backbones"))}.values())[::-1]
every_case = pytest.mark.parametrize("case", CASES, ids=IDS)


def build(case: Case, dtype=torch.float64, **more):
    torch.manual_seed(0)
    net = TABLES[case.table][case.name](in_channels=2, **case.settings, **more).to(dtype)
    for parameter in net.parameters():  # what starts at zero or one would hide what it is multiplied with
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return net


def encoder(net) -> Backbone:
    return net.encoder if hasattr(net, "encoder") else net


def volumes(case: Case, batch=2, dtype=torch.float64) -> Tensor:
    return torch.randn(batch, 2, *case.size, dtype=dtype, generator=torch.Generator().manual_seed(5))


def look(net, *arguments) -> Features:
    return net.features(*arguments) if hasattr(net, "features") else net(*arguments)


def outputs(features: Features) -> list[Tensor]:
    """Every tensor in there."""
    extra = [x for value in features.extra.values() for x in ((value,) if isinstance(value, Tensor) else value)]
    attention = [] if features.attention is None else [features.attention]
    return [*features.stages, features.summary, *attention, *extra]


def strides(net, stage: int, axes: int) -> tuple[int, ...]:
    stride = encoder(net).strides[stage]
    return (stride,) * axes if isinstance(stride, int) else tuple(stride)


def some_mask(net, case: Case, batch=2) -> Mask:
    """Cells of the first stage's stride, about half of them hidden, the first never and the second always."""
    cells = [-(-length // s) for length, s in zip(case.size, strides(net, 0, len(case.size)), strict=True)]
    where = torch.rand(batch, *cells, generator=torch.Generator().manual_seed(2)) < 0.5
    where[(slice(None), *[0] * len(cells))] = False
    where[(slice(None), *[0] * (len(cells) - 1), 1)] = True
    return Mask(where)


def test_every_entry_has_a_case_and_a_case_an_entry():
    listed = {(table, name) for table, entries in TABLES.items() for name in entries}
    assert {(case.table, case.name) for case in CASES} == listed


@every_case
def test_maps_are_channels_last_and_as_channels_and_strides_say(case):
    net = build(case)
    assert isinstance(encoder(net), Backbone) and (case.table == "backbones" or isinstance(net, Network))
    features = look(net, volumes(case))
    assert len(features.stages) == len(encoder(net).channels) == len(encoder(net).strides)
    for i, (stage, channels) in enumerate(zip(features.stages, encoder(net).channels, strict=True)):
        grid = [-(-length // s) for length, s in zip(case.size, strides(net, i, len(case.size)), strict=True)]
        assert stage.shape == (2, *grid, channels)
    assert features.summary.ndim == 2 and len(features.summary) == 2
    attended = encoder(net).semantic_attention
    assert (attended is None) == (features.attention is None)
    if features.attention is not None:
        assert features.attention.shape == (2, features.stages[attended - 1][0, ..., 0].numel())
    if case.table == "networks":
        logits = net(volumes(case))
        assert logits.shape[0] == 2 and logits.shape[2:] == case.size
        stride = getattr(net, "decoder_stride", 1)
        stride = (stride,) * len(case.size) if isinstance(stride, int) else stride
        grid = tuple(-(-length // s) for length, s in zip(case.size, stride, strict=True))
        assert features.extra["decoder"].shape[:-1] == (2, *grid)


@every_case
def test_gradients_reach_every_parameter_and_the_fill(case):
    net = build(case)
    fill = torch.randn(encoder(net).embed, dtype=torch.float64, requires_grad=True)
    arguments = (some_mask(net, case), fill) if case.masks else ()
    made = outputs(look(net, volumes(case), *arguments))
    weighted_sum([*made, net(volumes(case))] if case.table == "networks" else made).backward()
    named = [*net.named_parameters(), *([("fill", fill)] if case.masks else [])]
    for name, parameter in named:
        assert parameter.grad is not None, name
        assert name.endswith(case.silent or "-") or parameter.grad.abs().max() > 1e-12, name


@every_case
def test_finite_under_bf16_autocast(case):
    net = build(case, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        volume = volumes(case, dtype=torch.float32)
        made = outputs(look(net, volume)) + ([net(volume)] if case.table == "networks" else [])
        loss = sum(x.float().square().mean() for x in made)
    loss.backward()
    assert all(x.isfinite().all() for x in made)
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_one_graph_that_gives_what_eager_gives(case):
    torch.compiler.reset()  # cases share ``look``, and it is compiled anew for each of them
    net = build(case, torch.float32).eval()  # statistics of a batch would differ between the two runs
    volume, key = volumes(case, dtype=torch.float32), Key(1, torch.tensor(4), torch.tensor([3, 9]))
    fill = torch.randn(encoder(net).embed, requires_grad=True) if case.masks else None
    mask = some_mask(net, case) if case.masks else None
    results = []
    for run in (look, torch.compile(look, fullgraph=True, backend="aot_eager")):
        made = outputs(run(net, volume, mask, fill, key))
        wanted = [p for p in (fill, *net.parameters()) if p is not None]
        gradients = torch.autograd.grad(weighted_sum(made), wanted, allow_unused=case.table == "networks")
        results.append((*made, *(g for g in gradients if g is not None)))
    assert len(results[0]) == len(results[1])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-3, atol=1e-4 * max(1.0, eager.abs().max().item()))


@every_case
def test_deterministic_and_the_same_for_any_split_of_the_batch(case):
    net, volume = build(case).eval(), volumes(case, batch=3)
    sample = torch.tensor([7, 900, 3])
    mask = some_mask(net, case, batch=3) if case.masks else None
    fill = torch.ones(encoder(net).embed, dtype=torch.float64) if case.masks else None

    def part(rows):
        cut = None if mask is None else Mask(mask.where[rows])
        return outputs(look(net, volume[rows], cut, fill, Key(5, 2, sample[rows])))

    state = torch.get_rng_state()
    whole, again = part(slice(None)), part(slice(None))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(whole, map(torch.cat, zip(part(slice(0, 1)), part(slice(1, 3)), strict=True)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    if case.settings.get("drop_path"):
        assert not torch.allclose(encoder(net)(volume, mask, fill).stages[-1], whole[len(encoder(net).strides) - 1])


@every_case
def test_a_mask_hides_its_voxels_and_no_others(case):
    if not case.masks:
        pytest.skip("takes no masks")
    net, volume = build(case).eval(), volumes(case)
    mask, fill = some_mask(net, case), torch.ones(encoder(net).embed, dtype=torch.float64)
    hidden = mask.where
    for axis, stride in enumerate(strides(net, 0, len(case.size)), start=1):
        hidden = hidden.repeat_interleave(stride, axis).narrow(axis, 0, case.size[axis - 1])
    masked = encoder(net)(volume, mask, fill)
    for where, same in ((hidden, True), (~hidden, False)):
        other = encoder(net)(torch.where(where.unsqueeze(1), volume + 1.0, volume), mask, fill)
        for a, b in zip(outputs(other), outputs(masked), strict=True):
            assert torch.equal(a, b) == same
    assert not torch.equal(encoder(net)(volume).stages[0], masked.stages[0])
    assert not torch.equal(encoder(net)(volume, mask, 2 * fill).stages[0], masked.stages[0])


@every_case
def test_recomputed_stages_give_the_same_values_and_gradients(case):
    if "checkpoint" not in inspect.signature(TABLES[case.table][case.name]).parameters:
        pytest.skip("keeps its activations")
    results, saved = [], []
    for recompute in (False, True):
        net, kept = build(case, checkpoint=recompute), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            made = outputs(look(encoder(net), volumes(case), None, None, Key(1, 0, torch.tensor([4, 2]))))
        saved.append(len(kept))
        results.append([*made, *torch.autograd.grad(weighted_sum(made), list(encoder(net).parameters()))])
    assert saved[1] < 0.7 * saved[0]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
