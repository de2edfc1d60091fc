"""The C++ kernels against the definition: every mode, any number of threads; every instruction set by test_isa.py."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from operator_checks import assert_runs_its_own
from window_cases import NAMED, arguments, problems, values_and_gradients

import medfast_kernels as mk
from medfast_kernels import _dispatch

pytestmark = pytest.mark.skipif(_dispatch.WHY_NO_CPP is not None, reason=str(_dispatch.WHY_NO_CPP))
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5}
ROUNDINGS = 8  # of the largest entry of a tensor


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """What the allocator gives, to C++ too, is NaN: an element that nobody writes shows in every comparison here."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_memory_is_poisoned():
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.zeros(2).new_empty(3).isnan().all()


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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [1, 2, 3, 5, 9, 17, 25, 27, 33, 49])
def test_windows_of_any_length(window, dtype):
    """Vectors and blocks of four that end inside, at and beyond the last token."""
    compare(
        {"grid": (1, 2 * window + 1), "window": (1, window), "shift": (0, window // 2), "dim": window % 7 + 1}, dtype
    )


@settings(max_examples=25, deadline=None)
@given(problems())
def test_any_problem(case):
    """In fp64 to rounding; in fp32 at most 2 times as far from that as eager is, gradients 3 times."""
    compare(case, torch.float64)
    qkv, bias, options = arguments(case)
    exact = values_and_gradients(mk.reference.window_attention, *rounded(qkv, bias, options, torch.float64))
    low = rounded(qkv, bias, options, torch.float32)
    results = [values_and_gradients(operator, *low) for operator in (cpp, mk.reference.window_attention)]
    eps = torch.finfo(torch.float32).eps
    if case["cosine"]:  # the gradient of x / |x| is divided by |x|, and so is its rounding
        eps /= min(1.0, qkv[..., :2, :, :].norm(dim=-1).min().item())
    for i, (ours, theirs, truth) in enumerate(zip(*results, exact, strict=True)):
        least = ROUNDINGS * eps * truth.abs().max() if truth.numel() else 0.0  # eager is right by chance at times
        assert (ours - truth).abs().max() <= (3 if i else 2) * max((theirs - truth).abs().max(), least)


def rounded(qkv, bias, options, dtype):
    """The tensors of a problem, rounded to fp32, as leaves of ``dtype``."""

    def leaf(x):
        there = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.detach().float().to(dtype).requires_grad_() if there else x

    return leaf(qkv), leaf(bias), {name: leaf(x) for name, x in options.items()}


@pytest.mark.parametrize("name", ["padded, live", "padded, masked", "stage one", "clipped"])
def test_every_element_is_written(name):
    qkv, bias, options = arguments(dict(NAMED[name], batch=3))
    for keep in (None, torch.tensor([True, False, True]), torch.zeros(3, dtype=torch.bool)):
        got = values_and_gradients(cpp, qkv, bias, dict(options, keep=keep))
        assert all(x.isfinite().all() for x in got)


def test_plans_of_many_geometries_at_once():
    """More geometries than are kept, some that differ in one property alone, from several threads."""
    cases = [{"grid": (g, 5, 3), "window": 3, "shift": s, "pad": p} for g in range(3, 12) for s in (0, 1)
             for p in ("bias", "mask")]  # fmt: skip

    def check(case):
        qkv, bias, options = arguments(case)
        expected = mk.reference.window_attention(qkv, bias, **options)
        return bool(torch.allclose(mk.window_attention(qkv, bias, **options), expected, rtol=0, atol=1e-11))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, cases + cases[::-1]))


def test_more_windows_than_one_axis_of_a_gpu_grid_may_have():
    """65,536 and more are where others stop; indices of windows and of their rows are as wide as they need to be."""
    case = {"grid": (364, 363), "window": 2, "shift": 1, "batch": 2, "heads": 1, "dim": 8}
    qkv, bias, options = arguments(case, torch.float32)
    got = values_and_gradients(cpp, qkv, bias, options)
    for a, b in zip(got, values_and_gradients(mk.reference.window_attention, qkv, bias, options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_nan_stays_in_its_window():
    qkv, bias, options = arguments(NAMED["unshifted"])
    poisoned = qkv.detach().clone()
    poisoned[0, 0, 0, 0] = torch.nan
    out = cpp(poisoned, bias, **options)
    assert out[0, :4, :, :4].isnan().all() and out.isnan().sum() == out[0, :4, :, :4].numel()


@pytest.mark.parametrize("bits", [0x7FC00001, 0x7FFFFFFF, -1])
def test_nan_of_any_bits_stays_nan(bits):
    """Its low bits are added to an exponent on the way."""
    qkv, bias, options = arguments(NAMED["unshifted"], torch.float32)
    poisoned = qkv.detach().clone()
    poisoned[0, 0, 0, 0, 1] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    expected = mk.reference.window_attention(poisoned, bias, **options).isnan()
    assert expected.any() and torch.equal(cpp(poisoned, bias, **options).isnan(), expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_bias_of_the_lowest_number_there_is(dtype):
    """What masks are made of that must not give NaN where a whole row is masked."""
    qkv = arguments({"grid": (4, 4), "window": 4}, dtype)[0].detach()
    bias = torch.zeros(2, 16, 16, dtype=dtype)
    bias[0, 3], bias[:, :, 7], bias[1, 5, :9] = torch.finfo(dtype).min, torch.finfo(dtype).min, -torch.inf
    expected = mk.reference.window_attention(qkv, bias, window=4)
    torch.testing.assert_close(cpp(qkv, bias, window=4), expected)


def test_large_scores():
    """The backward makes the scores of the forward again, to the last bit: their rounding is no error of weights."""
    qkv, bias, options = arguments(NAMED["stage one"], torch.float32)
    options |= {"scale": 1e3}
    exact = values_and_gradients(
        mk.reference.window_attention, qkv.detach().double().requires_grad_(), bias.double(), options
    )
    ours, eager = (values_and_gradients(f, qkv, bias, options) for f in (cpp, mk.reference.window_attention))
    for a, b, truth in zip(ours, eager, exact, strict=True):
        assert (a - truth).square().mean() <= 9 * (b - truth).square().mean()


def test_a_bias_that_needs_no_gradient_gets_none():
    qkv, bias, options = arguments(NAMED["dense bias"])
    qkv.grad = None
    cpp(qkv, bias.detach(), **options).sum().backward()
    fixed, qkv.grad = qkv.grad, None
    cpp(qkv, bias, **options).sum().backward()
    assert torch.equal(qkv.grad, fixed) and bias.grad is not None


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


@pytest.mark.parametrize(("heads", "window"), [(3, 7), (8, 4)])
def test_same_bits_every_time(heads, window):
    """Of sizes at which torch's own index_put adds atomically, and without the mode that keeps it from that."""
    torch.use_deterministic_algorithms(False)
    case = {"grid": (window + 1,) * 3, "window": window, "shift": 1, "heads": heads, "dim": 8, "batch": 1}
    qkv, bias, options = arguments(case, torch.float32)
    first, *others = (values_and_gradients(cpp, qkv, bias, options) for _ in range(8))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


REFUSED = {
    "window of no token": {"window": (0, 2)}, "an axis short": {"window": (2,)}, "shift": {"shift": (2, 0)},
    "shift below zero": {"shift": (-1, 0)}, "scale": {"scale": torch.ones(1)}, "bias": {"bias": torch.ones(2, 3, 3)},
    "rows": {"bias": torch.ones(9, 2), "rows": torch.full((4, 4), 9)}, "pads": {"pad_value": torch.ones(3)},
    "keep": {"keep": torch.ones(3, dtype=torch.bool)}, "draw": {"draw": torch.ones(1, 3, dtype=torch.int64)},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_operator_refuses_what_would_end_the_process(name):
    """The public function refuses it before; a graph that was exported has the operator alone."""
    given = {
        "qkv": torch.ones(2, 4, 4, 3, 2, 5), "bias": None, "rows": None, "scale": torch.ones(2), "pad_value": None,
        "keep": None, "draw": None, "window": (2, 2), "shift": (0, 0), "cosine": False, "live_pads": True,
        "dropout": 0.0, "seed": 0,
    }  # fmt: skip
    operator = getattr(torch.ops, _dispatch.NAMESPACE).window_attention
    assert operator(**given)[0].shape == (2, 4, 4, 10)
    with pytest.raises(RuntimeError, match="must|needs|there must be"):
        operator(**{**given, **REFUSED[name]})


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_opcheck(dtype):
    qkv, bias, _ = arguments({"grid": (5, 4, 3), "window": 3, "bias": "dense"}, dtype)
    operator = getattr(torch.ops, _dispatch.NAMESPACE).window_attention
    scale, pads = torch.ones(2, dtype=dtype), torch.ones(3, 2, 5, dtype=dtype, requires_grad=True)
    rest = ((3, 3, 3), (1, 1, 0), False, True)
    table, rows = torch.ones(7, 2, dtype=dtype, requires_grad=True), torch.arange(27 * 27).view(27, 27) % 7
    for options in (
        (bias, None, scale, pads, None, None), (None, None, scale, None, torch.tensor([True, False]), None),
        (table, rows, scale, None, None, None),
    ):  # fmt: skip
        torch.library.opcheck(operator, (qkv, *options, *rest, 0.0, 0))
    draw = torch.tensor([[3, 0, 1], [4, 0, 1]])
    given = (qkv.detach(), bias.detach(), None, scale, pads.detach(), None, draw, *rest, 0.5, 7)
    torch.library.opcheck(operator, given)
    out, softmax = operator(*given)
    backward = getattr(torch.ops, _dispatch.NAMESPACE).window_attention_backward
    for of_bias in (True, False):
        torch.library.opcheck(backward, (torch.ones_like(out), out, softmax, *given, of_bias))


@pytest.mark.parametrize("name", ["stage one", "clipped, sliced", "dropout"])
def test_a_profile_shows_its_own_operators(name):
    qkv, bias, options = arguments(NAMED[name], torch.float32)
    run = lambda: values_and_gradients(mk.window_attention, qkv, bias, options)  # noqa: E731
    assert_runs_its_own(run, "window_attention", "window_attention_backward")
