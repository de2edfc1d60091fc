"""Class attention in Triton against fp64: values, gradients, odd shapes, every element written."""

import pytest
import torch
from interpreter import hold, poisoned_memory, run_cases

import medfast_kernels as mk
from medfast_kernels import _dispatch

SHAPES = [(1, 1, 1, 1), (2, 10, 3, 8), (3, 65, 5, 64), (1, 300, 2, 12), (2, 130, 1, 100)]  # b, n, heads, dim
SWEEP = [
    pytest.param(shape, dtype, marks=() if (i, dtype) in ((1, torch.float16), (2, torch.float32)) else pytest.mark.slow)
    for i, shape in enumerate(SHAPES)
    for dtype in (torch.float32, torch.float16)
]


def test_in_the_interpreter():
    run_cases(__file__)


@pytest.mark.slow
def test_more_of_it_in_the_interpreter():
    run_cases(__file__, "slow")


def inputs(shape, dtype):
    """q, k, v, strided, and gradients of both outputs."""
    b, n, heads, dim = shape
    draw = torch.Generator().manual_seed(n)
    q, kv, out, attention = (
        torch.randn(size, generator=draw, dtype=torch.float64).to(dtype)
        for size in ((b, heads, dim), (b, 1 + n, 2, heads, dim), (b, heads * dim), (b, n))
    )
    return [2 * q, *kv.unbind(2)], [out, attention]


def run(operator, shape, dtype, compute, scale=None):
    tensors, grads = inputs(shape, dtype)
    tensors = [x.to(compute).requires_grad_() for x in tensors]
    out, attention = operator(*tensors, scale=scale)
    grads = [g.to(x.dtype) for g, x in zip(grads, (out, attention), strict=True)]
    return [out, attention], list(torch.autograd.grad((out, attention), tensors, grads))


@pytest.mark.parametrize(("shape", "dtype"), SWEEP)
def case_values_and_gradients(shape, dtype):
    with mk.backend("triton"), poisoned_memory():
        got, again = (run(mk.class_attention, shape, dtype, dtype, scale=0.4) for _ in range(2))
    eager = run(mk.reference.class_attention, shape, dtype, dtype, scale=0.4)
    exact = run(mk.reference.class_attention, shape, dtype, torch.float64, scale=0.4)
    for values, (a, b, truth) in enumerate(zip(got, eager, exact, strict=True)):
        hold(a, b, truth, (2, 3)[values])
    assert all(torch.equal(a, b) for one, two in zip(got, again, strict=True) for a, b in zip(one, two, strict=True))


def case_one_gradient_alone():
    (q, k, v), grads = inputs(SHAPES[1], torch.float32)
    for i, wanted in enumerate(grads):
        results = []
        for operator in (mk.class_attention, mk.reference.class_attention):
            tensors = [x.detach().requires_grad_() for x in (q, k, v)]
            with mk.backend("triton" if operator is mk.class_attention else "reference"):
                results.append(torch.autograd.grad(operator(*tensors)[i], tensors, wanted, materialize_grads=True))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def case_large_logits():
    q, k, v = (x.float() for x in inputs(SHAPES[3], torch.float32)[0])
    with mk.backend("triton"):
        out, attention = mk.class_attention(300 * q, k, v)
    expected = mk.reference.class_attention(300 * q.double(), k.double(), v.double())
    torch.testing.assert_close((out, attention), expected, rtol=1e-2, atol=1e-3, check_dtype=False)


def case_fp64_and_second_derivatives_are_refused():
    with mk.backend("triton"):
        with pytest.raises(RuntimeError, match="computes in fp32, the tensors are torch.float64"):
            mk.class_attention(*inputs(SHAPES[0], torch.float64)[0])
        q, k, v = (x.requires_grad_() for x in inputs(SHAPES[1], torch.float32)[0])
        (grad,) = torch.autograd.grad(mk.class_attention(q, k, v)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="class_attention has no second derivative"):
        grad.sum().backward()


@pytest.mark.slow
def case_opcheck_and_a_whole_graph():
    q, k, v = (x.requires_grad_() for x in inputs((2, 9, 3, 8), torch.float32)[0])
    torch.library.opcheck(getattr(torch.ops, _dispatch.NAMESPACE).class_attention_triton, (q, k, v, 0.3))

    def gradient(operator):
        with mk.backend("triton"):
            out, attention = operator(q, k, v)
        return torch.autograd.grad(out.square().sum() + attention.square().sum(), (q, k, v))

    compiled = torch.compile(mk.class_attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradient(compiled), gradient(mk.class_attention), strict=True):
        assert torch.equal(a, b)
