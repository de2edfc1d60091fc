"""Class attention over a stage, against its equations in plain fp64."""

import pytest
import torch

from medfast.architectures.semantic_attention import SemanticAttention


def layer_norm(x, norm):
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * norm.weight + norm.bias


def by_hand(module, tokens, heads, kind):
    """SMART eq. 1 on CaiT's class attention ("class") or on ViT blocks ("vit"), one sample, row and head at a time."""
    width = tokens.shape[-1]
    dim, sums, maps = width // heads, [], []
    for z in tokens:
        rows = torch.cat((module.cls[None], z))
        for block in module.blocks:
            u = layer_norm(rows, block.norm1)
            q, k, v = (u @ layer.weight.T + layer.bias for layer in (block.q, block.k, block.v))
            made, weights = [], []
            for i, row in enumerate(rows):
                out = []
                for h in range(heads):
                    s = slice(h * dim, (h + 1) * dim)
                    a = torch.softmax(k[:, s] @ q[i, s] / dim**0.5, dim=0)
                    weights += [a] if i == 0 else []
                    out.append(a @ v[:, s])
                row = row + block.gamma1 * (block.proj.weight @ torch.cat(out) + block.proj.bias)
                hidden = block.mlp.fc1.weight @ layer_norm(row, block.norm2) + block.mlp.fc1.bias
                hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
                made.append(row + block.gamma2 * (block.mlp.fc2.weight @ hidden + block.mlp.fc2.bias))
            rows = torch.cat((made[0][None], z)) if kind == "class" else torch.stack(made)
        sums.append(rows[0])
        maps.append(torch.stack(weights).mean(0)[1:])
    return torch.stack(sums), torch.stack(maps)


@pytest.mark.parametrize("kind", ["class", "vit"])
def test_equals_a_plain_evaluation_with_gradients(kind):
    torch.manual_seed(0)
    module = SemanticAttention(24, heads=3, kind=kind).double()
    for parameter in module.parameters():  # zeros and ones would hide a parameter that is used wrongly
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 2, 3, 2, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 24, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)
    results = []
    for run in (module, lambda x: by_hand(module, x.flatten(1, 3), 3, kind)):
        cls, attention = run(x)
        loss = (cls * weight[0]).sum() + (attention * weight[1]).sum()
        results.append((cls, attention, *torch.autograd.grad(loss, [x, *module.parameters()])))
    assert results[0][1].shape == (2, 12)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_attention_is_not_renormalised_and_tokens_are_only_read():
    module = SemanticAttention(12, heads=2)
    x = torch.randn(1, 2, 2, 2, 12)
    before = x.clone()
    _, attention = module(x)
    assert 0.0 < attention.sum().item() < 1.0
    assert torch.equal(x, before)


def test_parameters_of_smart():
    """Fidelity's anchor: two blocks of width 384 count 3,550,464, [CLS] 384; heads do not count."""
    for heads, kind in ((8, "class"), (12, "class"), (12, "vit")):
        module = SemanticAttention(384, heads, kind=kind)
        assert sum(p.numel() for p in module.parameters()) == 3_550_464 + 384
    assert len(module.blocks) == 2
    assert not module.cls.any()
    for block in module.blocks:
        assert (block.gamma1 == 1e-4).all() and (block.gamma2 == 1e-4).all()


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="sa_heads must divide the 48 channels"):
        SemanticAttention(48, heads=5)
