import torch
from torch.nn import functional as F

from medfast.objectives.heads import Prototypes, Trunk, Voxels


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_the_papers():
    with torch.device("meta"):
        trunk, last = Trunk(384), torch.nn.Linear(256, 8192, bias=False)
        voxels = Voxels(768, 32)
    # 7,614,720 with the 8,192 magnitudes of weight normalisation, which stand still here
    assert count(trunk) + count(last) == 7_614_720 - 8_192
    assert count(Prototypes(256, 8192)) == count(last)
    assert count(voxels) == 25_198_592


def test_trunk_is_a_gelu_mlp_with_a_normalised_output():
    trunk = Trunk(5, (7, 6, 3)).double()
    with torch.no_grad():
        for p in trunk.parameters():
            p.normal_()
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    y = x
    weights = [p for name, p in trunk.named_parameters() if "weight" in name]
    biases = [p for name, p in trunk.named_parameters() if "bias" in name]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = y @ weight.T + bias
        if i < 2:
            y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    torch.testing.assert_close(trunk(x), y / y.norm(dim=-1, keepdim=True))


def test_prototypes_are_cosines_and_only_their_direction_counts():
    last = Prototypes(4, 6).double()
    x = F.normalize(torch.randn(3, 4, dtype=torch.float64), dim=-1)
    expected = torch.stack([F.cosine_similarity(x, row[None]) for row in last.direction], dim=-1)
    torch.testing.assert_close(last(x), expected)
    with torch.no_grad():
        last.direction.mul_(torch.rand(6, 1, dtype=torch.float64) + 0.5)
    torch.testing.assert_close(last(x), expected)


def test_logits_stay_fp32_under_autocast():
    last, trunk = Prototypes(16, 32), Trunk(8, (16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        vectors = trunk(torch.randn(5, 8))
        logits = last(vectors)
    assert vectors.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(logits, last(vectors), rtol=0, atol=0)


def test_voxels_of_a_token_lie_under_that_token():
    for axes, grid, size in ((3, (2, 1, 3), (5, 4, 9)), (2, (2, 3), (7, 9))):
        head = Voxels(6, 4, channels=2, axes=axes)
        tokens = torch.randn(2, *grid, 6)
        volume = head(tokens, size)
        assert volume.shape == (2, 2, *size)
        for cell in ((0,) * axes, tuple(g - 1 for g in grid)):
            block = head.linear(tokens[(1, *cell)]).reshape(2, *(4,) * axes)
            inside = [slice(4 * i, min(4 * i + 4, length)) for i, length in zip(cell, size, strict=True)]
            cut = [slice(0, s.stop - s.start) for s in inside]
            torch.testing.assert_close(volume[(1, slice(None), *inside)], block[(slice(None), *cut)])
