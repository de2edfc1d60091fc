"""The C++ contrast beyond its values: precision, threads, memory, NaN, what a profile shows."""

import os
import subprocess
import sys

import pytest
import torch
from contrast_cases import NAMED, arguments, by_equation, value_and_gradient
from operator_checks import assert_runs_its_own

import medfast_kernels as mk
from medfast_kernels import _dispatch

pytestmark = pytest.mark.skipif(_dispatch.WHY_NO_CPP is not None, reason=str(_dispatch.WHY_NO_CPP))
BIG = {"shape": (2, 5, 64, 40), "weight": 5.0}  # several blocks of rows and groups of columns, the last ones cut


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """What the allocator gives, to C++ too, is NaN: an element that nobody writes shows in every comparison here."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def cpp(z, **options):
    with mk.backend("cpp"):
        return mk.token_contrast(z, **options)


def worst(got, exact):
    return [(a - b).abs().max().item() for a, b in zip(got, exact, strict=True)]


@pytest.mark.parametrize("more", [{}, {"weight_mode": "logit"}, {"anchors": (2, 2)}, {"temperature": 0.02}])
def test_many_blocks(more):
    z, options = arguments({**BIG, **more})
    exact = value_and_gradient(mk.reference.token_contrast, z, options)
    assert max(worst(value_and_gradient(cpp, z, options), exact)) < 1e-11


@pytest.mark.parametrize("name", NAMED)
def test_fp32_is_as_precise_as_eager(name):
    z, options = arguments(NAMED[name], torch.float32)
    exact = value_and_gradient(by_equation, z.detach().double().requires_grad_(), options)
    loss, grad = worst(value_and_gradient(cpp, z, options), exact)
    eager_loss, eager_grad = worst(value_and_gradient(mk.reference.token_contrast, z, options), exact)
    ulp = torch.finfo(torch.float32).eps  # the largest logit's rounding: eager may be right by chance
    logit = (1 + options.get("weight", 1.0) * (options.get("weight_mode") == "logit")) / options.get("temperature", 0.5)
    assert loss <= max(2 * eager_loss, 2 * ulp * max(1.0, logit))
    assert grad <= max(3 * eager_grad, 4 * ulp * exact[1].abs().max().item())


@pytest.mark.parametrize("mode", ["exp", "logit"])
def test_vectors_that_are_not_normalised(mode):
    """The shift follows the longest vector: without normalisation nothing overflows."""
    z, options = arguments({"shape": (2, 3, 40, 16), "weight": 2.0, "weight_mode": mode}, torch.float32)
    z = (20 * z).detach().requires_grad_()
    exact = value_and_gradient(mk.reference.token_contrast, z.detach().double().requires_grad_(), options)
    for a, b in zip(value_and_gradient(cpp, z, options), exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("mode", ["exp", "logit"])
def test_nan_is_not_hidden(bad, mode):
    z, options = arguments({**BIG, "weight_mode": mode}, torch.float32)
    poisoned = z.detach().clone()
    poisoned[0, 1, 2, 3] = bad
    loss, grad = value_and_gradient(cpp, poisoned.requires_grad_(), options)
    assert loss.isnan() and grad.isnan().all()


def test_second_derivatives_are_refused():
    z, options = arguments(NAMED["plain"])
    (grad,) = torch.autograd.grad(cpp(z, **options), z, create_graph=True)
    with pytest.raises(RuntimeError, match="token_contrast_backward in C\\+\\+ has no derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("mode", ["exp", "logit"])
def test_same_bits_on_any_number_of_threads(mode):
    z, options = arguments({**BIG, "weight_mode": mode}, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(value_and_gradient(cpp, z, options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    z, _ = arguments({"shape": (2, 3, 4, 5)}, dtype)
    operator = getattr(torch.ops, _dispatch.NAMESPACE).token_contrast
    torch.library.opcheck(operator, (z, None, 0.5, 1.0, 1.6, 0, 3))
    given = z.detach(), torch.tensor([0, 1, 1]), 0.5, 6.0, 0.0, 1, 2
    torch.library.opcheck(operator, given)
    loss, lse = operator(*given)
    backward = getattr(torch.ops, _dispatch.NAMESPACE).token_contrast_backward
    torch.library.opcheck(backward, (torch.ones_like(loss), lse, *given))


def test_a_profile_shows_its_own_operators():
    z, options = arguments(NAMED["heavier negatives"], torch.float32)
    run = lambda: value_and_gradient(mk.token_contrast, z, options)  # noqa: E731
    assert_runs_its_own(run, "token_contrast", "token_contrast_backward")


MEMORY = """
import resource, torch, medfast_kernels as mk
def step(positions):
    z = torch.nn.functional.normalize(torch.randn(2, 4, positions, 8), dim=-1).requires_grad_()
    mk.token_contrast(z, weight=5.0).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(step(8), step(4096))
"""


def test_memory_grows_with_tokens_and_not_with_pairs():
    pytest.importorskip("resource")
    path = os.pathsep.join(filter(None, (str(_dispatch._LIBRARY.parents[1]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    before, after = map(float, done.stdout.split())
    assert after - before < 48, "MiB for 32,768 tokens, whose similarities would take 4,096"
