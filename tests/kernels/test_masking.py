"""attention_mask against a brute force that sorts Python lists."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_checks import assert_runs_its_own, cpp_only, on_cpp, on_threads

import medfast_kernels as mk
from medfast_kernels import _dispatch, _masking
from medfast_kernels.reference import masking as definition

BACKENDS = ["reference", pytest.param("cpp", marks=cpp_only)]


def brute_force(row, ratio, hint, mode, order, key, sample):
    n = len(row)
    sign = -1 if order == "high" else 1
    ranked = sorted(range(n), key=lambda token: (sign * row[token], token))
    exact = Fraction(str(ratio)), Fraction(str(hint))
    hidden, top = set(ranked[: math.floor(exact[0] * n)]), ranked[: math.floor(exact[1] * n)]
    if mode == "top":
        return hidden - set(top)
    words = mk.reference.philox_words(key._replace(sample=torch.tensor([sample])), n)[0].tolist()
    drawn = sorted(top, key=lambda token: (words[token], token))
    return hidden - set(drawn[: math.floor(exact[0] * exact[1] * n)])


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 60), st.integers(0, 100), st.integers(0, 100), st.sampled_from(["random", "top"]),
    st.sampled_from(["high", "low"]), st.integers(0, 1000),
)  # fmt: skip
def test_against_brute_force(name, n, ratio, hint, mode, order, seed):
    ratio, hint = ratio / 100, 0.0 if order == "low" else min(ratio, hint) / 100
    attention = torch.randint(0, 4, (3, n), generator=torch.Generator().manual_seed(seed)).double()  # many ties
    key = mk.Key(seed, sample=torch.tensor([4, 0, 9]))
    with mk.backend(name):
        where, hidden, visible = mk.attention_mask(attention, ratio, hint=hint, hint_mode=mode, order=order, key=key)
    assert where.dtype == torch.bool and hidden.dtype == visible.dtype == torch.int64
    for row, sample, mask, on, off in zip(attention.tolist(), (4, 0, 9), where, hidden, visible, strict=True):
        expected = brute_force(row, ratio, hint, mode, order, key, sample)
        assert set(mask.nonzero()[:, 0].tolist()) == expected
        assert on.tolist() == sorted(expected) and off.tolist() == sorted(set(range(n)) - expected)


KINDS = {  # of attention: what makes a selection stumble
    "softmax": lambda x: x.softmax(dim=1),
    "ties": lambda x: x.round(),
    "equal": torch.zeros_like,
    "signed zeros": lambda x: torch.copysign(torch.zeros_like(x), x),
    "infinite": lambda x: torch.where(x > 0.7, torch.inf, torch.where(x < -0.5, -torch.inf, x)),
    "tiny": lambda x: x * torch.finfo(x.dtype).smallest_normal,  # most of them subnormal
}
SHARES = st.sampled_from([0.0, 0.29, 0.5, 0.7, 1.0])


@cpp_only
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(KINDS)), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 4), st.integers(1, 700), SHARES, SHARES, st.sampled_from(["random", "top", "low"]),
    st.integers(0, 3),
)  # fmt: skip
def test_cpp_gives_the_same_bits(kind, dtype, batch, n, ratio, hint, mode, tensors):
    draw = torch.Generator().manual_seed(n)
    attention = KINDS[kind](torch.randn(n, batch, generator=draw).to(dtype).T)  # strided
    options = {"order": "low"} if mode == "low" else {"hint": min(ratio, hint), "hint_mode": mode}
    share = torch.rand(batch, generator=draw) if tensors & 1 else ratio
    if tensors & 2 and mode == "random":
        options["hint_ratio"] = torch.rand(batch, generator=draw, dtype=torch.float64)
    options["key"] = mk.Key(5, 3, torch.arange(batch) * 7 + 2**40).at(mk.Role.HINTS)
    torch.use_deterministic_algorithms(True)  # what nobody writes is no mask and no id
    try:
        got = on_cpp(mk.attention_mask)(attention, share, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(got, mk.reference.attention_mask(attention, share, **options), strict=True):
        assert ours is None and theirs is None or torch.equal(ours, theirs)


@cpp_only
def test_no_samples_at_all():
    """The counts of no samples have no address."""
    where, hidden, _ = on_cpp(mk.attention_mask)(torch.zeros(0, 4), torch.zeros(0), hint=0.5, hint_mode="top")
    assert where.shape == (0, 4) and hidden is None


@cpp_only
def test_long_rows_are_the_same_bits_on_any_number_of_threads():
    attention = torch.rand(3, 40_001, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    run = lambda: on_cpp(mk.attention_mask)(attention, 0.7, hint=0.1)  # noqa: E731
    expected = mk.reference.attention_mask(attention, 0.7, hint=0.1)
    for got in on_threads(run, 1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@cpp_only
def test_rules_of_operators():
    operator, draw = getattr(torch.ops, _dispatch.NAMESPACE).attention_mask, torch.tensor([[1, 2, 3], [4, 5, 6]])
    attention, counts = torch.rand(2, 9), torch.tensor([3, 0])
    torch.library.opcheck(operator, (attention, False, 5, None, 3, 2, None, draw, 7))
    torch.library.opcheck(operator, (attention.double(), True, 0, counts, 0, 0, None, None, 0))
    torch.library.opcheck(operator, (attention, False, 5, None, 3, 0, counts, draw, 7))
    for wrong in ((10, None, 0, 0), (2, None, 3, 1), (5, None, 3, 4), (5, counts[:1], 0, 0)):
        with pytest.raises(RuntimeError, match="count"):
            operator(attention, False, *wrong, None, draw, 0)


@cpp_only
def test_a_profile_shows_its_own_operator():
    attention = torch.rand(2, 64)
    assert_runs_its_own(lambda: mk.attention_mask(attention, 0.7, hint=0.2), "attention_mask")
    assert_runs_its_own(lambda: mk.attention_mask(attention, torch.tensor([0.1, 0.9]), hint=0.1), "attention_mask")


def test_nan_on_a_gpu_ranks_last_and_is_noted():
    """The definition, as it runs where NaN cannot be refused: a CPU stands for the GPU."""
    attention = torch.tensor([[0.1, torch.nan, 0.3, torch.nan], [0.4, 0.3, 0.2, 0.1]])
    for low, expected in ((False, [0, 2]), (True, [0, 2])):
        noted = torch.tensor(False)
        where, hidden, _ = definition.mask(_masking.Problem(attention, low, 2, 0, 0, None, noted))
        assert hidden is not None and hidden[0].tolist() == expected and bool(noted)
    noted = torch.tensor(False)
    definition.mask(_masking.Problem(attention[1:], False, 2, 0, 0, None, noted))
    assert not noted
    assert mk.nan_seen("cpu") is mk.nan_seen(torch.device("cpu")) and not mk.nan_seen("cpu")


def test_counts_of_the_paper():
    attention = torch.rand(2, 512, generator=torch.Generator().manual_seed(0))
    for options, count in (({}, 358), ({"hint": 0.1}, 358 - 35), ({"hint": 0.1, "hint_mode": "top"}, 358 - 51)):
        where, hidden, visible = mk.attention_mask(attention, 0.7, **options)
        assert where.sum(1).tolist() == [count] * 2
        assert hidden.shape == (2, count) and visible.shape == (2, 512 - count) and hidden.dtype == torch.int64
    assert mk.attention_mask(torch.rand(1, 100), 0.29)[1].shape == (1, 29)  # 0.29 * 100 == 28.999999999999996


def test_hints_are_of_the_top_and_fair():
    """Every one of the most attended tokens is shown as often as another, and no other token is."""
    attention = torch.arange(100.0).expand(3000, 100)
    where = mk.attention_mask(attention, 0.5, hint=0.2)[0]
    shown = (~where).float().mean(0)
    assert (shown[:50] == 1).all() and (shown[50:80] == 0).all()
    assert (shown[80:] - 0.5).abs().max() < 0.05


def test_hints_differ_by_sample_and_repeat():
    attention = torch.arange(200.0).expand(2, 200)
    where, again = (mk.attention_mask(attention, 0.7, hint=0.5, key=mk.Key(1))[0] for _ in range(2))
    assert torch.equal(where, again) and not torch.equal(where[0], where[1])
    other = mk.attention_mask(attention, 0.7, hint=0.5, key=mk.Key(2))[0]
    assert not torch.equal(where, other)


def test_ratio_per_sample():
    attention = torch.rand(3, 512, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64):
        where, hidden, visible = mk.attention_mask(attention, torch.tensor([0.7, 0.0, 0.29], dtype=dtype), hint=0.1)
        assert hidden is None and visible is None
        assert where.sum(1).tolist() == [323, 0, math.floor(0.29 * 512) - math.floor(0.029 * 512)]
        assert torch.equal(where[0], mk.attention_mask(attention, 0.7, hint=0.1)[0][0])
    where, hidden, _ = mk.attention_mask(attention, 0.5, hint=0.1, hint_ratio=torch.tensor([0.0, 0.5, 1.0]))
    assert where.sum(1).tolist() == [256, 256 - 25, 256 - 51] and hidden is None


def test_compiles_whole_and_still_refuses_nan():
    def mask(attention, step, sample):
        return mk.attention_mask(attention, 0.7, hint=0.1, key=mk.Key(3, step, sample))

    compiled = torch.compile(mask, fullgraph=True, backend="aot_eager")
    arguments = torch.rand(2, 64), torch.tensor(5), torch.tensor([3, 8])
    for got, expected in zip(compiled(*arguments), mask(*arguments), strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="NaN"):
        compiled(torch.full((2, 64), torch.nan), *arguments[1:])


@pytest.mark.parametrize(
    ("attention", "ratio", "options", "error", "match"),
    [
        (torch.full((1, 4), torch.nan), 0.5, {}, ValueError, "attention holds NaN: 4 of 4"),
        (torch.zeros(4), 0.5, {}, ValueError, r"\(b, n\)"),
        (torch.zeros(1, 4, dtype=torch.int64), 0.5, {}, TypeError, "floating"),
        (torch.zeros(1, 4), 1.5, {}, ValueError, r"ratio must be in \[0"),
        (torch.zeros(1, 4), torch.tensor([1.5]), {}, ValueError, r"ratio must be in \[0"),
        (torch.zeros(1, 4), torch.tensor([0.5, 0.5]), {}, ValueError, r"floating \(1,\) tensor"),
        (torch.zeros(1, 4), "half", {}, TypeError, "ratio must be a float"),
        (torch.zeros(1, 4), None, {}, TypeError, "ratio must be a float or an int, got None"),
        (torch.zeros(1, 4), True, {}, TypeError, "ratio must be a float or an int, got True"),
        (torch.zeros(1, 4), float("nan"), {}, ValueError, "ratio must be finite, got nan"),
        (torch.zeros(1, 4), torch.ones(1).half(), {}, TypeError, "fp32 or fp64, got torch.float16"),
        (
            torch.zeros(1, 4),
            0.5,
            {"hint": 0.1, "hint_ratio": torch.ones(1).bfloat16()},
            TypeError,
            "hint_ratio must be",
        ),
        (torch.zeros(1, 4), torch.tensor([0.5], device="meta"), {}, ValueError, "device of attention, cpu, got meta"),
        (torch.zeros(1, 4), torch.tensor([torch.nan]), {}, ValueError, "ratio holds NaN"),
        (torch.zeros(1, 4), 0.5, {"hint": 0.1, "order": "low"}, ValueError, "order"),
        (torch.zeros(1, 4), 0.5, {"hint": 0.6}, ValueError, "at most ratio"),
        (torch.zeros(1, 4), 0.5, {"hint_mode": "all"}, ValueError, "'random', 'top'"),
        (torch.zeros(1, 4), 0.5, {"order": "up"}, ValueError, "'high', 'low'"),
        (torch.zeros(1, 4), 0.5, {"hint": 0.2, "hint_mode": "top", "hint_ratio": 0.5}, ValueError, "hint_ratio"),
        (torch.zeros(3, 4), 0.5, {"hint": 0.4, "key": mk.Key(0, sample=torch.arange(2))}, ValueError, "key.sample"),
    ],
)
def test_refusals(attention, ratio, options, error, match):
    for function in (mk.attention_mask, mk.reference.attention_mask):
        with pytest.raises(error, match=match):
            function(attention, ratio, **options)
