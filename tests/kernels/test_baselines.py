"""The baseline that GPU rows are compared with computes what MONAI's Swin block computes, gradients included."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
baselines = pytest.importorskip("baselines")
swin = pytest.importorskip("monai.networks.nets.swin_unetr")


@pytest.mark.parametrize("attend", [baselines.eager, baselines.sdpa])
@pytest.mark.parametrize(("grid", "window", "shift"), [(8, 4, 2), (8, 4, 0), (5, 3, 1)])
def test_equal_to_monai(grid, window, shift, attend):
    torch.manual_seed(0)
    block = swin.SwinTransformerBlock(12, 2, (window,) * 3, (shift,) * 3, qkv_bias=False, norm_layer=nn.Identity)
    block.attn.proj = nn.Identity()
    block = block.double()
    table = block.attn.relative_position_bias_table
    table.data.normal_()
    side = -(-grid // window) * window
    mask = swin.compute_mask([side] * 3, (window,) * 3, (shift,) * 3, "cpu")
    x = torch.randn(2, *[grid] * 3, 12, dtype=torch.float64)
    run = baselines.Partitioned(grid, window, shift, attend)
    results = []
    for call in (lambda: block.forward_part1(x, mask), lambda: run(block.attn.qkv(x).unflatten(-1, (3, 2, 6)), table)):
        out = call()
        results.append([out, *torch.autograd.grad(out.sin().sum(), (block.attn.qkv.weight, table))])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
