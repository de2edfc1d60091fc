"""What every operator's tests ask of it."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import medfast_kernels as mk
from medfast_kernels import _dispatch

cpp_only = pytest.mark.skipif(_dispatch.WHY_NO_CPP is not None, reason=str(_dispatch.WHY_NO_CPP))
NOT_OURS = (
    "softmax",
    "logsumexp",
    "bmm",
    "mm",
    "matmul",
    "einsum",
    "sort",
    "topk",
    "multinomial",
    "gather",
    "scatter",
    "index_put",
)


def results(function, tensors, cotangents):
    """Outputs, then gradients of all ``tensors`` for the cotangents; None where there is no gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    total = sum((x * c.to(x.dtype)).sum() for x, c in zip(out, cotangents, strict=True) if c is not None)
    return [*out, *torch.autograd.grad(total, leaves, allow_unused=True)]


def assert_near(got, expected, factor):
    """Each within ``factor`` times the largest expected entry (at least 1)."""
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            bound = factor * max(1.0, b.abs().max().item() if b.numel() else 0.0)
            torch.testing.assert_close(a.to(b.dtype), b, rtol=0, atol=bound)


def on_cpp(function):
    def run(*args, **kwargs):
        with mk.backend("cpp"):
            return function(*args, **kwargs)

    return run


def assert_runs_its_own(function, *operators, beside=()):
    """A profile of ``function`` on backend cpp shows ``operators`` and none of torch's that they stand for.

    beside: words of ``NOT_OURS`` that may be there.
    """
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        on_cpp(function)()
    names = {event.key for event in seen.key_averages()}
    assert {f"{_dispatch.NAMESPACE}::{name}" for name in operators} <= names, names
    words = set(NOT_OURS) - set(beside)
    theirs = [name for name in names if name.startswith("aten::") and any(word in name for word in words)]
    assert not theirs, theirs


def on_threads(function, *counts):
    """What ``function`` gives on each number of threads."""
    before, got = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            got.append(function())
    finally:
        torch.set_num_threads(before)
    return got


@pytest.fixture
def poisoned():
    """What the allocator gives, to C++ too, is NaN or the largest int: an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
