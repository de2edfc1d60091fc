"""Autocast changes nothing that an operator does: it decides itself what it computes in, of whatever it is given."""

import pytest
import torch
from operator_checks import cpp_only

import medfast_kernels as mk
from medfast_kernels import _dispatch
from medfast_kernels._examples import examples

BACKENDS = ["reference", pytest.param("cpp", marks=cpp_only)]
LOW = (torch.bfloat16, torch.float16)
MIXED = {"window_attention": "qkv", "drop_tokens": "x", "restore_tokens": "y", "class_attention": "q"}


def forward(example, given):
    made = example.call(**given)
    return [x for x in (made if isinstance(made, tuple) else (made,)) if x is not None]


def gradients(made, given):
    leaves, outs = [x for x in given.values() if x.requires_grad], [x for x in made if x.requires_grad]
    return list(torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])) if leaves else []


def problem(example, lows, dtype):
    cast = {n: x.to(dtype if n in lows else torch.float32) if x.is_floating_point() else x
            for n, x in example.tensors.items()}  # fmt: skip
    return {n: x.requires_grad_(x.is_floating_point() and not example.exact) for n, x in cast.items()}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("operator", _dispatch.OPERATORS)
def test_nothing_changes(operator, name):
    """All 16 bits; 16 bits beside fp32, as layers under autocast and parameters are; all fp32."""
    for example in examples(operator):
        for dtype, lows in zip((*LOW, torch.float32), ({*example.tensors}, {MIXED.get(operator)}, {}), strict=True):
            given = problem(example, lows, dtype)
            with mk.backend(name):
                expected = forward(example, given)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    got = forward(example, given)
            got, expected = ([*made, *gradients(made, given)] for made in (got, expected))
            assert [x.dtype for x in got] == [x.dtype for x in expected]
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), example.name


RAW = {
    "window_attention": lambda x: (
        x(1, 4, 4, 3, 2, 5), None, None, x(2), None, None, None, (2, 2), (1, 1), False, True, 0.0, 0
    ),
    "class_attention": lambda x: (x(2, 3, 4), x(2, 9, 3, 4), x(2, 9, 3, 4), 0.5),
    "token_contrast": lambda x: (x(2, 3, 4, 5), None, 0.5, 1.0, 0.0, 0, 3),
    "attention_mask": lambda x: (x(2, 9), False, 5, None, 0, 0, None, None, 0),
}  # fmt: skip


@cpp_only
@pytest.mark.parametrize("name", RAW)
def test_operators_themselves_have_a_rule(name):
    """Called past the public front, what computes is given fp32 for 16 bits; fp64 stays."""
    operator = getattr(getattr(torch.ops, _dispatch.NAMESPACE), name)

    def arguments(dtype):
        draw = torch.Generator().manual_seed(0)
        return RAW[name](lambda *shape: torch.randn(shape, generator=draw).bfloat16().to(dtype))

    expected = operator(*arguments(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wide = operator(*arguments(torch.bfloat16)), operator(*arguments(torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(x.dtype in (torch.float64, torch.bool, torch.int64) for x in wide)
    with pytest.raises(RuntimeError, match="float32 or float64"):
        operator(*arguments(torch.bfloat16))
