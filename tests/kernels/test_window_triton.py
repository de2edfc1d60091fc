"""Window attention in Triton against fp64: every mode, values and all gradients, and the same bits every time."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interpreter import hold, poisoned_memory, run_cases
from window_cases import NAMED, arguments, problems

import medfast_kernels as mk
from medfast_kernels import _dispatch

SMALL = {
    "stage one": {"grid": (4, 8, 4), "window": 4, "shift": 2, "heads": 2, "dim": 12, "batch": 1},
    "padded, live": {**NAMED["padded, live"], "dim": 8, "batch": 1, "heads": 1},
    "padded, masked": {**NAMED["padded, masked"], "dim": 24, "batch": 1, "heads": 1},
    "clipped, sliced": {**NAMED["clipped, sliced"], "dim": 8, "batch": 1},
    "not clipped": {**NAMED["not clipped"], "dim": 8, "batch": 1, "heads": 1},
    "flat": {"grid": (9, 10), "window": 7, "shift": 3, "heads": 1, "dim": 32, "batch": 1},
    "cosine": {**NAMED["cosine"], "dim": 16, "batch": 1, "heads": 2},
    "dense bias": {**NAMED["dense bias"], "dim": 8, "batch": 1, "heads": 1},
    "no bias": {**NAMED["no bias"], "dim": 48, "batch": 1, "heads": 1},
    "scale below zero": {"grid": (3, 6), "window": 3, "scale": -0.4, "dim": 64, "heads": 1, "batch": 1},
    "scale per head": {"grid": (3, 6), "window": 3, "scale": "heads", "dim": 96, "batch": 1},
    "dropout": {"grid": (5, 4), "window": 3, "shift": 1, "dropout": 0.4, "dim": 8, "heads": 2},
    "dropout by fours": {"grid": (4, 8), "window": 4, "shift": 1, "dropout": 0.4, "dim": 8, "heads": 2},
    "keep": {"grid": (4, 4), "window": 3, "shift": 1, "batch": 3, "dim": 8, "pad_value": True,
             "keep": torch.tensor([False, True, False])},
    "one token": {**NAMED["one token"], "dim": 8},
    "empty batch": {**NAMED["empty batch"], "dim": 8},
}  # fmt: skip
LARGE = {  # windows of more than one tile
    "live": {"grid": (13, 9), "window": (10, 8), "shift": (5, 3), "heads": 1, "dim": 12, "batch": 1, "pad_value": True,
             "scale": "heads"},
    "masked": {"grid": (8, 11), "window": 9, "shift": 4, "heads": 1, "dim": 8, "batch": 2, "pad": "mask",
               "clip": False, "dropout": 0.3, "cosine": True, "keep": torch.tensor([True, False])},
    "by fours": {"grid": (6, 5, 3), "window": (6, 4, 3), "shift": (0, 1, 0), "heads": 1, "dim": 8, "batch": 2,
                 "dropout": 0.3, "bias": "dense"},
}  # fmt: skip
NAMES = [*SMALL, *[f"large, {name}" for name in LARGE]]
QUICK = {("stage one", torch.float16), ("padded, live", torch.float32), ("padded, masked", torch.float16),
         ("clipped, sliced", torch.float32), ("dropout by fours", torch.float32), ("keep", torch.float32),
         ("large, live", torch.float32)}  # fmt: skip
SWEEP = [pytest.param(name, dtype, marks=() if (name, dtype) in QUICK else pytest.mark.slow)
         for name in NAMES for dtype in (torch.float32, torch.float16)]  # fmt: skip


def test_in_the_interpreter():
    run_cases(__file__)


@pytest.mark.slow
def test_more_of_it_in_the_interpreter():
    run_cases(__file__, "slow")


@pytest.mark.parametrize(("side", "window"), [(514, 2), (2331, 9)])
def test_more_windows_than_one_axis_of_a_grid_may_have(monkeypatch, side, window):
    """CUDA's second and third axis end at 65,535; the only axis of these launches at 2^31 - 1."""
    from medfast_kernels._triton import window_large, window_launch, window_small

    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    for kernels in (window_small, window_large):
        monkeypatch.setattr(kernels, "forward", Recorded())
    qkv = torch.empty(1, side, side, 3, 1, 8, dtype=torch.float16)
    given = (None, None, None, None, None, [window] * 2, [window] * 2, [0, 0], 1.0, False, True, False, 0.0, 0)
    window_launch.forward(qkv, *given)
    assert window_launch.call_of(qkv, *given).windows > 65_535
    assert all(len(grid) == 1 and 0 < grid[0] < 2**31 for grid in grids) and len(grids) == 1


def the_case(name):
    return LARGE[name.removeprefix("large, ")] if name.startswith("large") else SMALL[name]


def copies(case, dtype, compute):
    """The tensors of a case rounded to ``dtype``, then in ``compute``: the truth is of what the kernel reads."""
    qkv, bias, options = arguments(case, dtype)
    tensors = {"qkv": qkv, "bias": bias, "pad_value": options.get("pad_value"), "scale": options.get("scale")}
    tensors = {k: v.detach().to(compute).requires_grad_() for k, v in tensors.items() if isinstance(v, torch.Tensor)}
    return tensors, {**options, **{k: v for k, v in tensors.items() if k in options}}


def outputs(operator, case, dtype, compute):
    tensors, options = copies(case, dtype, compute)
    out = operator(tensors["qkv"], tensors.get("bias"), **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weight = weight.to(dtype).to(compute)  # where nothing is padded, no gradient reaches pad_value
    grads = torch.autograd.grad(out, list(tensors.values()), weight, allow_unused=True, materialize_grads=True)
    return [out.detach(), *grads]


@pytest.mark.parametrize(("name", "dtype"), SWEEP)
def case_values_and_gradients(name, dtype):
    check_values_and_gradients(the_case(name), dtype)


def as_small(case):
    """A drawn problem of a few windows, with a head dim that there is a kernel for."""
    grid = tuple(min(n, w + 2) for n, w in zip(case["grid"], case["window"], strict=True))
    return {**case, "grid": grid, "heads": 1 + case["heads"] // 3, "dim": 8 if case["dim"] < 12 else 12, "batch": 1}


@settings(max_examples=6, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(problems().map(as_small), st.sampled_from([torch.float32, torch.float16]))
def case_drawn_problems(case, dtype):
    check_values_and_gradients(case, dtype)


def check_values_and_gradients(case, dtype):
    with mk.backend("triton"), poisoned_memory():
        got = outputs(mk.window_attention, case, dtype, dtype)
    eager = outputs(mk.reference.window_attention, case, dtype, dtype)
    exact = outputs(mk.reference.window_attention, case, dtype, torch.float64)
    hold(got[:1], eager[:1], exact[:1], 2)
    tensors = len(got) - (case.get("scale") == "heads")
    hold(got[1:tensors], eager[1:tensors], exact[1:tensors], 3)
    # the gradient of a scale: one sum over all scores, most of which cancels
    hold(got[tensors:], eager[tensors:], exact[tensors:], 3, condition=8.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage one", "large, by fours"])
def case_same_bits_every_time(name):
    with mk.backend("triton"):
        first, second = (outputs(mk.window_attention, the_case(name), torch.float16, torch.float16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dropout", "dropout by fours", "large, by fours"])
def case_dropout_takes_the_bits_of_the_reference(name):
    """Equal scores make equal weights, and values that are powers of two tell which of them stayed."""
    qkv, _, options = arguments({**the_case(name), "bias": None, "shift": 0, "heads": 1}, torch.float32)
    qkv = torch.zeros_like(qkv)
    tokens = qkv.shape[1:-3].numel()
    for first in range(0, tokens, 16):  # the exact sum of so many bits at a time
        qkv.zero_()
        flat = qkv.view(len(qkv), tokens, 3, -1)
        for at in range(first, min(first + 16, tokens)):
            flat[:, at, 2] = 2.0 ** (at - first)
        with mk.backend("triton"):
            got = mk.window_attention(qkv, **options)
        torch.testing.assert_close(got, mk.reference.window_attention(qkv, **options), rtol=1e-6, atol=0)


@pytest.mark.slow
def case_dropped_samples_are_not_read():
    for case in (SMALL["keep"], {**LARGE["masked"], "dropout": 0.0}):
        tensors, options = copies(case, torch.float32, torch.float32)
        dropped = ~options["keep"]
        tensors["qkv"].data[dropped] = torch.nan
        with mk.backend("triton"), poisoned_memory():
            out = mk.window_attention(tensors["qkv"], tensors["bias"], **options)
            grads = torch.autograd.grad(out.sum(), list(tensors.values()), torch.ones(()))
        assert not out[dropped].any() and not grads[0][dropped].any()
        assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.slow
def case_any_strides():
    qkv, bias, options = arguments(SMALL["stage one"], torch.float32)
    strided = qkv.detach().movedim(-1, 1).contiguous().movedim(1, -1)
    wider = torch.randn(1, 4, 8, 6, 3, 3, 12)
    with mk.backend("triton"):
        for view in (strided, wider[:, :, :, ::2, :, 1:][:, :, :, :3]):
            expected = mk.reference.window_attention(view, bias, **options)
            torch.testing.assert_close(mk.window_attention(view, bias, **options), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def case_offsets_of_64_bits(monkeypatch):
    """Forced on a small volume."""
    from medfast_kernels._triton import window_plan

    monkeypatch.setattr(window_plan, "_MOST_32", 1)
    case_values_and_gradients("padded, live", torch.float32)


def case_what_has_no_kernel_says_so():
    qkv = torch.zeros(1, 4, 4, 3, 1, 13)
    with mk.backend("triton"):
        with pytest.raises(RuntimeError, match="head dims 8, 12, 16, 24, 32, 48, 64, 96, this one is 13"):
            mk.window_attention(qkv, window=2)
        with pytest.raises(RuntimeError, match="float32, float16 and bfloat16, qkv is float64"):
            mk.window_attention(qkv.double()[..., :12], window=2)
    assert mk.window_attention(qkv, window=2).shape == (1, 4, 4, 13)


@pytest.mark.slow
def case_second_derivatives_are_refused():
    tensors, options = copies(SMALL["dropout"], torch.float32, torch.float32)
    with mk.backend("triton"):
        out = mk.window_attention(tensors["qkv"], tensors["bias"], **options)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors["qkv"], create_graph=True)
    with pytest.raises(RuntimeError, match="window_attention has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["dropout", pytest.param("large, by fours", marks=pytest.mark.slow)])
def case_opcheck(name):
    from medfast_kernels import _window
    from medfast_kernels._triton import window

    qkv, bias, options = arguments(the_case(name), torch.float32)
    defaults = {"shift": 0, "scale": None, "cosine": False, "pad": "bias", "pad_value": None, "clip": True,
                "bias_index": "geometric", "keep": None}  # fmt: skip
    problem = _window.check(qkv, bias, **{**defaults, **options})
    operator = getattr(torch.ops, _dispatch.NAMESPACE).window_attention_triton
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, window.arguments(problem), test_utils=checks)


@pytest.mark.slow
def case_compiles_whole():
    torch._dynamo.reset()
    case = SMALL["dropout"]
    with mk.backend("triton"):
        compiled = torch.compile(mk.window_attention, fullgraph=True, backend="aot_eager")
        got = outputs(compiled, case, torch.float32, torch.float32)
        eager = outputs(mk.window_attention, case, torch.float32, torch.float32)
    for a, b in zip(got, eager, strict=True):
        torch.testing.assert_close(a, b)
