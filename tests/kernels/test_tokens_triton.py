"""Dropping and restoring tokens in Triton against fp64: values, gradients of both orders, ids in any order."""

import pytest
import torch
from interpreter import hold, poisoned_memory, run_cases

import medfast_kernels as mk
from medfast_kernels import _dispatch, _tokens

SHAPES = [(1, 1, 1, 1), (2, 10, 3, 8), (2, 33, 0, 130), (2, 17, 17, 200), (5, 40, 21, 16)]  # b, n, count, dim
SWEEP = [
    pytest.param(shape, dtype, wide, marks=() if (i, wide) in ((1, True), (2, False)) else pytest.mark.slow)
    for i, shape in enumerate(SHAPES)
    for dtype, wide in ((torch.float32, False), (torch.float16, False), (torch.float16, True))
]


def test_in_the_interpreter():
    run_cases(__file__)


@pytest.mark.slow
def test_more_of_it_in_the_interpreter():
    run_cases(__file__, "slow")


def inputs(shape, dtype, wide):
    """ids in any order; x, position, y and fill, the second and the last perhaps fp32 beside 16 bits; gradients."""
    b, n, count, dim = shape
    draw = torch.Generator().manual_seed(n)
    ids = torch.stack([torch.randperm(n, generator=draw)[:count] for _ in range(b)])
    sizes = (b, dim, n), (n, dim), (b, count, dim), (dim,), (b, count, dim), (b, n, dim)
    x, *rest = (torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes)
    position, y, fill, *grads = rest
    if wide:
        position, fill = position.float(), fill.float()
    return ids, [x.transpose(1, 2), position, y, fill], grads


def run(operators, shape, dtype, compute, wide=False):
    ids, tensors, grads = inputs(shape, dtype, wide)
    x, position, y, fill = tensors = [
        t.to(torch.promote_types(compute, t.dtype)).detach().requires_grad_() for t in tensors
    ]
    out = [operators.drop_tokens(x, ids, position), operators.restore_tokens(y, ids, shape[1], fill),
           operators.drop_tokens(x, ids)]  # fmt: skip
    grads = [g.to(compute) for g in grads]
    return out, [*torch.autograd.grad(out[:2], tensors, grads), *torch.autograd.grad(out[2], x, grads[0])]


@pytest.mark.parametrize(("shape", "dtype", "wide"), SWEEP)
def case_values_and_gradients(shape, dtype, wide):
    with mk.backend("triton"), poisoned_memory():
        got, again = (run(mk, shape, dtype, dtype, wide) for _ in range(2))
    eager = run(mk.reference, shape, dtype, dtype, wide)
    exact = run(mk.reference, shape, dtype, torch.float64, wide)
    for values, (a, b, truth) in enumerate(zip(got, eager, exact, strict=True)):
        hold(a, b, truth, (2, 3)[values])
    assert all(torch.equal(a, b) for one, two in zip(got, again, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.slow
def case_several_tiles_to_a_program(monkeypatch):
    """As for a large volume: the gradient of the fill token."""
    from medfast_kernels._triton import tokens

    monkeypatch.setattr(tokens, "_PROGRAMS", 2)
    ids, (_, _, y, _), _ = inputs((2, 100, 30, 128), torch.float32, False)
    fill = torch.zeros(128, requires_grad=True)
    grad = torch.randn(2, 100, 128)
    results = []
    for name in ("triton", "reference"):
        with mk.backend(name):
            results.append(torch.autograd.grad(mk.restore_tokens(y, ids, 100, fill), fill, grad)[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def case_ids_out_of_range_touch_nothing():
    """On a GPU nobody looks at ids beforehand."""
    from medfast_kernels._triton import tokens

    ids = torch.tensor([[0, 7, -1, 5]])
    x, y = torch.rand(1, 5, 3), torch.rand(1, 4, 3)
    assert torch.equal(tokens.drop(_tokens.Drop(x, ids, None)), torch.cat((x[:, :1], torch.zeros(1, 3, 3)), 1))
    fill = torch.full((3,), 2.0)
    restored = tokens.restore(_tokens.Restore(y, ids, 5, fill))
    assert torch.equal(restored, torch.cat((y[:, :1], fill.expand(1, 4, 3)), 1))


@pytest.mark.slow
def case_second_derivatives():
    ids, tensors, _ = inputs((2, 7, 3, 4), torch.float32, False)
    results = []
    for name in ("triton", "reference"):
        x, position, y, fill = tensors = [t.detach().requires_grad_() for t in tensors]
        with mk.backend(name):
            value = mk.drop_tokens(x, ids, position).pow(3).sum() + mk.restore_tokens(y, ids, 7, fill).pow(3).sum()
            first = torch.autograd.grad(value, tensors, create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def case_fp64_is_refused():
    ids, (x, _, y, fill), _ = inputs(SHAPES[1], torch.float64, False)
    with mk.backend("triton"):
        with pytest.raises(RuntimeError, match="computes in fp32, the tensors are torch.float64"):
            mk.drop_tokens(x, ids)
        with pytest.raises(RuntimeError, match="computes in fp32, the tensors are torch.float64"):
            mk.restore_tokens(y, ids, 10, fill)


def case_opcheck():
    operators = getattr(torch.ops, _dispatch.NAMESPACE)
    ids, tensors, _ = inputs((2, 7, 3, 4), torch.float32, False)
    x, position, y, fill = (t.requires_grad_() for t in tensors)
    inverse = operators.invert_ids_triton(ids, 7)
    for operator, arguments in (
        ("invert_ids", (ids, 7)), ("take_tokens", (x, ids, position)), ("put_tokens", (y, ids, inverse, fill)),
        ("sum_samples", (y, ids, inverse)), ("sum_missing", (x, ids, inverse)),
    ):  # fmt: skip
        torch.library.opcheck(getattr(operators, f"{operator}_triton"), arguments)
