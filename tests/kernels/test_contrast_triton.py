"""The token-wise contrast in Triton against fp64: modes, ids, shares of anchors, odd shapes, cold temperatures."""

import pytest
import torch
from contrast_cases import NAMED, arguments, value_and_gradient
from interpreter import hold, poisoned_memory, run_cases

import medfast_kernels as mk
from medfast_kernels import _dispatch

LARGE = ("wide", "one volume", "one position, a share")  # for the interpreter
CASES = [(name, torch.float32) for name in NAMED if name not in LARGE]
CASES += [(name, torch.float16) for name in ("heavier negatives", "in the exponent", "a share")]
QUICK = (("in the exponent", torch.float32), ("heavier negatives", torch.float16), ("a share", torch.float32))


def test_in_the_interpreter():
    run_cases(__file__)


@pytest.mark.slow
def test_more_of_it_in_the_interpreter():
    run_cases(__file__, "slow")


def triton(z, **options):
    with mk.backend("triton"):
        return mk.token_contrast(z, **options)


def compare(case, dtype):
    z, options = arguments(case, dtype)
    with poisoned_memory():
        got, again = (value_and_gradient(triton, z, options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    eager = value_and_gradient(mk.reference.token_contrast, z, options)
    exact = value_and_gradient(mk.reference.token_contrast, z.detach().double().requires_grad_(), options)
    hold(got[:1], eager[:1], exact[:1], 2)
    largest = (1 + case["weight"] if case.get("weight_mode") == "logit" else 1) / case.get("temperature", 0.5)
    hold(got[1:], eager[1:], exact[1:], 3, condition=max(4.0, largest) if dtype == torch.float32 else 4.0)


@pytest.mark.parametrize(
    ("name", "dtype"), [c if c in QUICK else pytest.param(*c, marks=pytest.mark.slow) for c in CASES]
)
def case_named(name, dtype):
    compare(NAMED[name], dtype)


@pytest.mark.slow
def case_tiles_that_meet_and_tiles_that_do_not(monkeypatch):
    """Tiles of 16: most hold no two tokens of one position, and wrap from a volume into the next."""
    from medfast_kernels._triton import contrast

    plan = contrast.plan
    monkeypatch.setattr(contrast, "plan", lambda *args: plan(*args)._replace(rows=16, columns=16))
    for positions, mode in ((32, "exp"), (22, "logit")):
        compare({"shape": (2, 2, positions, 8), "weight": 4.0, "weight_mode": mode, "anchors": (1, 1)}, torch.float32)


def case_what_does_not_fit_is_refused():
    with pytest.raises(RuntimeError, match="rows of at most 256 channels, z has 300"):
        triton(arguments(NAMED["wide"], torch.float32)[0])
    with pytest.raises(RuntimeError, match="computes in fp32"):
        triton(arguments(NAMED["plain"])[0])
    z, options = arguments(NAMED["plain"], torch.float32)
    (grad,) = torch.autograd.grad(triton(z, **options), z, create_graph=True)
    with pytest.raises(RuntimeError, match="token_contrast has no second derivative"):
        grad.sum().backward()


@pytest.mark.slow
def case_bf16_is_widened_in_the_interpreter():
    z, options = arguments(NAMED["two crops of a volume"], torch.bfloat16)
    loss, grad = value_and_gradient(triton, z, options)
    exact = value_and_gradient(mk.reference.token_contrast, z.detach().double().requires_grad_(), options)
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-6, atol=0)
    assert grad.dtype == torch.bfloat16 and (grad.double() - exact[1]).abs().max() < 0.01 * exact[1].abs().max()


@pytest.mark.slow
def case_opcheck_and_a_whole_graph():
    z, options = arguments(NAMED["plain"], torch.float32)
    operator = getattr(torch.ops, _dispatch.NAMESPACE).token_contrast_triton
    torch.library.opcheck(operator, (z, torch.arange(3), 0.5, 1.0, 0.3, 1, 2))
    compiled = torch.compile(triton, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradient(compiled, z, options), value_and_gradient(triton, z, options), strict=True):
        assert torch.equal(a, b)
