"""Modules on the operators: their parameters, and that each is one call of its operator with its settings."""

import pytest
import torch

import medfast_kernels as mk
from medfast_kernels import modules

KEY = mk.Key(3, sample=torch.arange(2))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("axes", "window"), [(3, 3), (2, (2, 3))])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_window_attention(axes, window, qkv_bias):
    module = modules.WindowAttention(
        12, 2, window, 1, axes=axes, qkv_bias=qkv_bias, clip=False, bias_index="sliced", dropout=0.4
    )
    expected = {"qkv.weight", "relative_position_bias_table", "proj.weight", "proj.bias"}
    assert set(module.state_dict()) == expected | ({"qkv.bias"} if qkv_bias else set())
    module.double()
    x, keep = draw(2, *(5, 4, 2)[:axes], 12), torch.tensor([True, False])
    qkv = module.qkv(x).unflatten(-1, (3, 2, 6))
    settings = {"window": window, "shift": 1, "clip": False, "bias_index": "sliced",
                "pad_value": module.qkv.bias.view(3, 2, 6) if qkv_bias else None}  # fmt: skip
    table = module.relative_position_bias_table
    for key, more in ((None, {}), (KEY, {"dropout": 0.4, "key": KEY})):
        expected = module.proj(mk.window_attention(qkv, table, keep=keep, **settings, **more))
        assert torch.equal(module(x, keep, key), expected)
    assert torch.equal(module(x, keep)[1], module.proj.bias.expand_as(x[1]))
    module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """16-bit qkv beside an fp32 table is computed in fp32; fp32 qkv stays fp32; gradients of parameters are fp32."""
    module, x = modules.WindowAttention(12, 2, 3, 1), draw(1, 5, 4, 6, 12).float()
    exact = module(x)
    with torch.autocast("cpu", dtype=dtype):
        out = module(x)
        qkv = module.qkv(x).unflatten(-1, (3, 2, 6))
        table = module.relative_position_bias_table
        low = mk.window_attention(qkv, table, window=3, shift=1)
        full = mk.window_attention(qkv.float(), table, window=3, shift=1)
    assert qkv.dtype == out.dtype == low.dtype == dtype and full.dtype == torch.float32
    assert torch.equal(low, full.to(dtype))  # rounded once, at the end
    torch.testing.assert_close(out.float(), exact, rtol=0.02, atol=0.02)
    out.float().pow(2).sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())
    assert module.relative_position_bias_table.grad.abs().max() > 0


def test_window_attention_loads_what_others_saved():
    from swin_layouts import WindowAttention3D

    theirs, module = WindowAttention3D(8, (2, 3, 2), 2).double(), modules.WindowAttention(8, 2, (2, 3, 2)).double()
    missing, unexpected = module.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == [] and unexpected == ["relative_position_index"]
    x = draw(1, 2, 3, 2, 8)
    torch.testing.assert_close(module(x).flatten(1, 3), theirs(x.flatten(1, 3)), rtol=0, atol=1e-12)


def test_class_attention():
    module, x = modules.ClassAttention(12, 3).double(), draw(2, 6, 12)
    out, attention = module(x)
    q, k, v = (linear(x).unflatten(-1, (3, 4)) for linear in (module.q, module.k, module.v))
    expected, weights = mk.class_attention(q[:, 0], k, v)
    torch.testing.assert_close(out, module.proj(expected))
    torch.testing.assert_close(attention, weights)


def test_attention_mask():
    attention = draw(2, 40)
    for settings in ({"hint": 0.2}, {"hint": 0.2, "hint_mode": "top"}, {"order": "low"}):
        got = modules.AttentionMask(0.5, **settings)(attention, KEY)
        expected = mk.attention_mask(attention, 0.5, key=KEY, **settings)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_drop_and_restore():
    drop, restore, x = modules.DropTokens(9, 4).double(), modules.RestoreTokens(4).double(), draw(2, 9, 4)
    ids = mk.random_ids(9, 5, key=KEY)
    kept = drop(x, ids)
    assert torch.equal(kept, mk.drop_tokens(x, ids, drop.position))
    full = restore(kept, ids, 9)
    assert torch.equal(full, mk.restore_tokens(kept, ids, 9, restore.fill))
    full.pow(2).sum().backward()
    assert drop.position.grad.abs().sum() > 0 and restore.fill.grad.abs().sum() > 0


def test_token_contrast():
    z = draw(2, 3, 4, 5)
    settings = {"temperature": 0.2, "weight": 3.0}
    volume = torch.tensor([0, 0, 1])
    got = modules.TokenContrast(**settings)(z, volume=volume, anchors=(1, 2))
    unit = z / z.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(got, mk.token_contrast(unit, **settings, volume=volume, anchors=(1, 2)))


def test_refusals():
    for build in (lambda: modules.WindowAttention(10, 3, 4), lambda: modules.ClassAttention(10, 0)):
        with pytest.raises(ValueError, match="heads must divide the width"):
            build()
    with pytest.raises(ValueError, match="one entry per grid axis"):
        modules.WindowAttention(8, 2, (2, 2))
