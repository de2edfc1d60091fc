"""Patch embedding, merging, stochastic depth, masks on token grids."""

import itertools

import pytest
import torch
from torch import nn

from medfast.architectures.blocks import (
    MERGE_ORDERS,
    MLP,
    PatchEmbedding,
    PatchMerging,
    add_branch,
    cell_size,
    cells_to_tokens,
    init_weights,
)

# fidelity: orders as the four public codes have them, (first, second, third spatial axis)
ORDERS = {
    "smit": "000 100 010 001 110 011 101 111",
    "monai": "000 100 010 001 110 101 011 111",
    "monai_v2": "000 001 010 011 100 101 110 111",
    "monai_legacy": "000 100 010 001 101 010 001 111",
}


@pytest.mark.parametrize("name", ORDERS)
def test_merging_takes_neighbours_in_the_order_of_its_preset(name):
    merge = PatchMerging(1, name)
    merge.norm, merge.reduction = nn.Identity(), nn.Identity()
    x = torch.zeros(1, 2, 2, 2, 1)
    for i, j, k in itertools.product(range(2), repeat=3):
        x[0, i, j, k] = 100 * i + 10 * j + k
    assert merge(x).flatten().tolist() == [float(entry) for entry in ORDERS[name].split()]
    assert set(MERGE_ORDERS) == set(ORDERS)


def test_merging_pads_odd_axes_with_zeros_at_the_far_end():
    merge = PatchMerging(1, "monai_v2")
    merge.norm, merge.reduction = nn.Identity(), nn.Identity()
    out = merge(torch.ones(1, 3, 2, 1, 1))
    assert out.shape == (1, 2, 1, 1, 8)
    assert out[0, 0, 0, 0].tolist() == [1, 0, 1, 0, 1, 0, 1, 0]
    assert out[0, 1, 0, 0].tolist() == [1, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("order", ORDERS)
def test_mergings_gradient_is_that_of_slices(order):
    torch.manual_seed(0)
    merge = PatchMerging(3, order).double()
    results = []
    for dtype in (torch.float64, torch.float32):
        x = torch.randn(2, 6, 3, 4, 3, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        padded = nn.functional.pad(x, (0, 0, 0, 0, 0, 1))
        slices = torch.cat([padded[:, i::2, j::2, k::2] for i, j, k in MERGE_ORDERS[order]], dim=-1)
        merge = merge.to(dtype)
        outputs = merge(x), merge.reduction(merge.norm(slices))
        assert torch.equal(*outputs)
        weight = torch.randn(outputs[0].shape, dtype=dtype)
        results += [torch.autograd.grad((out * weight).sum(), x)[0] for out in outputs]
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results[2], results[3], rtol=1e-5, atol=1e-5)


def test_embedding_equals_a_plain_evaluation_and_pads_the_far_end():
    torch.manual_seed(0)
    embed = PatchEmbedding(2, 6, 2).double()
    nn.init.normal_(embed.norm.weight)
    volume = torch.randn(1, 2, 5, 4, 3, dtype=torch.float64)
    out = embed(volume)
    assert out.shape == (1, 3, 2, 2, 6)
    padded = torch.zeros(2, 6, 4, 4, dtype=torch.float64)
    padded[:, :5, :, :3] = volume[0]
    for cell in itertools.product(range(3), range(2), range(2)):
        d, h, w = (2 * i for i in cell)
        patch = padded[:, d : d + 2, h : h + 2, w : w + 2]
        raw = (embed.proj.weight * patch).sum(dim=(1, 2, 3, 4)) + embed.proj.bias
        normed = (raw - raw.mean()) / (raw.var(correction=0) + 1e-5).sqrt() * embed.norm.weight + embed.norm.bias
        torch.testing.assert_close(out[(0, *cell)], normed, rtol=1e-10, atol=1e-10)


def test_mlp_uses_the_exact_gelu():
    mlp = MLP(3, 5).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias, rtol=1e-12, atol=1e-12)


def test_initialisation_of_linear_layers():
    torch.manual_seed(0)
    layer = nn.Linear(300, 300)
    init_weights(layer)
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not layer.bias.any()


def test_dropped_samples_keep_the_residual_and_kept_ones_are_scaled():
    x, branch = torch.randn(3, 2, 2, 2, 4), torch.ones(3, 2, 2, 2, 4)
    out = add_branch(x, branch, torch.tensor([True, False, True]), 0.75)
    torch.testing.assert_close(out[[0, 2]], x[[0, 2]] + 4.0)
    assert torch.equal(out[1], x[1])
    assert torch.equal(add_branch(x, branch, None, 0.75), x + branch)


def test_stochastic_depth_scale_is_not_rounded_to_16_bits():
    x, branch = torch.zeros(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 1.375, dtype=torch.bfloat16)
    out = add_branch(x, branch, torch.tensor([True]), 0.1)
    assert out.dtype == torch.bfloat16
    assert out.item() == 1.53125  # nearest to 1.5278; with the scale in 16 bits it would be 1.5234375


@pytest.mark.parametrize(
    "tokens, cells, k",
    [
        ((64, 64, 64), (8, 8, 8), 8),
        ((64, 64, 64), (64, 64, 64), 1),
        ((5, 9, 12), (3, 5, 6), 2),
        ((6, 6, 6), (2, 2, 2), 4),  # 3 and 4 both do, the power of two is taken
        ((12, 12, 9), (4, 4, 3), 3),  # no power of two does
        ((7, 13, 3), (1, 1, 1), 16),
        ((1, 1, 1), (1, 1, 1), 1),
    ],
)
def test_cells_repeat_over_their_tokens_and_the_last_is_cut(tokens, cells, k):
    assert cell_size(tokens, cells) == k
    where = torch.rand(2, *cells, generator=torch.Generator().manual_seed(1)) < 0.5
    up = cells_to_tokens(where, tokens)
    assert up.shape == (2, *tokens)
    index = torch.meshgrid(*(torch.arange(t) // k for t in tokens), indexing="ij")
    assert torch.equal(up, where[:, index[0], index[1], index[2]])


def test_a_mask_that_fits_no_cell_size_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match=r"\(3, 4, 4\) cells .* \(8, 8, 8\) tokens.*\(4, 4, 4\), \(2, 2, 2\)"):
        cell_size((8, 8, 8), (3, 4, 4))
