"""The CUDA kernels, the same sources, on emulated warps: values, gradients, masks, barriers and memory."""

import cuda_emulation
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from window_cases import NAMED, arguments, problems, values_and_gradients

import medfast_kernels as mk
from medfast_kernels import _masking, _window
from medfast_kernels._cuda import masking, window

pytestmark = pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not()))
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of rounding
DEFAULTS = {"shift": 0, "scale": None, "cosine": False, "pad": "bias", "pad_value": None, "clip": True,
            "bias_index": "geometric", "dropout": 0.0, "keep": None, "key": None}  # fmt: skip
WINDOWS = [
    name for name, case in NAMED.items() if not case.get("cosine") and not case.get("dropout") and name != "window 7"
]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """What the allocator gives, to C++ too, is NaN: an element that nobody writes shows in every comparison here."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", autouse=True)
def operators():
    return cuda_emulation.load()


def emulated(qkv, bias, **options):
    problem = _window.check(qkv, bias, **{**DEFAULTS, **options})
    assert not window.unfit(problem)
    return window.attend(problem, cuda_emulation.NAMESPACE)


def fitting(case):
    """With a head dim that is a multiple of 4."""
    return {**case, "dim": -(-case.get("dim", 5) // 4) * 4}


def exact(x):
    return x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def compare(case, dtype):
    qkv, bias, options = arguments(case, dtype)
    got = values_and_gradients(emulated, qkv, bias, options)
    options = {name: exact(value) for name, value in options.items()}
    expected = values_and_gradients(mk.reference.window_attention, exact(qkv), exact(bias), options)
    for a, b in zip(got, expected, strict=True):
        units = 16 if a.dim() == 1 else 3  # the gradient of scale is one sum over all scores, most of which cancels
        bound = units * UNIT[dtype] * max(1.0, b.abs().max().item() if b.numel() else 0.0)
        torch.testing.assert_close(a, b, rtol=0, atol=bound)
    return got


@pytest.mark.parametrize("name", WINDOWS)
def test_named_windows(name):
    compare(fitting(NAMED[name]), torch.bfloat16 if len(name) % 2 else torch.float16)


@pytest.mark.parametrize("dim", [8, 12, 16, 24, 32, 48, 64, 96])
def test_head_dims(dim):
    case = {"grid": (4, 5, 4), "window": (4, 4, 4), "shift": (0, 2, 0), "heads": 1, "dim": dim, "batch": 1}
    compare(dict(case, pad_value=True), torch.bfloat16 if dim % 16 else torch.float16)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_any_window(case):
    compare({**fitting(case), "cosine": False}, torch.float16)


def test_dropped_samples_are_neither_read_nor_left_unwritten():
    case = dict(fitting(NAMED["padded, live"]), batch=3)
    keep = torch.tensor([True, False, True])
    qkv, bias, options = arguments(case, torch.float16)
    expected = values_and_gradients(mk.reference.window_attention, qkv, bias, dict(options, keep=keep))
    with torch.no_grad():
        qkv[1] = torch.nan
    got = values_and_gradients(emulated, qkv, bias, dict(options, keep=keep))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2 * UNIT[torch.float16] * max(1.0, b.abs().max().item()))
    assert not got[0][1].any() and not got[1][1].any()


def test_nan_stays_in_its_window():
    qkv, bias, options = arguments(dict(NAMED["unshifted"], dim=8, heads=1), torch.float16)
    poisoned = qkv.detach().clone()
    poisoned[0, 0, 0, 0] = torch.nan
    out = emulated(poisoned, bias, **options)
    assert out[0, :4, :, :4].isnan().all() and out.isnan().sum() == out[0, :4, :, :4].numel()
    poisoned.requires_grad_()
    (grad,) = torch.autograd.grad(emulated(poisoned, bias, **options).sum(), poisoned)
    assert not grad[0, 4:].isnan().any() and not grad[0, :, :, 4:].isnan().any() and not grad[1].isnan().any()


def test_a_scale_of_zero_has_a_gradient():
    case = {"grid": (4, 4), "window": 4, "heads": 2, "dim": 8, "bias": "dense"}
    qkv, bias, options = arguments(case, torch.float16)
    scale = torch.tensor([0.0, 0.5], requires_grad=True)
    got = values_and_gradients(emulated, qkv, bias, dict(options, scale=scale))
    expected = values_and_gradients(
        mk.reference.window_attention, exact(qkv), exact(bias), dict(options, scale=exact(scale))
    )  # fmt: skip
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2 * UNIT[torch.float16] * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("name", ["stage one", "padded, masked", "padded, live"])
def test_the_order_of_threads_does_not_matter(name, monkeypatch):
    """What lacks a barrier depends on it."""
    case = dict(fitting(NAMED[name]), batch=1)
    results = []
    for order in ("0", "1", "7"):
        monkeypatch.setenv("MEDFAST_ORDER", order)
        qkv, bias, options = arguments(case, torch.float16)
        results.append(values_and_gradients(emulated, qkv, bias, options))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck(operators):
    qkv, bias, _ = arguments({"grid": (5, 4), "window": 3, "bias": "dense", "dim": 4, "batch": 1}, torch.float16)
    bias, scale, pads = bias.detach().float().requires_grad_(), torch.ones(2), torch.ones(3, 2, 4, requires_grad=True)
    for options in ((bias, scale, pads, None), (None, scale, None, torch.tensor([False]))):
        torch.library.opcheck(operators.window_attention_cuda, (qkv, *options, (3, 3), (1, 1), True))
    attention = torch.rand(2, 20)
    where, draw = torch.zeros((), dtype=torch.bool), torch.tensor([[0, 0, 1], [1, 0, 1]])
    torch.library.opcheck(operators.attention_mask_cuda, (attention, where, None, None, draw, 9, 5, 2, False, 3))


def attention_of(kind, batch, n):
    generator = torch.Generator().manual_seed(n)
    if kind == "distinct":
        return torch.rand(batch, n, generator=generator)
    equal = torch.randint(-2, 3, (batch, n), generator=generator).float()
    equal[:, ::5], equal[:, 1::5] = -0.0, -torch.inf
    return equal


def same_mask(attention, options):
    problem = _masking.check(attention, **options)
    got = masking.mask(problem, cuda_emulation.NAMESPACE)
    expected = mk.reference.masking.mask(problem)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


MASKS = {
    "highest": {"ratio": 0.7},
    "lowest": {"ratio": 0.3, "order": "low"},
    "none": {"ratio": 0.0},
    "all": {"ratio": 1.0},
    "top hints": {"ratio": 0.7, "hint": 0.4, "hint_mode": "top"},
    "drawn hints": {"ratio": 0.7, "hint": 0.6, "key": mk.Key(2**63 + 5, step=3)},
    "share": {"ratio": 0.8, "hint": 0.5, "hint_ratio": torch.tensor([0.1, 0.9])},
    "each its own": {"ratio": torch.tensor([0.0, 0.6]), "hint": 0.4},
}


@pytest.mark.parametrize("kind", ["distinct", "equal"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, kind):
    same_mask(attention_of(kind, 2, 77), MASKS[name])


def test_a_mask_of_many_tokens_in_any_order_of_threads(monkeypatch):
    monkeypatch.setenv("MEDFAST_ORDER", "1")
    same_mask(attention_of("equal", 2, 1100), MASKS["drawn hints"])


def test_one_token():
    same_mask(torch.ones(1, 1), {"ratio": 0.7})


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_any_mask(data):
    n = data.draw(st.integers(1, 300))
    ratio = data.draw(st.floats(0.0, 1.0))
    kind, mode = data.draw(st.sampled_from(["distinct", "equal"])), data.draw(st.sampled_from(["top", "random"]))
    same_mask(
        attention_of(kind, 1, n), {"ratio": ratio, "hint": ratio * data.draw(st.floats(0.0, 1.0)), "hint_mode": mode}
    )


def test_nan_ranks_last_and_is_noted():
    attention = attention_of("distinct", 2, 50)
    problem = _masking.check(attention, 0.96)
    attention[1, 3] = torch.nan
    noted = torch.zeros((), dtype=torch.bool)
    where, *_ = masking.mask(problem._replace(attention=attention, nan_seen=noted), cuda_emulation.NAMESPACE)
    assert noted and not where[1, 3] and where.sum() == 96
    noted.zero_()
    masking.mask(problem._replace(attention=attention[:1], nan_seen=noted), cuda_emulation.NAMESPACE)
    assert not noted


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "16-bit tensor cores"),
        ({"window": 9, "grid": (9, 9)}, "at most 64 tokens, this one has 81"),
        ({"dim": 6}, "multiples of 4 and at most 96, this one is 6"),
        ({"dim": 100}, "multiples of 4 and at most 96, this one is 100"),
        ({"cosine": True}, "no kernel of cosine"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_what_has_no_kernel_says_why(change, reason):
    case = {"grid": (4, 4), "window": 4, "dim": 8, **{k: v for k, v in change.items() if k != "dtype"}}
    qkv, bias, options = arguments(case, change.get("dtype", torch.float16))
    assert reason in window.unfit(_window.check(qkv, bias, **{**DEFAULTS, **options}))["cuda"]
