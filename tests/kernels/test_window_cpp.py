"""The C++ kernels against the definition: every mode, every instruction set, any number of threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from window_cases import NAMED, arguments, problems, values_and_gradients

import medfast_kernels as mk
from medfast_kernels import _dispatch

pytestmark = pytest.mark.skipif(_dispatch.WHY_NO_CPP is not None, reason=str(_dispatch.WHY_NO_CPP))
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5}


def cpp(*args, **options):
    with mk.backend("cpp"):
        return mk.window_attention(*args, **options)


def compare(case, dtype):
    qkv, bias, options = arguments(case, dtype)
    got = values_and_gradients(cpp, qkv, bias, options)
    qkv, bias, options = arguments(case, torch.float64)
    for a, b in zip(got, values_and_gradients(mk.reference.window_attention, qkv, bias, options), strict=True):
        bound = TOLERANCE[dtype] * max(1.0, b.abs().max().item() if b.numel() else 0.0)
        torch.testing.assert_close(a, b, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", NAMED)
def test_named_cases(name, dtype):
    compare(NAMED[name], dtype)


@settings(max_examples=25, deadline=None)
@given(problems())
def test_any_problem(case):
    compare(case, torch.float64)


@pytest.mark.parametrize("isa", ["avx2", "plain"])
def test_older_instruction_sets(isa):
    """In a process of its own, because the choice is made once."""
    code = "import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    names = ["test_named_cases[stage one-dtype1]", "test_named_cases[cosine-dtype0]", "test_named_cases[flat-dtype1]"]
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-c", code, *[f"{here}::{name}" for name in names]],
        cwd=here.parents[2], env={**os.environ, "MEDFAST_ISA": isa}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


def test_every_element_is_written():
    """Memory that comes back from the allocator is poisoned: whatever is not written shows as NaN."""
    case = dict(NAMED["padded, live"], batch=3)
    for _ in range(3):
        poison = [torch.full((3, 5, 7, 3, 3, 2, 5), torch.nan, dtype=torch.float64) for _ in range(8)]
        poison += [torch.full((3, 5, 7, 3, 10), torch.nan, dtype=torch.float64) for _ in range(8)]
        del poison
        qkv, bias, options = arguments(case)
        options["keep"] = torch.tensor([True, False, True])
        assert all(x.isfinite().all() for x in values_and_gradients(cpp, qkv, bias, options))


def test_nan_stays_in_its_window():
    qkv, bias, options = arguments(NAMED["unshifted"])
    poisoned = qkv.detach().clone()
    poisoned[0, 0, 0, 0] = torch.nan
    out = cpp(poisoned, bias, **options)
    assert out[0, :4, :, :4].isnan().all() and out.isnan().sum() == out[0, :4, :, :4].numel()


@pytest.mark.parametrize("name", ["padded, live", "cosine", "dense bias", "dropout"])
def test_gradcheck(name):
    case = dict(NAMED[name], batch=1 if name != "dropout" else 2, heads=1, dim=2)
    case["grid"], case["window"], case["shift"] = (3, 3), (2, 2), (1, 1)
    qkv, bias, options = arguments(case)
    tensors = {k: v for k, v in options.items() if isinstance(v, torch.Tensor) and v.requires_grad}

    def run(qkv, bias, *extra):
        return cpp(qkv, bias, **{**options, **dict(zip(tensors, extra, strict=True))})

    assert torch.autograd.gradcheck(run, (qkv, bias, *tensors.values()))


def test_second_derivatives_are_refused():
    qkv, bias, options = arguments(NAMED["stage one"])
    (grad,) = torch.autograd.grad(cpp(qkv, bias, **options).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="window_attention_backward"):
        grad.sum().backward()


def test_same_bits_on_any_number_of_threads():
    qkv, bias, options = arguments(dict(NAMED["stage one"], grid=(12, 9, 10), pad_value=True), torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(values_and_gradients(cpp, qkv, bias, options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_opcheck(dtype):
    qkv, bias, _ = arguments({"grid": (5, 4, 3), "window": 3, "bias": "dense"}, dtype)
    operator = getattr(torch.ops, _dispatch.NAMESPACE).window_attention
    scale, pads = torch.ones(2, dtype=dtype), torch.ones(3, 2, 5, dtype=dtype, requires_grad=True)
    rest = ((3, 3, 3), (1, 1, 0), False, True)
    for options in ((bias, scale, pads, None, None), (None, scale, None, torch.tensor([True, False]), None)):
        torch.library.opcheck(operator, (qkv, *options, *rest, 0.0, 0))
    draw = torch.tensor([[3, 0, 1], [4, 0, 1]])
    torch.library.opcheck(operator, (qkv, bias, scale, None, None, draw, *rest, 0.5, 7))
