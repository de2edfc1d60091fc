"""class_attention against dense attention over all tokens, and its backends against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_checks import assert_near, assert_runs_its_own, cpp_only, on_cpp, on_threads, poisoned, results

import medfast_kernels as mk
from medfast_kernels import _dispatch

BACKENDS = ["reference", pytest.param("cpp", marks=cpp_only)]
cpp, definition = on_cpp(mk.class_attention), mk.reference.class_attention
__all__ = ["poisoned"]


def inputs(dtype, batch=2, n=10, heads=3, dim=8):
    """q, k, v, k and v strided, and a cotangent of each output."""
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, 1 + n, 3, heads, dim, generator=draw, dtype=torch.float64).to(dtype)
    cotangents = (torch.randn(batch, heads * dim, generator=draw), torch.randn(batch, n, generator=draw))
    return (qkv[:, 0, 0], qkv[:, :, 1], qkv[:, :, 2]), cotangents


@pytest.mark.parametrize("name", BACKENDS)
def test_is_the_first_row_of_dense_attention(name):
    q, k, v = (x.requires_grad_() for x in inputs(torch.float64)[0])
    queries = torch.cat((q[:, None], torch.zeros_like(k[:, 1:])), dim=1)
    weights = torch.softmax(queries.transpose(1, 2) @ k.permute(0, 2, 3, 1) * 8**-0.5, dim=-1)
    dense = (weights @ v.transpose(1, 2))[:, :, 0].flatten(1)
    with mk.backend(name):
        out, attention = mk.class_attention(q, k, v)
        assert torch.autograd.gradcheck(mk.class_attention, (q, k, v))
    torch.testing.assert_close(out, dense)
    torch.testing.assert_close(attention, weights[:, :, 0, 1:].mean(1))
    assert (attention.sum(1) < 1).all()  # [CLS] took its part


@cpp_only
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.integers(1, 200), st.integers(1, 5), st.integers(1, 40), st.sampled_from([None, 0.3, 4.0]))
def test_any_shape_in_cpp(batch, n, heads, dim, scale):
    torch.use_deterministic_algorithms(True)  # poisons memory, see poisoned
    try:
        for dtype, factor in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
            tensors, cotangents = inputs(dtype, batch, n, heads, dim)
            exact = [x.double() for x in tensors]
            expected = results(lambda *x: definition(*x, scale=scale), exact, cotangents)
            assert_near(results(lambda *x: cpp(*x, scale=scale), tensors, cotangents), expected, factor)
    finally:
        torch.use_deterministic_algorithms(False)


@cpp_only
def test_cpp_is_as_near_to_fp64_as_eager(poisoned):
    tensors, cotangents = inputs(torch.float32, 2, 3000, 4, 48)
    exact = results(definition, [x.double() for x in tensors], cotangents)
    eager, ours = results(definition, tensors, cotangents), results(cpp, tensors, cotangents)
    for i, (theirs, mine, truth) in enumerate(zip(eager, ours, exact, strict=True)):
        allowed = (2 if i < 2 else 3) * (theirs - truth).abs().max() + 1e-8 * truth.abs().max()
        assert (mine - truth).abs().max() <= allowed, i


@cpp_only
@pytest.mark.parametrize("used", [(True, False), (False, True)])
def test_either_output_alone(used, poisoned):
    tensors, cotangents = inputs(torch.float64, n=70)
    cotangents = [c if use else None for c, use in zip(cotangents, used, strict=True)]
    got, expected = results(cpp, tensors, cotangents), results(definition, tensors, cotangents)
    if not used[0]:
        assert expected[-1] is None or not expected[-1].any()
        expected[-1] = torch.zeros_like(got[-1])  # v has no part in attention
    assert_near(got, expected, 1e-11)


@pytest.mark.parametrize("name", BACKENDS)
def test_logits_stay_fp32_under_autocast(name):
    with mk.backend(name):
        q, k, v = inputs(torch.float32)[0]
        plain = mk.class_attention(q, k, v, scale=0.5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = mk.class_attention(q, k, v, scale=0.5)
        assert cast[1].dtype == torch.float32 and torch.equal(plain[1], cast[1]) and torch.equal(plain[0], cast[0])
        for dtype in (torch.bfloat16, torch.float16):
            tensors = inputs(dtype)[0]
            out, attention = mk.class_attention(*tensors)
            assert out.dtype == dtype and attention.dtype == torch.float32
            assert_near((attention,), (definition(*[x.double() for x in tensors])[1],), 1e-6)


@cpp_only
def test_raw_operator_is_cast_under_autocast():
    operator = getattr(torch.ops, _dispatch.NAMESPACE).class_attention
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert operator(*inputs(torch.bfloat16)[0], 0.5)[0].dtype == torch.float32


def test_compiles_whole():
    compiled = torch.compile(mk.class_attention, fullgraph=True, backend="aot_eager")
    tensors, cotangents = inputs(torch.float32)
    assert_near(results(compiled, tensors, cotangents), results(definition, tensors, cotangents), 1e-6)


@cpp_only
def test_same_bits_on_any_number_of_threads():
    tensors, cotangents = inputs(torch.float32, 1, 2000, 3, 20)
    first, *others = on_threads(lambda: results(cpp, tensors, cotangents), 1, 2, 3, 1)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@cpp_only
def test_rules_of_operators():
    (q, k, v), cotangents = inputs(torch.float64)
    operators = getattr(torch.ops, _dispatch.NAMESPACE)
    torch.library.opcheck(operators.class_attention, tuple(x.clone().requires_grad_() for x in (q, k, v)) + (0.5,))
    out, _, weights = operators.class_attention(q, k, v, 0.5)
    grads = cotangents[0].double(), None
    torch.library.opcheck(operators.class_attention_backward, (*grads, out, weights, q, k, v, 0.5))
    q.requires_grad_()
    (grad,) = torch.autograd.grad(cpp(q, k, v)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="class_attention_backward"):
        grad.sum().backward()


@cpp_only
def test_a_profile_shows_its_own_operator():
    tensors, cotangents = inputs(torch.float32)
    run = lambda: results(mk.class_attention, tensors, cotangents)  # noqa: E731
    assert_runs_its_own(run, "class_attention", "class_attention_backward")


def test_nan_spreads_to_its_sample_alone():
    q, k, v = (x.clone() for x in inputs(torch.float32, n=40)[0])
    k[0, 17] = torch.nan
    for out in (*mk.class_attention(q, k, v), *definition(q, k, v)):
        assert out[0].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("function", [mk.class_attention, definition])
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda q, k, v: (q[:, :2], k, v), ValueError, r"k, v \(b, 1 \+ n, heads, dim\)"),
        (lambda q, k, v: (q, k[:, :1], v[:, :1]), ValueError, "n >= 1"),
        (lambda q, k, v: (q.double(), k, v), ValueError, "all be fp64 or none"),
        (lambda q, k, v: (q.to("meta"), k, v), ValueError, "on one device, got meta, cpu"),
        (lambda q, k, v: (q, k.int(), v), TypeError, "k must be a floating tensor, got torch.int32"),
        (lambda q, k, v: (q, k, [1.0]), TypeError, "v must be a floating tensor, got list"),
        (lambda q, k, v: (q[:, :0], k[:, :, :0], v[:, :, :0]), ValueError, "at least one head"),
    ],
)
def test_refusals(function, change, error, match):
    with pytest.raises(error, match=match):
        function(*change(*inputs(torch.float32)[0]))
    with pytest.raises(TypeError, match="scale must be a float or an int"):
        function(*inputs(torch.float32)[0], scale="half")
