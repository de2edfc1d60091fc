"""The C++ contrast beyond its values: precision, instruction sets, threads, memory, NaN, what a profile shows."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from contrast_cases import NAMED, arguments, by_equation, value_and_gradient

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


OLDER = """
import sys, numpy, torch
library, namespace, folder = sys.argv[1:]
torch.ops.load_library(library)
operators = getattr(torch.ops, namespace)
print(operators.instruction_set())
for dtype in ("float32", "float64"):
    z = torch.from_numpy(numpy.load(f"{folder}/z.npy", allow_pickle=False)).to(getattr(torch, dtype))
    for name, factor in (("exp", 1.0), ("logit", 6.0)):
        options = z, None, 0.5, factor, 0.0, 1, 3
        loss, lse = operators.token_contrast(*options)
        grad = operators.token_contrast_backward(torch.full_like(loss, 3.0), lse, *options)
        numpy.save(f"{folder}/{dtype} {name} loss.npy", loss.numpy())
        numpy.save(f"{folder}/{dtype} {name} grad.npy", grad.numpy())
"""


@pytest.mark.parametrize("isa", ["avx2", "plain"])
def test_older_instruction_sets(isa, tmp_path):
    """In a process of its own, because the choice is made once; of torch alone, because imports are what takes long."""
    if isa == "avx2" and getattr(torch.ops, _dispatch.NAMESPACE).instruction_set() == "plain":
        pytest.skip("this processor has no AVX2")
    z, _ = arguments(BIG)
    np.save(tmp_path / "z.npy", z.detach().numpy())
    done = subprocess.run(
        [sys.executable, "-c", OLDER, str(_dispatch._LIBRARY), _dispatch.NAMESPACE, str(tmp_path)],
        env={**os.environ, "MEDFAST_ISA": isa}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == isa
    for name, options in (("exp", {"weight": 1.0}), ("logit", {"weight": 5.0, "weight_mode": "logit"})):
        exact = value_and_gradient(mk.reference.token_contrast, z, {**options, "anchors": (1, 3)})
        for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-12)):
            for part, expected in zip(("loss", "grad"), exact, strict=True):
                got = torch.from_numpy(np.load(tmp_path / f"{dtype} {name} {part}.npy", allow_pickle=False)).double()
                bound = tolerance * expected.abs().max().item()
                torch.testing.assert_close(got, expected, rtol=0, atol=bound)


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
    torch.library.opcheck(operator, (z, torch.tensor([0, 1, 1]), 0.5, 6.0, 0.0, 1, 2))


def test_a_profile_shows_the_operator_alone():
    z, options = arguments(NAMED["heavier negatives"], torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        mk.token_contrast(z, **options).backward()
    names = {event.name for event in profile.events()}
    assert {f"{_dispatch.NAMESPACE}::token_contrast", f"{_dispatch.NAMESPACE}::token_contrast_backward"} <= names
    assert not [name for name in names if any(word in name for word in ("softmax", "logsumexp", "mm", "exp"))]


MEMORY = """
import resource, torch, medfast_kernels as mk
def step(positions):
    z = torch.nn.functional.normalize(torch.randn(2, 4, positions, 8), dim=-1).requires_grad_()
    mk.token_contrast(z, weight=5.0).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(step(8), step(2048))
"""


def test_memory_grows_with_tokens_and_not_with_pairs():
    pytest.importorskip("resource")
    path = os.pathsep.join(filter(None, (str(_dispatch._LIBRARY.parents[1]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    before, after = map(float, done.stdout.split())
    assert after - before < 32, "MiB for 16,384 tokens, whose similarities would take 1,024"
