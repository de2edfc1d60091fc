"""Attention masks in Triton: the same bits as the definition and as C++, ties, signed zeros and infinities included."""

import math

import pytest
import torch
from interpreter import poisoned_memory, run_cases

import medfast_kernels as mk
from medfast_kernels import _dispatch, _masking

KEY = mk.Key(3, torch.tensor(11), torch.tensor([4, 0, 2**32 - 1])).at(mk.Role.HINTS)
OPTIONS = {
    "all": (1.0, {}), "none": (0.0, {}), "high": (0.7, {}), "low": (0.29, {"order": "low"}),
    "random hints": (0.7, {"hint": 0.3}), "few hints": (0.7, {"hint": 0.5, "hint_ratio": 0.1}),
    "all hints": (1.0, {"hint": 1.0, "hint_ratio": 1.0}), "top hints": (0.5, {"hint": 0.2, "hint_mode": "top"}),
    "a ratio each": (torch.tensor([0.7, 0.0, 1.0]), {"hint": 0.2}),
    "a share of hints each": (0.7, {"hint": 0.5, "hint_ratio": torch.tensor([0.0, 0.5, 1.0])}),
    "a ratio each, top hints": (torch.tensor([0.5, 0.1, 0.9]), {"hint": 0.2, "hint_mode": "top"}),
}  # fmt: skip
QUICK = ("low", "random hints", "a ratio each, top hints")


def test_in_the_interpreter():
    run_cases(__file__)


@pytest.mark.slow
def test_more_of_it_in_the_interpreter():
    run_cases(__file__, "slow")


def rows(kind, n, dtype):
    draw = torch.Generator().manual_seed(n)
    if kind == "ties":
        signs = torch.tensor([1.0, -1e-5, 0.0])  # zeros of both signs
        return (torch.randint(-2, 3, (3, n), generator=draw) * signs[:, None]).to(dtype)
    x = torch.randn(3, n, generator=draw).to(dtype)
    x[:, n // 2 :: 5], x[:, n // 3 :: 7], x[:, ::11] = math.inf, -math.inf, -0.0
    return x


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS])
def case_same_bits(name):
    ratio, options = OPTIONS[name]
    names = ["reference", *(["cpp"] if _dispatch.WHY_NO_CPP is None else [])]
    sizes = [(61, "ties", torch.float16), (300, "any", torch.float32)]
    if name == "few hints":
        sizes += [(1, "ties", torch.float32), (257, "any", torch.bfloat16), (4100, "ties", torch.float32)]
    for n, kind, dtype in sizes:
        attention = rows(kind, n, dtype)
        with mk.backend("triton"), poisoned_memory():
            got = mk.attention_mask(attention, ratio, key=KEY, **options)
        for other in names:
            with mk.backend(other):
                expected = mk.attention_mask(attention, ratio, key=KEY, **options)
            for a, b in zip(got, expected, strict=True):
                assert (a is b is None) or (a.dtype == b.dtype and torch.equal(a, b)), (n, other)


@pytest.mark.slow
def case_strided_rows_and_no_rows():
    wide = torch.rand(4, 3, 40)
    for attention in (wide[:, 1, 3:], wide[:, 0].t(), wide[:0, 0]):
        key = KEY._replace(sample=torch.arange(len(attention)))
        with mk.backend("triton"):
            got = mk.attention_mask(attention, 0.5, hint=0.2, key=key)
        for a, b in zip(got, mk.reference.attention_mask(attention, 0.5, hint=0.2, key=key), strict=True):
            assert torch.equal(a, b)


def case_nan_ranks_last_and_is_noted():
    """What a GPU does; on a CPU the front refuses NaN, so the operator is given a problem that has passed it."""
    from medfast_kernels._triton import masking

    attention = rows("any", 300, torch.float32)
    for order in ("high", "low"):
        noted = torch.zeros((), dtype=torch.bool)
        problem = _masking.check(attention, 0.6, order=order)._replace(nan_seen=noted)
        masking.mask(problem)
        assert not noted
        spoilt = attention.clone()
        spoilt[1, 270:] = math.nan
        got = masking.mask(problem._replace(attention=spoilt))
        assert noted
        for a, b in zip(got, mk.reference.masking.mask(problem._replace(attention=spoilt)), strict=True):
            assert torch.equal(a, b)


def case_opcheck():
    operator = getattr(torch.ops, _dispatch.NAMESPACE).attention_mask_triton
    attention, counter, each = torch.rand(3, 20), mk.key.address(KEY), torch.tensor([4, 0, 9])
    torch.library.opcheck(operator, (attention, None, None, None, counter, 9, 4, 2, "random", False, 5))
    noted = torch.zeros((), dtype=torch.bool)
    torch.library.opcheck(operator, (attention, noted, each, each, None, 0, 4, 0, "top", True, 5))
