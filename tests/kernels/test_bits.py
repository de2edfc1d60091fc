"""One generator, one layout: every backend draws the same bits. Masks, ids, keep vectors and dropout patterns."""

import itertools

import pytest
import torch
from interpreter import run_cases

import medfast_kernels as mk
from medfast_kernels import _dispatch
from medfast_kernels._examples import examples

pytest.importorskip("triton")
CPU = torch.device("cpu")
EXACT = [operator for operator in _dispatch.OPERATORS if all(one.exact for one in examples(operator))]
KEY = mk.Key(2**64 - 3, step=2**31, sample=torch.tensor([7, 2**32 - 1])).at(mk.Role.DROPOUT, view=255, layer=65535)


def test_in_the_interpreter():
    run_cases(__file__)


def test_the_table_is_whole():
    assert {"attention_mask", "philox_words", "random_ids", "random_keep", "random_uniform"} == set(EXACT)


def on_all(operator, call):
    """What every backend that is here gives, by its name."""
    there = [name for name in _dispatch.BACKENDS if _dispatch.why_not(operator, name, CPU) is None]
    assert "triton" in there
    made = {}
    for name in there:
        with mk.backend(name):
            given = call()
        made[name] = given if isinstance(given, tuple) else (given,)
    return made


@pytest.mark.parametrize("operator", EXACT)
def case_same_bits(operator):
    for example in examples(operator):
        expected, *others = on_all(operator, lambda example=example: example.call(**example.tensors)).values()
        for made in others:
            for a, b in itertools.zip_longest(expected, made):
                assert a.dtype == b.dtype and torch.equal(a, b), example.name


@pytest.mark.parametrize("grid, shift", [((4, 4, 4), 0), ((3, 4, 2), 1)])
def case_same_dropout(grid, shift):
    """Scores are equal and values are the unit vectors of a window's places, so an output row is its row of weights."""
    places = torch.meshgrid(*[(torch.arange(n) - shift) % 2 for n in grid], indexing="ij")
    qkv = torch.zeros(2, *grid, 3, 1, 8)
    qkv[..., 2, 0, :] = torch.nn.functional.one_hot(4 * places[0] + 2 * places[1] + places[2], 8).float()

    def weights():
        return mk.window_attention(qkv, window=2, shift=shift, pad="mask", dropout=0.4, key=KEY)

    expected, *others = [made for (made,) in on_all("window_attention", weights).values()]
    for made in others:
        assert torch.equal(made == 0, expected == 0)
        torch.testing.assert_close(made, expected)
    if not shift:
        assert 0.3 < (expected == 0).float().mean() < 0.5


def case_one_number_is_one_bit_pattern():
    """Words, uniform numbers, ids and keep vectors are the same draw seen four ways, on every backend."""
    words = on_all("philox_words", lambda: mk.philox_words(KEY, 9))["reference"][0]
    for (uniform,) in on_all("random_uniform", lambda: mk.random_uniform(9, key=KEY)).values():
        assert torch.equal(uniform, (words >> 8).float() * 2**-24)
    for (keep,) in on_all("random_keep", lambda: mk.random_keep(0.5, key=KEY)).values():
        assert torch.equal(keep, (words[:, 0] >> 8).float() * 2**-24 >= 0.5)
    for (ids,) in on_all("random_ids", lambda: mk.random_ids(9, 4, key=KEY)).values():
        assert torch.equal(ids, words.argsort(dim=1)[:, :4].sort(dim=1).values)
