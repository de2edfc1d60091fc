"""Draws in Triton: the same bits as the definition and as C++, whatever the counts and keys."""

import pytest
import torch
from interpreter import poisoned_memory, run_cases

import medfast_kernels as mk
from medfast_kernels import _dispatch

KEYS = {
    "plain": mk.Key(0, 0, torch.tensor([0])),
    "full words": mk.Key(2**64 - 5, torch.tensor(2**32 - 1), torch.tensor([2**32 - 1, 7, 2**33])).at(7, 2, 9),
    "a stream each": mk.Key(-3, 17, torch.tensor([4, 4]), torch.tensor([1 << 24, 5 << 24 | 7])),
}  # fmt: skip


def test_in_the_interpreter():
    run_cases(__file__)


@pytest.mark.slow
def test_more_of_it_in_the_interpreter():
    run_cases(__file__, "slow")


def others():
    return ["reference", *(["cpp"] if _dispatch.WHY_NO_CPP is None else [])]


def same(draw):
    """What Triton draws, after a look at the other backends."""
    with mk.backend("triton"), poisoned_memory():
        got = draw()
    for name in others():
        with mk.backend(name):
            expected = draw()
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    return got


@pytest.mark.parametrize(
    "name", ["full words", *[pytest.param(n, marks=pytest.mark.slow) for n in ("plain", "a stream each")]]
)
def case_same_bits(name):
    key = KEYS[name]
    for count in (0, 1, 4, 1023, 1025):
        same(lambda count=count: mk.philox_words(key, count))
        same(lambda count=count: mk.random_uniform((count, 1), key=key))


@pytest.mark.parametrize(
    "name", ["full words", *[pytest.param(n, marks=pytest.mark.slow) for n in ("plain", "a stream each")]]
)
def case_same_choices(name):
    key = KEYS[name]
    for n, count in ((0, 0), (1, 1), (9, 0), (9, 9), (300, 77), *([(5000, 4999)] if name == "plain" else [])):
        ids = same(lambda n=n, count=count: mk.random_ids(n, count, key=key))
        assert ids.shape == (len(key.sample), count)
    many = key._replace(sample=torch.arange(1000), stream=3)
    for rate in (0.0, 0.1, 0.5, 1.0):
        same(lambda rate=rate: mk.random_keep(rate, key=many))


@pytest.mark.slow
def case_ties_of_words():
    """Equal words are rare: here the kernel is given some outright."""
    from medfast_kernels._triton import random_selection as kernels

    words = torch.tensor([5, -1, 5, 0, 5, 5, 0, -1] * 40, dtype=torch.int32)  # -1 is the largest: unsigned
    order = torch.argsort(words.long() & 0xFFFFFFFF, stable=True)
    for count in (0, 1, 80, 81, 150, 239, 240, 241, 320):
        out = torch.full((count,), -1)
        kernels.write_smallest[(1,)](out, words, len(words), count, 256)
        assert torch.equal(out, order[:count].sort().values)


@pytest.mark.slow
def case_normal_numbers():
    for key in KEYS.values():
        for shape in (1, (3, 5), 1500):
            with mk.backend("triton"), poisoned_memory():
                got = mk.random_normal(shape, key=key)
            torch.testing.assert_close(got, mk.reference.random_normal(shape, key=key), rtol=0, atol=1e-6)


def case_opcheck():
    counter = mk.key.address(KEYS["full words"])
    operators = getattr(torch.ops, _dispatch.NAMESPACE)
    torch.library.opcheck(operators.random_draw_triton, (counter, 7, -5, "uniform"))
    torch.library.opcheck(operators.random_ids_triton, (counter, 12, 5, 3))
    torch.library.opcheck(operators.random_keep_triton, (counter, 0.3, 3))
