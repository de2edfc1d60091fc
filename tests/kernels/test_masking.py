"""attention_mask against a brute force that sorts Python lists."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import medfast_kernels as mk


def brute_force(row, ratio, hint, mode, order, key, sample):
    n = len(row)
    sign = -1 if order == "high" else 1
    ranked = sorted(range(n), key=lambda token: (sign * row[token], token))
    exact = Fraction(str(ratio)), Fraction(str(hint))
    hidden = set(ranked[: math.floor(exact[0] * n)])
    top = math.floor(exact[1] * n)
    if mode == "top":
        return hidden - set(ranked[:top])
    drawn = mk.random_ids(top, math.floor(exact[0] * exact[1] * n), key=key._replace(sample=torch.tensor([sample])))
    return hidden - {ranked[i] for i in drawn[0].tolist()}


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60), st.integers(0, 100), st.integers(0, 100), st.sampled_from(["random", "top"]),
    st.sampled_from(["high", "low"]), st.integers(0, 1000),
)  # fmt: skip
def test_against_brute_force(n, ratio, hint, mode, order, seed):
    ratio, hint = ratio / 100, 0.0 if order == "low" else min(ratio, hint) / 100
    attention = torch.randint(0, 4, (3, n), generator=torch.Generator().manual_seed(seed)).double()  # many ties
    key = mk.Key(seed, sample=torch.tensor([4, 0, 9]))
    where, hidden, visible = mk.attention_mask(attention, ratio, hint=hint, hint_mode=mode, order=order, key=key)
    for row, sample, mask, on, off in zip(attention.tolist(), (4, 0, 9), where, hidden, visible, strict=True):
        expected = brute_force(row, ratio, hint, mode, order, key, sample)
        assert set(mask.nonzero()[:, 0].tolist()) == expected
        assert on.tolist() == sorted(expected) and off.tolist() == sorted(set(range(n)) - expected)


def test_counts_of_the_paper():
    attention = torch.rand(2, 512, generator=torch.Generator().manual_seed(0))
    for options, count in (({}, 358), ({"hint": 0.1}, 358 - 35), ({"hint": 0.1, "hint_mode": "top"}, 358 - 51)):
        where, hidden, visible = mk.attention_mask(attention, 0.7, **options)
        assert where.sum(1).tolist() == [count] * 2
        assert hidden.shape == (2, count) and visible.shape == (2, 512 - count) and hidden.dtype == torch.int64
    assert mk.attention_mask(torch.rand(1, 100), 0.29)[1].shape == (1, 29)  # 0.29 * 100 == 28.999999999999996


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
        (torch.zeros(1, 4), 0.5, {"hint": 0.1, "order": "low"}, ValueError, "order"),
        (torch.zeros(1, 4), 0.5, {"hint": 0.6}, ValueError, "at most ratio"),
        (torch.zeros(1, 4), 0.5, {"hint_mode": "all"}, ValueError, "'random', 'top'"),
        (torch.zeros(1, 4), 0.5, {"order": "up"}, ValueError, "'high', 'low'"),
        (torch.zeros(1, 4), 0.5, {"hint": 0.2, "hint_mode": "top", "hint_ratio": 0.5}, ValueError, "hint_ratio"),
        (torch.zeros(3, 4), 0.5, {"hint": 0.4, "key": mk.Key(0, sample=torch.arange(2))}, ValueError, "key.sample"),
    ],
)
def test_refusals(attention, ratio, options, error, match):
    with pytest.raises(error, match=match):
        mk.attention_mask(attention, ratio, **options)
