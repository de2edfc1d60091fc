"""class_attention against dense attention over all tokens."""

import pytest
import torch

import medfast_kernels as mk


def inputs(dtype):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 11, 3, 8, generator=draw, dtype=torch.float64).to(dtype) for _ in range(3))
    return q[:, 0], k, v


def test_is_the_first_row_of_dense_attention():
    q, k, v = (x.requires_grad_() for x in inputs(torch.float64))
    queries = torch.cat((q[:, None], torch.zeros_like(k[:, 1:])), dim=1)
    weights = torch.softmax(queries.transpose(1, 2) @ k.permute(0, 2, 3, 1) * 8**-0.5, dim=-1)
    dense = (weights @ v.transpose(1, 2))[:, :, 0].flatten(1)
    out, attention = mk.class_attention(q, k, v)
    torch.testing.assert_close(out, dense)
    torch.testing.assert_close(attention, weights[:, :, 0, 1:].mean(1))
    assert (attention.sum(1) < 1).all()  # [CLS] took its part
    assert torch.autograd.gradcheck(mk.class_attention, (q, k, v))


def test_logits_stay_fp32_under_autocast():
    q, k, v = inputs(torch.float32)
    plain = mk.class_attention(q, k, v, scale=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = mk.class_attention(q, k, v, scale=0.5)
    assert cast[1].dtype == torch.float32 and torch.equal(plain[1], cast[1]) and torch.equal(plain[0], cast[0])
    out, attention = mk.class_attention(*inputs(torch.bfloat16))
    assert out.dtype == torch.bfloat16 and attention.dtype == torch.float32


def test_compiles_whole():
    compiled = torch.compile(mk.class_attention, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*inputs(torch.float32)), mk.class_attention(*inputs(torch.float32)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("change", [lambda q, k, v: (q[:, :2], k, v), lambda q, k, v: (q, k[:, :1], v[:, :1])])
def test_shapes_that_do_not_fit_are_refused(change):
    with pytest.raises(ValueError, match=r"k, v \(b, 1 \+ n, heads, dim\)"):
        mk.class_attention(*change(*inputs(torch.float32)))
    with pytest.raises(TypeError, match="k must be a floating tensor"):
        mk.class_attention(torch.zeros(1, 1, 1), torch.zeros(1, 2, 1, 1, dtype=torch.int32), torch.zeros(1, 2, 1, 1))
