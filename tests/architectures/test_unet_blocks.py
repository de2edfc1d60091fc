"""Convolutional blocks of the U-Nets: the norm that forgets its input, up-sampling to odd skips."""

import pytest
import torch
from torch.nn import functional as F

from medfast.architectures.unet_blocks import BatchNorm, Conv, InstanceNorm, ResidualBlock, Up, UpBlock


@pytest.mark.parametrize("slope", [1.0, 0.01])
def test_instance_norm_equals_torchs_in_values_and_gradients(slope):
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 4, 5, 6, dtype=torch.float64) * 3 + 7).requires_grad_()
    plain = F.leaky_relu(F.instance_norm(x.movedim(-1, 1)).movedim(1, -1), slope)
    made = InstanceNorm(6)(x, slope)
    torch.testing.assert_close(made, plain, rtol=1e-11, atol=1e-11)
    weight = torch.randn_like(made)
    got, expected = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (made, plain))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


def test_instance_norm_keeps_its_output_alone_and_computes_16_bits_in_32():
    norm, kept = InstanceNorm(4), []
    x = (torch.randn(1, 6, 6, 6, 4) + 300).bfloat16().requires_grad_()  # a mean in 16 bits would be off by 1
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        made = norm(x, 0.01)
    assert made.dtype == torch.bfloat16
    assert [y.data_ptr() for y in kept if y.numel() == x.numel()] == [made.data_ptr()]
    wide = F.leaky_relu(F.instance_norm(x.float().movedim(-1, 1)).movedim(1, -1), 0.01)
    torch.testing.assert_close(made.float(), wide, rtol=8e-3, atol=1e-5)


def test_batch_norm_equals_torchs():
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    expected = F.leaky_relu(F.batch_norm(x.movedim(-1, 1), None, None, training=True).movedim(1, -1), 0.01)
    torch.testing.assert_close(BatchNorm(6).double()(x, 0.01), expected)


def test_blocks_take_and_give_maps_that_lie_channels_last():
    block = ResidualBlock(4, 8, "instance")
    assert block(torch.randn(2, 6, 5, 4, 4)).is_contiguous()
    assert Up(4, 8)(torch.randn(2, 6, 5, 4, 4)).is_contiguous()


def test_a_depth_of_two_gives_the_gradient_of_a_plain_convolution_in_16_bits_too():
    """oneDNN's own gradient holds NaN or noise there: what it reads is left over from other tensors."""
    torch.manual_seed(0)
    conv, x = Conv(16, 8, 3), torch.randn(2, 2, 4, 3, 16)
    weight = torch.randn(2, 2, 4, 3, 8)
    plain = F.conv3d(x.movedim(-1, 1), conv.weight, padding=1).movedim(1, -1)
    torch.testing.assert_close(conv(x), plain)
    (expected,) = torch.autograd.grad((plain * weight).sum(), conv.weight)
    for _ in range(20):
        junk = [torch.full((size,), torch.nan) for size in (conv.weight.numel(), 1000, 50_000)]
        del junk
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (got,) = torch.autograd.grad((conv(x) * weight).sum(), conv.weight)
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.2)


def test_upsampled_maps_are_cut_at_the_far_end_of_odd_skips():
    torch.manual_seed(0)
    block = UpBlock(4, 2, "instance", (2, 1, 2)).double()
    x, skip = torch.randn(1, 3, 3, 2, 4, dtype=torch.float64), torch.randn(1, 5, 3, 3, 2, dtype=torch.float64)
    seen = []
    block.block.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    assert block(x, skip).shape == skip.shape
    for i, j, k in ((0, 0, 0), (4, 2, 2), (3, 1, 1)):
        expected = x[0, i // 2, j, k // 2] @ block.up.weight[:, :, i % 2, 0, k % 2]
        torch.testing.assert_close(seen[0][0, i, j, k, :2], expected)
    assert torch.equal(seen[0][..., 2:], skip)
